from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
from awkward import depthwise, matmul, residual

from onnxq import check, quantize
from onnxq import graph as g
from onnxq import target as targets
from onnxq.errors import OnnxqError
from onnxq.qtype import QType
from onnxq.target import Format, detect, load_target, target_names, target_text

DIGITS = Path(__file__).parents[1] / "models/digits_cnn.onnx"
MINE = """
summary = "mine"
providers = ["CPUExecutionProvider"]
opset = 17
[[rule]]
ops = ["Conv", "MatMul"]
form = "static"
activation = "s8"
weight = "s4:32"
source = "a test"
[left_float]
Softmax = "no"
[session]
"session.x64quantprecision" = "1"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, "utf-8")
    return str(path)


CPUS = [name for name in target_names() if name.startswith("cpu")]


@pytest.mark.parametrize("name", target_names())
def test_every_shipped_target_loads_and_says_where_its_rules_come_from(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.providers  # the first runs it, the others what it leaves
    assert target.summary
    for op in ("Conv", "Gemm", "MatMul", "Gather", "Add", "MaxPool"):
        for rule in target.ops.get(op, ()):
            assert (
                rule.source.split(":")[0] in ("measured", "documented")
                or "measured" in (rule.source)
                or rule.source.startswith(("a row", "fuses"))
            ), rule.source
    for op in ("Conv", "Gemm", "MatMul"):  # every one takes int8-static
        assert any(r.form == "static" and r.takes(STANDARD) for r in target.ops[op])
    assert "summary" in target_text(name)


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2"])
def test_targets_without_vnni_bound_the_pairs_of_every_kernel_that_adds_in_16_bits(
    name: str,
) -> None:
    for op in ("Conv", "Gemm", "MatMul"):
        for rule in load_target(name).ops[op]:
            # Integers alone are multiplied as uint8 by uint8, which is exact.
            exact = rule.form in ("weights", "integer") or rule.depthwise
            if rule.weight is not None and not exact and rule.takes(STANDARD):
                assert rule.pair_limit == 128, (op, rule.form)
                assert rule.activation == QType.parse("u8a")


@pytest.mark.parametrize("name", ["cpu-vnni", "cpu-arm64"])
def test_targets_that_add_in_32_bits_use_every_code(name: str) -> None:
    target = load_target(name)
    rules = [r for op in ("Conv", "Gemm", "MatMul") for r in target.ops[op]]
    assert not [r for r in rules if r.pair_limit]
    assert target.ops["Add"] == load_target("cpu").ops["Add"]


def test_the_first_rule_that_fits_the_node_is_taken() -> None:
    target = load_target("cpu")
    nodes = {n.outputs[0].name: n for n in g.load(depthwise().model).nodes}
    pointwise, deep = target.rule(nodes["a"], "static"), target.rule(nodes["d"], "static")
    assert pointwise is not None
    assert deep is not None
    assert (pointwise.pair_limit, deep.pair_limit) == (128, None)
    assert target.rule(nodes["a"], "dynamic") is None
    assert target.rule(nodes["y"], "dynamic") is not None


def test_why_a_node_stays_float() -> None:
    nodes = {n.outputs[0].name: n for n in g.load(residual().model).nodes}
    target = load_target("cpu")
    assert "ten times slower" in target.why_float(nodes["a"], "dynamic")
    assert target.why_float(nodes["r"], "static") == "cpu has no static integer form of Relu"
    assert "not of this shape" in target.why_float(g.load(matmul().model).nodes[0], "static")


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    target = load_target(written(tmp_path, MINE))
    assert (target.name, target.opset) == ("mine", 17)
    assert target.session == {"session.x64quantprecision": "1"}
    assert target.left_float == {"Softmax": "no"}
    assert target.ops["Conv"] == target.ops["MatMul"]
    assert target.ops["Conv"][0].weight == QType.parse("s4:32")


def test_a_target_inherits_what_it_does_not_mention(tmp_path: Path) -> None:
    text = 'base = "cpu"\nsummary = "s"\n' + MINE[MINE.index("[[rule]]") :]
    mine, base = load_target(written(tmp_path, text)), load_target("cpu")
    assert len(mine.ops["Conv"]) == 1
    assert mine.ops["Gemm"] == base.ops["Gemm"]
    assert mine.left_float == base.left_float | {"Softmax": "no"}
    assert mine.opset == base.opset
    assert mine.depthwise_channels == base.depthwise_channels > mine.dense_channels > 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('summary = "mine"', "", "lacks the key 'summary'"),
        ('"s4:32"', '"s4:x"', "no number format"),
        ('form = "static"', "", "form"),
        ('source = "a test"', 'source = "a"\ncolour = "red"', "colour"),
        ("[[rule]]", "[[rule", "not valid TOML"),
        ("opset = 17", "opset = 17\ndense_channels = 0", "at least 1"),
    ],
)
def test_a_broken_target_is_an_error_on_one_line(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    with pytest.raises(OnnxqError, match="target 'mine'") as error:
        load_target(written(tmp_path, MINE.replace(before, after)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_targets_are_refused_with_the_nearest() -> None:
    with pytest.raises(OnnxqError, match="nearest: cpu-vnni"):
        load_target("cpu-vnnni")
    with pytest.raises(OnnxqError, match=r"no target file 'x\.toml'"):
        load_target("x.toml")


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, "cpu-avx2"),
        ("x86_64", {"avx2", "avx512_vnni"}, "cpu-vnni"),
        ("AMD64", {"avx2", "avx_vnni"}, "cpu-vnni"),
        ("x86_64", set(), "cpu-avx2"),
        ("aarch64", {"asimd"}, "cpu-arm64"),
        ("arm64", set(), "cpu-arm64"),
    ],
)
def test_auto_reads_the_machine(
    machine: str, flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_flags", lambda: flags)
    assert detect() == expected
    assert load_target("auto").name == expected


WIDE, STANDARD, NARROW = Format(8, 16), Format(8, 8), Format(4, 8)


@pytest.mark.parametrize("name", CPUS)
def test_every_cpu_has_16_and_4_bit_rules_for_the_products_it_has_8_bit_rules_for(
    name: str,
) -> None:
    target = load_target(name)
    assert target.formats("static") == {
        *(Format(w, a) for w in (4, 8) for a in (8, 16)), Format(8, 4),
        *(Format(w, None) for w in (4, 8)), *(Format(None, a) for a in (4, 8, 16)),
    }  # fmt: skip
    assert target.formats("dynamic") == {STANDARD, NARROW}
    for op in ("Conv", "Gemm", "MatMul"):
        shapes = {
            format: {
                (r.constant_weight, r.batched)
                for r in target.ops[op]
                if r.form == "static" and r.takes(format) and not r.depthwise
            }
            for format in target.formats("static")
            if format.weight_bits and format.activation_bits
        }
        for format, found in shapes.items():
            assert found == shapes[STANDARD], (op, format)


def test_a_rule_is_taken_by_its_widths() -> None:
    target = load_target("cpu")
    node = gs.Node("Add", inputs=[gs.Variable("a"), gs.Variable("b")])
    for bits in (4, 8, 16):
        rule = target.rule(node, "static", Format(8, bits))
        assert rule is not None
        assert rule.activation is not None
        assert rule.activation.bits == bits
    assert target.rule(node, "static", Format(8, 2)) is None
    assert target.rule(node, "static", Format(8, None)) is None


def test_a_format_of_one_half_leaves_the_other_float_and_pairs_unbound() -> None:
    target = load_target("cpu")
    node = next(n for n in g.load(residual().model).nodes if n.name == "a")
    both, weights, activations, neither = (
        target.rule(node, "static", Format.parse(text)) for text in ("w8a8", "w8", "a8", "float")
    )
    assert both is not None
    assert both.pair_limit == 128
    assert weights == replace(both, activation=None, pair_limit=None)
    assert activations == replace(both, weight=None, pair_limit=None)
    assert neither is None


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w8a16", "w4a16", "w8a4", "w8", "a8", "float"])
def test_a_format_reads_what_it_writes(text: str) -> None:
    assert str(Format.parse(text)) == text


@pytest.mark.parametrize("text", ["", "8", "w", "a8w8", "w8 a8", "w8a8 ", "W8A8", "int8", "wa"])
def test_what_is_no_format_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="for example w8a8"):
        Format.parse(text)


def test_a_format_knows_the_opset_that_can_say_it() -> None:
    least = {"w8a8": 1, "w8a4": 1, "float": 1, "w4a8": 21, "w8a16": 21, "w4": 21, "w2a8": 25}
    assert {text: Format.parse(text).opset for text in least} == least


def test_a_form_that_a_target_lacks_is_not_its_base_s_and_check_warns_of_such_a_model(
    tmp_path: Path,
) -> None:
    openvino = load_target("openvino")
    forms = {rule.form for rules in openvino.ops.values() for rule in rules}
    assert forms == {"static", "dynamic", "weights"}
    quantize(DIGITS, "integer-only", output=tmp_path / "integers.onnx", check=False)
    (warning,) = check(tmp_path / "integers.onnx", target="openvino").warnings
    assert "64 bits" in warning
    with pytest.raises(OnnxqError, match=r"has no rules for w8a8 \(integer\).*64 bits"):
        quantize(DIGITS, "integer-only", target="openvino", output=tmp_path / "none.onnx")
