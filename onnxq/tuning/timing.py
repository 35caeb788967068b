"""What each layer takes in float and quantized, where its neighbours are quantized.

A kernel by itself tells little: a float layer between quantized ones also costs what turns codes to
floats and back. So each layer is timed with its neighbours, all of them quantized against the same
with the layer float, in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxq import verify
from onnxq.pipeline import Plan
from onnxq.samples import Feed
from onnxq.tuning.segments import Chain, Lower, Segment, cuts
from onnxq.tuning.variants import Variants

RUNS = 40
SECONDS = 0.5  # per layer, at most


def layer_times(
    variants: Variants, feed: Feed, threads: int | None = None
) -> dict[str, tuple[float, float]]:
    """By layer, ms of its neighbourhood with the layer float and with it quantized.

    Lower quartiles: what else the machine does only ever adds. A layer in a body, or one that
    cannot be cut out with its neighbours, is not among them.
    """
    names = [node.name for node in variants.layers]
    graph = variants.graph
    chain = Chain(graph, cuts(graph, names, len(names)), lambda part: part, feed, threads)
    states = chain.run(feed)
    quantized = variants.plan(())
    times: dict[str, tuple[float, float]] = {}
    for name in names:
        place = next((k for k, s in enumerate(chain.segments) if name in s.nodes), None)
        if place is None:
            continue
        first, last = max(place - 1, 0), min(place + 2, len(chain.segments))
        given: Mapping[str, Any] = states[first]
        pieces = [
            Segment(graph, given, chain.cuts[last], _lowering(variants, plan), threads)
            for plan in (variants.plan({name}), quantized)
        ]
        sessions = [piece.session for piece in pieces if piece.session is not None]
        if len(sessions) == 2:
            timed = verify.latency(
                sessions, {n: given[n] for n in pieces[0].read}, seconds=SECONDS, most=RUNS
            )
            times[name] = timed[0].low_ms, timed[1].low_ms
    return times


def _lowering(variants: Variants, plan: Plan) -> Lower:
    return lambda part: variants.lowered(part, plan)
