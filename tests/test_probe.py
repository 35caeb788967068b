import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import model
from onnx import numpy_helper
from typer.testing import CliRunner

from onnxq import quantize
from onnxq.cli import app
from onnxq.devices import Answer, Job, Place, ask
from onnxq.devices.single import Single, Verdict, make_single, table
from onnxq.errors import OnnxqError
from onnxq.probing import Probed, default_places, paths_of, probe
from onnxq.probing.candidates import Candidate, candidates, shipped_rules
from onnxq.probing.decide import decide, pair_limit, wrong
from onnxq.probing.measure import Measured, measure
from onnxq.probing.write import supports, target_toml
from onnxq.target import OpRule, load_target, target_names

CPU = Place("CPUExecutionProvider")
OPS = ("Conv", "Sigmoid")


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXQ_CACHE", "off")
        return probe(CPU, ops=OPS, threads=1)


def rule_of(op: str, **fields: Any) -> OpRule:
    found = (r for o, r in shipped_rules("cpu") if o == op)
    return next(r for r in found if all(str(getattr(r, k)) == v for k, v in fields.items()))


def gemm_sums() -> list[Candidate]:
    rule = rule_of("Gemm", form="static", activation="u8a", weight="s8:channel")
    return [c for c in candidates("Gemm", rule, load_target("cpu")) if c.purpose == "sums"]


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul", "Sigmoid", "Concat"])
def test_every_input_has_the_shape_that_it_is_fed(op: str) -> None:
    """Providers that compile a graph leave what has no shape to the CPU."""
    base = load_target("cpu")
    for rule in (rule for name, rule in shipped_rules("cpu") if name == op):
        for candidate in candidates(op, rule, base):
            form = candidate.form
            declared = {
                value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
                for value in form.model.graph.input
            }
            assert declared == {name: array.shape for name, array in form.feed.items()}


# ── exactness ────────────────────────────────────────────────────────────────────────────────────


def adds_pairs_in_16_bits(job: Job) -> Answer:
    """QGemm on AVX2 without VNNI: the products of neighbours are added in int16, which saturates.

    Weights are the codes in the model, activations 1 and -1 as codes of the range from -1 to 1.
    """
    assert isinstance(job.model, onnx.ModelProto)
    arrays = {t.name: numpy_helper.to_array(t) for t in job.model.graph.initializer}
    weights = next(a for a in arrays.values() if a.dtype == np.int8 and a.ndim == 2)
    weights = weights if weights.shape[0] == 256 else weights.T
    codes = np.where(job.feeds[0]["x0"] > 0, 255, 0)
    products = codes[:, :, None] * weights.astype(np.int64)[None]
    pairs = np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1)
    sums = pairs.sum(1) - 127.5 * weights.sum(0, dtype=np.int64)
    y = sums / 127.5 / np.abs(weights).max()
    return Answer(outputs=[{"y0": y.astype(np.float32)}], placement={"": CPU.provider})


def on_avx2(place: Place, jobs: Sequence[Job], **options: Any) -> list[Answer]:
    return [adds_pairs_in_16_bits(j) if j.optimize else ask(place, [j])[0] for j in jobs]


def test_sums_that_saturate_are_seen_and_their_cure_is_found() -> None:
    wanted = gemm_sums()
    assert [c.rule.pair_limit for c in wanted] == [None, 128]
    rows = measure(CPU, wanted, timed=False, run=on_avx2)
    assert rows[0].off > 0.4  # the largest pairs come to half
    assert rows[1].off < 0.01
    assert pair_limit(rows) == (128, "")


def test_exact_sums_need_no_limit() -> None:
    exact = [replace_off(row, 0.001) for row in measured_sums()]
    assert pair_limit(exact) == (None, "")


def test_where_no_bound_makes_sums_right_the_rule_is_dropped() -> None:
    limit, why = pair_limit([replace_off(row, 0.5) for row in measured_sums()])
    assert limit is None
    assert "wrong here, by 50%" in why


def measured_sums() -> list[Measured]:
    return [Measured("Gemm", c.rule, "sums", c.label, None) for c in gemm_sums()]


def replace_off(row: Measured, off: float) -> Measured:
    return replace(row, off=off)


# ── decisions ────────────────────────────────────────────────────────────────────────────────────


def speed(
    rule: OpRule, integer: float, floats: float, label: str = "a shape", block: int | None = None
) -> Measured:
    basis = Measured("Conv", rule, "speed", label, block, kernels=("QLinearConv",))
    return replace(basis, integer_ms=float(integer), float_ms=float(floats))


def test_what_is_slower_in_every_shape_is_no_rule_and_says_by_how_much() -> None:
    rule = rule_of("Conv", form="static", activation="u16a", weight="s8:channel")
    made, why = decide([speed(rule, 10, 4), speed(rule, 10, 5, label="another")], "onnxruntime 9")
    assert made is None
    assert why == "slower than float here: 0.5 × (another)"
    made, _ = decide([speed(rule, 10, 4), speed(rule, 10, 20)], "onnxruntime 9")
    assert made is not None
    assert "2 × float (a shape)" in made.source
    assert "onnxruntime 9" in made.source


def test_weights_alone_are_kept_for_their_bytes_however_slow() -> None:
    rule = rule_of("Conv", form="weights", weight="s8:channel")
    assert decide([speed(rule, 10, 4)], "onnxruntime 9")[0] is not None


