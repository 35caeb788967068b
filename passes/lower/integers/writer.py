"""Writes a planned body with integers alone: walks its units and keeps each tensor's codes.

Where a float tensor is asked for as codes, a QuantizeLinear makes them, and where an operator that
stays float or the world reads codes, a DequantizeLinear: at the borders of the model and nowhere
else, if every operator has an integer form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.integers.grid import Codes, Grid, Refusal
from onnxq.passes.lower.integers.group import Group, type_code
from onnxq.passes.solve.integer_planner import SIZES
from onnxq.passes.solve.units import units

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context

Lower = Callable[[Group], "gs.Variable | list[gs.Variable]"]


@dataclass
class Writer:
    """One graph or body. `left` are the nodes that stay float, with the reason."""

    graph: Graph
    body: Graph
    ctx: Context
    maker: g.Maker
    lowerings: dict[str, Lower]
    shapes: dict[str, tuple[int | str | None, ...]]
    made: dict[str, Codes] = field(default_factory=dict)  # by the name of the float tensor
    lowered: set[str] = field(default_factory=set)  # of those, what no float operator makes now
    left: dict[str, str] = field(default_factory=dict)
    tails: set[str] = field(default_factory=set)  # nodes that belong to the operator before them

    def run(self) -> int:
        """Returns the number of nodes that became integer."""
        found = units(self.graph, self.body)
        outputs = {t.name for t in self.body.outputs}
        done: list[Node] = []
        for unit in found:
            plan = self.ctx.plan.get(unit.node.name)
            if plan is None or not plan.quantized:
                if unit.op == "Identity" and unit.node.outputs[0].name in self.ctx.activations:
                    done += self._lower(Group(unit, (), self))  # a copy in the narrow format
                continue
            if unit.node.name in self.tails:
                continue
            if unit.op not in self.lowerings:
                self.left[unit.node.name] = f"no integer form of {unit.op} is known"
            else:
                done += self._lower(Group(unit, self._tail(unit.node), self))
        self._remove(done)
        self._dequantize(outputs)
        return len(done)

    def _remove(self, nodes: list[Node]) -> None:
        gone = {id(node) for node in nodes}
        for node in nodes:
            node.inputs.clear()
            node.outputs.clear()
        self.body.nodes[:] = [node for node in self.body.nodes if id(node) not in gone]

    def _tail(self, node: Node) -> tuple[Node, ...]:
        tail: list[Node] = []
        while g.is_float(node.outputs[0]) and not self.ctx.plan[node.name].output:
            reader = g.sole_consumer(self.body, node.outputs[0])
            if reader is None:
                break
            tail.append(reader)
            node = reader
        self.tails |= {n.name for n in tail}
        return tuple(tail)

    def _lower(self, group: Group) -> list[Node]:
        before, made = len(self.body.nodes), dict(self.made)
        try:
            results = self.lowerings[group.unit.op](group)
        except Refusal as refusal:
            self._remove(self.body.nodes[before:])
            self.made = made
            for node in (*group.unit.nodes, *group.tail):
                self.left[node.name] = str(refusal)
            return []
        results = results if isinstance(results, list) else [results]
        for tensor, result in zip(group.last.outputs, results, strict=False):
            params = self.ctx.activations.get(tensor.name)
            is_place = result.dtype == np.int64  # whose type nobody knew where nobody reads it
            if params is None or is_place:  # what is no float, as of a comparison, keeps its name
                _rename(result, tensor)
                continue
            result.dtype = Grid.of(params).dtype
            self.made[tensor.name] = Codes(result, Grid.of(params))
            self.lowered.add(tensor.name)
        return [*group.unit.nodes, *group.tail]

    def codes(self, tensor: gs.Tensor) -> Codes:
        """The codes of a float tensor; those that nobody has made yet are quantized here."""
        if tensor.name not in self.made:
            params = self.ctx.activations.get(tensor.name)
            if params is None:
                raise Refusal(f"the range of {tensor.name!r} is not known")
            grid = Grid.of(params)
            self.made[tensor.name] = Codes(self.quantize(tensor, grid), grid)
        return self.made[tensor.name]

    def quantize(self, x: gs.Tensor, grid: Grid) -> gs.Variable:
        """The codes of a float tensor."""
        name = x.name
        kind = g.dtype(x)
        if kind is not None and kind != np.float32:
            x = self.maker.emit(self.body, "Cast", [x], name, to=type_code(np.float32))
        stored = np.uint8 if grid.narrow else np.int16
        scale = self.maker.shared(f"{name}_scale", np.asarray(grid.scale, np.float32))
        zero = self.maker.shared(f"{name}_zero_point", np.asarray(grid.zero, stored))
        codes = self.maker.emit(self.body, "QuantizeLinear", [x, scale, zero], name)
        if not grid.narrow:
            codes = self.maker.emit(self.body, "Cast", [codes], name, to=type_code(np.int32))
        codes.dtype = grid.dtype
        return codes

    def _dequantize(self, outputs: set[str]) -> None:
        """Float tensors for those who still read them, under their own names."""
        tensors = g.tensors(self.graph)
        own = {id(node) for node in self.body.nodes}
        for name, codes in self.made.items():
            tensor = tensors.get(name)
            if tensor is None or name not in self.lowered:
                continue
            for reader in list(tensor.outputs):
                if reader.op in SIZES and id(reader) in own:
                    g.replace_input(reader, tensor, codes.tensor)
            if not tensor.outputs and name not in outputs:
                continue
            scale = self.maker.shared(f"{name}_scale", np.asarray(codes.grid.scale, np.float32))
            operands = [codes.tensor, scale]
            if codes.grid.narrow:
                zero = np.asarray(codes.grid.zero, np.uint8)
                operands.append(self.maker.shared(f"{name}_zero_point", zero))
            real = self.maker.emit(self.body, "DequantizeLinear", operands, name)
            kind = g.dtype(tensor)
            if kind is not None and kind != np.float32:
                real = self.maker.emit(self.body, "Cast", [real], name, to=type_code(kind))
            real.inputs[0].outputs[0] = tensor


def _rename(result: gs.Variable, tensor: gs.Variable) -> None:
    """Let the node that makes `result` make `tensor` instead."""
    maker = tensor.inputs[0]
    maker.outputs[maker.outputs.index(tensor)] = gs.Variable(f"{tensor.name}_float")
    node = result.inputs[0]
    node.outputs[node.outputs.index(result)] = tensor
