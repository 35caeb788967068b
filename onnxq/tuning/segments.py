"""A model cut into a chain of segments, so that what differs late need not run what comes before.

A cut is the set of tensors that nodes before it hand to nodes after it. The segment between two
cuts is a session of its own: all segments together are built once and hold the model once. A
variant of the model differs from it in some nodes. To run it, the segments that hold these are
built anew, and the chain's own run from there to the end, on what the chain held before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.runtime import Session

Array = NDArray[Any]
Values = dict[str, Array]
Cut = tuple[str, ...]
Lower = Callable[[g.Graph], g.Graph]
MOST = 24  # segments: each run of one costs some 50 µs beside what it computes
# Threads that spin while they wait would take the cores from the next segment's.
QUIET = {"session.intra_op.allow_spinning": "0"}


def cuts(graph: g.Graph, layers: Collection[str], most: int = MOST) -> list[Cut]:
    """The inputs, what crosses before a layer (each n-th, for `most` segments), the outputs.

    Outputs that are constants are left out.
    """
    places = [i for i, node in enumerate(graph.nodes) if _holds(node, layers)]
    every = -(-len(places) // most) or 1
    found: list[Cut] = [tuple(t.name for t in graph.inputs)]
    outputs = tuple(t.name for t in graph.outputs if not g.is_constant(t))
    for place in places[every::every]:
        made = {t.name for node in graph.nodes[:place] for t in node.outputs} | {*found[0]}
        needed = {name for node in graph.nodes[place:] for name in _reads(node)} | {*outputs}
        found.append(tuple(sorted(made & needed)))
    return [*found, outputs]


def _holds(node: g.Node, layers: Collection[str]) -> bool:
    """Whether a node is one of the layers, or has one in a body."""
    return node.name in layers or any(
        inner.name in layers for body in g.bodies(node) for inner in g.walk(body)
    )


def _reads(node: g.Node) -> set[str]:
    """Tensors that a node takes, or its bodies from around them."""
    names = {t.name for t in node.inputs if t.name and not g.is_constant(t)}
    for body in g.bodies(node):
        made = {t.name for t in body.inputs} | {t.name for n in body.nodes for t in n.outputs}
        inner = {name for n in body.nodes for name in _reads(n)}
        names |= (inner | {t.name for t in body.outputs if not g.is_constant(t)}) - made
    return names


def _between(graph: g.Graph, given: Collection[str], wanted: Collection[str]) -> list[g.Node]:
    """The nodes that make the tensors `wanted` out of `given`, in order."""
    makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    needed: set[int] = set()
    pending = [name for name in wanted if name not in given]
    while pending:
        node = makers[pending.pop()]
        if id(node) not in needed:
            needed.add(id(node))
            pending += [name for name in _reads(node) if name not in given]
    return [node for node in graph.nodes if id(node) in needed]


class Segment:
    """A session that makes the tensors of one cut out of those of another."""

    def __init__(
        self,
        graph: g.Graph,
        given: Mapping[str, Array],
        wanted: Collection[str],
        lower: Lower,
        threads: int | None = None,
    ) -> None:
        """`given` are values that tell the inputs' types; `lower` rewrites a part of the graph."""
        nodes = _between(graph, given, wanted)
        self.made = [name for name in wanted if name not in given]
        self.kept = [name for name in wanted if name in given]
        self.read = sorted({name for node in nodes for name in _reads(node)} & set(given))
        self.nodes = {inner.name for node in nodes for inner in (node, *_inside(node))}
        self.session: Session | None = None
        if nodes:
            model, weights = g.to_proto_without_weights(
                lower(_part(graph, nodes, self.read, self.made))
            )
            del model.graph.input[:]
            model.graph.input.extend(_typed(name, given[name]) for name in self.read)
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.made)
            self.session = Session(model, threads=threads, initializers=weights, config=QUIET)

    def run(self, values: Mapping[str, Array]) -> Values:
        made = self.session.run({name: values[name] for name in self.read}) if self.session else {}
        return made | {name: values[name] for name in self.kept}


def _inside(node: g.Node) -> list[g.Node]:
    return [inner for body in g.bodies(node) for inner in g.walk(body)]


def _part(graph: g.Graph, nodes: list[g.Node], inputs: list[str], outputs: list[str]) -> g.Graph:
    """A copy of some nodes of a graph, as a graph."""
    tensors = graph.tensors()
    part = gs.Graph(
        nodes=nodes,
        inputs=[tensors[name] for name in inputs],
        outputs=[tensors[name] for name in outputs],
        name=graph.name,
        opset=graph.opset,
        import_domains=graph.import_domains,
    )
    return g.copy(part)


def _typed(name: str, value: Array) -> onnx.ValueInfoProto:
    """An input of the value's type and of any shape: what a model declares of it may be wrong."""
    made = onnx.ValueInfoProto(name=name)
    kind = np.dtype(object) if value.dtype.kind in "OUS" else value.dtype
    made.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(kind)
    return made


class Chain:
    """A model as segments, each lowered by itself: a tensor that a lowering rounds for all of its
    readers crosses a cut rounded, so that the chain computes what the lowered model would.
    """

    def __init__(
        self,
        graph: g.Graph,
        wanted: Sequence[Cut],
        lower: Lower,
        feed: Mapping[str, Array],
        threads: int | None = None,
    ) -> None:
        """`wanted` are cuts, the first and the last the inputs and outputs. It is cut at those
        where nothing but tensors is handed on. `feed` tells the types.
        """
        self.graph, self.threads = graph, threads
        self.cuts: list[Cut] = [wanted[0]]
        self.segments: list[Segment] = []
        state: Values = dict(feed)
        for number, cut in enumerate(wanted[1:], 1):
            segment = Segment(graph, state, cut, lower, threads)
            after = segment.run(state)
            tensors = all(isinstance(value, np.ndarray) for value in after.values())
            if tensors or number == len(wanted) - 1:
                self.segments.append(segment)
                self.cuts.append(cut)
                state = after

    def run(self, feed: Mapping[str, Array]) -> list[Values]:
        """What crosses each cut, the outputs last."""
        states: list[Values] = [dict(feed)]
        for segment in self.segments:
            states.append(segment.run(states[-1]))
        return states

    def finish(self, state: Values, cut: int) -> Values:
        """The outputs, from what crosses a cut."""
        for segment in self.segments[cut:]:
            state = segment.run(state)
        return state

    def variant(
        self, differing: Collection[str], lower: Lower, states: Sequence[Values]
    ) -> Variant:
        """The chain with the segments that hold these nodes lowered otherwise.

        `states` are those of any sample; they tell types.
        """
        places = [k for k, s in enumerate(self.segments) if not s.nodes.isdisjoint(differing)]
        if not places:
            return Variant(self, None, 0, 0)
        first, last = places[0], places[-1] + 1
        segment = Segment(self.graph, states[first], self.cuts[last], lower, self.threads)
        return Variant(self, segment, first, last)


@dataclass(frozen=True)
class Variant:
    """A chain with the segments `first` to `last` (exclusive) replaced by one of its own."""

    chain: Chain
    segment: Segment | None
    first: int
    last: int

    def run(self, states: Sequence[Values]) -> Values:
        """The variant's outputs, from the chain's states on the same sample."""
        if self.segment is None:
            return states[-1]
        return self.chain.finish(self.segment.run(states[self.first]), self.last)
