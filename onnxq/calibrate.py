"""Stream samples through ONNX Runtime into observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.observe import Observer
from onnxq.runtime import Session
from onnxq.samples import Samples


def observe(
    graph: g.Graph,
    observers: Mapping[str, Observer],
    samples: Samples,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run every sample once; return each observer's result under its key.

    A key is `tensor` or `tensor#purpose`. Raises OnnxqError for a tensor that is not in the graph
    and for a sample that makes one NaN or infinite.
    """
    wanted = sorted({key.split("#")[0] for key in observers})
    tensors = graph.tensors()
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise OnnxqError(f"cannot observe {unknown[0]!r}: the graph has no tensor of that name")
    inputs = {t.name for t in graph.inputs}
    model, weights = g.to_proto_without_weights(graph)
    fetched = [name for name in wanted if name not in inputs]
    _make_outputs(model, fetched)
    session = Session(model, threads=threads, initializers=weights)
    total = len(samples)
    for done, feed in enumerate(samples):
        progress(done, total)
        try:
            values = (session.run(feed, fetched) if fetched else {}) | feed
        except OnnxqError as error:
            raise OnnxqError(f"{samples.where(done)}: {error}") from None
        for key, observer in observers.items():
            name = key.split("#")[0]
            try:
                observer.update(values[name])
            except FloatingPointError:
                raise OnnxqError(
                    f"{samples.where(done)} makes {name!r} NaN or infinite; leave that sample out, "
                    "or check its preprocessing"
                ) from None
    progress(total, total)
    return {key: observer.result() for key, observer in observers.items()}


def _make_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    """Expose exactly these tensors; what only other outputs need is not computed."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
