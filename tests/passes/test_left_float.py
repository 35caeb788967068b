"""A layer that the plan leaves float between quantized ones is run in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import feeds_of, fused, model, normal, pipeline, run, sqnr

BIAS = {"c0": normal(8, seed=8), "c1": normal(8, seed=9), "c2": normal(8, seed=10)}


def _spread(*shape: int, seed: int, axis: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """Weights of which one scale for all would leave most channels nothing."""
    lined = [1] * len(shape)
    lined[axis] = shape[axis]
    scale = np.logspace(-2, 1, shape[axis]).astype(np.float32).reshape(lined)
    return normal(*shape, seed=seed) * scale


def convolutions(middle: str, weight: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    text = f"""(float[n,8,6,6] x) => (float[n,8,p,q] y) {{
        a = Conv (x, w0, c0)  r = Relu (a)
        b = {middle} (r, w1, c1)  s = Relu (b)
        y = Conv (s, w2, c2)
    }}"""
    return model(
        text, w0=normal(8, 8, 1, 1, scale=0.3), w1=weight, w2=normal(8, 8, 1, 1, seed=2), **BIAS
    )


def gemms(attrs: str, weight: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    text = f"""(float[n,8] x) => (float[n,8] y) {{
        a = Gemm (x, w0, c0)  r = Relu (a)
        b = Gemm {attrs} (r, w1, c1)  s = Relu (b)
        y = Gemm (s, w2, c2)
    }}"""
    return model(text, w0=normal(8, 8, scale=0.3), w1=weight, w2=normal(8, 8, seed=2), **BIAS)


CASES = {
    "Conv": (convolutions("Conv", _spread(8, 8, 1, 1, seed=1)), (2, 8, 6, 6)),
    "Conv depthwise": (
        convolutions("Conv <group = 8, pads = [1,1,1,1]>", _spread(8, 1, 3, 3, seed=1)),
        (2, 8, 6, 6),
    ),
    "ConvTranspose": (
        convolutions("ConvTranspose", _spread(8, 8, 1, 1, seed=1, axis=1)),
        (2, 8, 6, 6),
    ),
    "Gemm": (gemms("", _spread(8, 8, seed=1, axis=1)), (4, 8)),
    "Gemm transB": (gemms("<transB = 1>", _spread(8, 8, seed=1)), (4, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_float_stays_float(name: str, tmp_path: Path) -> None:
    source, shape = CASES[name]
    feeds = feeds_of(8, x=shape)
    result = pipeline(source, feeds, exclude=("re:^b$",))
    made = result.to_proto()
    onnx.checker.check_model(made, full_check=True)
    for feed in feeds:
        plain, optimized = run(made, feed, False)["y"], run(made, feed)["y"]
        assert sqnr(optimized, plain) > 30
        assert sqnr(plain, run(source, feed)["y"]) > 25
    kinds = {node.op_type for node in fused(made, tmp_path / "fused.onnx").graph.node}
    assert kinds & {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm"}
