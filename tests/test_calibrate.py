import numpy as np
import pytest
from awkward import matmul, residual
from graphs import feeds_of, model, normal, samples_of

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe import Histogram, MinMax, Moments


def test_observers_see_what_the_model_computes_under_each_key() -> None:
    case = matmul()
    graph = g.load(case.model)
    observers = {"x": MinMax(), "a": MinMax(), "a#moments-1": Moments(-1), "y": MinMax()}
    found = observe(graph, observers, samples_of(case.model, case.feeds), threads=1)
    weights = {t.name: t.values for t in g.constants(graph)}
    x = np.concatenate([feed["x"][0] for feed in case.feeds])
    a = x @ weights["w1"]
    y = np.maximum(a + weights["b1"], 0) @ weights["w2"]
    assert list(found) == list(observers)
    for name, values in (("x", x), ("a", a), ("y", y)):
        np.testing.assert_allclose(found[name], (values.min(), values.max()), rtol=1e-5)
    np.testing.assert_allclose(found["a#moments-1"].mean, a.mean(axis=0), atol=1e-6)


def test_observing_leaves_the_graph_as_it_was() -> None:
    case = residual()
    graph = g.load(case.model)
    before = g.to_proto(graph).SerializeToString(deterministic=True)
    observe(graph, {"r": MinMax(), "s": MinMax()}, samples_of(case.model, case.feeds))
    assert g.to_proto(graph).SerializeToString(deterministic=True) == before


def test_inputs_alone_need_no_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = matmul()
    graph = g.load(case.model)
    monkeypatch.setattr("onnxq.runtime.Session.run", lambda *_: pytest.fail("it ran the model"))
    found = observe(graph, {"x": MinMax()}, samples_of(case.model, case.feeds))
    assert found["x"].high == max(feed["x"].max() for feed in case.feeds)


def test_a_tensor_that_is_not_there_is_named() -> None:
    case = matmul()
    with pytest.raises(OnnxqError, match="'hidden': the graph has no tensor"):
        observe(g.load(case.model), {"hidden": MinMax()}, samples_of(case.model, case.feeds))


@pytest.mark.parametrize("kind", [MinMax, Histogram])
def test_nan_in_the_model_names_sample_and_tensor(kind: type) -> None:
    made = model(
        "(float[n,4] x) => (float[n,4] y) { l = Log (x) y = MatMul (l, w) }", w=normal(4, 4)
    )
    feeds = [{"x": np.abs(feed["x"])} for feed in feeds_of(3, x=(2, 4))]
    feeds[2]["x"][0, 0] = -1
    samples = samples_of(made, feeds)
    with pytest.raises(OnnxqError, match=r"list, sample 2 \(counted from 0\) makes 'l' NaN"):
        observe(g.load(made), {"l": kind()}, samples)


def test_a_sample_that_does_not_run_is_named() -> None:
    made = model("(float[n,m] x) => (float[n,4] y) { y = MatMul (x, w) }", w=normal(4, 4))
    samples = samples_of(made, [{"x": normal(2, 4)}, {"x": normal(2, 5)}])
    with pytest.raises(OnnxqError, match=r"list, sample 1 \(counted from 0\): the model does not"):
        observe(g.load(made), {"y": MinMax()}, samples)


def test_progress_counts_every_sample() -> None:
    case = matmul()
    calls: list[tuple[int, int]] = []
    observe(
        g.load(case.model),
        {"a": MinMax()},
        samples_of(case.model, case.feeds),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(k, 4) for k in range(5)]
