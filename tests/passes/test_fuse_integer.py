"""FuseInteger form against the QDQ form it was made from, through ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO, Case
from graphs import Array, apply, context, feeds_of, fused, model, normal, ops, pipeline, run, sqnr
from onnxq.passes import FuseInteger

import onnxq
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.target import load_target

PRESET = "int8-static-qoperator"
INTEGER = load_target("cpu").integer_operators


def both(case: Case) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The QDQ form and the FuseInteger form of one model."""
    plain = pipeline(case.model, case.feeds).to_proto()
    spelled = pipeline(case.model, case.feeds, PRESET).to_proto()
    onnx.checker.check_model(spelled, full_check=True)
    return plain, spelled


def assert_same(case: Case, plain: onnx.ModelProto, spelled: onnx.ModelProto) -> None:
    for feed in case.feeds:
        expected = run(plain, feed)
        for optimize in (False, True):
            found = run(spelled, feed, optimize)
            assert list(found) == list(expected)
            for key, values in expected.items():
                np.testing.assert_allclose(found[key], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"no_shapes"}))
def test_numbers_are_those_of_the_fused_qdq_form(name: str) -> None:
    case = ZOO[name]()
    assert_same(case, *both(case))


# A Gemm with alpha and beta, a MatMul that shares its weight, float16: the runtime fuses less.
UNFUSED = {"gemm_trans_a", "gemm_trans_b_row_bias", "same_weight_many_ways", "mixed_types"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - UNFUSED - {"no_shapes"}))
def test_the_file_has_the_operators_that_the_runtime_makes_of_the_qdq_form(
    name: str, tmp_path: Path
) -> None:
    """`gemm` has one more: the runtime does not fuse a Gemm with a beta."""
    case = ZOO[name]()
    plain, spelled = both(case)
    runs = ops(fused(plain, tmp_path / "optimized.onnx"))
    expected = sorted(op for op in runs if op in INTEGER)
    found = sorted(op for op in ops(spelled) if op in INTEGER)
    assert found == (["QGemm", "QGemm"] if name == "gemm" else expected)
    assert ops(spelled).count("DequantizeLinear") <= runs.count("DequantizeLinear")


# ── one operator at a time ───────────────────────────────────────────────────────────────────────


def layer(text: str, feeds: dict[str, tuple[int, ...]], **weights: Array) -> Case:
    return Case(model(text, **weights), feeds_of(4, **feeds))


