"""A provider that does one thing otherwise is found out: the layer, and what it does."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, model
from places import place

from onnxq.devices import Place
from onnxq.devices.disagreement import first_disagreement

FAKE = """
import numpy as np, onnx, onnxruntime
from onnx import helper, numpy_helper

Session = onnxruntime.InferenceSession

def edited(path, *rest, **more):
    model = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    edit(model.graph, constants)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    return Session(model.SerializeToString(), *rest, **more)

onnxruntime.InferenceSession = edited

def quantizing(graph, constants, text, scaled=1.0):
    '''Every QuantizeLinear of a layer written out, with `text` before the zero point is added.'''
    nodes = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in {v.name for v in graph.input}:
            nodes.append(node)
            continue
        x, s, z = node.input
        out = node.output[0]
        constants[out + "_s"] = constants[s] * np.float32(scaled)
        constants[out + "_z"] = constants[z].astype(np.float32)
        constants["half"], constants["low"] = np.float32(0.5), np.float32(0)
        constants["high"] = np.float32(255)
        body = onnx.parser.parse_graph(
            f"g (float x) => (float r) {{ d = Div (x, {out}_s) {text} "
            f"p = Add (r, {out}_z) c = Clip (p, low, high) o = Cast <to = 2> (c) }}")
        for inner in body.node:
            own = {"x": x, "o": out, "half": "half", "low": "low", "high": "high"}
            for names in (inner.input, inner.output):
                fresh = [own.get(n, n if n.startswith(out) else f"{out}_{n}") for n in names]
                del names[:]
                names.extend(fresh)
            nodes.append(inner)
    del graph.node[:]
    graph.node.extend(nodes)
"""
ROUND = "def edit(graph, constants): quantizing(graph, constants, {!r})"


def fake(tmp_path: Path, edit: str) -> Place:
    """The CPU provider, of a model that `edit(graph, constants)` has changed."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n{FAKE}\n{edit}\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script.chmod(0o755)
    return Place.parse(f"cpu@{script}")


def two_layers(multiplier: float, zero: int = 7) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Conv, MatMul of codes, with multipliers s_x s_w / s_y that are the same everywhere."""
    rng = np.random.default_rng(0)
    scale = np.float32(0.25)
    text = """(float[1,3,60,9] x) => (float[1,4,60,5] y) {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear (w, ws, wz)
        bd = DequantizeLinear (b, bs, bz)
        a = Conv <pads = [1,1,1,1]> (xd, wd, bd)
        aq = QuantizeLinear (a, s, z)
        ad = DequantizeLinear (aq, s, z)
        vd = DequantizeLinear (v, ws, wz)
        m = MatMul (ad, vd)
        yq = QuantizeLinear (m, s, z)
        y = DequantizeLinear (yq, s, z)
    }"""
    made = model(
        text, 17, s=scale, z=np.uint8(zero), ws=np.float32(multiplier), wz=np.int8(0),
        bs=np.float32(scale * np.float32(multiplier)), bz=np.int32(0),
        w=rng.integers(-60, 60, (4, 3, 3, 3)).astype(np.int8),
        v=rng.integers(-60, 60, (9, 5)).astype(np.int8),
        b=rng.integers(2000, 5000, 4).astype(np.int32),
    )  # fmt: skip
    return made, {"x": rng.uniform(0, 60, (1, 3, 60, 9)).astype(np.float32)}


@pytest.mark.parametrize(
    ("edit", "multiplier", "why"),
    [
        (ROUND.format("h = Add (d, half) r = Floor (h)"), 2**-7, "rounds halves up, not to even"),
        (ROUND.format("r = Floor (d)"), 0.0113, "rounds down"),
        (
            ROUND.format("f = Cast <to = 10> (d) k = Cast <to = 1> (f) r = Round (k)"),
            0.0113,
            "requantizes in float16",
        ),
        (
            "def edit(graph, constants): quantizing(graph, constants, 'h = Add (d, half) "
            "r = Floor (h)', np.float32(0.0113) / np.float32(185 / 2**14))",
            0.0113,
            "requantizes with a multiplier of 8 bits",
        ),
        (
            "def edit(graph, constants):\n"
            "    for node in graph.node:\n"
            "        if node.op_type == 'Conv': del node.input[2]",
            0.0113,
            "leaves the bias out",
        ),
        (
            "def edit(graph, constants):\n"
            "    constants['none'] = np.uint8(0)\n"
            "    for node in graph.node:\n"
            "        if node.op_type == 'DequantizeLinear' and node.input[0] not in constants:\n"
            "            node.input[2] = 'none'",
            0.0113,
            "takes the zero point of its input for zero",
        ),
    ],
)
def test_what_a_provider_does_otherwise_is_said(
    tmp_path: Path, edit: str, multiplier: float, why: str
) -> None:
    made, feed = two_layers(multiplier)
    found = first_disagreement(made, feed, fake(tmp_path, edit))
    assert found is not None
    assert found.why == why
    assert found.explained == 1
    assert found.unit == "step"
    assert 0 < found.share <= 1
    assert found.operators in (["Conv"], ["MatMul"])


def test_codes_that_a_provider_never_makes_are_named(tmp_path: Path) -> None:
    """Alone each layer is right; two together lose the rounding between them."""
    edit = """
