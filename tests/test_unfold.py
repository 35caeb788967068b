from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Array, normal, run

from onnxq import graph as g
from onnxq.graph import Unfolding
from onnxq.observe_channels import Hessian

# (operator, shape of x, shape of w, attributes); y has no bias
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "Conv": ("Conv", (2, 3, 7, 6), (4, 3, 3, 2), {}),
    "Conv 1x1": ("Conv", (2, 3, 4, 5), (4, 3, 1, 1), {}),
    "Conv strides": ("Conv", (2, 3, 9, 8), (4, 3, 3, 3), {"strides": [2, 3]}),
    "Conv pads": ("Conv", (1, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 0, 2, 1]}),
    "Conv dilations": ("Conv", (1, 3, 9, 9), (4, 3, 3, 2),
                       {"dilations": [2, 3], "strides": [2, 1]}),
    "Conv groups": ("Conv", (2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "Conv depthwise": ("Conv", (2, 4, 5, 5), (8, 1, 3, 3), {"group": 4, "strides": [2, 2]}),
    "Conv 1-D": ("Conv", (2, 3, 11), (4, 3, 4), {"strides": [3], "pads": [2, 1]}),
    "Conv 3-D": ("Conv", (1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {"strides": [1, 2, 2]}),
    "Conv SAME_UPPER": ("Conv", (1, 3, 8, 7), (4, 3, 3, 2),
                        {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "Conv SAME_LOWER": ("Conv", (1, 3, 8, 7), (4, 3, 4, 2),
                        {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    "Conv VALID": ("Conv", (1, 3, 8, 7), (4, 3, 3, 2), {"auto_pad": "VALID"}),
    "Gemm": ("Gemm", (5, 3), (3, 4), {}),
    "Gemm transA transB": ("Gemm", (3, 5), (4, 3), {"transA": 1, "transB": 1}),
    "MatMul": ("MatMul", (2, 5, 3), (3, 4), {}),
    "MatMul batches": ("MatMul", (2, 3, 5, 4), (3, 4, 6), {}),
    "MatMul batches of one input": ("MatMul", (5, 4), (2, 3, 4, 6), {}),
    "MatMul batches of one": ("MatMul", (2, 3, 5, 4), (2, 1, 4, 6), {}),
}  # fmt: skip


def layer(name: str) -> tuple[g.Node, Array, Array]:
    """The node, an input and the output that the runtime gives for it."""
    op, x_shape, w_shape, attrs = LAYERS[name]
    weight = normal(*w_shape, seed=1)
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], **attrs)
    x, y = (
        onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, shape)
        for tensor, shape in (("x", x_shape), ("y", None))
    )
    graph = onnx.helper.make_graph(
        [node], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")]
    )
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )
    value = normal(*x_shape)
    return g.load(made).nodes[0], value, run(made, {"x": value}, optimize=False)["y"]


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_columns_are_what_the_runtime_computes(name: str) -> None:
    node, x, expected = layer(name)
    view = g.weight_view(node)
    assert view is not None
    how = g.unfolding(view)
    assert how is not None
    rows = how(x)
    matrix = view.matrix()
    assert matrix.shape[0] == view.rows
    y = rows @ matrix.reshape(how.groups, -1, matrix.shape[1]).swapaxes(1, 2)  # groups, rows, out
    if node.op == "Conv":
        places = (expected.shape[0], *expected.shape[2:])
        y = np.moveaxis(y, 0, 1).reshape(*places, -1)
        y = np.moveaxis(y, -1, 1)
    elif how.groups > 1:  # the batches of the weight stand first
        batch = (1,) * (expected.ndim - view.rank) + tuple(view.tensor.shape[:-2])
        axes = [axis for axis, size in enumerate(batch) if size > 1]
        expected = np.moveaxis(expected, axes, range(len(axes)))
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_few_rows_are_some_of_all(name: str) -> None:
    node, x, _ = layer(name)
    view = g.weight_view(node)
    assert view is not None
    how = g.unfolding(view)
    assert how is not None
    few, every = how(x, 3), how(x)
    assert few.shape == (every.shape[0], 3, every.shape[2])
    for group in range(len(few)):
        assert {row.tobytes() for row in few[group]} <= {row.tobytes() for row in every[group]}


@pytest.mark.parametrize(("op", "w_shape"), [("ConvTranspose", (3, 4, 2, 2)), ("Gather", (6, 4))])
def test_no_rows_where_columns_meet_no_single_input(op: str, w_shape: tuple[int, ...]) -> None:
    node = g.load(onnx.helper.make_model(onnx.helper.make_graph(
        [onnx.helper.make_node(op, ["x", "w"] if op != "Gather" else ["w", "x"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", 1 if op != "Gather" else 7, None)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(normal(*w_shape), "w")],
    ))).nodes[0]  # fmt: skip
    view = g.weight_view(node)
    assert view is not None
    assert g.unfolding(view) is None


# ── second moments ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_is_the_mean_of_all_outer_products(name: str) -> None:
    node, x, _ = layer(name)
    view = g.weight_view(node)
    assert view is not None
    how = g.unfolding(view)
    assert how is not None
    observer = Hessian(how, 10**6)
    for value in (x, 2 * x):
        observer.update(value)
    seen = observer.result()
    for group, rows in enumerate(np.concatenate([how(x), how(2 * x)], axis=1).astype(np.float64)):
        expected = sum(np.outer(row, row) for row in rows) / len(rows)
        np.testing.assert_allclose(seen.product[group], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.mean[group], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert seen.rows == 2 * how(x).shape[1]


def test_hessians_of_halves_merge_to_that_of_the_whole() -> None:
    x = normal(6, 10, 4)
    whole, left, right = (Hessian(Unfolding(), 10**6) for _ in range(3))
    whole.update(x)
    left.update(x[:2])
    right.update(x[2:])
    left.merge(Hessian(Unfolding(), 10**6))
    left.merge(right)
    for a, b in zip(left.result(), whole.result(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nan_is_refused_and_nothing_is_harmless() -> None:
    observer = Hessian(Unfolding(), 10)
    observer.update(np.zeros((0, 4), np.float32))
    assert observer.result().rows == 0
    with pytest.raises(FloatingPointError):
        observer.update(np.full((3, 4), np.nan, np.float32))


def test_few_rows_leave_variances_and_means_but_little_of_covariances() -> None:
    """Against the truth: 12 rows of 40 inputs that are correlated, and 12000."""
    rng = np.random.default_rng(0)
    mix, mean = rng.normal(size=(40, 40)) / 6, rng.normal(size=40)
    truth = mix @ mix.T + np.outer(mean, mean)
    for rows, better in ((12, True), (12000, False)):
        observer = Hessian(Unfolding(), 10**6)
        observer.update((rng.normal(size=(rows, 40)) @ mix.T + mean).astype(np.float32))
        seen = observer.result()
        shrunk = seen.shrunk(3)
        np.testing.assert_allclose(
            np.diagonal(shrunk[0]), np.diagonal(seen.product[0]), rtol=1e-4, atol=1e-5
        )
        plain, kept = (np.linalg.norm(h[0] - truth) for h in (seen.product, shrunk))
        assert kept < 0.9 * plain if better else kept < 1.5 * plain
        assert np.linalg.eigvalsh(shrunk[0].astype(np.float64)).min() > -1e-4
