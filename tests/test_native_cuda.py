"""MatMulCodebook on a GPU, against its reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import onnxq.ops
from onnxq.ops import DOMAIN, OPERATORS

LIBRARIES = [Path(folder) / "libonnxq_ops_cuda.so" for folder in onnxq.ops.__path__]
LIBRARY = next((path for path in LIBRARIES if path.is_file()), None)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        LIBRARY is None or "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="needs the library for CUDA and onnxruntime with CUDA",
    ),
]

TYPE = helper.np_dtype_to_tensor_dtype


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 130])
@pytest.mark.parametrize(
    ("channels", "columns", "block"), [(1, 1, 16), (65, 129, 48), (256, 512, 64)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_product_is_what_the_reference_says(
    rows: int, channels: int, columns: int, block: int, dtype: type, zeros: bool
) -> None:
    rng = np.random.default_rng(0)
    blocks = -(-columns // block)
    x = rng.standard_normal((rows, columns)).astype(dtype)
    constants = {
        "codes": rng.integers(0, 256, (channels, blocks, block // 2), np.uint8),
        "scales": rng.uniform(0.001, 0.02, (channels, blocks)).astype(dtype),
        "codebook": rng.integers(-128, 128, (channels, 1, 16)).astype(np.int8),
        "zero_points": rng.integers(-9, 9, (channels, blocks) if zeros else (1, 1)).astype(np.int8),
        "bias": rng.standard_normal(channels).astype(dtype),
    }
    node = helper.make_node("MatMulCodebook", ["x", *constants], ["y"], domain=DOMAIN)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TYPE(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", TYPE(x.dtype), None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.register_custom_ops_library(str(LIBRARY))
    session = ort.InferenceSession(model.SerializeToString(), options, ["CUDAExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    expected = OPERATORS["MatMulCodebook"].reference(x, **constants)
    bound = 1e-5 if dtype == np.float32 else 2e-3
    assert np.abs(y - expected).max() <= bound * np.abs(expected).max()
