"""Verdicts: against the CPU provider for real, and from the data alone for the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import model, normal, pipeline, relative
from places import place
from typer.testing import CliRunner

import onnxq
from onnxq import graph as g
from onnxq.cli import app
from onnxq.devices import Answer, Job, Place, ask, units
from onnxq.devices.happened import compare
from onnxq.devices.judge import judge
from onnxq.devices.verdicts import CheckReport
from onnxq.errors import OnnxqError
from onnxq.target import Support, Target, load_target, target_names

NPU = Target(
    name="npu", summary="", providers=("QNNExecutionProvider",), opset=13, ops={},
    fixed_shapes=True, takes_units=True,
    supports={
        "Conv": (
            Support("", codes=("uint8",), weights=("int8",)),
            Support("", types=("float32",), ranks=(4, 4)),
        ),
        "Relu": (Support("", types=("float32",)),),
        "QuantizeLinear": (Support("", types=("float32",)),),
        "DequantizeLinear": (Support("", types=("uint8", "int8")),),
        "Pad": (Support("", types=("float32",), attributes={"mode": ["constant"]}),),
        "MatMul": (Support("", types=("float32",), operand_ranks=(2, 2)),),
        "Unsqueeze": (Support("", types=("float32",), ranks=(0, 3)),),
        "Gelu": (Support("", types=("float32",)),),
        "Round": (Support("", types=("float32",), fails="it stops"),),
    },
)  # fmt: skip

OPENVINO = load_target("openvino")


def save(proto: onnx.ModelProto | g.Graph, folder: Path) -> Path:
    path = folder / "m.onnx"
    onnx.save(proto if isinstance(proto, onnx.ModelProto) else g.to_proto(proto), path)
    return path


def kinds(proto: onnx.ModelProto | g.Graph, target: Target) -> dict[str, str]:
    """The verdict of each operator; of one that comes twice, the last."""
    graph = g.load(proto) if isinstance(proto, onnx.ModelProto) else proto
    return {verdict.op: verdict.kind for verdict in judge(graph, target)}


def custom() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "here": 1]> g (float[2] x) => (float[2] y) '
        "{ y = here.Twice (x) }"
    )


@pytest.mark.parametrize("name", target_names())
def test_codes_of_any_rank_are_judged(name: str) -> None:
    for shape in ("[]", "[4]", "[1, 4, 2, 2]"):
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g (uint8{shape} x) => (float{shape} y) '
            "<float s = {0.5}, uint8 z = {3}> { y = DequantizeLinear (x, s, z) }"
        )
        assert kinds(proto, load_target(name)).keys() == {"DequantizeLinear"}


# ── the CPU provider, really asked ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("preset", ["int8-static", "int8-symmetric", "int16x8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["conv_bn_relu6", "gemm", "moves", "if_body", "tied"])
def test_verdicts_are_what_the_cpu_does(name: str, preset: str, tmp_path: Path) -> None:
    case = ZOO[name]()
    if (name, preset) == ("if_body", "int8-symmetric"):
        pytest.xfail("of signed codes the runtime leaves a MatMul float inside a body")
    try:
        graph = pipeline(case.model, case.feeds, preset).graph
    except OnnxqError:
        pytest.skip("the preset refuses the graph")
    report = onnxq.check(save(graph, tmp_path), target="cpu", run=True)
    assert not report.error
    wrong = [v for v in report.verdicts if v.agrees is False]
    assert not wrong
    assert report.agreement[1] > 0


def test_a_layer_in_integers_is_seen_to_be(tmp_path: Path) -> None:
    case = ZOO["conv_bn_relu6"]()
    graph = pipeline(case.model, case.feeds, "int8-static").graph
    report = onnxq.check(save(graph, tmp_path), target="cpu", run=True)
    conv = next(v for v in report.verdicts if v.op == "Conv")
    assert (conv.kind, conv.happened) == ("integer", "QLinearConv, on codes")


def test_sixteen_bits_are_not_fused(tmp_path: Path) -> None:
    case = ZOO["conv_bn_relu6"]()
    graph = pipeline(case.model, case.feeds, "int16x8").graph
    report = onnxq.check(save(graph, tmp_path), target="cpu", run=True)
    conv = next(v for v in report.verdicts if v.op == "Conv")
    assert conv.kind == "not fused"
    assert "uint16" in conv.reason
    assert conv.node in conv.fix
    assert "on codes" not in conv.happened


def test_bodies_are_judged_too(tmp_path: Path) -> None:
    proto = ZOO["if_body"]().model
    inner = {node.name for body in g.subgraphs(g.load(proto)) for node in body.nodes}
    report = onnxq.check(save(proto, tmp_path), target="cpu")
    assert {verdict.node for verdict in report.verdicts} == inner


def test_a_custom_operator_wants_its_library(tmp_path: Path) -> None:
    proto = custom()
    verdict = onnxq.check(save(proto, tmp_path), target="cpu").verdicts[0]
    assert verdict.kind == "will not run"
    assert "--custom-ops" in verdict.fix


# ── data alone ───────────────────────────────────────────────────────────────────────────────────


def conv_qdq(weight: str = "int8", activation: str = "uint8", relu: str = "") -> onnx.ModelProto:
    zero = {"uint8": 128, "int8": 0, "uint16": 32768}[activation]
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[1, 2, 6, 6] x) => (float[1, 2, 6, 6] y)
    <float s = {{0.1}}, {activation} z = {{{zero}}}, float ws = {{0.1}}, {weight} wz = {{0}}> {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      w = DequantizeLinear (wq, ws, wz)
      c = Conv (d, w)
      {relu}
      cq = QuantizeLinear ({"r" if relu else "c"}, s, z)
      y = DequantizeLinear (cq, s, z)
    }}"""
    proto = onnx.parser.parse_model(text)
    codes = np.random.default_rng(0).integers(0, 5, (2, 2, 1, 1)).astype(weight)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(codes, "wq"))
    return proto


