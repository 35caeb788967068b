"""Stream samples through ONNX Runtime into observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

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
    batch_statistics: Mapping[str, tuple[Any, Any]] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run every sample once; return each observer's result under its key.

    A key is `tensor` or `tensor#purpose`. `batch_statistics` holds, for made-up samples, the mean
    and deviation (channels,) that a tensor of channels on axis 1 had in training; the tensor is
    normalised to them on its way, so that what follows sees what training saw.
    """
    wanted = sorted({key.split("#")[0] for key in observers})
    probe = g.copy(graph)
    namer = g.Namer(probe)
    for name, (mean, deviation) in (batch_statistics or {}).items():
        _renormalize(probe, namer, name, mean, deviation)
    tensors = probe.tensors()
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise OnnxqError(f"cannot observe {unknown[0]!r}: the graph has no tensor of that name")
    inputs = {t.name for t in probe.inputs}
    model = g.to_proto(probe)
    fetched = [name for name in wanted if name not in inputs]
    _make_outputs(model, fetched)
    session = Session(model, threads=threads)
    total = len(samples)
    for done, feed in enumerate(samples):
        progress(done, total)
        values = (session.run(feed, fetched) if fetched else {}) | feed
        for key, observer in observers.items():
            value = values[key.split("#")[0]]
            if not np.isfinite(value.sum()) and not np.isfinite(value).all():
                raise OnnxqError(
                    f"sample {done} makes {key.split('#')[0]!r} NaN or infinite; "
                    "leave that sample out, or check its preprocessing"
                )
            observer.update(value)
    progress(total, total)
    return {key: observer.result() for key, observer in observers.items()}


def _make_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    """Expose exactly these tensors; what only other outputs need is not computed."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)


def _renormalize(probe: g.Graph, namer: g.Namer, name: str, mean: Any, deviation: Any) -> None:
    """t ← (t − mean(t)) / std(t) · deviation + mean, per channel, for all that read t."""
    tensor = probe.tensors().get(name)
    if tensor is None or not tensor.inputs:
        return
    # InstanceNormalization does just that over each sample's own pixels.
    raw = gs.Variable(namer(f"{name}_raw"), dtype=tensor.dtype)
    maker = tensor.inputs[0]
    maker.outputs[maker.outputs.index(tensor)] = raw
    scale = g.constant(namer(f"{name}_deviation"), np.asarray(deviation, np.float32))
    shift = g.constant(namer(f"{name}_mean"), np.asarray(mean, np.float32))
    probe.nodes.append(
        gs.Node(
            "InstanceNormalization",
            namer(f"{name}_normalize"),
            {"epsilon": 1e-5},
            [raw, scale, shift],
            [tensor],
        )
    )
    probe.toposort()
