from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.errors import OnnxqError
from onnxq.feeds import InputSpec, Shape, input_specs, output_specs
from onnxq.pairing import find_pairs

F32, I64 = np.dtype("float32"), np.dtype("int64")
DATA = InputSpec("x", F32, ("batch", "time", 8))


def state(name: str, shape: Shape | None = (1, 4), dtype: np.dtype[np.generic] = F32) -> InputSpec:
    return InputSpec(name, dtype, shape)


def pairs(
    inputs: list[InputSpec], outputs: list[InputSpec], declared: Mapping[str, str] | None = None
) -> dict[str, str]:
    return {p.output: p.input.name for p in find_pairs(inputs, outputs, declared or {})}


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("present.0.key", "past_key_values.0.key"),
        ("present.11.decoder.value", "past_key_values.11.decoder.value"),
        ("present_key_values.0.key", "past_key_values.0.key"),
        ("present.3.key", "past.3.key"),
        ("present_3", "past_3"),
        ("conv_cache_out", "conv_cache"),
        ("conv_cache_out", "conv_cache_in"),
        ("state.out", "state"),
        ("hout", "hin"),
        ("mem_output", "mem_input"),
        ("cache_out_2", "cache_in_2"),
        ("cache_out_2", "cache_2"),
        ("h_next", "h"),
        ("new_h", "h"),
        ("next_h", "h"),
        ("next_h", "prev_h"),
        ("stateN", "state"),
        ("hn", "h0"),
        ("cn", "c0"),
        ("h_n", "h_0"),
        ("hn", "h"),
        ("output_h", "input_h"),
        ("out_c", "in_c"),
        ("final_state", "initial_state"),
        ("running_out", "running"),
    ],
)
def test_names_that_tell_a_pair(output: str, name: str) -> None:
    assert pairs([DATA, state(name)], [state("y"), state(output)]) == {output: name}


@pytest.mark.parametrize(
    ("output", "spec"),
    [
        (state("h_out"), state("h", dtype=np.dtype("float16"))),
        (state("h_out"), state("h", (1, 4, 1))),
        (state("h_out"), state("h", (1, 5))),
        (state("logits"), state("h")),
        (state("output_ids", ("n", "m"), I64), state("input_ids", ("n", "m"), I64)),
        (state("image_out", (1, 3, 64, 64)), state("image", (1, 3, 64, 64))),
    ],
    ids=["type", "rank", "size", "name", "ids", "image"],
)
def test_what_is_no_pair(output: InputSpec, spec: InputSpec) -> None:
    assert pairs([DATA, spec], [output]) == {}


def test_something_is_left_to_be_fed() -> None:
    flag = state("training", (), np.dtype("bool"))
    assert pairs([state("a"), flag], [state("a_out")]) == {}
    assert pairs([state("state"), flag], [state("state_out")]) == {}
    both = [state("a"), state("state")], [state("a_out"), state("state_out")]
    assert pairs(*both) == {"state_out": "state"}
    assert pairs(*both, {"a_out": "a"}) == {"a_out": "a"}


def test_each_output_and_input_has_one_other() -> None:
    outputs = [state("state_out"), state("new_state")]
    assert pairs([DATA, state("state")], outputs) == {"state_out": "state"}


def test_declared_pairs_go_first() -> None:
    inputs, outputs = [DATA, state("h"), state("c")], [state("h_out"), state("c_out")]
    assert pairs(inputs, outputs, {"h_out": "c"}) == {"h_out": "c"}
    assert pairs(inputs, outputs, {"h_out": "c", "c_out": "h"}) == {"c_out": "h", "h_out": "c"}


def test_declared_names_that_are_wrong() -> None:
    inputs, outputs = [DATA, state("h0"), state("c0")], [state("logits", (1, 9)), state("hidden")]
    for declared, words in (
        ({"hiden": "h0"}, "state hiden=h0: the model has no output 'hiden'; nearest: hidden"),
        ({"hidden": "h1"}, "state hidden=h1: the model has no input 'h1'; nearest: h0"),
        (
            {"logits": "h0"},
            "state logits=h0: the output is float32 [1,9] and the input float32 [1,4]; pair "
            "tensors of one type and shape",
        ),
    ):
        with pytest.raises(OnnxqError) as error:
            pairs(inputs, outputs, declared)
        assert str(error.value) == words
    with pytest.raises(OnnxqError, match="'h0' has 'hidden' already; declare one output for each"):
        pairs(inputs, [state("hidden"), state("other")], {"hidden": "h0", "other": "h0"})


@pytest.mark.parametrize(
    ("name", "shape", "made", "axis"),
    [
        ("past.0.key", ("batch", 4, "past", 8), ("batch", 4, "total", 8), 2),
        ("past.0.key", ("batch", 4, "past", 8), None, 2),
        ("past.0.key", (1, 4, None, 8), (1, 4, None, 8), 2),
        ("past.0.key", ("past", "batch", 8), ("total", "batch", 8), 0),
        ("state", (2, "batch", 8), ("a", "batch", "b"), None),
        ("state", (2, None, 8), (2, None, 8), None),
        ("state", (2, "n", 8), (2, "n", 8), None),
        ("state", (2, 1, 8), (2, 1, 8), None),
        ("state", None, None, None),
    ],
)
def test_the_axis_of_the_past(
    name: str, shape: Shape | None, made: Shape | None, axis: int | None
) -> None:
    data = state("x", ("n" if "n" in (shape or ()) else "batch", 8))
    output = {"past.0.key": "present.0.key", "state": "stateN"}[name]
    (pair,) = find_pairs([data, state(name, shape)], [state(output, made)], {})
    assert pair.axis == axis


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("silero_vad_16k", {"stateN": "state"}),
        (
            "gtcrn_stream",
            {f"{k}_cache_out": f"{k}_cache" for k in ("conv", "tra", "inter")},
        ),
        (
            "stories260K_kv",
            {f"present.{k}.{n}": f"past_key_values.{k}.{n}"
             for k in range(5) for n in ("key", "value")},
        ),
        ("mobilenet_v1_0.25_224", {}),
        ("all-MiniLM-L6-v2", {}),
        ("ultraface_rfb320", {}),
    ],
)  # fmt: skip
def test_real_models(model: str, expected: dict[str, str], shared: Path) -> None:
    proto = onnx.load(shared / "models" / f"{model}.onnx", load_external_data=False)
    found = find_pairs(input_specs(proto), output_specs(proto), {})
    assert {p.output: p.input.name for p in found} == expected
    assert {p.axis for p in found} <= {2 if "kv" in model else None}
    assert all(p.sure for p in found)