def test_other_answers_and_errors_drop_a_rule() -> None:
    rule = rule_of("Conv", form="static", activation="u8a", weight="s8:channel")
    off = replace_off(speed(rule, 1, 4), 5.0)
    assert wrong(off)
    assert "other answers here: off by 5" in decide([off], "")[1]
    assert decide([replace(off, error="no kernel")], "")[1] == "does not run here: no kernel"
    assert not wrong(replace_off(off, 1.0))  # a rounding


def test_blocks_for_which_there_is_no_fast_kernel_are_left_out() -> None:
    rule = rule_of("MatMul", form="weights", weight="u2a", batched="False")
    rows = [speed(rule, ms, 1, block=block) for block, ms in ((32, 0.2), (64, 0.25), (128, 80))]
    made, _ = decide(rows, "")
    assert made is not None
    assert made.blocks == (32, 64)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", target_names())
def test_a_target_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.toml"
    path.write_text(target_toml(load_target(name), ["a note"]), "utf-8")
    assert replace(load_target(str(path)), name=name) == load_target(name)


def test_supports_hold_types_ranks_and_attributes_that_ran() -> None:
    def verdict(runs: bool, kind: str = "float32", **attributes: str) -> Verdict:
        single = make_single("Resize", table()["Resize"][0])
        assert isinstance(single, Single)
        call = replace(single.call, attributes=attributes)
        return Verdict(replace(single, type=kind, call=call), runs)

    rows = [verdict(True, mode="linear"), verdict(False, mode="cubic"), verdict(False, "float16")]
    (row,) = supports(rows, "a test")["Resize"]
    assert row.types == ("float32",)
    assert row.attributes == {"mode": ["linear"]}
    assert not supports([verdict(False)], "a test")


# ── whole ────────────────────────────────────────────────────────────────────────────────────────


def test_every_rule_of_a_probed_operator_is_the_probes_own(probed: Probed, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(probed.target, "utf-8")
    target = load_target(str(path))
    assert target.providers == ("CPUExecutionProvider",)
    for op in OPS:
        assert all(rule.source.startswith("measured here: ") for rule in target.ops[op])
        assert any(rule.form == "static" and rule.activation for rule in target.ops[op])
        assert any(rule.form == "integer" for rule in target.ops[op])
    assert target.ops["Add"] == load_target("cpu").ops["Add"]
    assert any("largest sums" in rule.source for rule in target.ops["Conv"])


def test_quantize_uses_the_probed_target(probed: Probed, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    conv = model(
        "(float[1,8,6,6] x) => (float[1,16,4,4] y) { y = Conv (x, w) }",
        w=rng.standard_normal((16, 8, 3, 3)).astype(np.float32),
    )
    path, source = tmp_path / "mine.toml", tmp_path / "conv.onnx"
    path.write_text(probed.target, "utf-8")
    onnx.save(conv, source)
    feeds = [{"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(4)]
    result = quantize(source, samples=feeds, target=str(path), latency_check=False)
    (plan,) = result.context.plan.values()
    assert result.report.target == "mine"
    assert plan.rule is not None
    assert plan.rule.source.startswith("measured here: ")


def test_a_second_probe_answers_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path))
    first = probe(CPU, ops=["Sigmoid"], threads=1)
    monkeypatch.setattr("onnxq.probing.run.measure", None)
    second = probe(CPU, ops=["Sigmoid"], threads=1)
    assert second.cached
    assert not first.cached
    assert second == replace(first, cached=True)
    with pytest.raises(TypeError):
        probe(CPU, ops=["Sigmoid"], threads=2)  # measured anew


def test_files_are_named_by_provider_where_there_are_several() -> None:
    other = Place("OpenVINOExecutionProvider")
    assert paths_of(Path("a/b.toml"), [CPU]) == [Path("a/b.toml")]
    assert paths_of(Path("b.toml"), [CPU, other]) == [Path("b.cpu.toml"), Path("b.openvino.toml")]
    with pytest.raises(OnnxqError, match="twice"):
        paths_of(Path("b.toml"), [CPU, CPU])
    with pytest.raises(OnnxqError, match=r"\.toml file"):
        paths_of(Path("b.txt"), [CPU])


def test_the_cpu_is_among_the_default_places() -> None:
    assert CPU in default_places()


@pytest.mark.parametrize(
    ("ep", "said"),
    [("gpu", "no execution provider 'gpu'"), ("cpu@/no/such/python", "does not run onnxruntime")],
)
def test_a_bad_place_is_one_line(ep: str, said: str, tmp_path: Path) -> None:
    output = tmp_path / "device.toml"
    found = CliRunner().invoke(app, ["probe", "--ep", ep, "-o", str(output)])
    assert found.exit_code == 2 or found.exit_code == 1
    assert said in " ".join(found.output.split())
    assert not output.exists()


def test_the_command_writes_a_target_and_says_what_it_found(
    probed: Probed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("onnxq.probing.probe", lambda place, **options: probed)
    output = tmp_path / "device.toml"
    found = CliRunner().invoke(app, ["probe", "--ep", "cpu", "-o", str(output)])
    assert found.exit_code == 0, found.output
    assert load_target(str(output)).ops["Conv"]
    assert "quantize --target" in found.output
    assert "QLinearConv" in found.output
    found = CliRunner().invoke(app, ["probe", "--ep", "cpu", "-o", str(output), "--json"])
    (row,) = json.loads(found.stdout)
    assert row["provider"] == "cpu"
    assert {m["op"] for m in row["measured"]} == set(OPS)
