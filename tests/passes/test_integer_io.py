"""Inputs and outputs as codes, strictness, and what the report says of float operators."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal, pipeline

import onnxq
from onnxq import exactness
from onnxq import graph as g
from onnxq.coded_io import KEY
from onnxq.errors import OnnxqError
from onnxq.report import Report
from onnxq.runtime import Session
from onnxq.verify import Array

LAYERS = """
(float[N,3,8,8] x) => (float[N,4] y, float[N,4,1,1] pooled)
{ c = Conv(x, w) r = Relu(c) pooled = GlobalAveragePool(r) y = Flatten(pooled) }
"""
CODES = "integer-only.io=codes"


def test_codes_in_and_out_are_those_between_the_quantizers() -> None:
    feeds = feeds_of(8, x=(2, 3, 8, 8))
    source = model(LAYERS, 21, w=normal(4, 3, 3, 3))
    floats = Session(g.to_proto(pipeline(source, feeds, "integer-only").graph))
    made = pipeline(source, feeds, "integer-only", settings=[CODES]).to_proto()
    onnx.checker.check_model(made, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)}
    kinds = {name: onnx.helper.tensor_dtype_to_np_dtype(kind).name for name, kind in types.items()}
    assert kinds["x"] == "uint8"
    assert kinds["y"] == "int32"
    said = json.loads(next(p.value for p in made.metadata_props if p.key == KEY))
    assert said.keys() == {"x", "y", "pooled"}
    coded = Session(made)
    for feed in feeds:
        for name, values in floats.run(feed).items():
            np.testing.assert_array_equal(coded.run(feed)[name], values)
    raw = coded.ort.run(["y"], {"x": np.full((1, 3, 8, 8), said["x"]["zero"], np.uint8)})[0]
    assert raw.dtype == np.int32


@pytest.mark.parametrize("twin", ["Identity(y)", "Cast<to=10>(y)"])
def test_two_outputs_of_the_same_codes(twin: str) -> None:
    kind = "float16" if "Cast" in twin else "float"
    text = (
        f"(float[2,8] x) => (float[2,4] y, {kind}[2,4] again) {{ y = MatMul(x, w) again = {twin} }}"
    )
    feeds = feeds_of(8, x=(2, 8))
    made = pipeline(
        model(text, 21, w=normal(8, 4)), feeds, "integer-only", settings=[CODES]
    ).to_proto()
    onnx.checker.check_model(made, full_check=True)
    said = Session(made).run(feeds[0])
    np.testing.assert_array_equal(said["y"], said["again"])


def test_an_input_that_floats_read_too_stays_float() -> None:
    text = """
    (float[4,2,8] x) => (float[4,2,4] y, float[4,1,2,3] h)
    { y = MatMul(x, w) h, a = GRU<hidden_size=3>(x, k, r) }
    """
    made = pipeline(
        model(text, 21, w=normal(8, 4), k=normal(1, 9, 8), r=normal(1, 9, 3)),
        feeds_of(8, x=(4, 2, 8)), "integer-only", settings=[CODES],
    ).to_proto()  # fmt: skip
    onnx.checker.check_model(made, full_check=True)
    assert made.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


GRU = (
    "(float[4,2,8] x) => (float[4,1,2,3] h) { m = MatMul(x, w) h, a = GRU<hidden_size=3>(m, k, r) }"
)


def saved(tmp_path: Path, text: str, **weights: Array) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(model(text, 21, **weights), path)
    return path


def test_strict_refuses_what_stays_float_and_names_it(tmp_path: Path) -> None:
    path = saved(tmp_path, GRU, w=normal(8, 8), k=normal(1, 9, 8), r=normal(1, 9, 3))
    with pytest.raises(OnnxqError, match=r"stay float: .*\(GRU\): .*without --strict"):
        onnxq.quantize(path, "integer-only", strict=True)
    assert list(tmp_path.iterdir()) == [path]
    report = onnxq.quantize(path, "integer-only").report
    assert report.float_operators is not None
    assert [r.op for r in report.float_operators if r.op == "GRU"] == ["GRU"]
    assert all(r.reason for r in report.float_operators)
    assert report.exact_with == []
    assert Report.from_json(report.to_json()) == report


def test_strict_is_for_recipes_of_integers(tmp_path: Path) -> None:
    path = saved(tmp_path, LAYERS, w=normal(4, 3, 3, 3))
    with pytest.raises(OnnxqError, match="--strict is for recipes"):
        onnxq.quantize(path, "int8-static", strict=True)


def test_a_model_of_integers_is_run_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, LAYERS, w=normal(4, 3, 3, 3))
    report = onnxq.quantize(path, "integer-only", strict=True, settings=[CODES]).report
    assert report.float_operators == []
    assert len(report.exact_with) == 3

    def other(*given: object) -> dict[str, Array]:
        return {name: values + 1 for name, values in evaluate(*given).items()}

    evaluate = exactness.evaluate
    monkeypatch.setattr(exactness, "evaluate", other)
    with pytest.raises(OnnxqError, match="has other bits than integer arithmetic gives"):
        onnxq.quantize(path, "integer-only", output=tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
