"""A run that is killed leaves the old output or the new one; the same command, the same bytes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from killing import finish, kill_at_random, older, prepare, quantize, save, whole

from onnxq.scratch import scratch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")


@pytest.mark.parametrize("external", [False, True])
def test_killed_at_each_change_of_the_output_folder(tmp_path: Path, external: bool) -> None:
    _, out = prepare(tmp_path)
    older(out, external)
    after = finish(save(tmp_path, external), out)
    assert len(after) == 1 + external
    seen = []
    for deadly in range(1, 30):
        before = older(out, external)
        work = save(tmp_path, external, deadly)
        work.communicate(timeout=60)
        if work.returncode == 0:
            break
        assert work.returncode == -signal.SIGKILL
        seen.append(whole(out, before, after))
    assert work.returncode == 0, "it was never left alone"
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert finish(save(tmp_path, external), out) == after


def test_killed_at_random_moments(tmp_path: Path) -> None:
    seen = kill_at_random(tmp_path, times=3, external=True, seed=0)
    assert sum(seen.values()) == 3


def test_what_a_killed_run_leaves_in_the_temporary_folder_goes_with_the_next(
    tmp_path: Path,
) -> None:
    abandoned = tmp_path / ".onnxq-tmp-abcdefgh"
    abandoned.mkdir()
    (abandoned / "model.onnx").write_bytes(bytes(1000))
    (tmp_path / "onnxq-tmp-mine").mkdir()
    with scratch(tmp_path) as first:
        (first / "x").touch()
        with scratch(tmp_path) as second:  # does not touch what is in use
            assert first.is_dir()
            assert second.is_dir()
            assert (first / "x").is_file()
        assert not abandoned.exists()
        assert not second.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["onnxq-tmp-mine"]


@pytest.mark.parametrize("external", [False, True])
def test_the_same_command_gives_the_same_bytes(
    tmp_path: Path, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed in ("0", "1"):
        monkeypatch.setitem(os.environ, "PYTHONHASHSEED", seed)
        (tmp_path / seed).mkdir()
        _, out = prepare(tmp_path / seed)
        found.append(finish(quantize(tmp_path / seed, external), out))
    assert found[0] == found[1]
    assert len(found[0]) == 1 + external
