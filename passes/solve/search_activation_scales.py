"""Activation ranges by the error of the model's outputs, measured.

What a range should cut, no histogram knows: in a detector the few strong values are the answer, in
a classifier they make every other value coarser. So ranges are tried in the quantized model itself,
on a few samples, for

    E = Σ_outputs Σ‖ŷ − y‖² / Σ‖y‖²,

y of the float model: first one rule for all tensors, then for one tensor after another each
candidate in turn (coordinate descent), which stays where it lowers E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.solve.calibrate import percentile_range, search_range

from onnxq import graph as g
from onnxq.feeds import Feed
from onnxq.graph import Array, Graph
from onnxq.observe import HistogramResult
from onnxq.pipeline import Context
from onnxq.qtype import QParams
from onnxq.runtime import Session

PERCENTILES = (99.9, 99.99, 99.999)
SHARES = (0.9, 0.8)  # of the whole range
LEAST_GAIN = 0.01  # of E, for a range to change: less is chance
SAME = 0.02  # ranges that differ by less are one candidate

Ranges = dict[str, QParams]


class Trial:
    """The quantized model with the ranges of its activations as inputs, and what it should say."""

    def __init__(self, graph: Graph, ctx: Context, feeds: list[Feed]) -> None:
        names = [t.name for t in graph.outputs if g.is_float(t)]
        session = Session.of(graph, threads=ctx.threads)
        self.feeds, self.expected = feeds, [session.run(feed, names) for feed in feeds]
        self.power = {
            name: sum(float(np.square(e[name], dtype=np.float64).sum()) for e in self.expected)
            for name in names
        }
        self.names = [name for name in names if self.power[name]]
        quantized = ctx.quantized(graph, qdq=True)
        self.inputs = dict(_open_ranges(quantized, ctx.activations))
        self.fixed = dict(ctx.activations)
        # Optimized, onnxruntime 1.31 gets float weights between quantized activations wrong.
        self.session = Session.of(quantized, threads=ctx.threads, optimize=False)

    def error(self, ranges: Mapping[str, QParams]) -> float:
        """E under these ranges; infinite where the model says nothing comparable."""
        given: dict[str, Array] = {}
        for name, (scale, zero) in self.inputs.items():
            params = ranges.get(name, self.fixed[name])
            given |= {scale: params.scale, zero: params.zero}
        total = 0.0
        for feed, expected in zip(self.feeds, self.expected, strict=True):
            said = self.session.run({**feed, **given}, self.names)
            for name in self.names:
                if said[name].shape != expected[name].shape:
                    return np.inf
                noise = np.square(said[name].astype(np.float64) - expected[name]).sum()
                total += float(noise) / self.power[name]
        return total if np.isfinite(total) else np.inf


def _open_ranges(
    graph: Graph, activations: Mapping[str, QParams]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Make scale and zero point of every activation an input of the graph: their names."""
    namer = g.Namer(graph)
    done: set[str] = set()
    for node in list(g.walk(graph)):
        if node.op != "QuantizeLinear" or not all(map(g.is_constant, node.inputs[1:3])):
            continue
        after = [t.name for reader in node.outputs[0].outputs for t in reader.outputs]
        name = next((n for n in (*after, node.inputs[0].name) if n in activations), None)
        if name is None or name in done:
            continue
        done.add(name)
        opened = []
        for constant in node.inputs[1:3]:
            values = g.values(constant)
            variable = gs.Variable(namer(f"{constant.name}_tried"), values.dtype, values.shape)
            graph.inputs.append(variable)
            for reader in list(constant.outputs):
                g.replace_input(reader, constant, variable)
            opened.append(variable.name)
        yield name, (opened[0], opened[1])


def rules(seen: HistogramResult, now: QParams) -> list[QParams]:
    """Candidates for one tensor, the same rule in the same place for all: as it is, whole, …"""
    ranges = [(seen.low, seen.high)]
    ranges += [percentile_range(seen, p) for p in PERCENTILES]
    ranges += [search_range(seen, now.qtype, "mse")]
    ranges += [(seen.low * share, seen.high * share) for share in SHARES]
    return [now, *(QParams.from_range(*limits, now.qtype) for limits in ranges)]


def search_ranges(
    trial: Trial, candidates: Mapping[str, list[QParams]], groups: list[list[str]], evaluations: int
) -> Ranges:
    """A range for every tensor; those of a group share theirs.

    `candidates` hold as many per tensor, the present one first. Raises no E.
    """
    choices = len(next(iter(candidates.values())))
    common = [{name: rule[k] for name, rule in candidates.items()} for k in range(choices)]
    errors = [trial.error(ranges) for ranges in common]
    best = int(np.argmin(errors))  # the present ones, where nothing is better
    ranges, least = dict(common[best]), errors[best]
    left = evaluations - choices
    for group in groups:
        for tried in distinct(candidates[group[0]], ranges[group[0]]):
            if left <= 0:
                return ranges
            left -= 1
            changed = ranges | dict.fromkeys(group, tried)
            error = trial.error(changed)
            if error < least * (1 - LEAST_GAIN):
                ranges, least = changed, error
    return ranges


def distinct(candidates: list[QParams], now: QParams) -> list[QParams]:
    """Those that differ from the present one and from each other."""
    found = [now]
    for tried in candidates:
        step = float(tried.scale) * SAME * (tried.qtype.qmax - tried.qtype.qmin)
        if all(
            max(abs(a - b) for a, b in zip(tried.range, other.range, strict=True)) > step
            for other in found
        ):
            found.append(tried)
    return found[1:]
