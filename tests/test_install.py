"""onnxq as it is installed: with a C++ compiler its library of kernels is built, without it is not
missed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import MODELS

ROOT = Path(__file__).parents[1]
NOWHERE = "/nowhere/c++"
NO_INDEX = "No matching distribution found for scikit-build-core"


def installed(folder: Path, **environment: str) -> Path:
    """The commands of a fresh virtual environment with onnxq in it, and this one's packages.

    What is compiled is not optimized, which takes a third of the time.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (python,) = folder.glob("bin/python")
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", "utf-8")
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps",
         "--config-settings=cmake.build-type=Debug", str(ROOT)],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    if NO_INDEX in done.stderr:
        pytest.skip("needs a package index")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def said(commands: Path, *arguments: str) -> str:
    command = [str(commands / "onnxq"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=commands)
    assert done.returncode == 0, done.stderr
    return done.stdout


def quantized(commands: Path, folder: Path) -> str:
    """What the command says of a model with operators that have kernels."""
    out = folder / "digits.onnx"
    model = MODELS / "digits_cnn.onnx"
    done = subprocess.run(
        [str(commands / "onnxq"), "quantize", str(model), "--preset", "nf4", "--ops", "-q",
         "--output", str(out)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size
    return done.stderr


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
def test_with_a_compiler_the_library_is_built(tmp_path: Path) -> None:
    commands = installed(tmp_path / "venv")
    about = json.loads(said(commands, "ops", "--json"))
    library = Path(about["library"])
    assert library.is_relative_to(tmp_path)
    assert about["used"] in about["built"]
    assert "portable" in about["built"]
    assert not list(library.parent.rglob("*.cpp"))
    assert f"this CPU uses: {about['used']}" in said(commands, "ops")
    assert "--ops" not in said(commands, "targets", "show", "cpu")
    assert "no library" not in quantized(commands, tmp_path)


def test_without_a_compiler_the_operators_run_by_their_functions(tmp_path: Path) -> None:
    commands = installed(tmp_path / "venv", CC=NOWHERE, CXX=NOWHERE)
    about = json.loads(said(commands, "ops", "--json"))
    assert about["library"] is None
    assert "MatMulCodebook" in about["operators"]
    assert "no library of kernels was built" in said(commands, "ops")
    shown = said(commands, "targets", "show", "cpu").splitlines()
    assert shown[-1].startswith("# operators of onnxq's own (--ops): no library of kernels")
    assert "run by functions of standard operators" in shown[-1]
    assert "no library of kernels was built" in quantized(commands, tmp_path)
