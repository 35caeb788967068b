"""What the report page shows of each layer beyond its errors: its weight, tensors, neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.distribution import SHOWN_BINS, WeightRecord, distribution
from onnxq.pipeline import Result
from onnxq.qtype import QTensor, spread
from onnxq.report import LayerRecord, Report

MOST_VALUES = 1 << 22  # of a weight, looked at
MOST_NEIGHBOURS = 8  # of a layer on each side


def record_details(result: Result, report: Report) -> None:
    """Weights, quantized inputs and neighbours of every layer that the report lists."""
    records = {record.name: record for record in report.layers}
    plan = result.context.plan
    for node in g.walk(result.prepared):
        if node.name not in records or node.name not in plan:
            continue
        record = records[node.name]
        record.inputs = [
            node.inputs[slot].name
            for slot in plan[node.name].inputs
            if slot < len(node.inputs) and not g.is_constant(node.inputs[slot])
        ]
        views = g.weight_views(node) if record.form != "float" else []
        record.weights = [found for view in views if (found := _weight(view, result))]
    _record_neighbours(result.prepared, records)


def _weight(view: g.WeightView, result: Result) -> WeightRecord | None:
    name, context = view.tensor.name, result.context
    if name in context.weights:
        return weight_record(name, view.matrix(), context.weights[name])
    if name in context.codebooks:
        return weight_record(name, view.matrix(), None)
    return None


def weight_record(name: str, weight: NDArray[np.float32], codes: QTensor | None) -> WeightRecord:
    """A float weight (out, in) and its codes, None where those are places in a table."""
    step = max(1, -(-weight.size // MOST_VALUES))
    seen = weight[::step]
    found = WeightRecord(name, distribution(seen), len(weight))
    if codes is None:
        return found
    qtype, zero = codes.qtype, codes.zero.astype(np.float32)
    ends = [np.asarray(codes.scale * (end - zero)) for end in (qtype.qmin, qtype.qmax)]
    found.low, found.high = float(min(e.min() for e in ends)), float(max(e.max() for e in ends))
    first, second = (_rows(end, weight.shape, qtype.group)[::step] for end in ends)
    half = _rows(np.abs(codes.scale) / 2, weight.shape, qtype.group)[::step]
    outside = (seen < np.minimum(first, second) - half) | (seen > np.maximum(first, second) + half)
    found.clipped = float(outside.mean())
    found.scales = few(np.abs(codes.scale).reshape(len(codes.scale), -1).max(axis=1)
                       if codes.scale.ndim else np.abs(codes.scale).reshape(1))  # fmt: skip
    return found


def _rows(per_group: NDArray[Any], shape: tuple[int, ...], group: int | None) -> NDArray[Any]:
    """A value per tensor, channel or block as one per row or weight, (out, 1) or (out, in)."""
    wide = spread(per_group, shape, group)
    return np.broadcast_to(wide, (shape[0], wide.shape[1] if wide.ndim == 2 else 1))


def few(scales: NDArray[Any]) -> list[float]:
    """At most SHOWN_BINS of them: the largest of neighbours.

    >>> few(np.arange(130.0))[:2], len(few(np.arange(130.0)))
    ([2.0, 5.0], 44)
    """
    together = -(-len(scales) // SHOWN_BINS)
    padded = np.pad(scales, (0, -len(scales) % together))
    return [float(scale) for scale in padded.reshape(-1, together).max(axis=1)]


def _record_neighbours(graph: g.Graph, records: dict[str, LayerRecord]) -> None:
    """The layers before and after each, through whatever stands between them."""
    made_by: dict[str, list[str]] = {}  # tensor → the layers that it comes from
    for node in g.walk(graph):
        before = dict.fromkeys(
            layer for tensor in node.inputs for layer in made_by.get(tensor.name, ())
        )
        record = records.get(node.name)
        if record is not None:
            record.before = [*before][:MOST_NEIGHBOURS]
            for layer in record.before:
                after = records[layer].after
                if len(after) < MOST_NEIGHBOURS:
                    after.append(node.name)
        sources = [node.name] if record is not None else [*before][:MOST_NEIGHBOURS]
        for tensor in node.outputs:
            made_by[tensor.name] = sources