def conv(rank: int, attributes: str = "", groups: int = 1, bias: bool = True) -> Case:
    dims = ",".join("defg"[:rank])
    out = ",".join("hijk"[:rank])
    text = f"""(float[n,4,{dims}] x) => (float[n,6,{out}] y) {{
        y = Conv <group = {groups}{attributes}> (x, w{", b" * bias})
    }}"""
    weights = {"w": normal(6, 4 // groups, *(3,) * rank)}
    weights |= {"b": normal(6, seed=1)} if bias else {}
    return layer(text, {"x": (3, 4, *(7,) * rank)}, **weights)


def gemm(attributes: str, bias: tuple[int, ...] | None, then: str = "") -> Case:
    a = "float[8,3] x" if "transA" in attributes else "float[3,8] x"
    w = normal(6, 8) if "transB" in attributes else normal(8, 6)
    text = f"""({a}) => (float[3,q] y) {{
        {"h" if then else "y"} = Gemm <{attributes}> (x, w{", b" * (bias is not None)})
        {then}
    }}"""
    weights = {"w": w, "v": normal(6, 5, seed=3)} if then else {"w": w}
    weights |= {} if bias is None else {"b": np.asarray(normal(*bias, seed=1), np.float32)}
    return layer(text, {"x": (8, 3) if "transA" in attributes else (3, 8)}, **weights)


NEXT = "y = MatMul (h, v)"
LAYERS: dict[str, tuple[Case, str]] = {
    "Conv 1-D": (conv(1), "QLinearConv"),
    "Conv 2-D with strides and pads": (
        conv(2, ", strides = [2,1], pads = [1,0,2,1]"), "QLinearConv"),
    "Conv 2-D with dilations": (conv(2, ", dilations = [2,2]"), "QLinearConv"),
    "Conv 2-D with auto_pad": (conv(2, ', auto_pad = "SAME_UPPER"'), "QLinearConv"),
    "Conv 2-D in groups without bias": (conv(2, groups=2, bias=False), "QLinearConv"),
    "Conv 3-D": (conv(3), "QLinearConv"),
    "Gemm without bias": (gemm("alpha = 1.0", None), "QGemm"),
    "Gemm without bias, to codes": (gemm("alpha = 1.0", None, NEXT), "QGemm"),
    "Gemm of everything": (gemm("transA = 1, transB = 1, alpha = 0.5, beta = 2.0", (6,)), "QGemm"),
    "Gemm of everything, to codes": (
        gemm("transA = 1, transB = 1, alpha = 0.5, beta = 2.0", (6,), NEXT), "QGemm"),
    "Gemm with one bias for all": (gemm("beta = 1.5", ()), "QGemm"),
    "MatMul of a batch": (
        layer("(float[n,5,8] x) => (float[n,5,4] y) { y = MatMul (x, w) }",
              {"x": (2, 5, 8)}, w=normal(8, 4)), "MatMulIntegerToFloat"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_any_of_its_forms(name: str) -> None:
    case, integer = LAYERS[name]
    plain, spelled = both(case)
    assert integer in ops(spelled)
    assert not {"Conv", "Gemm", "MatMul"} & set(ops(spelled))
    for feed in case.feeds:
        exact, qdq = run(case.model, feed)["y"], run(plain, feed)["y"]
        for optimize in (False, True):
            found = run(spelled, feed, optimize)["y"]
            assert sqnr(found, exact) > 25
            # The runtime leaves a Gemm with a beta in float: codes may fall to either side.
            assert sqnr(found, qdq) > (35 if "everything" in name or "one bias" in name else 100)


def test_an_operator_between_convolutions_works_on_codes() -> None:
    for body, shape, integer in (
        ("h = Add (a, c)", 4, "QLinearAdd"),
        ("h = Mul (a, c)", 4, "QLinearMul"),
        ("h = Concat <axis = 1> (a, c)", 8, "QLinearConcat"),
        ("h = AveragePool <kernel_shape = [2,2], pads = [1,1,0,0]> (a)", 4, "QLinearAveragePool"),
        (
            "h = AveragePool <kernel_shape = [2,2], pads = [1,1,0,0], count_include_pad = 1> (a)",
            4,
            "QLinearAveragePool",
        ),
        ("h = LeakyRelu <alpha = 0.2> (a)", 4, "QLinearLeakyRelu"),
        ("h = Sigmoid (a)", 4, "QLinearSigmoid"),
    ):
        text = f"""(float[n,3,5,5] x) => (float[n,2,s,t] y) {{
            a = Conv (x, wa)
            c = Conv (x, wc)
            {body}
            y = Conv (h, v)
        }}"""
        weights = {f"w{k}": normal(4, 3, 1, 1, seed=i) for i, k in enumerate("ac")}
        case = layer(text, {"x": (2, 3, 5, 5)}, **weights, v=normal(2, shape, 1, 1, seed=4))
        plain, spelled = both(case)
        assert integer in ops(spelled), body
        assert ops(spelled).count("DequantizeLinear") == 1, body
        assert_same(case, plain, spelled)


MOVES = {
    "MaxPool": "h = MaxPool <kernel_shape = [2,2], pads = [1,1,0,0]> (a)",
    "Reshape": "h = Reshape (a, moved)",
    "Transpose": "h = Transpose <perm = [0,1,3,2]> (a)",
    "Slice": "h = Slice (a, ones, fours, last)",
    "Pad": "h = Pad (a, pads)",
    "Pad reflect": 'h = Pad <mode = "reflect"> (a, pads)',
    "Expand": "h = Expand (a, moved)",
    "DepthToSpace": "s = DepthToSpace <blocksize = 2> (a)\n h = SpaceToDepth <blocksize = 2> (s)",
    "Unsqueeze": "u = Unsqueeze (a, first)\n h = Squeeze (u, first)",
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_carry_codes(move: str) -> None:
    """QDQ by hand around every operator, with a zero point that is not 0."""
    lines, source = [], "a"
    for line in MOVES[move].splitlines():
        name = line.split()[0]
        lines.append(line.replace("(a", f"({source}").replace("(s)", f"({source})"))
        lines[-1] = lines[-1].replace("(u", f"({source}")
        lines.append(f"{name}_q = QuantizeLinear ({name}, sa, za)")
        lines.append(f"{name}_d = DequantizeLinear ({name}_q, sa, za)")
        source = f"{name}_d"
    text = f"""(float[2,4,6,6] x) => (float[n,c,s,t] y) {{
        q = QuantizeLinear (x, sa, za)
        a = DequantizeLinear (q, sa, za)
        {chr(10).join(lines)}
        y = Identity ({source})
    }}"""
    source_model = model(
        text, sa=np.float32(0.03), za=np.uint8(117), moved=np.array([2, 4, 6, 6]),
        ones=np.array([1]), fours=np.array([4]), last=np.array([3]), first=np.array([0]),
        pads=np.array([0, 0, 1, 2, 0, 0, 2, 1]),
    )  # fmt: skip
    graph, changes, ctx = apply(FuseInteger(), source_model)
    assert changes == len(MOVES[move].splitlines())
    assert ops(graph).count("QuantizeLinear") == ops(graph).count("DequantizeLinear") == 1
    assert not ctx.report.warnings
    for feed in feeds_of(3, x=(2, 4, 6, 6)):
        np.testing.assert_array_equal(run(graph, feed)["y"], run(source_model, feed, False)["y"])
        np.testing.assert_array_equal(
            run(graph, feed, False)["y"], run(source_model, feed, False)["y"]
        )


# ── QDQ models of any origin ─────────────────────────────────────────────────────────────────────


def qdq(body: str, zero: Array = np.uint8(128), scale: float = 0.02, **more: Array) -> Case:  # noqa: B008
    """`body` between a dequantized `a` and `h`, which is quantized and dequantized."""
    text = f"""(float[2,4,6,6] x) => (float[n,c,s,t] y) {{
        q = QuantizeLinear (x, sa, za)
        a = DequantizeLinear (q, sa, za)
        {body}
        hq = QuantizeLinear (h, sh, za)
        y = DequantizeLinear (hq, sh, za)
    }}"""
    made = model(text, sa=np.float32(0.03), za=np.asarray(zero), sh=np.float32(scale), **more)
    return Case(made, feeds_of(3, x=(2, 4, 6, 6)))


def weights(dtype: type = np.int8, channels: int = 5, zero: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype)
    return {
        "w": rng.integers(limits.min + 1, limits.max, (channels, 4, 3, 3)).astype(dtype),
        "sw": rng.uniform(0.001, 0.01, channels).astype(np.float32),
        "zw": np.full(channels, zero, dtype),
    }


CONV = "d = DequantizeLinear <axis = 0> (w, sw, zw)\n h = Conv (a, d)"


@pytest.mark.parametrize(("opset", "axis"), [(12, 1), (12, -1), (13, 1), (13, -1)])
def test_softmax_means_what_it_meant_in_its_opset(opset: int, axis: int) -> None:
    case = qdq(f"h = Softmax <axis = {axis}> (a)", np.uint8(9), 1 / 256)
    case.model.opset_import[0].version = opset
    graph, changes, _ = apply(FuseInteger(), case.model)
    assert (changes, ops(graph)) == (1, ["QuantizeLinear", "QLinearSoftmax", "DequantizeLinear"])
    for feed in case.feeds:
        difference = run(graph, feed)["y"] - run(case.model, feed, False)["y"]
        assert np.abs(difference).max() <= 1.01 / 256


@pytest.mark.parametrize(
    ("activation", "weight", "integer"),
    [("u", np.int8, True), ("u", np.uint8, True), ("s", np.int8, True), ("s", np.uint8, False)],
)
def test_types_are_those_the_kernels_take(activation: str, weight: type, integer: bool) -> None:
    zero = np.uint8(120) if activation == "u" else np.int8(-7)
    case = qdq(CONV, zero, 0.1, **weights(weight, zero=0 if weight is np.int8 else 128))
    graph, changes, ctx = apply(FuseInteger(), case.model)
    assert (changes, ops(graph).count("QLinearConv")) == (int(integer), int(integer))
    assert [r.reason for r in ctx.report.layers] == (
        [] if integer else
        ["kept in QDQ form: no kernel multiplies int8 activations by uint8 weights"]
    )  # fmt: skip
    for feed in case.feeds:
        difference = run(graph, feed)["y"] - run(case.model, feed, False)["y"]
        assert np.abs(difference).max() <= 0.1 * 1.01
        assert np.mean(difference != 0) < 0.01


RELU = {
    "Relu at the end of the codes": (f"{CONV.replace('h =', 'c =')}\n h = Relu (c)", 0, True),
    "Relu amid the codes": (f"{CONV.replace('h =', 'c =')}\n h = Relu (c)", 3, False),
    "Clip wider than the codes": (f"{CONV.replace('h =', 'c =')}\n h = Clip (c, no, big)", 3, True),
    "Clip that bites": (f"{CONV.replace('h =', 'c =')}\n h = Clip (c, no, one)", 3, False),
}


@pytest.mark.parametrize("name", RELU)
def test_an_activation_function_goes_only_where_the_codes_do_its_work(name: str) -> None:
    body, zero, integer = RELU[name]
    bounds = {"no": np.float32(-9), "big": np.float32(99), "one": np.float32(1)}
    bounds = {k: v for k, v in bounds.items() if k in body.split("Clip")[-1] and "Clip" in body}
    case = qdq(body, np.uint8(zero), 0.1, **weights(), **bounds)
    graph, _, ctx = apply(FuseInteger(), case.model)
    assert ("QLinearConv" in ops(graph)) is integer
    assert bool(ctx.report.warnings) is not integer
    for feed in case.feeds:
        assert np.abs(run(graph, feed)["y"] - run(case.model, feed, False)["y"]).max() <= 0.101


REFUSED = {
    "16 bits": ("h = Sigmoid (a)", np.uint16(9), {}, "take 8 bits, not uint16"),
    "zero points": (
        CONV, np.uint8(9), weights(np.uint8) | {"zw": np.uint8([1, 2, 3, 4, 5])}, "one zero point",
    ),
    "axis": (
        CONV.replace("axis = 0", "axis = 1"), np.uint8(9),
        {k: v[:4] if k != "w" else v for k, v in weights().items()}, "do not lie along",
    ),
    "bias": (
        CONV.replace("(a, d)", "(a, d, b)"), np.uint8(9),
        {**weights(), "b": np.zeros(5, np.float32)}, "its bias is float",
    ),
    "another scale": ("h = Transpose (a)", np.uint8(9), {}, "another scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_operator_is_left_with_a_reason(name: str) -> None:
    body, zero, more, reason = REFUSED[name]
    source = qdq(body, zero, 0.1, **more).model
    if zero.dtype == np.uint16:
        source.opset_import[0].version, source.ir_version = 21, 10
    before = ops(source)
    graph, changes, ctx = apply(FuseInteger(), source)
    assert (changes, sorted(ops(graph))) == (0, sorted(before))
    assert len(ctx.report.warnings) == 1
    assert reason in ctx.report.warnings[0]
    assert reason in ctx.report.layers[0].reason


def test_bodies_are_rewritten_each_by_itself_and_read_codes_from_outside() -> None:
    text = """(float[2,8] x, bool choice, int64 n, bool go) => (float[2,4] y, float[2,8] z) {
        q = QuantizeLinear (x, sx, zx)
        a = DequantizeLinear (q, sx, zx)
        y = If (choice) <
            then_branch = yes () => (float[2,4] t) {
                d = DequantizeLinear <axis = 1> (w, sw, zw)
                t = MatMul (a, d)
            },
            else_branch = no () => (float[2,4] e) {
                f = DequantizeLinear <axis = 1> (w, sw, zw)
                m = MatMul (a, f)
                r = Relu (m)
                mq = QuantizeLinear (r, sx, zero)
                e = DequantizeLinear (mq, sx, zero)
            }
        >
        z = Loop (n, go, x) <
            body = again (int64 i, bool c, float[2,8] s) => (bool k, float[2,8] o) {
            k = Identity (c)
            sq = QuantizeLinear (s, sx, zx)
            sd = DequantizeLinear (sq, sx, zx)
            vd = DequantizeLinear (v, sx, zv)
            p = MatMul (sd, vd)
            pq = QuantizeLinear (p, sp, zx)
            o = DequantizeLinear (pq, sp, zx)
        }>
    }"""
    rng = np.random.default_rng(0)
    source = model(
        text, opset=16, sx=np.float32(0.03), zx=np.uint8(128), zero=np.uint8(0),
        sw=rng.uniform(0.01, 0.1, 4).astype("f4"), w=rng.integers(-127, 128, (8, 4)).astype("i1"),
        zw=np.zeros(4, np.int8), v=rng.integers(-20, 20, (8, 8)).astype("i1"), zv=np.int8(0),
        sp=np.float32(0.02),
    )  # fmt: skip
    graph, changes, _ = apply(FuseInteger(), source)
    assert changes == 3
    found = ops(graph)
    assert (found.count("QLinearMatMul"), found.count("MatMulIntegerToFloat")) == (2, 1)
    assert "MatMul" not in found
    assert FuseInteger().apply(graph, context()) == 0
    proto = g.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    assert {d.domain for d in proto.opset_import} == {"", "com.microsoft"}
    for choice in (True, False):
        feed = {"x": normal(2, 8), "choice": np.array(choice),
                "n": np.array(2), "go": np.array(True)}  # fmt: skip
        expected = run(source, feed, False)
        for optimize in (False, True):
            actual = run(proto, feed, optimize)
            for key, step in (("y", 0.0301), ("z", 0.0201)):
                assert np.abs(actual[key] - expected[key]).max() <= step


def test_a_target_without_integer_operators_is_an_error() -> None:
    case = ZOO["residual"]()
    target = load_target("cpu")
    bare = type(target)(**{**target.__dict__, "integer_operators": ()})
    with pytest.raises(OnnxqError, match="lists no integer_operators; use --preset int8-static"):
        pipeline(case.model, case.feeds, PRESET, target=bare)


def test_layers_are_compared_in_the_form_that_still_has_their_tensors(tmp_path: Path) -> None:
    case = ZOO["residual"]()
    path = tmp_path / "m.onnx"
    onnx.save(case.model, path)
    errors = []
    for preset in ("int8-static", PRESET):
        report = onnxq.quantize(path, preset, samples=case.feeds, output=tmp_path / "q.onnx").report
        errors.append({layer.name: layer.sqnr_db for layer in report.layers})
        assert report.verified
    assert errors[0] == errors[1]
    assert all(value is not None for value in errors[0].values())


def test_a_layer_kept_in_qdq_form_is_quantized_in_the_report_and_has_its_reason(
    tmp_path: Path,
) -> None:
    case = gemm("alpha = 1.0", (3, 6))
    path = tmp_path / "m.onnx"
    onnx.save(case.model, path)
    report = onnxq.quantize(path, PRESET, samples=case.feeds, output=tmp_path / "q.onnx").report
    assert [(r.form, r.reason) for r in report.layers] == [
        ("w s8:channel, a u8a", "kept in QDQ form: its bias is float")
    ]
    assert report.share("parameters") == 1
    assert any("kept in QDQ form: 'y': its bias is float" in w for w in report.warnings)


# ── what follows products ────────────────────────────────────────────────────────────────────────


def matmul(after: str, out: str = "y", **more: Array) -> Case:
    """A product of codes, and what is made of it in float: `p` → `after`."""
    text = f"""(float[n,5,8] x) => (float[n,5,6] {out}) {{
        q = QuantizeLinear (x, sa, za)
        a = DequantizeLinear (q, sa, za)
        d = DequantizeLinear <axis = 1> (w, sw, zw)
        p = MatMul (a, d)
        {after}
    }}"""
    rng = np.random.default_rng(0)
    made = model(
        text, sa=np.float32(0.03), za=np.uint8(120), zw=np.zeros(6, np.int8),
        w=rng.integers(-127, 128, (8, 6)).astype("i1"),
        sw=rng.uniform(0.001, 0.01, 6).astype("f4"), **more,
    )  # fmt: skip
    return Case(made, feeds_of(3, x=(2, 5, 8)))


BIAS, COLUMN = normal(6, seed=1), normal(5, 1, seed=2)
AFTER: dict[str, tuple[Case, list[str]]] = {
    "bias": (matmul("y = Add (b, p)", b=BIAS), []),
    "scalars, then a bias": (
        matmul("s = Div (p, r)\n t = Mul (two, s)\n y = Add (t, b)",
               r=np.float32(2.8), two=np.float32([2]), b=BIAS), []),
    "a bias, then a scalar": (
        matmul("s = Add (p, b)\n y = Div (s, r)", r=np.float32(2.8), b=BIAS), ["Div"]),
    "two biases": (matmul("s = Add (p, b)\n y = Add (s, b)", b=BIAS), ["Add"]),
    "a number added": (matmul("y = Add (p, b)", b=np.float32(2)), ["Add"]),
    "a column added": (matmul("y = Add (p, b)", b=COLUMN), ["Add"]),
    "a vector as factor": (matmul("y = Mul (p, b)", b=BIAS), ["Mul"]),
    "a scalar divided": (matmul("y = Div (r, p)", r=np.float32(2.8)), ["Div"]),
    "division by zero": (matmul("y = Div (p, r)", r=np.float32(0)), ["Div"]),
    "a product that others read": (
        matmul("s = Add (p, b)\n y = Sub (s, p)", b=BIAS), ["Add", "Sub"]),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_scalars_and_biases_after_a_product_go_into_it(name: str) -> None:
    case, left = AFTER[name]
    graph, changes, _ = apply(FuseInteger(), case.model)
    assert sorted(ops(graph)) == sorted(["QuantizeLinear", "MatMulIntegerToFloat", *left])
    assert changes == 1 + len(ops(case.model)) - len(ops(graph)) - 2  # two DequantizeLinear
    assert FuseInteger().apply(graph, context()) == 0
    assert_same(case, case.model, g.to_proto(graph))


ERF = "s = Div (p, root)\n e = Erf (s)\n o = Add (e, one)\n"
GELUS = {
    "whole": f"{ERF} m = Mul (p, o)\n h = Mul (m, half)",
    "the half first": f"{ERF} m = Mul (p, half)\n h = Mul (m, o)",
    "without its half": f"{ERF} h = Mul (p, o)",
    "smoothed, without its half": f"{ERF} m = Mul (p, o)\n h = Mul (m, smoothing)",
}
CODES = "hq = QuantizeLinear (h, sh, zh)\n y = DequantizeLinear (hq, sh, zh)"
GELU_CONSTANTS: dict[str, Array] = {
    "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
    "smoothing": np.linspace(0.5, 2, 6, dtype=np.float32), "sh": np.float32(0.01),
    "zh": np.uint8(20),
}  # fmt: skip


@pytest.mark.parametrize("name", GELUS)
def test_gelu_between_codes_is_one_operator_and_gives_the_same_codes(name: str) -> None:
    used = {k: v for k, v in GELU_CONSTANTS.items() if k in GELUS[name] + CODES}
    case = matmul(f"{GELUS[name]}\n{CODES}", **used)
    graph, _, _ = apply(FuseInteger(), case.model)
    smoothed = ["Mul"] if "smoothing" in GELUS[name] else []
    expected = ["QuantizeLinear", "MatMulIntegerToFloat", "Gelu", *smoothed, "QuantizeLinear"]
    assert ops(graph) == [*expected, "DequantizeLinear"]
    for feed in case.feeds:
        expected_y = run(case.model, feed, False)["y"]
        for optimize in (False, True):
            difference = np.abs(run(graph, feed, optimize)["y"] - expected_y)
            assert difference.max() <= 0.0101
            assert np.mean(difference > 1e-6) < 0.02


@pytest.mark.parametrize(
    "after",
    [
        f"{ERF} y = Mul (p, o)",  # a float result: there is no scale to halve
        f"{ERF} h = Mul (p, o)\n y = Add (h, e)",  # what is made on the way is read too
    ],
)
def test_gelu_stays_in_parts_where_they_are_read(after: str) -> None:
    used = {k: v for k, v in GELU_CONSTANTS.items() if k in ERF}
    case = matmul(after, **used)
    graph, _, _ = apply(FuseInteger(), case.model)
    assert "Gelu" not in ops(graph)
    assert "Erf" in ops(graph)
    assert_same(case, case.model, g.to_proto(graph))


def test_codes_are_moved_and_their_shape_is_read_of_them() -> None:
    """As heads of attention are joined again: Transpose, then Reshape to what Shape says."""
    after = """t = Transpose <perm = [1,0,2]> (p)
        shape = Shape (t)
        first = Gather (shape, zeroth)
        r = Unsqueeze (first, axes)
        target = Concat <axis = 0> (r, rest)
        h = Reshape (t, target)
        hq = QuantizeLinear (h, sh, zh)
        hd = DequantizeLinear (hq, sh, zh)
        d2 = DequantizeLinear (w2, sh, z2)
        y = MatMul (hd, d2)"""
    constants = {k: GELU_CONSTANTS[k] for k in ("sh", "zh")}
    case = matmul(
        after, zeroth=np.int64(0), axes=np.array([0]), rest=np.array([-1, 6]), z2=np.int8(0),
        w2=np.arange(-18, 18, dtype=np.int8).reshape(6, 6), **constants,
    )  # fmt: skip
    graph, _, _ = apply(FuseInteger(), case.model)
    found = ops(graph)
    assert "QLinearMatMul" in found
    assert found.count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in found
    for feed in case.feeds:
        assert np.abs(run(graph, feed)["y"] - run(case.model, feed, False)["y"]).max() <= 0.002


# ── padded channels ──────────────────────────────────────────────────────────────────────────────


def separable(channels: int, depthwise: int = 1) -> Case:
    """dense → depthwise → … → dense of odd sizes."""
    lines = [
        f"d{k + 1} = Conv <group = {channels}, pads = [1,1,1,1]> (d{k}, v{k}, b{k})"
        for k in range(depthwise)
    ]
    text = f"""(float[n,4,9,9] x) => (float[n,8,s,t] y) {{
        d0 = Conv (x, w, b)
        {chr(10).join(lines)}
        y = Conv (d{depthwise}, u)
    }}"""
    each = {f"v{k}": normal(channels, 1, 3, 3, seed=k) for k in range(depthwise)}
    each |= {f"b{k}": normal(channels, seed=k + 9) for k in range(depthwise)}
    return layer(
        text, {"x": (2, 4, 9, 9)}, w=normal(channels, 4, 1, 1), b=normal(channels, seed=5),
        u=normal(8, channels, 3, 3, seed=6), **each,
    )  # fmt: skip


def padded_and_not(case: Case, target: str = "cpu") -> tuple[onnx.ModelProto, onnx.ModelProto]:
    rules = load_target(target)
    plain = type(rules)(**{**rules.__dict__, "dense_channels": 1, "depthwise_channels": 1})
    protos = [pipeline(case.model, case.feeds, PRESET, t).to_proto() for t in (plain, rules)]
    onnx.checker.check_model(protos[1], full_check=True)
    return protos[0], protos[1]


def weight_shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    dims = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    return [dims[n.input[3]] for n in proto.graph.node if n.op_type == "QLinearConv"]


def assert_same_bits(case: Case, one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    for feed in case.feeds:
        for optimize in (False, True):
            expected, found = run(one, feed, optimize), run(other, feed, optimize)
            for key, values in expected.items():
                np.testing.assert_array_equal(found[key], values)


@pytest.mark.parametrize(
    ("channels", "depthwise", "wide"),
    [(24, 1, 32), (5, 2, 16), (16, 1, 16), (6, 0, 8), (5, 0, 8)],
)
def test_channels_between_convolutions_are_padded_and_no_bit_changes(
    channels: int, depthwise: int, wide: int
) -> None:
    case = separable(channels, depthwise)
    plain, padded = padded_and_not(case, "cpu-vnni")
    assert weight_shapes(plain)[0] == (channels, 4, 1, 1)
    expected = [(wide, 4, 1, 1), *[(wide, 1, 3, 3)] * depthwise, (8, wide, 3, 3)]
    assert weight_shapes(padded) == expected
    assert_same_bits(case, plain, padded)


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("target", ["cpu", "cpu-vnni"])
def test_the_input_of_a_convolution_is_padded_and_pairs_of_weights_stay_bounded(
    channels: int, target: str
) -> None:
    text = f"""(float[n,{channels},9,9] x) => (float[n,12,s,t] y) {{
        y = Conv <strides = [2,2], pads = [1,1,1,1]> (x, w)
    }}"""
    case = layer(text, {"x": (2, channels, 9, 9)}, w=1 + normal(12, channels, 3, 3))
    plain, padded = padded_and_not(case, target)
    wide = -(-channels // 4) * 4
    assert weight_shapes(padded) == [(12, wide, 3, 3)]
    assert ops(padded).count("Pad") == 1
    assert_same_bits(case, plain, padded)
    repeats = any(n.op_type == "Pad" and len(n.attribute) for n in padded.graph.node)
    assert repeats is (target == "cpu" and channels == 3)
    if target == "cpu":
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in padded.graph.initializer}
        conv = next(n for n in padded.graph.node if n.op_type == "QLinearConv")
        rows = np.moveaxis(arrays[conv.input[3]].astype(int), 1, -1).reshape(12, -1)
        assert np.abs(rows[:, 0::2] + rows[:, 1::2]).max() <= 128


def test_a_tensor_that_others_read_is_not_padded() -> None:
    text = """(float[n,4,5,5] x) => (float[n,8,5,5] y, float[n,8,5,5] z) {
        c = Conv (x, w)
        y = Conv (c, u)
        z = Conv <dilations = [1,1]> (c, v)
    }"""
    case = layer(
        text, {"x": (2, 4, 5, 5)}, w=normal(5, 4, 1, 1), u=normal(8, 5, 1, 1),
        v=normal(8, 5, 1, 1, seed=1),
    )  # fmt: skip
    plain, padded = padded_and_not(case)
    assert weight_shapes(padded)[0] == (5, 4, 1, 1)
    assert_same_bits(case, plain, padded)


# ── the report ───────────────────────────────────────────────────────────────────────────────────


def test_who_reads_what_is_dequantized_between_operators_has_its_reason() -> None:
    case = qdq("h = HardSigmoid (a)")
    graph, changes, ctx = apply(FuseInteger(), case.model)
    assert (changes, ops(graph).count("DequantizeLinear")) == (0, 2)
    assert [(r.op, r.reason) for r in ctx.report.layers] == [
        ("HardSigmoid",
         "dequantized before it: no integer kernel: quantizing around it would be slower")
    ]  # fmt: skip
