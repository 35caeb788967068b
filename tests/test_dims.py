"""Dimensions fixed by name, and those that all samples share."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import model, normal

import onnxq
from onnxq.dims import fix_dims, fix_shapes
from onnxq.errors import OnnxqError
from onnxq.feeds import input_specs

TEXT = """(float[batch,sequence,8] x) => (float[batch,sequence,4] y) {
    h = MatMul (x, w) n = Shape (h) y = Reshape (h, n)
}"""


def dynamic() -> onnx.ModelProto:
    """Of two open dimensions, with a Shape that a fixed model needs not."""
    return model(TEXT, w=normal(8, 4))


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]


def test_named_dimensions_are_fixed_and_all_that_follows() -> None:
    fixed = fix_dims(dynamic(), {"batch": 2, "sequence": 5})
    assert shape(fixed.graph.input[0]) == [2, 5, 8]
    assert shape(fixed.graph.output[0]) == [2, 5, 4]
    assert "Shape" not in [node.op_type for node in fixed.graph.node]


def test_dimensions_not_named_stay_open() -> None:
    fixed = fix_dims(dynamic(), {"batch": 2})
    assert shape(fixed.graph.input[0]) == [2, "sequence", 8]
    assert "Shape" in [node.op_type for node in fixed.graph.node]


def test_an_unknown_dimension_is_refused_with_the_nearest() -> None:
    with pytest.raises(OnnxqError, match=r"dimension 'sequense'; nearest: sequence"):
        fix_dims(dynamic(), {"sequense": 5})


def test_no_dimension_is_below_1() -> None:
    with pytest.raises(OnnxqError, match="at least 1"):
        fix_dims(dynamic(), {"batch": 0})


def test_samples_of_one_shape_fix_what_is_open() -> None:
    fixed = fix_shapes(dynamic(), [{"x": normal(1, 6, 8)}] * 3)
    assert shape(fixed.graph.input[0]) == [1, 6, 8]
    assert input_specs(fixed)[0].shape == (1, 6, 8)


def test_samples_of_differing_shapes_are_refused_with_what_to_give() -> None:
    feeds = [{"x": normal(1, 6, 8)}, {"x": normal(1, 9, 8)}]
    with pytest.raises(OnnxqError, match=r"'sequence' of 'x' \(6 and 9\).*--dim sequence=128"):
        fix_shapes(dynamic(), feeds)


def test_the_quantized_model_carries_them(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(dynamic(), path)
    samples = [{"x": normal(1, 6, 8, seed=k)} for k in range(8)]
    for options in ({"target": "qnn-htp"}, {"dims": {"batch": 1, "sequence": 6}}):
        out = tmp_path / "q.onnx"
        onnxq.quantize(path, samples=samples, output=out, latency_check=False, **options)
        assert shape(onnx.load(out).graph.input[0]) == [1, 6, 8]