def test_a_layer_between_quantizers_is_one_with_them() -> None:
    assert kinds(conv_qdq(), NPU) == {
        "QuantizeLinear": "runs", "DequantizeLinear": "runs", "Conv": "integer",
    }  # fmt: skip


def test_a_unit_of_other_codes_falls_back_as_a_whole() -> None:
    found = kinds(conv_qdq(activation="uint16"), NPU)
    assert found == dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "Conv"), "falls back")
    found = kinds(conv_qdq(weight="uint8"), NPU)
    assert found["Conv"] == "falls back"


def test_a_relu_that_codes_cannot_say_keeps_the_layer_float() -> None:
    target = load_target("cpu")
    assert kinds(conv_qdq(activation="int8", relu="r = Relu (c)"), target)["Conv"] == "runs"
    assert kinds(conv_qdq(activation="int8"), target)["Conv"] == "integer"


def test_open_dimensions_leave_all_to_the_cpu() -> None:
    proto = model("(float[n, 2, 6, 6] x) => (float[n, 2, 6, 6] y) { y = Relu (x) }")
    (verdict,) = judge(g.load(proto), NPU)
    assert verdict.kind == "falls back"
    assert "--dim n=" in verdict.fix


def test_ranks_attributes_and_failures() -> None:
    w = normal(3, 3)
    assert kinds(model("(float[1, 2, 6] x) => (float[a] y) { y = Conv (x, w) }", w=normal(2, 2, 3)),
                 NPU) == {"Conv": "falls back"}  # fmt: skip
    rank_4 = model(
        "(float[1, 2, 6, 6] x) => (float[a] y) { y = Conv (x, w) }", w=normal(2, 2, 3, 3)
    )
    assert kinds(rank_4, NPU) == {"Conv": "runs"}
    for mode, kind in (("constant", "runs"), ("edge", "falls back")):
        proto = model(f'(float[3] x) => (float[a] y) {{ y = Pad <mode = "{mode}"> (x, p) }}',
                      p=np.array([1, 1]))  # fmt: skip
        assert kinds(proto, NPU) == {"Pad": kind}
    assert kinds(model("(float[2, 3] x) => (float[a] y) { y = MatMul (x, w) }", w=w), NPU) == {
        "MatMul": "runs"
    }
    stack = model("(float[4, 2, 3] x, float[4, 3, 3] v) => (float[a] y) { y = MatMul (x, v) }")
    assert kinds(stack, NPU) == {"MatMul": "falls back"}
    for axes, kind in (([0], "runs"), ([0, 1], "falls back")):  # to rank 3, and to rank 4
        made = ", ".join("abcd"[: 2 + len(axes)])
        text = f"(float[2, 3] x) => (float[{made}] y) {{ y = Unsqueeze (x, w) }}"
        proto = model(text, w=np.array(axes))
        assert kinds(proto, NPU) == {"Unsqueeze": kind}
    (verdict,) = judge(g.load(model("(float[3] x) => (float[3] y) { y = Round (x) }")), NPU)
    assert (verdict.kind, verdict.reason) == ("will not run", "it stops")