def edit(graph, constants):
    made = {n.output[0]: n for n in graph.node if n.op_type == 'QuantizeLinear'}
    for node in list(graph.node):
        if node.op_type == 'DequantizeLinear' and node.input[0] == 'aq' and 'aq' in made:
            raw = made['aq'].input[0]
            for reader in graph.node:
                for slot, name in enumerate(reader.input):
                    if name == node.output[0]: reader.input[slot] = raw
"""
    made, feed = two_layers(0.0113)
    found = first_disagreement(made, feed, fake(tmp_path, edit))
    assert found is not None
    assert found.operators == ["MatMul"]
    assert found.why == "fuses aq without rounding it to codes"
    assert found.explained == 1


def test_what_nothing_gives_is_counted_and_left_unexplained(tmp_path: Path) -> None:
    edit = ROUND.format("h = Sin (d) r = Round (h)")
    made, feed = two_layers(0.0113)
    found = first_disagreement(made, feed, fake(tmp_path, edit))
    assert found is not None
    assert (found.why, found.explained) == ("", 0)
    assert found.largest > 1


def test_the_same_codes_are_no_disagreement() -> None:
    made, feed = two_layers(0.0113)
    assert first_disagreement(made, feed, Place.parse("cpu")) is None


def test_64_bit_integers_in_32_are_found_out(tmp_path: Path) -> None:
    text = """(int32[2,64] x) => (uint8[2,64] y) {
        l = Cast <to = 7> (x)
        p = Mul (l, m)
        q = Div (p, d)
        c = Clip (q, low, high)
        y = Cast <to = 2> (c)
    }"""
    made = model(text, 17, m=np.int64(40000), d=np.int64(1 << 20), low=np.int64(0),
                 high=np.int64(255))  # fmt: skip
    feed = {"x": np.arange(128, dtype=np.int32).reshape(2, 64) * 50000}
    edit = """
def edit(graph, constants):
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == 'Mul':
            raw, node.output[0] = node.output[0], 'raw'
            nodes.append(helper.make_node('Cast', ['raw'], ['narrow'], to=6))
            nodes.append(helper.make_node('Cast', ['narrow'], [raw], to=7))
    del graph.node[:]
    graph.node.extend(nodes)
"""
    found = first_disagreement(made, feed, fake(tmp_path, edit))
    assert found is not None
    assert found.why == "computes integers of 64 bits in 32"
    assert found.explained == 1


def test_the_simulated_npu_cuts_sums_before_it_multiplies_them() -> None:
    made, feed = two_layers(0.0113, zero=100)
    found = first_disagreement(made, feed, place("qnn"))
    assert found is not None
    assert found.why.startswith("cuts the sum to 4 binary places of a step, zero point included")
    assert found.why.endswith("multiplies it by 11 bits")
    assert found.explained == 1
