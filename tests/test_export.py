"""`onnxq export` where the extra hf is not installed, and bad input; tests/test_hf.py exports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onnxq.cli import app


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    assert "pip install 'onnxq[hf]'" in refused("some/model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists; remove it" in refused("some/model", tmp_path / "there")
    assert "make it first" in refused("some/model", tmp_path / "no" / "out")
    assert "holds no config.json" in refused(tmp_path / "there", tmp_path / "out")
    (tmp_path / "model.onnx").touch()
    assert "is a file; give a folder" in refused(tmp_path / "model.onnx", tmp_path / "out")