def test_what_is_constant_is_folded() -> None:
    proto = model("(float[3] x) => (float[3] y) { v = Exp (w) y = Add (x, v) }", w=normal(3))
    found = judge(g.load(proto), replace(NPU, supports={}))
    assert [v.kind for v in found] == ["folded", "runs"]


def test_what_fails_as_it_stands_fails_between_codes() -> None:
    stops = replace(NPU.supports["Conv"][1], attributes={"group": [1]}, fails="it stops")
    npu = replace(NPU, supports=NPU.supports | {"Conv": (stops, *NPU.supports["Conv"])})
    proto = conv_qdq()
    assert kinds(proto, npu)["Conv"] == "integer"
    (conv,) = [node for node in proto.graph.node if node.op_type == "Conv"]
    conv.attribute.append(onnx.helper.make_attribute("group", 1))
    assert kinds(proto, npu)["Conv"] == "will not run"


def test_a_branch_that_is_known_takes_the_place_of_its_if() -> None:
    """As in exported recurrent networks: whether to squeeze depends on a shape, and the next such
    question on what the first left."""
    text = """(float[2, 1, 3] x) => (float[a] y) {
      shape = Shape (x)
      size = Gather (shape, one)
      single = Equal (size, one)
      flat = If (single) <
        then_branch = g1 () => (float[a] out) { out = Squeeze (x, axis) },
        else_branch = g2 () => (float[b] out) { out = Round (x) }
      >
      rank = Size (flat)
      six = Equal (rank, number)
      y = If (six) <
        then_branch = g3 () => (float[a] out) { t = Relu (flat) out = Relu (t) },
        else_branch = g4 () => (float[b] out) { t = Round (flat) out = Round (t) }
      >
    }"""
    npu = replace(NPU, supports=NPU.supports | {"Squeeze": NPU.supports["Relu"]})
    for number, expected in ((6, {"Relu": "runs"}), (7, {"Round": "will not run"})):
        proto = model(text, one=np.array([1]), axis=np.array([1]), number=np.array(number))
        graph = g.load(proto)
        found = judge(graph, npu)
        assert [v.node for v in found] == [node.name for node in g.walk(graph)]
        assert {v.op: v.kind for v in found if v.kind != "folded"} == {"Squeeze": "runs"} | expected


def test_a_provider_of_units_takes_control_flow_whole_or_not_at_all() -> None:
    text = """(float[2, 3] x, bool choice) => (float[2, 3] y) {
      y = If (choice) <
        then_branch = g1 () => (float[2, 3] a) { h = OPERATOR (x) a = Relu (h) },
        else_branch = g2 () => (float[2, 3] b) {
          b = If (choice) <
            then_branch = g3 () => (float[2, 3] c) { c = Relu (x) },
            else_branch = g4 () => (float[2, 3] d) { d = Relu (x) }
          >
        }
      >
    }"""
    npu = replace(NPU, supports=NPU.supports | {"If": (Support("", types=("bool",)),)})
    for operator, kind in (("Relu", "runs"), ("Sin", "falls back")):
        found = judge(g.load(model(text.replace("OPERATOR", operator))), npu)
        outer = [v.kind for v in found if v.op != "Sin"]
        assert outer == [kind] * len(outer)
    found = judge(g.load(model(text.replace("OPERATOR", "Sin"))), replace(npu, takes_units=False))
    assert [v.kind for v in found if v.op == "Relu"] == ["runs"] * 3


@pytest.mark.parametrize(
    ("branch", "kind"),
    [
        ("h = Relu (x) a = Abs (h)", "runs"),
        ("a = Hardmax (x)", "falls back"),
        ("h = Relu (x) a = Hardmax (h)", "will not run"),  # measured: it does not load
    ],
)
def test_openvino_cannot_take_a_part_of_a_branch(branch: str, kind: str) -> None:
    text = f"""(float[2, 3] x, bool choice) => (float[2, 3] y) {{
      y = If (choice) <
        then_branch = g1 () => (float[2, 3] a) {{ {branch} }},
        else_branch = g2 () => (float[2, 3] b) {{ b = Neg (x) }}
      >
    }}"""
    assert kinds(model(text), OPENVINO)["If"] == kind


