"""Random graphs through every preset; `scripts/fuzz graphs` runs many more."""

import pytest
from awkward import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import (
    SCHEMES,
    check_integers,
    check_mixed,
    check_preset,
    random_graphs,
    random_regions,
)

PRESETS = ("int8-static", "int8-dynamic", "int16x8", "int8-static-qoperator", *SCHEMES, "w4a8")
EXAMPLES = 300


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


@settings(
    max_examples=EXAMPLES // 4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=random_graphs(), seed=st.integers(0, 99))
def test_every_node_of_a_random_graph_may_have_a_format_of_its_own(case: Case, seed: int) -> None:
    assert check_mixed(case, seed) in ("quantized", "refused")


@settings(
    max_examples=EXAMPLES // 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=random_regions(), powers=st.booleans())
def test_a_random_graph_of_integers_gives_exact_bits(case: Case, powers: bool) -> None:
    scales = ("assign.power_of_two=true",) if powers else ()
    assert check_integers(case, scales) in ("quantized", "refused", "partly float")
