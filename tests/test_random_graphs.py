"""Random graphs through every preset; `scripts/fuzz graphs` runs many more."""

import pytest
from awkward import Case
from hypothesis import HealthCheck, given, settings
from random_graphs import check_preset, random_graphs

PRESETS = ("int8-static", "int8-dynamic", "int16x8", "int8-static-qoperator")
EXAMPLES = 500


@pytest.mark.parametrize("preset", PRESETS)
@settings(
    max_examples=EXAMPLES // len(PRESETS),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=random_graphs())
def test_a_random_graph_is_quantized_or_refused_with_a_reason(preset: str, case: Case) -> None:
    assert check_preset(case, preset) in ("quantized", "refused")