@pytest.mark.parametrize(
    ("axis", "length", "kind"),
    [(0, 32, "runs"), (-2, 32, "runs"), (1, 40, "will not run"), (2, 32, "will not run")],
)
def test_openvino_wants_whole_blocks_along_two_axes(axis: int, length: int, kind: str) -> None:
    shape = [32, 32] if axis < 2 else [1, 2, 32]
    shape[axis] = length
    few = [-(-size // 16) if k == axis % len(shape) else size for k, size in enumerate(shape)]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (uint4{shape} x, float{few} s)
        => (float{shape} y) {{ y = DequantizeLinear <axis = {axis}, block_size = 16> (x, s) }}"""
    )
    assert kinds(proto, OPENVINO)["DequantizeLinear"] == kind


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [  # measured, all of them
        ("h = Slice (x, from, to) y = Abs (h)", "falls back"),
        ("h = Sin (x) y = Slice (h, from, to)", "runs"),
        ("h = Slice (x, from, to) i = Abs (h) j = Neg (i) y = Sin (j)", "runs"),
        ("h = Cast <to = 10> (x) i = Cast <to = 1> (h) y = Sin (i)", "falls back"),
        ("y = Slice (x, from, to) v = Sin (x)", "runs"),
        ("v = Sin (x) y = Slice (x, from, to)", "falls back"),
        ("h = Pad (x, ends) y = Conv (h, w)", "runs"),
        ("h = Pad (x, ends) y = Sin (h)", "falls back"),
    ],
)
def test_openvino_takes_few_small_models_that_begin_oddly(nodes: str, kind: str) -> None:
    values = {
        "from": np.array([0]), "to": np.array([2]), "ends": np.array([0, 0, 0, 0, 0, 1]),
        "w": normal(2, 3, 2),
    }  # fmt: skip
    outputs = "(float y, float v)" if "v = " in nodes else "(float y)"
    found = kinds(model(f"(float[2, 3, 4] x) => {outputs} {{ {nodes} }}", **values), OPENVINO)
    assert {k for op, k in found.items() if op != "Pad"} == {kind}


def test_a_quantizer_without_company_falls_back() -> None:
    text = """(float[2, 3] x) => (uint8[3, 2] y) {
      q = QuantizeLinear (x, scale, zero)
      y = Transpose (q)
    }"""
    values = {"scale": np.float32(0.1), "zero": np.uint8(3)}
    assert kinds(model(text, **values), NPU)["QuantizeLinear"] == "falls back"
    after_relu = text.replace("q = QuantizeLinear (x", "r = Relu (x) q = QuantizeLinear (r")
    assert kinds(model(after_relu, **values), NPU)["QuantizeLinear"] == "runs"


def test_the_erf_of_a_gelu_is_one_with_it() -> None:
    text = """(float[2, 3] x) => (float[2, 3] y) {
      d = Div (x, root) e = Erf (d) p = Add (e, one) m = Mul (x, p) y = Mul (m, half) }"""
    parts = {"root": np.sqrt(2), "one": 1, "half": 0.5}
    proto = model(text, **{name: np.array(value, np.float32) for name, value in parts.items()})
    assert kinds(proto, NPU)["Erf"] == "runs"
    alone = model("(float[2, 3] x) => (float[2, 3] y) { y = Erf (x) }")
    assert kinds(alone, NPU)["Erf"] == "falls back"


def test_nodes_elsewhere_are_counted_under_any_name() -> None:
    """The runtime names what was in a branch anew."""
    graph = g.load(conv_qdq())
    report = CheckReport("m", "npu", NPU.providers[0], judge(graph, NPU))
    who = {"_if_then_branch_token_0_LSTM": "CPUExecutionProvider"}
    compare(report, graph, Place("QNNExecutionProvider"), Answer(version="1", placement=who))
    assert report.elsewhere == 1


def test_what_happened_stands_beside_the_verdict() -> None:
    graph = g.load(conv_qdq())
    report = CheckReport("m", "npu", NPU.providers[0], judge(graph, NPU))
    names = [verdict.node for verdict in report.verdicts]
    who = dict.fromkeys(names[:-1], "QNNExecutionProvider") | {names[-1]: "CPUExecutionProvider"}
    who[f"{names[3]}_token_7"] = who.pop(names[3])  # as the runtime names what it lays out anew
    place = Place("QNNExecutionProvider")
    compare(report, graph, place, Answer(stage="", version="1", placement=who))
    assert [v.agrees for v in report.verdicts] == [True] * (len(names) - 1) + [False]
    assert report.agreement == (len(names) - 1, len(names))


def test_codes_are_read_through_what_quantizers_are_moved_past() -> None:
    proto = conv_qdq(relu="r = Transpose (c)")
    graph = g.load(proto)
    conv = next(node for node in graph.nodes if node.op == "Conv")
    units.give_types(graph)
    around = units.unit(graph, conv, units.fixed_tensors(graph), units.own_nodes(graph))
    assert (around.activation, around.weight, around.result) == ("uint8", "int8", "uint8")


def test_what_float_outruns_is_warned_of(tmp_path: Path) -> None:
    path = save(ZOO["gemm"]().model, tmp_path)
    quick = onnxq.check(path, target="web-wasm").warnings
    slow = replace(load_target("web-wasm"), slow={"Gemm": "take another preset"})
    found = onnxq.check(path, target=slow).warnings
    assert [*found] == [*quick, "Gemm is slow on web-wasm: take another preset"]
    assert "int8-weights" in load_target("web-wasm").slow["MatMulNBits"]


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def test_the_command_says_why_and_stops_with_1(tmp_path: Path) -> None:
    proto = custom()
    done = CliRunner().invoke(app, ["check", str(save(proto, tmp_path)), "--target", "cpu"])
    assert done.exit_code == 1
    assert "domain 'here'" in done.stdout
    done = CliRunner().invoke(app, ["check", str(save(conv_qdq(), tmp_path)), "--json", "--run"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["runs"]
    assert found["counts"]["integer"] == 1
    assert found["agreement"][0] == found["agreement"][1] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "gpu9"], "there is no target"),
        (["--ep", "openvino"], "cpu is for CPUExecutionProvider"),
        (["--target", "qnn-htp", "--run"], "not to be had"),
    ],
)
def test_errors_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(save(conv_qdq(), tmp_path)), *arguments])
    assert done.exit_code == 2 or done.exit_code == 1
    assert says in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1


def test_a_target_that_loses_the_weights_of_known_branches_says_so(tmp_path: Path) -> None:
    text = """(float[2, 3] x) => (float[2, 3] y) {
      known = Equal (one, CONDITION)
      y = If (known) <
        then_branch = g1 () => (float[2, 3] a) { a = Relu (x) },
        else_branch = g2 () => (float[2, 3] b) { b = Neg (x) }
      >
    }"""
    said = {}
    for condition in ("one", "flag"):
        inputs = "(float[2, 3] x, int64[1] flag)" if condition == "flag" else "(float[2, 3] x)"
        changed = text.replace("CONDITION", condition).replace("(float[2, 3] x)", inputs, 1)
        path = tmp_path / f"{condition}.onnx"
        onnx.save(model(changed, one=np.array([1])), path)
        warnings = onnxq.check(path, target="openvino").warnings
        said[condition] = [text for text in warnings if "If of this model" in text]
    assert len(said["one"]) == 1
    assert said["flag"] == []


@pytest.mark.parametrize(("target", "warned"), [("openvino", True), ("generic-qdq", False)])
def test_quantize_says_what_its_target_will_not_run(
    target: str, warned: bool, tmp_path: Path
) -> None:
    text = """(int64[2, 3] ids) => (float[2, 3, 8] y) {
      h = Gather (table, ids)
      y = MatMul (h, w)
    }"""
    source = tmp_path / "source.onnx"
    onnx.save(model(text, table=normal(40, 256), w=normal(256, 8)), source)
    result = onnxq.quantize(
        source, "int4-qdq", target=target, check=False, output=tmp_path / "m.onnx"
    )
    said = [text for text in result.report.warnings if "will not run" in text]
    assert len(said) == warned
    assert all("DequantizeLinear" in text and "third axis" in text for text in said)


@pytest.mark.parametrize(
    ("bits", "behind", "wrong"),
    [
        (4, "y = Neg (h)", True),
        (4, "y = Mul (h, half)", True),
        (4, "i = Add (h, bias) y = Div (i, half)", True),
        (4, "i = Relu (h) y = Mul (i, half)", False),
        (4, "y = Add (h, bias)", False),
        (8, "y = Mul (h, half)", False),
    ],
)
def test_openvino_garbles_weights_of_4_bits_that_are_scaled(
    bits: int, behind: str, wrong: bool, tmp_path: Path
) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[3, 64] x) => (float[3, 6] y) {{
          a = Sin (x)
          h = com.microsoft.MatMulNBits <K = 64, N = 6, bits = {bits}, block_size = 32> (a, w, s)
          {behind}
        }}"""
    )
    codes = np.random.default_rng(0).integers(0, 256, (6, 2, 4 * bits), dtype=np.uint8)
    values = {"w": codes, "s": normal(6, 2), "half": np.float32(0.5), "bias": normal(6)}
    for name, array in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    report = onnxq.check(save(proto, tmp_path), target="openvino")
    assert any("other numbers" in text for text in report.warnings) == wrong
    job = Job(proto, ({"x": normal(3, 64)},))
    said, other = (
        ask(p, [job])[0].outputs[0]["y"] for p in (Place.parse("cpu"), place("openvino"))
    )
    assert (relative(said, other) > 0.1) == wrong
