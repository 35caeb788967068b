"""An integer block as boxes and arrows, in SVG: read from the model, placed by its edges.

Operators in a row, of which each alone reads the one before, share a card. Cards stand in ranks by
their longest path from the block's inputs; what runs beside the first branch, in columns of its
own. The picture has a ground of its own, so that it reads alike on dark pages and light ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import onnx
from integer_block import MOVERS, Array, Block, short

from onnxq.ops import DOMAIN

FOLLOWS = ("Add", "Requantize", "ShiftRequantize", *MOVERS)  # on the card of what they read
WIDTH, GAP, LANE, MARGIN = 340, 26, 36, 14  # pixels; a lane left of the cards, for long edges
LINE, APART, PAD, BETWEEN = 13, 4, 6, 30
CHARACTERS = 50  # of small type, on a line of a card
ATTRIBUTES = ("kernel_shape", "pads", "strides", "group", "perm", "axis", "keepdims")
COLORS = {"u8": "#0b4fa3", "s16": "#b45309", "i32": "#4b5563"}
STYLE = """
text { font-family: 'DejaVu Sans Mono', ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
       font-size: 10px; fill: #374151 }
.title { fill: #6b7280; font-style: italic }
.operator { font-size: 12px; font-weight: bold; fill: #111827 }
.function { font-size: 12px; font-weight: bold; fill: #6d28d9 }
.kind { font-weight: bold }
.edge { fill: none; stroke: #4b5563; stroke-width: 1.3; marker-end: url(#arrow) }
.card { fill: #ffffff; stroke: #9ca3af }
.input { fill: #eef2f7; stroke: #9ca3af }
"""


@dataclass
class Card:
    """Operators drawn as one box, or a tensor that enters the block."""

    nodes: list[onnx.NodeProto]
    tensor: str  # its result
    sources: list[Card] = field(default_factory=list)
    column: int = 0
    rank: int = 0
    top: float = 0

    lines: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Of each operator its name, the kind of its result and its parameters."""

    @property
    def height(self) -> float:
        lines = 1 + sum(1 + len(text) for _, _, text in self.lines)
        return 2 * PAD + LINE * lines + APART * len(self.lines)

    @property
    def left(self) -> float:
        return MARGIN + LANE + self.column * (WIDTH + GAP)

    @property
    def center(self) -> float:
        return self.left + WIDTH / 2

    @property
    def middle(self) -> float:
        return self.top + self.height / 2

    @property
    def bottom(self) -> float:
        return self.top + self.height


def draw(block: Block, path: Path) -> None:
    cards = make_cards(block)
    place(cards)
    taken: set[tuple[int, int]] = {(card.column, card.rank) for card in cards}
    edges = [edge(a, card, taken) for card in cards for a in card.sources]
    boxes = [box(block, card) for card in cards]
    width = max(card.left for card in cards) + WIDTH + MARGIN
    last = max(card.bottom for card in cards)
    height = last + 3 * LINE + MARGIN
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">\n<style>{STYLE}</style>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#4b5563"/></marker>'
        f'</defs>\n<rect width="100%" height="100%" rx="8" fill="#f8fafc"/>\n'
        + "\n".join([*edges, *boxes, legend(last + 2 * LINE)])
        + "\n</svg>\n",
        "utf-8",
    )


# ── cards ────────────────────────────────────────────────────────────────────────────────────────


def make_cards(block: Block) -> list[Card]:
    cards: list[Card] = []
    of: dict[str, Card] = {}  # by the tensor that it makes, inside it too

    def source(tensor: str) -> Card:
        if tensor not in of:
            of[tensor] = Card([], tensor, lines=[(block.title(tensor), block.kind(tensor), [])])
            cards.append(of[tensor])
        return of[tensor]

    for node in block.nodes:
        moving = [t for t in node.input if t not in block.constants and not is_size(block, t)]
        before = of.get(moving[0])
        alone = len(moving) == 1 and len(block.readers(moving[0])) == 1
        if before is not None and before.nodes and alone and node.op_type in FOLLOWS:
            card = before
        else:
            card = Card([], "", [source(t) for t in moving])
            cards.append(card)
        card.nodes.append(node)
        card.tensor = node.output[0]
        operands = {t: title(block, of[t]) for t in moving} if len(moving) > 1 else {}
        said = parameters(block, node, operands)
        card.lines.append((node.op_type, block.kind(card.tensor), said))
        of[card.tensor] = card
    return cards


def is_size(block: Block, tensor: str) -> bool:
    """Whether a tensor is a shape, computed beside the codes."""
    return block.values[tensor].dtype == np.int64


def title(block: Block, card: Card) -> str:
    """The last operator of the float model that a card stands for."""
    named = [node.output[0] for node in card.nodes if node.op_type not in MOVERS]
    return block.title(named[-1] if named else card.tensor)


def parameters(block: Block, node: onnx.NodeProto, operands: dict[str, str]) -> list[str]:
    """Operands and attributes, packed into lines; of `operands` by tensor, where they come from."""
    said: list[str] = []
    for name, tensor in block.operands(node):
        if name == "low":
            said.append(f"codes {block.values[tensor]} … {block.constant(node, 'high')}")
        elif tensor in block.constants and name != "high":
            label = "bias" if node.op_type == "Add" else name
            said.append(f"{label} {number(block.values[tensor])}")
        elif tensor in operands:
            said.append(f"{name} = {operands[tensor]}")
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name in ATTRIBUTES and value not in (1, [1, 1]):
            said.append(f"{attribute.name} {value}")
    lines: list[str] = []
    for each in said:
        if lines and len(lines[-1]) + len(each) + 3 <= CHARACTERS:
            lines[-1] += f" · {each}"
        else:
            lines.append(each)
    return lines


def number(value: Array) -> str:
    if not value.ndim:
        return str(value)
    shape = "×".join(map(str, value.shape))
    ends = "" if value.dtype == np.uint8 else f" {value.min()} … {value.max()}"
    return f"{short(value.dtype)}[{shape}]{ends}"


# ── places ───────────────────────────────────────────────────────────────────────────────────────


def place(cards: list[Card]) -> None:
    inherited: set[int] = set()  # ids of cards below which another goes on
    for card in cards:
        if not card.nodes:
            continue
        card.rank = 1 + max(source.rank for source in card.sources)
        heir = next((s for s in card.sources if id(s) not in inherited), None)
        if heir is not None and heir.column == min(s.column for s in card.sources):
            card.column = heir.column
            inherited.add(id(heir))
        else:
            card.column = 1 + max(c.column for c in cards if c.rank == card.rank and c is not card)
    for card in cards:  # what enters later stands beside its reader
        readers = [c for c in cards if any(s is card for s in c.sources)]
        if not card.nodes and readers[0].rank > 1:
            card.rank, card.column = readers[0].rank, 1
    top: float = MARGIN
    for rank in range(1 + max(card.rank for card in cards)):
        row = [card for card in cards if card.rank == rank]
        tallest = max(card.height for card in row)
        for card in row:
            card.top = top + (0 if card.nodes else (tallest - card.height) / 2)
        top += tallest + BETWEEN


# ── ink ──────────────────────────────────────────────────────────────────────────────────────────


def edge(a: Card, b: Card, taken: set[tuple[int, int]]) -> str:
    """From card to card: straight, round a corner, or by the lane where others are between."""
    right = a.left + WIDTH
    if a.column == b.column and b.rank == a.rank + 1:
        path = f"M{a.center} {a.bottom} V{b.top}"
    elif a.column == b.column:
        lane = a.left - LANE / 2
        start, end = a.top + 0.7 * a.height, b.top + 0.3 * b.height
        path = f"M{a.left} {start} H{lane} V{end} H{b.left}"
    elif a.column < b.column:
        path = f"M{right} {a.middle} H{b.center} V{b.top}"
    elif a.rank == b.rank:
        path = f"M{a.left} {a.middle} H{b.left + WIDTH}"
    else:
        path = f"M{a.center} {a.bottom} V{b.middle} H{b.left + WIDTH}"
    return f'<path class="edge" d="{path}"/>'


def box(block: Block, card: Card) -> str:
    kind = "card" if card.nodes else "input"
    ink = [
        f'<rect class="{kind}" x="{card.left}" y="{card.top}" width="{WIDTH}" '
        f'height="{card.height}" rx="6"/>'
    ]
    above = title(block, card) if card.nodes else "enters the block"
    y = card.top + PAD + LINE - 4
    ink.append(text(card.left + 9, y, "title", above))
    for (name, result, said), node in zip(card.lines, card.nodes or [None], strict=True):
        y += LINE + APART
        style = "function" if node is not None and node.domain == DOMAIN else "operator"
        ink.append(text(card.left + 9, y, style, name))
        color = COLORS[result.split()[0]]
        ink.append(
            f'<text class="kind" x="{card.left + WIDTH - 9}" y="{y}" text-anchor="end" '
            f'style="fill:{color}">{escape(result)}</text>'
        )
        for line in said:
            y += LINE
            ink.append(text(card.left + 18, y, "", line))
    return "\n".join(ink)


def text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def legend(y: float) -> str:
    x = MARGIN + LANE
    return (
        f'<text x="{x}" y="{y}"><tspan style="font-weight:bold;fill:#6d28d9">violet</tspan> '
        'function of ai.onnxq · <tspan style="font-weight:bold;fill:#111827">black</tspan> '
        "operator of ONNX</text>\n"
        f'<text x="{x}" y="{y + LINE}"><tspan class="kind" style="fill:{COLORS["u8"]}">u8</tspan> '
        f'codes of 8 bits · <tspan class="kind" style="fill:{COLORS["s16"]}">s16 in i32</tspan> '
        f'of 16 · <tspan class="kind" style="fill:{COLORS["i32"]}">i32</tspan> sums</text>'
    )
