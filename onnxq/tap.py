"""Look at any tensor of a graph while it runs, those inside the bodies of If, Loop and Scan too.

A session only hands out tensors of the outermost graph. A tensor of a body may take a value any
number of times per run, or none; all of them are brought out in a sequence: it is threaded through
the control-flow operators like any other state, and grows by one where the tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto, helper

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

Array = NDArray[Any]
Feed = Mapping[str, Array]


class Tap:
    """A session of a graph that hands out the tensors `names`, and nothing else.

    Raises OnnxqError for a tensor that is not in the graph, and for one in a body inside the body
    of a Scan, where no sequence can be carried.
    """

    def __init__(self, graph: g.Graph, names: Sequence[str], *, threads: int | None = None) -> None:
        known = g.tensors(graph)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise OnnxqError(f"cannot observe {unknown[0]!r}: the graph has no tensor of that name")
        inputs = {t.name for t in graph.inputs}
        outermost = graph.tensors()
        model, weights = g.to_proto_without_weights(graph)
        inner = [name for name in names if name not in outermost]
        self.fed = [name for name in names if name in inputs]
        self.sequences = _Thread(model.graph).run({n: _elem_type(known[n]) for n in inner})
        self.fetched = [n for n in names if n not in inputs and n not in self.sequences]
        del model.graph.output[:]
        outputs = [*self.fetched, *self.sequences.values()]
        model.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
        self.session = Session(model, threads=threads, initializers=weights) if outputs else None

    def run(self, feed: Feed) -> dict[str, list[Array]]:
        """All values that each tensor took, in order."""
        made: Mapping[str, Any] = {}
        if self.session is not None:
            made = self.session.run(feed, [*self.fetched, *self.sequences.values()])
        return (
            {name: [feed[name]] for name in self.fed}
            | {name: [made[name]] for name in self.fetched}
            | {name: list(made[output]) for name, output in self.sequences.items()}
        )


def _elem_type(tensor: Any) -> int:
    kind = g.dtype(tensor)
    return int(helper.np_dtype_to_tensor_dtype(kind or np.dtype(np.float32)))


class _Thread:
    """Carries a sequence per tensor through a graph and its bodies."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.types: dict[str, int] = {}
        self.count = 0

    def run(self, wanted: Mapping[str, int]) -> dict[str, str]:
        """The name of the sequence that holds each tensor; `wanted` gives element types."""
        if not wanted:
            return {}
        self.types = dict(wanted)
        held = {name: self.fresh() for name in wanted}
        empty = [
            helper.make_node("SequenceEmpty", [], [held[name]], dtype=kind)
            for name, kind in wanted.items()
        ]
        filled = self.graph_body(self.graph, held)
        nodes = [*empty, *self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return filled

    def graph_body(self, graph: GraphProto, held: Mapping[str, str]) -> dict[str, str]:
        """Make each tensor that this graph makes join its sequence; the sequences afterwards."""
        now = dict(held)
        nodes: list[NodeProto] = []

        def insert(name: str, value: str) -> None:
            nodes.append(helper.make_node("SequenceInsert", [now[name], value], [self.fresh()]))
            now[name] = nodes[-1].output[0]

        for value in graph.input:
            if value.name in now:
                insert(value.name, value.name)
        for node in graph.node:
            inside = {name: now[name] for name in now if name in made_inside(node)}
            own = list(node.output)
            if inside and node.op_type == "Scan":
                stacked = self.scan(node, inside)
                nodes.append(node)
                for name, output in stacked.items():
                    insert(name, output)
            elif inside:
                now |= (
                    self.branches(node, inside) if node.op_type == "If" else self.loop(node, inside)
                )
                nodes.append(node)
            else:
                nodes.append(node)
            for name in own:
                if name in now:
                    insert(name, name)
        del graph.node[:]
        graph.node.extend(nodes)
        return now

    def branches(self, node: NodeProto, held: Mapping[str, str]) -> dict[str, str]:
        """If: either branch hands on the sequences, with one more value or with an empty one."""
        for body in bodies(node):
            after = self.graph_body(body, held)
            for name, sequence in after.items():
                if sequence == held[name]:  # a branch must make what it hands on
                    nothing, after[name] = self.fresh(), self.fresh()
                    kind = helper.tensor_dtype_to_np_dtype(self.types[name])
                    empty = onnx.numpy_helper.from_array(np.zeros(0, kind), nothing)
                    body.initializer.append(empty)
                    joined = helper.make_node("SequenceInsert", [sequence, nothing], [after[name]])
                    body.node.append(joined)
            body.output.extend(self.value(name, after[name]) for name in held)
        outputs = {name: self.fresh() for name in held}
        node.output.extend(outputs.values())
        return outputs

    def loop(self, node: NodeProto, held: Mapping[str, str]) -> dict[str, str]:
        """Loop: the sequences are carried from one iteration to the next."""
        (body,) = bodies(node)
        carried = len(body.input) - 2
        inner = {name: self.fresh() for name in held}
        body.input.extend(self.value(name, inner[name]) for name in held)
        node.input.extend(held.values())
        after = self.graph_body(body, inner)
        outputs = {name: self.fresh() for name in held}
        _insert(body.output, carried + 1, [self.value(n, after[n]) for n in held])
        _insert(node.output, carried, list(outputs.values()))
        return outputs

    def scan(self, node: NodeProto, held: Mapping[str, str]) -> dict[str, str]:
        """Scan: carries no sequences, but stacks what each step makes."""
        (body,) = bodies(node)
        own = {name for inner in body.node for name in inner.output}
        own |= {value.name for value in body.input}
        deeper = [name for name in held if name not in own]
        if deeper:
            raise OnnxqError(f"cannot observe {deeper[0]!r}: it is in a body inside a Scan")
        outputs = {name: self.fresh() for name in held}
        handed = {name: self.fresh() for name in held}  # an output may not be listed twice
        for name in held:
            body.node.append(helper.make_node("Identity", [name], [handed[name]]))
            body.output.append(ValueInfoProto(name=handed[name]))
        node.output.extend(outputs.values())
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.extend([0] * len(held))
        return outputs

    def value(self, name: str, sequence: str) -> ValueInfoProto:
        return helper.make_tensor_sequence_value_info(sequence, self.types[name], None)

    def fresh(self) -> str:
        self.count += 1
        return f"onnxq_tap_{self.count}"


def bodies(node: NodeProto) -> list[GraphProto]:
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]


def made_inside(node: NodeProto) -> set[str]:
    """The tensors that come into being in a node's bodies, at any depth."""
    made: set[str] = set()
    for body in bodies(node):
        made |= {value.name for value in body.input}
        for inner in body.node:
            made |= {*inner.output} | made_inside(inner)
    return made


def _insert(repeated: Any, index: int, items: Iterable[Any]) -> None:
    """Into the middle of a protobuf list."""
    merged = [*repeated[:index], *items, *repeated[index:]]
    del repeated[:]
    repeated.extend(merged)
