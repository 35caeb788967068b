"""Stream samples through ONNX Runtime into observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.observe import Observer
from onnxq.probe import Probe
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
    probe = Probe(graph, wanted, threads=threads)
    total = len(samples)
    for done, feed in enumerate(samples):
        progress(done, total)
        try:
            values = probe.run(feed)
        except OnnxqError as error:
            raise OnnxqError(f"{samples.where(done)}: {error}") from None
        for key, observer in observers.items():
            name = key.split("#")[0]
            try:
                for value in values[name]:
                    if value.size:
                        observer.update(value)
            except FloatingPointError:
                raise OnnxqError(
                    f"{samples.where(done)} makes {name!r} NaN or infinite; leave that sample out, "
                    "or check its preprocessing"
                ) from None
    progress(total, total)
    return {key: observer.result() for key, observer in observers.items()}
