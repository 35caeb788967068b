"""What docs/integer.md shows of real models: pictures, constants, values worked out, functions.

    python scripts/integer_page.py [FOLDER]

quantizes two models of models/ with the preset `integer-only`, takes a block out of each, draws it,
and writes anew what stands in the page between `<!-- generated: NAME -->` and `<!-- end -->`.
FOLDER is docs/ unless told; what a person wrote is kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx
from accuracy import markdown_table
from integer_block import Block
from integer_drawing import draw
from integer_worked import convolution, gelu, layer_norm, softmax

from onnxq.ops import EXP_BITS, EXP_FRACTION, FUNCTIONS, UNIT_BITS
from onnxq.ops.transcendental import ERF_A, ERF_B, EXP_A, EXP_B, EXP_C, EXP_DROP

FOLDER = Path(__file__).parents[1] / "docs"
SAMPLE = 1  # of the calibration samples: a text with padding
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ["float operator", "function", "factor", "M", "m", "n", "z_y", "codes"]


def main(folder: Path) -> None:
    conv = Block.of("digits_cnn", "/features/features.1/", SAMPLE)
    attention = Block.of("encoder_classifier", "blocks.0", SAMPLE)
    draw(conv, folder / "integer-conv.svg")
    draw(attention, folder / "integer-attention.svg")
    regions: dict[str, Callable[[], str]] = {
        "conv-constants": lambda: constants(conv),
        "conv-worked": lambda: fenced(convolution(conv)),
        "attention-constants": lambda: constants(attention),
        "softmax-worked": lambda: fenced(softmax(attention)),
        "layer-norm-worked": lambda: fenced(layer_norm(attention)),
        "gelu-worked": lambda: fenced(gelu(attention)),
        "fixed-point": fixed_point,
        "functions": lambda: fenced(list(functions())),
    }
    page = folder / "integer.md"
    text = page.read_text("utf-8")
    page.write_text(REGION.sub(lambda m: m[1] + regions[m[2]]() + "\n" + m[3], text), "utf-8")


def fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def constants(block: Block) -> str:
    """Every factor of a block; of those by channel the first, and how many there are."""
    rows = [row for node in block.nodes for row in factors(block, node)]
    return markdown_table(COLUMNS, rows)


def factors(block: Block, node: onnx.NodeProto) -> Iterator[list[str]]:
    operands = dict(block.operands(node))
    for name, tensor in operands.items():
        if not name.endswith("multiplier") or tensor not in block.constants:
            continue
        shift = name.replace("multiplier", "shift")
        m = block.values[tensor]
        n = block.constant(node, shift if shift in operands else "shift")
        first, exponent = int(m.flat[0]), int(n.flat[0])
        more = f", first of {m.size}" if m.size > 1 else ""
        yield [
            block.title(node.output[0]), node.op_type, f"`{name}`{more}",
            f"{first / 2**exponent:.4e}", str(first), str(exponent),
            str(block.constant(node, "y_zero")),
            f"{block.constant(node, 'low')} … {block.constant(node, 'high')}",
        ]  # fmt: skip


def fixed_point() -> str:
    rows = [
        ["exp", "fraction bits of p", str(EXP_FRACTION), ""],
        ["exp", "a", str(EXP_A), f"{EXP_A / 2**EXP_FRACTION:.6f}"],
        ["exp", "b", str(EXP_B), f"{EXP_B / 2**EXP_FRACTION:.6f}"],
        ["exp", "c", str(EXP_C), f"{EXP_C / 2**EXP_BITS:.6f}"],
        ["exp", "bits dropped of a (b - f)²", str(EXP_DROP), ""],
        ["exp", "1", str(1 << EXP_BITS), "1"],
        ["erf", "a", str(ERF_A), f"{ERF_A / 2**UNIT_BITS:.6f}"],
        ["erf", "b", str(ERF_B), f"{ERF_B / 2**UNIT_BITS:.6f}"],
        ["erf, σ, normalized values", "1", str(1 << UNIT_BITS), "1"],
    ]
    return markdown_table(["function", "constant", "integer", "real"], rows)


def functions() -> Iterator[str]:
    """Signature and meaning of each function, as they stand in the file."""
    for each in FUNCTIONS.values():
        attributes = [*each.attribute, *(a.name for a in each.attribute_proto)]
        settings = f" <{', '.join(attributes)}>" if attributes else ""
        yield f"{each.name}{settings} ({', '.join(each.input)}) → {', '.join(each.output)}"
        yield from (f"    {line}" for line in each.doc_string.splitlines())
        yield ""


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
