"""README and CONTRIBUTING say what is so: their examples run, what they name exists."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxq.preprocess import Preprocess

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.]+)(, continued)?$")


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text("utf-8")
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def run(command: list[str], folder: Path) -> str:
    """Run as a user would, with the installed onnxq and what `folder` holds."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with a copy of models/ in it."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    return tmp_path


# ── CONTRIBUTING ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def examples(folder: Path) -> Path:
    """CONTRIBUTING's examples as the files they say they are, installed by entry point."""
    for code in blocks("CONTRIBUTING.md", "python") + blocks("CONTRIBUTING.md", "toml"):
        named = FILE.match(code.partition("\n")[0])
        assert named, f"an example without a file name:\n{code}"
        with (folder / named[1]).open("a" if named[2] else "x", encoding="utf-8") as file:
            file.write(code)
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    installed = folder / f"my_passes-{project['version']}.dist-info"
    installed.mkdir()
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (installed / "METADATA").write_text(header, "utf-8")
    rows = [f"{k} = {v}\n" for k, v in project["entry-points"]["onnxq.passes"].items()]
    (installed / "entry_points.txt").write_text("[onnxq.passes]\n" + "".join(rows), "utf-8")
    return folder


def test_the_worked_example_runs_in_a_pipeline(examples: Path) -> None:
    printed = run([sys.executable, "use_it.py"], examples)
    assert re.search(r"^div-to-mul +[1-9]", printed, re.MULTILINE), printed
    assert (examples / "encoder.int8.onnx").is_file()


def test_the_worked_examples_own_tests_pass(examples: Path) -> None:
    (examples / "pyproject.toml").unlink()  # pytest would look for its settings there
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_passes.py"]
    assert "4 passed" in run(command, examples)


def test_the_worked_example_is_found_by_entry_point(examples: Path) -> None:
    code = (
        "import onnxq; result = onnxq.quantize('models/encoder_classifier.onnx',"
        " recipe='mine.toml', settings=['div-to-mul.exact=true'],"
        " samples='models/encoder_classifier.calib.npz', limit=8, write=False);"
        "print([s.settings for s in result.report.passes if s.name == 'div-to-mul'])"
    )
    assert "[{'exact': 'True'}]" in run([sys.executable, "-c", code], examples)


# ── README and the guides ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def workplace(folder: Path) -> Path:
    """The files that README's commands speak of, made of the digits model."""
    shutil.copy(folder / "models/digits_cnn.onnx", folder / "model.onnx")
    (folder / "images").mkdir()
    (folder / "images/preprocess.toml").write_text("resize = 8", "utf-8")
    with np.load(folder / "models/digits_cnn.calib.npz") as file:
        np.savez(folder / "samples.npz", **{name: array[:24] for name, array in file.items()})
        for number, image in enumerate(file["image"][:8, 0]):
            Image.fromarray((255 * image).astype(np.uint8)).save(folder / f"images/{number}.png")
    return folder


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_a_pages_python_runs(document: str, workplace: Path) -> None:
    examples = blocks(document, "python")
    assert examples
    for number, code in enumerate(examples):
        (workplace / f"example{number}.py").write_text(code, "utf-8")
        run([sys.executable, f"example{number}.py"], workplace)


GUIDES = [f"docs/{name}.md" for name in (
    "quickstart", "presets", "targets", "samples", "verification", "language-models", "tuning",
    "accuracy-dropped", "slower", "operators",
)]  # fmt: skip


@pytest.mark.parametrize("document", ["README.md", *GUIDES])
def test_a_pages_commands_run(document: str, workplace: Path) -> None:
    for code in blocks(document, "sh"):
        if code.startswith("onnxq ") and "qwen" not in code:  # which would be downloaded
            run(["bash", "-euo", "pipefail", "-c", code], workplace)


def test_preprocessing_is_shown_with_every_setting() -> None:
    (settings,) = map(tomllib.loads, blocks("docs/samples.md", "toml"))
    assert set(settings) == {field.name for field in fields(Preprocess)}
    assert Preprocess.of(settings).scale == 1 / 255


@pytest.mark.parametrize("kind", ["presets", "targets"])
def test_its_page_has_every_preset_and_target(kind: str) -> None:
    shipped = {path.stem for path in (ROOT / "onnxq" / kind).glob("*.toml")}
    text = (ROOT / f"docs/{kind}.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE))
    assert listed == shipped | ({"auto"} if kind == "targets" else set())


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "models/README.md", "docs/integer.md", *GUIDES]
)
def test_what_a_document_links_to_is_there(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    files = re.findall(r"`((?:\./)?(?:[\w.-]+/)+[\w.-]*)`", text)
    folder = (ROOT / document).parent
    assert not [link for link in links if not (folder / link).exists()]
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize(
    "script",
    [
        "scripts/install",
        "scripts/quickstart",
        "scripts/test",
        "scripts/lint",
        "scripts/docs",
        "scripts/hf-check",
        ".ci/run",
    ],
)
def test_a_script_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_every_built_in_pass_is_registered() -> None:
    from onnxq import passes

    registered = {entry.load() for entry in metadata.entry_points(group="onnxq.passes")}
    assert {getattr(passes, name) for name in passes.__all__} <= registered


# ── docs/integer.md ──────────────────────────────────────────────────────────────────────────────

NUMBER = re.compile(r"-?\d[\d.e+-]*")  # scales and codes vary with the processor's floats
SVG_TEXT = re.compile(r">([^<>]+)</t")


def test_the_integer_page_shows_what_its_script_makes(tmp_path: Path) -> None:
    """The script itself asserts that each value worked out by hand is what the runtime gives."""
    shutil.copy(ROOT / "docs/integer.md", tmp_path)
    run([sys.executable, str(ROOT / "scripts/integer_page.py"), str(tmp_path)], tmp_path)
    made, shown = ((f / "integer.md").read_text("utf-8") for f in (tmp_path, ROOT / "docs"))
    assert NUMBER.sub("#", made) == NUMBER.sub("#", shown)
    heading = "## Functions\n"
    assert made.partition(heading)[2] == shown.partition(heading)[2]
    for name in ("integer-conv.svg", "integer-attention.svg"):
        drawn, there = (
            [NUMBER.sub("#", text) for text in SVG_TEXT.findall((f / name).read_text("utf-8"))]
            for f in (tmp_path, ROOT / "docs")
        )
        assert drawn
        assert " ".join(drawn).replace(" · ", " ") == " ".join(there).replace(" · ", " ")


def test_the_integer_pages_python_runs(folder: Path) -> None:
    command = (
        "import onnxq; onnxq.quantize('models/digits_cnn.onnx', 'integer-only', check=False,"
        " samples='models/digits_cnn.calib.npz', output='model.onnx')"
    )
    run([sys.executable, "-c", command], folder)
    shutil.copy(folder / "models/digits_cnn.calib.npz", folder / "samples.npz")
    examples = blocks("docs/integer.md", "python")
    assert examples
    for number, code in enumerate(examples):
        (folder / f"example{number}.py").write_text(code, "utf-8")
        run([sys.executable, f"example{number}.py"], folder)
