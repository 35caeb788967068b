import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from awkward import Case, attention, gemm, if_body, residual
from graphs import MODELS, model, normal, ops, run

import onnxq
from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.report import Report
from onnxq.runtime import Session
from onnxq.storage import file_hash, model_size
from onnxq.verify import Comparison, compare

ROOT = Path(__file__).parents[1]
CORE = {"onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "ml_dtypes", "joblib", "typer", "rich"}


def saved(case: Case, folder: Path) -> Path:
    path = folder / "m.onnx"
    onnx.save(case.model, path)
    return path


# ── what may be installed ────────────────────────────────────────────────────────────────────────


def test_the_core_needs_what_is_agreed_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {re.split(r"[ <>=~!\[]", row)[0] for row in project["dependencies"]} == CORE


def test_nothing_that_is_used_pulls_in_torch() -> None:
    code = (
        "import sys, onnxq, onnxq.api, onnxq.passes, onnxq.recipe, onnxq.synthesize\n"
        "for name in onnxq.__all__: getattr(onnxq, name)\n"
        "heavy = {'torch', 'tensorflow', 'scipy', 'sklearn', 'transformers', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, onnxq; print({'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = onnxq.quantise


# ── the main job on the trained models ───────────────────────────────────────────────────────────

# least cosine of an output to float, on samples that calibration did not see
COSINE = {
    ("digits_cnn", "int8-static"): 0.999,
    ("encoder_classifier", "int8-static"): 0.97,
    ("decoder_lm", "int8-static"): 0.97,
    ("digits_cnn", "int8-dynamic"): 0.9999,
    ("encoder_classifier", "int8-dynamic"): 0.999,
    ("decoder_lm", "int8-dynamic"): 0.999,
}


@pytest.mark.parametrize(("name", "preset"), COSINE)
def test_a_trained_model_is_quantized_written_and_close(
    name: str, preset: str, tmp_path: Path
) -> None:
    source, out = MODELS / f"{name}.onnx", tmp_path / "out.onnx"
    before = file_hash(source)
    result = onnxq.quantize(
        source, preset, samples=str(MODELS / f"{name}.calib.npz"), output=out, limit=64
    )
    report = result.report
    assert file_hash(source) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert report.verified
    assert report.verification_unseen
    assert report.quantized_bytes == model_size(out) < report.float_bytes
    if (name, preset) != ("digits_cnn", "int8-dynamic"):  # which leaves convolutions
        assert report.quantized_bytes < 0.55 * report.float_bytes
        assert report.share("parameters") > 0.9
    assert report.float_latency
    assert report.ranked
    onnx.checker.check_model(onnx.load(out), full_check=True)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == Session(source).inputs
    # Measured anew, on the test samples, with what is in the file.
    test = np.load(MODELS / f"{name}.test.npz")
    rows = {k: v[:100] for k, v in test.items() if k != "label"}
    feeds = [{k: v[n : n + 10] for k, v in rows.items()} for n in range(0, 100, 10)]
    feeds = [feed for feed in feeds if len(next(iter(feed.values())))]
    found = compare(Session(source), Session(out), feeds)
    for output, seen in found.items():
        assert seen.cosine > COSINE[name, preset], output
    if "label" in test:
        logits = np.concatenate([session.run(None, feed)[0] for feed in feeds])
        exact = np.concatenate([next(iter(Session(source).run(f).values())) for f in feeds])
        assert (logits.argmax(-1) == exact.argmax(-1)).mean() >= 0.97


def test_the_layers_of_the_report_are_those_of_the_model() -> None:
    result = onnxq.quantize(
        MODELS / "digits_cnn.onnx", samples=str(MODELS / "digits_cnn.calib.npz"), write=False
    )
    report = result.report
    layers = [r for r in report.layers if r.op in ("Conv", "Gemm")]
    assert len(layers) == sum(op in ("Conv", "Gemm") for op in ops(onnx.load(report.model)))
    assert all(r.sqnr_db is not None and r.sqnr_db > 10 for r in layers)
    assert all(r.macs > 0 and r.parameters > 0 for r in layers)
    assert sum(r.parameters for r in layers) <= 119_178
    assert report.outputs[0].agreement is not None
    assert Report.from_json(report.to_json()) == report
    assert report.ranked[0].contribution == max(r.contribution for r in report.ranked)


@pytest.mark.parametrize("name", ["decoder_lm_kv", "encoder_classifier", "digits_cnn"])
def test_without_samples_they_are_made_up_with_a_warning(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = onnxq.quantize(MODELS / f"{name}.onnx", output=out).report
    assert "no samples given" in " ".join(report.warnings)
    assert report.verified
    assert min(o.cosine for o in report.outputs) > 0.9
    assert out.is_file()


def test_the_same_input_recipe_samples_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for name, samples in (("digits_cnn", None), ("digits_cnn", "calib"), ("decoder_lm", None)):
        given = samples and str(MODELS / f"{name}.{samples}.npz")
        for copy in ("a", "b"):
            onnxq.quantize(
                MODELS / f"{name}.onnx", samples=given, output=tmp_path / copy, seed=3, limit=16
            )
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ── what is written ──────────────────────────────────────────────────────────────────────────────


def test_the_output_stands_beside_the_model_and_says_how_it_came_about(tmp_path: Path) -> None:
    case = residual()
    onnx.helper.set_model_props(case.model, {"author": "me"})
    path = saved(case, tmp_path)
    result = onnxq.quantize(path, samples=case.feeds, settings=["calibrate.method=minmax"])
    out = tmp_path / "m.int8-static.onnx"
    props = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert props["author"] == "me"
    assert props["onnxq.preset"] == "int8-static"
    assert props["onnxq.target"] == "cpu"
    assert props["onnxq.verified"] == "true"
    assert props["onnxq.source_sha256"] == file_hash(path)
    cosine = json.loads(props["onnxq.cosine"])["y"]
    assert cosine == pytest.approx(result.report.outputs[0].cosine, abs=1e-4)
    # The recipe in the file gives the file again.
    (tmp_path / "again.toml").write_text(props["onnxq.recipe"])
    onnxq.quantize(path, samples=case.feeds, recipe=tmp_path / "again.toml")
    again = onnx.load(tmp_path / "m.again.onnx")
    assert again.graph == onnx.load(out).graph


FAILURES = {
    "the comparison": ("check_optimizations", OnnxqError),
    "the layers": ("layer_errors", OnnxqError),
    "the clock": ("latency", KeyboardInterrupt),
}


@pytest.mark.parametrize("step", FAILURES)
def test_nothing_is_written_when_verification_fails(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, error = FAILURES[step]
    case = residual()
    path = saved(case, tmp_path)
    old = tmp_path / "m.int8-static.onnx"
    old.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise error("it does not hold")

    monkeypatch.setattr(verify, name, fail)
    with pytest.raises(error, match="does not hold"):
        onnxq.quantize(path, samples=case.feeds)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.int8-static.onnx", "m.onnx"]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("damage", "message"),
    [("operator", "fails the ONNX checker"), ("input", "does not load|fails the ONNX checker")],
)
def test_a_result_that_is_no_model_is_not_written(
    damage: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxq.passes import InsertQDQ

    case = residual()
    path = saved(case, tmp_path)
    original = InsertQDQ.apply

    def damaged(self, graph, ctx):  # type: ignore[no-untyped-def]
        changes = original(self, graph, ctx)
        last = graph.nodes[-1]
        if damage == "operator":
            last.op = "NoSuchOperator"
        else:
            last.attrs["no_such_attribute"] = 1
        return changes

    monkeypatch.setattr(InsertQDQ, "apply", damaged)
    with pytest.raises(OnnxqError, match=message):
        onnxq.quantize(path, samples=case.feeds)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_run_without_verification_says_so(tmp_path: Path) -> None:
    case = residual()
    path = saved(case, tmp_path)
    report = onnxq.quantize(path, samples=case.feeds, check=False).report
    assert not report.verified
    assert report.outputs == []
    assert report.float_latency is None
    assert any("not verified" in warning for warning in report.warnings)
    props = {p.key: p.value for p in onnx.load(tmp_path / "m.int8-static.onnx").metadata_props}
    assert props["onnxq.verified"] == "false"
    assert "onnxq.cosine" not in props


def test_write_false_writes_nothing(tmp_path: Path) -> None:
    case = residual()
    report = onnxq.quantize(saved(case, tmp_path), samples=case.feeds, write=False).report
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert report.quantized_bytes > 0
    assert report.output == ""


# ── external data ────────────────────────────────────────────────────────────────────────────────


def external(folder: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    text = (
        "(float[n,256] x) => (float[n,8] y) { h = MatMul (x, w) r = Relu (h) y = Gemm (r, v, b) }"
    )
    made = model(text, w=normal(256, 256), v=normal(256, 8, seed=1), b=normal(8))
    path = folder / "m.onnx"
    onnx.save(made, path, save_as_external_data=True, location="m.weights", size_threshold=0)
    return path, [{"x": normal(4, 256, seed=k)} for k in range(8)]


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_a_model_with_external_data_is_quantized_and_reruns_leave_the_same_size(
    preset: str, tmp_path: Path
) -> None:
    path, feeds = external(tmp_path)
    hashes = [file_hash(tmp_path / name) for name in ("m.onnx", "m.weights")]
    sizes = []
    for _ in range(3):
        report = onnxq.quantize(path, preset, samples=feeds, output=tmp_path / "q.onnx").report
        sizes.append(model_size(tmp_path / "q.onnx"))
        assert report.verified
        assert report.float_bytes == model_size(path) > 4 * 256 * 256
    assert len(set(sizes)) == 1
    assert sizes[0] < report.float_bytes / 2
    assert hashes == [file_hash(tmp_path / name) for name in ("m.onnx", "m.weights")]
    seen = Comparison()
    for feed in feeds:
        seen.update(Session(path).run(feed)["y"], Session(tmp_path / "q.onnx").run(feed)["y"])
    assert seen.sqnr_db > 25


def test_weights_that_stay_float_stay_external(tmp_path: Path) -> None:
    path, feeds = external(tmp_path)
    onnxq.quantize(path, samples=feeds, output=tmp_path / "q.onnx", exclude=["MatMul"])
    tensors = onnx.load(tmp_path / "q.onnx", load_external_data=False).graph.initializer
    places = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    assert places == {file.name for file in tmp_path.glob("q.onnx.*.data")}
    assert len(places) == 1
    expected = Session(path).run(feeds[0])["y"]
    assert np.abs(Session(tmp_path / "q.onnx").run(feeds[0])["y"] - expected).max() < 5


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path, feeds = external(inner)
    (inner / "m.weights").rename(tmp_path / "m.weights")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.weights"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxqError, match="outside the model's folder"):
        onnxq.quantize(path, samples=feeds)
    assert [p.name for p in inner.iterdir()] == ["m.onnx"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "int9"}, "no preset 'int9'"),
        ({"target": "gpu"}, "no target 'gpu'"),
        ({"include": ["Cnv"]}, "'Cnv' matches no node name or operator; nearest: Conv"),
        ({"exclude": ["Conv", "GlobalAveragePool", "Add"]}, "excluded by the user"),
        ({"settings": ["calibrate.method=x"]}, "one of minmax"),
        ({"output": "m.onnx"}, "would replace the input"),
        ({"output": "nowhere/q.onnx"}, "no folder"),
        ({"samples": [{"z": np.zeros((1, 4, 6, 6), np.float32)}]}, "x"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(
    options: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = residual()
    saved(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = {"samples": case.feeds} | options
    with pytest.raises(OnnxqError) as error:
        onnxq.quantize("m.onnx", **arguments)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(OnnxqError, match=r"nowhere\.onnx"):
        onnxq.quantize("nowhere.onnx")


# ── validate, inspect, bench ─────────────────────────────────────────────────────────────────────


def test_validate_measures_a_pair_of_files(tmp_path: Path) -> None:
    case = attention()
    path = saved(case, tmp_path)
    made = onnxq.quantize(path, samples=case.feeds).report
    report = onnxq.validate(path, tmp_path / "m.int8-static.onnx", samples=case.feeds)
    seen = Comparison()
    for feed in case.feeds:
        left, right = (run(onnx.load(p), feed)["y"] for p in (path, made.output))
        seen.update(left, right)
    assert report.outputs[0].cosine == pytest.approx(seen.cosine, abs=1e-6)
    assert report.outputs[0].sqnr_db == pytest.approx(seen.sqnr_db, abs=0.5)
    assert report.ranked
    assert report.float_latency


def test_inspect_says_what_a_target_could_quantize_and_why_not_the_rest(tmp_path: Path) -> None:
    case = attention()
    path = saved(case, tmp_path)
    before = file_hash(path)
    report = onnxq.inspect(path)
    assert file_hash(path) == before
    layers = {r.name: r for r in report.layers}
    assert layers["p"].reason.startswith("rounding attention weights")
    assert layers["q"].form == "w s8:channel, a u8a"
    assert layers["q"].parameters == 256
    assert report.operators["MatMul"] == 6


@pytest.mark.parametrize("case", [gemm(), if_body()], ids=["gemm", "if_body"])
def test_inspect_counts_multiply_accumulates(case: Case, tmp_path: Path) -> None:
    report = onnxq.inspect(saved(case, tmp_path))
    macs = {r.name: r.macs for r in report.layers}
    if "a" in macs and "y" in macs:
        assert (macs["a"], macs["y"]) == (3 * 12 * 16, 3 * 16 * 5)
    else:
        assert macs["h"] > 0
        assert macs["h"] % 16 == 0


def test_strings_are_fed_as_they_are(tmp_path: Path) -> None:
    text = """(string[n] s, float[n,4] x) => (float[n,4] y, string[n] t) {
        t = Identity (s)
        y = MatMul (x, w)
    }"""
    onnx.save(model(text, w=normal(4, 4)), tmp_path / "m.onnx")
    feeds = [{"s": np.array(["a", "b"]), "x": normal(2, 4, seed=k)} for k in range(12)]
    report = onnxq.quantize(tmp_path / "m.onnx", samples=feeds).report
    assert report.outputs[0].cosine > 0.99
    assert len(onnxq.bench([tmp_path / "m.onnx"], samples=feeds, seconds=0.1)) == 1
    with pytest.raises(OnnxqError, match=r"made up .* 's' is a tensor\(string\)\); give --data"):
        onnxq.quantize(tmp_path / "m.onnx")


def test_bench_times_models_in_turns_and_their_memory(tmp_path: Path) -> None:
    case = residual()
    path = saved(case, tmp_path)
    onnxq.quantize(path, samples=case.feeds)
    rows = onnxq.bench([path, tmp_path / "m.int8-static.onnx"], samples=case.feeds, seconds=0.2)
    assert [Path(row["model"]).name for row in rows] == ["m.onnx", "m.int8-static.onnx"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
    for row in rows:
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["bytes"] == model_size(row["model"])
        assert row["peak_mb"] > 0
