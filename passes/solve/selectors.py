"""Which nodes a recipe means: patterns over node names and operator types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from onnxq import graph as g
from onnxq.errors import OnnxqError, suggest
from onnxq.graph import Graph, Node
from onnxq.graph.patterns import find, projections
from onnxq.target import Format

ATTENTION = "part:attention"  # layers that make its queries, keys and values, or read its output


class Selector:
    """Globs, or regular expressions after `re:`. One that matches nothing is an error."""

    def __init__(self, patterns: tuple[str, ...], graph: Graph) -> None:
        self.patterns = patterns
        nodes = list(g.walk(graph))
        for pattern in patterns:
            if not any(_matches(pattern, node) for node in nodes):
                raise no_match(pattern, nodes)

    def __call__(self, node: Node) -> bool:
        return any(_matches(pattern, node) for pattern in self.patterns)

    def __bool__(self) -> bool:
        return bool(self.patterns)


def formats_by_node(layers: Sequence[str], graph: Graph) -> dict[str, Format]:
    """Node name → format, of `pattern=format`; the last that matches wins.

    A pattern that is a node's name means this node alone, whatever characters are in it, and
    `part:attention` the layers into and out of attention. Raises
    OnnxqError for what is no format and for a pattern that matches nothing.
    """
    nodes = list(g.walk(graph))
    found: dict[str, Format] = {}
    for layer in layers:
        pattern, format = split(layer)
        named = [node for node in nodes if node.name == pattern]
        if pattern == ATTENTION:
            parts = projections(find(graph))
            named = [node for node in nodes if node.name in parts]
            if not named:
                raise OnnxqError(
                    f"no attention was found in this model, which {layer!r} is about; quantize it "
                    "with another preset, such as int4"
                )
        matching = named or [node for node in nodes if _matches(pattern, node)]
        if not matching:
            raise no_match(pattern, nodes)
        found |= {node.name: format for node in matching}
    return found


def split(layer: str) -> tuple[str, Format]:
    """Pattern and format of `pattern=format`; the pattern may hold `=` itself."""
    pattern, equals, text = layer.rpartition("=")
    if not equals or not pattern:
        raise OnnxqError(f"assign.layers wants pattern=format, not {layer!r}")
    try:
        return pattern, Format.parse(text)
    except ValueError as error:
        raise OnnxqError(f"assign.layers, {layer!r}: {error}") from None


def no_match(pattern: str, nodes: Sequence[Node]) -> OnnxqError:
    known = {n.op for n in nodes} | {n.name for n in nodes if g.weight_view(n) or n.op == "MatMul"}
    return OnnxqError(f"{pattern!r} matches no node name or operator{suggest(pattern, known)}")


def _matches(pattern: str, node: Node) -> bool:
    if pattern.startswith("re:"):
        try:
            return any(re.search(pattern[3:], text) for text in (node.name, node.op))
        except re.error as error:
            raise OnnxqError(f"{pattern!r} is no regular expression: {error}") from None
    return any(text == pattern or fnmatchcase(text, pattern) for text in (node.name, node.op))
