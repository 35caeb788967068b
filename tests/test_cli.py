"""The command line as a user meets it: commands, exit codes, one line for what went wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from onnxq import show, tables
from onnxq.cli import app
from onnxq.report import (
    FloatOperatorRecord,
    GroupRecord,
    Latency,
    LayerRecord,
    OutputRecord,
    PassRecord,
    ProviderRecord,
    RangeRecord,
    Report,
)

MODELS = Path(__file__).parents[1] / "models"
DIGITS = MODELS / "digits_cnn.onnx"
CALIBRATION = MODELS / "digits_cnn.calib.npz"
TEST = MODELS / "digits_cnn.test.npz"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def passed(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def complaint(*arguments: object, code: int = 1) -> str:
    """The one line on stderr of a command that must fail, with nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("onnxq: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    return result.stderr


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """onnxq in a process of its own; Ctrl-C reaches it even where the tests ignore it."""

    def hear_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "onnxq.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, preexec_fn=hear_ctrl_c, **pipes, **options)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "digits.onnx"
    passed("quantize", DIGITS, "--data", CALIBRATION, "-o", path, "--quiet")
    return path


# Commands


def test_quantize_writes_beside_the_model_and_leads_with_what_came_of_it(tmp_path: Path) -> None:
    model = Path(shutil.copy(DIGITS, tmp_path))
    lines = passed("quantize", model, "--data", CALIBRATION).splitlines()
    assert lines[0] == f"wrote {tmp_path / 'digits_cnn.int8-static.onnx'}"
    assert re.search(r"\d× smaller, .*(faster|slower|as fast), cosine 0\.99\d+", lines[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "digits_cnn.int8-static.onnx",
        "digits_cnn.onnx",
    ]
    assert any("samples that calibration did not see" in line for line in lines)
    assert not any(line != line.rstrip() or "\x1b" in line for line in lines)


def test_quantize_without_samples_warns_before_the_details(tmp_path: Path) -> None:
    lines = passed("quantize", DIGITS, "-o", tmp_path / "q.onnx").splitlines()
    warnings = [i for i, line in enumerate(lines) if line.startswith("warning: no samples given")]
    assert warnings == [2]


def test_a_folder_of_images_is_as_good_as_its_arrays(tmp_path: Path) -> None:
    with np.load(CALIBRATION) as file:
        pixels = np.round(file["image"][:12, 0] * 255).astype(np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:02}.png")
    np.savez(tmp_path / "same.npz", image=(pixels[:, None] * (1 / 255)).astype(np.float32))
    (tmp_path / "mine.toml").write_text("crop = 8\n")
    made = []
    for options in (
        ["--data", tmp_path / "same.npz"],
        ["--data", folder, "--preprocess", tmp_path / "mine.toml"],
    ):
        passed("quantize", DIGITS, "-o", tmp_path / "q.onnx", "--quiet", *options)
        made.append(onnx.load(tmp_path / "q.onnx").graph.SerializeToString())
    assert made[0] == made[1]
    passed("validate", DIGITS, tmp_path / "q.onnx", "--quiet", *options)
    passed("bench", DIGITS, "--seconds", 0.1, *options)
    assert "no preprocess.toml; write there" in complaint("quantize", DIGITS, "--data", folder)
    message = complaint("quantize", DIGITS, "--data", CALIBRATION, *options[2:])
    assert "preprocessing is for a folder of images, and digits_cnn.calib.npz is none" in message
    message = complaint("quantize", DIGITS, *options[2:])
    assert "preprocessing is for a folder of images; give it with --data FOLDER" in message


def test_states_are_declared(tmp_path: Path) -> None:
    text = "(float[1,4] x, float[1,4] a) => (float[1,4] b) { s = Add (x, a) b = MatMul (s, w) }"
    onnx.save(graphs.model(text, w=graphs.normal(4, 4, scale=0.2)), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=graphs.normal(20, 4))
    common = (tmp_path / "m.onnx", "--data", tmp_path / "x.npz")
    assert "say so: --state b=a" in complaint("quantize", *common)
    printed = passed("quantize", *common, "--state", "b=a", "--json")
    assert json.loads(printed)["samples"] == "x.npz, 16 samples; a from b"
    passed("bench", *common, "--state", "b=a", "--seconds", 0.1)
    assert "give an output and an input as OUT=IN" in complaint("quantize", *common, "--state", "b")
    message = complaint("quantize", *common, "--state", "b=a", "--state", "b=x")
    assert "--state b=x: 'b' is paired already; give it once" in message
    assert "the model has no input 'A'" in complaint("bench", *common, "--state", "b=A")


def test_quantize_takes_settings_selectors_and_a_preset(tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    options = ["--set", "calibrate.method=percentile", "--set", "calibrate.percentile=99.9"]
    options += ["--exclude", "Gemm", "--exclude", "re:features.0/.*Conv"]
    report = json.loads(
        passed("quantize", DIGITS, "--data", CALIBRATION, "-o", out, *options, "--json")
    )
    left = {layer["op"] for layer in report["layers"] if layer["form"] == "float"}
    assert {"Gemm", "Conv"} <= left
    settings = next(p["settings"] for p in report["passes"] if p["name"] == "calibrate")
    assert settings == {"method": "percentile", "percentile": "99.9"}
    assert any(node.op_type == "Gemm" for node in onnx.load(out).graph.node)


def test_a_printed_preset_is_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(passed("presets", "show", "int8-static"))
    model = Path(shutil.copy(DIGITS, tmp_path))
    passed("quantize", model, "--recipe", recipe, "--data", CALIBRATION, "--no-verify")
    assert (tmp_path / "digits_cnn.mine.onnx").is_file()


def test_the_same_command_writes_the_same_bytes(tmp_path: Path, quantized: Path) -> None:
    again = tmp_path / "again.onnx"
    passed("quantize", DIGITS, "--data", CALIBRATION, "-o", again, "--no-verify", "--quiet")
    first, second = onnx.load(quantized), onnx.load(again)
    assert first.graph.SerializeToString() == second.graph.SerializeToString()


def test_no_verify_is_said(tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    text = passed("quantize", DIGITS, "--data", CALIBRATION, "-o", out, "--no-verify")
    assert "not verified" in text.splitlines()[1]
    assert "warning: not verified" in text


def test_quiet_prints_warnings_alone(tmp_path: Path) -> None:
    silent = run("quantize", DIGITS, "--data", CALIBRATION, "-o", tmp_path / "a.onnx", "-q")
    assert (silent.exit_code, silent.stdout) == (0, "")
    # A small model on a busy machine may come out slower, which is then said.
    assert [line for line in silent.stderr.splitlines() if "slower" not in line] == []
    warned = run("quantize", DIGITS, "-o", tmp_path / "b.onnx", "--quiet", "--no-verify")
    assert warned.stdout == ""
    assert all(line.startswith("onnxq: warning: ") for line in warned.stderr.splitlines())
    assert "no samples given" in warned.stderr


def test_validate_compares_two_files(quantized: Path) -> None:
    text = passed("validate", DIGITS, quantized, "--data", TEST, "--samples", 16)
    assert text.startswith(f"{quantized} against {DIGITS}\n")
    assert "compared on digits_cnn.test.npz, 16 samples" in text


def test_inspect_says_what_can_be_quantized_and_why_not_the_rest() -> None:
    text = passed("inspect", MODELS / "encoder_classifier.onnx")
    assert "parameters" in text.splitlines()[1]
    assert "Target cpu can quantize, static" in text
    assert "LayerNormalization: its statistics need float" in text
    assert re.search(r"^  MatMul +\d+ +int8/channel × uint8$", text, re.MULTILINE)


def test_inspect_counts_every_operator_of_the_file() -> None:
    report = json.loads(passed("inspect", DIGITS, "--form", "dynamic", "--json"))
    nodes = onnx.load(DIGITS).graph.node
    assert sum(report["operators"].values()) == len(nodes)
    assert report["operators"]["Conv"] == sum(node.op_type == "Conv" for node in nodes)


def test_bench_measures_models_against_the_first(quantized: Path) -> None:
    text = passed("bench", DIGITS, quantized, "--data", TEST, "--seconds", 0.1)
    titles, *rows = text.splitlines()
    assert titles.split() == ["model", "median", "quartiles", "ratio", "size", "peak", "memory"]
    assert len(rows) == 2
    assert " 1.00 " in rows[0]


@pytest.mark.parametrize(
    ("catalogue", "known", "shown"),
    [
        ("presets", "int8-static", "[[pass]]"),
        ("passes", "calibrate", "minmax, percentile, entropy, mse"),
        ("targets", "cpu", "[[rule]]"),
    ],
)
def test_catalogues(catalogue: str, known: str, shown: str) -> None:
    listed = passed(catalogue, "list")
    assert passed(catalogue) == listed
    assert re.search(rf"^{known}  +\w", listed, re.MULTILINE)
    assert shown in passed(catalogue, "show", known)


def test_every_pass_can_be_shown() -> None:
    names = [line.split()[0] for line in passed("passes").splitlines() if line[0] != " "]
    for name in names:
        assert passed("passes", "show", name).startswith(f"{name}\n")


def test_version() -> None:
    assert re.fullmatch(r"onnxq \d+\.\d+\.\d+\S*\n", passed("--version"))


@pytest.mark.parametrize(
    "command", [(), ("quantize",), ("validate",), ("inspect",), ("bench",), ("presets",)]
)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    text = passed(*command, "--help")
    assert re.search(r"Examples?:|Start with:", text)


def test_every_option_says_what_it_does() -> None:
    import typer

    def parameters(command: Any) -> list[Any]:
        inner = [p for c in getattr(command, "commands", {}).values() for p in parameters(c)]
        return [*command.params, *inner]

    every = parameters(typer.main.get_command(app))
    assert len(every) > 20
    assert all(parameter.help for parameter in every if parameter.name != "help")


# JSON


def test_json_is_all_there_is_on_stdout(tmp_path: Path, quantized: Path) -> None:
    commands: list[list[object]] = [
        ["quantize", DIGITS, "-o", tmp_path / "q.onnx"],
        ["validate", DIGITS, quantized],
        ["inspect", DIGITS],
        ["bench", DIGITS, quantized, "--seconds", 0.1],
    ]
    for command in commands:
        result = run(*command, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document
        for line in result.stderr.splitlines():
            assert line.startswith("onnxq: warning: ")


def test_what_a_users_function_prints_stays_out_of_the_json(tmp_path: Path) -> None:
    module = tmp_path / "chatty.py"
    module.write_text(
        "import numpy as np\n"
        "def samples():\n"
        "    print('a sample')\n"
        f"    x = np.load({str(CALIBRATION)!r})\n"
        "    for row in list(x.values())[0][:8]:\n"
        "        yield {list(x)[0]: row[None]}\n"
    )
    arguments = ["quantize", DIGITS, "--data", "chatty:samples", "-o", "q.onnx", "--json"]
    work = process(*arguments, "--no-verify", cwd=tmp_path)
    out, err = work.communicate(timeout=60)
    assert work.returncode == 0, err
    assert json.loads(out)["samples"]
    assert "a sample" in err


def test_the_report_file_is_the_json(tmp_path: Path) -> None:
    out, report = tmp_path / "q.onnx", tmp_path / "report.json"
    printed = passed(
        "quantize", DIGITS, "--data", CALIBRATION, "-o", out, "--report", report, "--json"
    )
    assert report.read_text() == printed
    assert Report.from_json(printed).verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "report.json"]


# What goes wrong


def missing_model(folder: Path) -> list[object]:
    return ["quantize", folder / "none.onnx"]


def not_a_model(folder: Path) -> list[object]:
    return ["quantize", CALIBRATION, "--data", CALIBRATION]


def empty_model(folder: Path) -> list[object]:
    return ["inspect", os.devnull]


def unknown_preset(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--preset", "int8-statik"]


def unknown_target(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--target", "cpu-vnny"]


def unknown_pass(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--set", "calibrat.method=mse"]


def unknown_field(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--set", "calibrate.metod=mse"]


def wrong_value(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--set", "calibrate.method=best"]


def no_setting(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--set", "calibrate"]


def selector_without_match(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--data", CALIBRATION, "--exclude", "Gem"]


def everything_excluded(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--data", CALIBRATION, "--exclude", "*"]


def missing_data(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--data", "none.npz"]


def wrong_input_name(folder: Path) -> list[object]:
    data = folder.parent / "wrong.npz"
    np.savez(data, picture=np.zeros((4, 1, 8, 8), np.float32))
    return ["quantize", DIGITS, "--data", data]


def empty_data(folder: Path) -> list[object]:
    data = folder.parent / "empty.npz"
    name = next(iter(np.load(CALIBRATION)))
    np.savez(data, **{name: np.load(CALIBRATION)[name][:0]})  # type: ignore[arg-type]
    return ["quantize", DIGITS, "--data", data]


def no_output_folder(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--data", CALIBRATION, "-o", folder / "none" / "q.onnx"]


def output_is_a_folder(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--data", CALIBRATION, "--no-verify", "-o", folder]


def test_a_report_that_ends_in_html_is_a_page_and_json_makes_the_same_later(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    out, direct, saved = (tmp_path / name for name in ("q.onnx", "direct.html", "q.json"))
    for file in (direct, saved):
        passed("quantize", DIGITS, "--data", CALIBRATION, "-o", out, "--report", file, "--quiet")
    assert "wrote" in passed("report", saved)
    for page in (direct, tmp_path / "q.html"):
        text = page.read_text()
        assert text.startswith("<!doctype html>")
        assert "It holds" in text
        assert "Where it hurts" in text
    assert any(record["weights"] for record in json.loads(saved.read_text())["layers"])
    assert "would replace" in complaint("report", direct)
    assert "no report" in complaint("report", direct, "-o", tmp_path / "new.html")
    assert "ends in .html" in complaint("report", saved, "-o", tmp_path / "page.txt")
    assert "there is no folder" in complaint("report", saved, "-o", tmp_path / "no" / "p.html")
    assert "No such file" in complaint("report", tmp_path / "no.json")


def test_a_page_without_its_libraries_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxq.page.render.LIBRARIES", {"no_such_module": "no-such-package"})
    out, page = tmp_path / "q.onnx", tmp_path / "page.html"
    said = complaint("quantize", DIGITS, "--data", CALIBRATION, "-o", out, "--report", page)
    assert "pip install 'onnxq[report]'" in said
    assert not out.exists()


def no_report_folder(folder: Path) -> list[object]:
    report = folder / "none" / "report.json"
    return ["quantize", DIGITS, "--data", CALIBRATION, "--report", report]


def unknown_recipe(folder: Path) -> list[object]:
    return ["quantize", DIGITS, "--recipe", folder / "none.toml"]


def models_that_differ(folder: Path) -> list[object]:
    return ["validate", DIGITS, MODELS / "decoder_lm.onnx", "--data", CALIBRATION]


def missing_bench(folder: Path) -> list[object]:
    return ["bench", DIGITS, folder / "none.onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (missing_model, "none.onnx"),
        (not_a_model, "not an ONNX model"),
        (empty_model, "/dev/null"),
        (unknown_preset, "nearest: int8-static"),
        (unknown_target, "nearest: cpu-vnni"),
        (unknown_pass, "nearest: calibrate"),
        (unknown_field, "nearest: method"),
        (wrong_value, "minmax, percentile, entropy, mse"),
        (no_setting, "pass.field=value"),
        (selector_without_match, "nearest: Gemm"),
        (everything_excluded, "nothing in this model can be quantized"),
        (missing_data, "none.npz"),
        (wrong_input_name, "picture"),
        (empty_data, "no samples"),
        (no_output_folder, "there is no folder"),
        (output_is_a_folder, "is a folder"),
        (no_report_folder, "there is no folder"),
        (unknown_recipe, "none.toml"),
        (models_that_differ, "input_ids"),
        (missing_bench, "none.onnx"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_input_gets_one_line_and_leaves_no_file(
    arguments: Any, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    command = arguments(folder)
    if command[0] == "quantize" and "-o" not in command:
        command += ["-o", folder / "q.onnx"]
    assert said in complaint(*command)
    assert list(folder.iterdir()) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("catalogue", "wrong", "near"),
    [
        ("presets", "int8-statik", "int8-static"),
        ("passes", "calibrat", "calibrate"),
        ("targets", "cpu-vnny", "cpu-vnni"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(
    catalogue: str, wrong: str, near: str
) -> None:
    assert f"nearest: {near}" in complaint(catalogue, "show", wrong)


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    model = Path(shutil.copy(DIGITS, tmp_path))
    before = model.read_bytes()
    assert "input" in complaint("quantize", model, "--data", CALIBRATION, "-o", model)
    assert "model" in complaint("quantize", model, "--data", CALIBRATION, "--report", model)
    assert model.read_bytes() == before
    assert list(tmp_path.iterdir()) == [model]


def test_a_failed_run_keeps_the_older_result(tmp_path: Path) -> None:
    older, report = tmp_path / "q.onnx", tmp_path / "report.json"
    older.write_text("older")
    report.write_text("older")
    complaint(
        "quantize", DIGITS, "--data", CALIBRATION, "-o", older, "--report", report,
        "--exclude", "*",
    )  # fmt: skip
    assert (older.read_text(), report.read_text()) == ("older", "older")


@pytest.mark.parametrize("wrong", [["--samples", "0"], ["--nonsense"], ["--samples", "many"], []])
def test_usage_errors_exit_with_2(wrong: list[str], tmp_path: Path) -> None:
    result = run("quantize", *([DIGITS, *wrong, "-o", tmp_path / "q.onnx"] if wrong else []))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("onnxq.api.inspect", broken)
    assert "ZeroDivisionError: by zero" in complaint("inspect", DIGITS)
    shown = run("--debug", "inspect", DIGITS).stderr
    assert shown.startswith("Traceback")
    assert shown.endswith("with what `onnxq --debug COMMAND` prints)\n")


def test_a_full_disk_is_not_reported_as_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "q.onnx")

    monkeypatch.setattr("onnxq.api.inspect", full)
    assert complaint("inspect", DIGITS) == "onnxq: error: No space left on device: q.onnx\n"


# Processes


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    started = tmp_path / "started"
    (tmp_path / "endless.py").write_text(
        "import time\n"
        "import numpy as np\n"
        "def samples():\n"
        f"    x = np.load({str(CALIBRATION)!r})\n"
        "    for number in range(10000):\n"
        "        if number == 5:\n"
        f"            open({str(started)!r}, 'w').close()\n"
        "        time.sleep(0.01)\n"
        "        yield {list(x)[0]: list(x.values())[0][:1]}\n"
    )
    folder = tmp_path / "out"
    scratch = tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    work = process(
        "quantize", DIGITS, "--data", "endless:samples", "--samples", 10000,
        "-o", folder / "q.onnx", "--report", folder / "report.json",
        cwd=tmp_path, env=os.environ | {"TMPDIR": str(scratch)},
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not started.exists() and work.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    work.send_signal(signal.SIGINT)
    try:
        out, err = work.communicate(timeout=15)
    finally:
        work.kill()
    assert (work.returncode, out, err) == (130, "", "onnxq: stopped; nothing was written\n")
    assert list(folder.iterdir()) == []
    assert list(scratch.glob("onnxq*")) == []  # onnxruntime keeps a session number of its own there


def test_a_closed_pipe_is_no_news(quantized: Path) -> None:
    work = process("passes", "list")
    assert work.stdout is not None
    assert work.stderr is not None
    work.stdout.close()
    assert work.stderr.read() == ""
    work.wait(timeout=30)
    work.stderr.close()


def test_help_is_quick_and_nothing_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys, onnxq.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"try: cli.app(['quantize', {str(DIGITS)!r}, '-o', {str(tmp_path / 'q.onnx')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'onnxruntime' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "onnxq.cli", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - started < 2  # 0.2 s by itself; CI machines are busy


# Tables


def rendered(report: Report, width: int) -> str:
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        show.show_report(report, console)
    return capture.get()


def long_report() -> Report:
    name = "/encoder/layer.{}/attention/output/dense/with/a/name/that/goes/on/MatMul_[{}]"
    layers = [
        LayerRecord(
            name.format(i, i), "MatMul", "w s8:channel, a u8a" if i % 2 else "a u8a",
            parameters=100, macs=1000, sqnr_db=30.0 + i, contribution=0.5**i,
        )
        for i in range(12)
    ]  # fmt: skip
    layers.append(LayerRecord("softmax", "Softmax", "float", "it " + "stays float " * 12))
    ranges = [
        RangeRecord(
            layer.name, -1234.5, 987.6, -1234.5, 987.6, 0.0, -0.00123, 0.00123, 0.0015, 5,
            set_by=117, finding=("clipped", "wider", "one sample", "narrower")[i % 4],
        )
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    groups = [
        GroupRecord(f"a group with a long name of its own {i}", name, 1000, 0.001 * i, 0.0123, None,
                    0.999, 31.5, i > 9)
        for i in range(12)
    ]  # fmt: skip
    groups.append(replace(groups[0], output="another output"))
    return Report(
        model="m.onnx", output="q.onnx", target="cpu", preset="p", samples="x.npz, 9 samples",
        verified=True, passes=[PassRecord("assign", {}, 3, 0.25, 90.0)], layers=layers,
        outputs=[OutputRecord(f"present.{i}", 1 - 10**-i, 10.0 * i, 0.9) for i in range(1, 15)],
        verification_samples=4, float_bytes=4000, quantized_bytes=1000,
        float_latency=Latency(2.0, 1.9, 2.1), quantized_latency=Latency(1.0, 0.9, 1.1),
        warnings=["a word of " + "warning " * 20], ranges=ranges, groups=groups,
    )  # fmt: skip


def test_tables_fit_the_terminal() -> None:
    lines = rendered(long_report(), 80).splitlines()
    tables = [line for line in lines if not line.startswith("warning: ")]
    assert max(map(len, tables)) <= 80
    ranking = [line for line in lines if "MatMul_[" in line and line.endswith("%")]
    assert len(ranking) == 10
    assert all("…" in line for line in ranking)
    assert ranking[0].endswith("████ 50.0 %")
    assert any("and 2 more layers" in line for line in lines)
    assert any("and 3 more tensors" in line for line in lines)
    assert any("and 3 more rows" in line for line in lines)
    assert any(line.endswith("sample 117") for line in lines)
    assert "clips: more than 0.1 % of the values in validation" in "\n".join(lines)
    first = lines.index(next(line for line in lines if line.startswith("Groups"))) + 2
    assert lines[first].endswith("stands out")
    assert any("and 4 more outputs" in line for line in lines)


def test_columns_that_can_be_spared_are_left_out_where_there_is_no_room() -> None:
    columns = [
        tables.Column("name", fit="cut"), tables.Column("a", "right", "drop"),
        tables.Column("b", "right"), tables.Column("c", "right", "drop"),
    ]  # fmt: skip
    rows = [["x" * 30, "1" * 10, "2" * 10, "3" * 10]]

    def titles(width: int) -> list[str]:
        console = Console(width=width)
        with console.capture() as capture:
            tables.print_table(console, columns, rows)
        assert max(map(len, capture.get().splitlines())) <= width
        return capture.get().split("\n")[0].split()

    assert titles(70) == ["name", "a", "b", "c"]
    assert titles(40) == ["name", "a", "b"]
    assert titles(30) == ["name", "b"]


def test_a_row_for_each_provider_fits_the_terminal() -> None:
    latency = Latency(12.345, 12.0, 13.0)
    output = OutputRecord("y", 0.99999, 40.12, 0.999)
    row = ProviderRecord(
        "openvino@/a/long/way/to/python", "OpenVINOExecutionProvider", "1.24", 1234, 1234,
        outputs=[output], same_bits=True, latency=latency, ratio=0.81,
    )  # fmt: skip
    text = rendered(replace(long_report(), providers=[row, row]), 80)
    assert max(map(len, text.splitlines()[3:])) <= 80
    assert "same bits" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_bars_are_drawn_where_the_stream_has_blocks(encoding: str) -> None:
    stream = TextIOWrapper(BytesIO(), encoding=encoding, errors="replace")
    show.show_report(long_report(), Console(file=stream, width=80))
    stream.seek(0)
    assert ("█" in stream.read()) == (encoding == "utf-8")


def test_names_are_whole_where_there_is_room() -> None:
    text = rendered(long_report(), 200)
    assert "/encoder/layer.3/attention/output/dense/with/a/name/that/goes/on/MatMul_[3]" in text
    assert "  4.00× smaller, 2.00× faster, cosine 0.9000, top-1 agrees 90.0 %" in text


def test_what_stays_float_in_an_integer_model_is_listed() -> None:
    left = [
        FloatOperatorRecord(f"/decoder/rnn/{k}", "GRU", "its state is float") for k in range(12)
    ]
    report = replace(long_report(), float_operators=left)
    lines = rendered(report, 80).splitlines()
    assert "Float operators between inputs and outputs  12" in lines
    assert any(line.split()[:2] == ["/decoder/rnn/0", "GRU"] for line in lines)
    assert any("and 2 more operators" in line for line in lines)
    assert Report.from_json(report.to_json()) == report


def test_an_integer_model_says_what_gave_the_same_bits() -> None:
    report = replace(long_report(), float_operators=[], exact_with=["one way", "another"])
    text = rendered(report, 80)
    assert "no floating-point operator between inputs and outputs" in text
    assert "the same bits with one way, another" in text
    assert "100 % of parameters" in text
    assert Report.from_json(report.to_json()) == report


def test_an_empty_report_is_still_a_report() -> None:
    assert "not verified" in rendered(Report(model="m.onnx", preset="p"), 80)
