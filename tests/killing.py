"""Runs `onnxq quantize` over an older output and kills it: old or new must be there, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from graphs import feeds_of, model, normal

from onnxq.storage import load_proto, save_proto

# A lower limit, so that small models get data files, too.
QUANTIZE = """
import sys
from onnxq import storage
storage.ONE_FILE_LIMIT = int(sys.argv.pop(1))
from onnxq.cli import main
main()
"""
SAVE = """
import os, signal, sys
from onnxq import storage
limit, deadly = map(int, sys.argv[1:])
calls = 0

def killing(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

os.replace, os.unlink, os.rmdir = map(killing, (os.replace, os.unlink, os.rmdir))
storage.Path.unlink = killing(storage.Path.unlink)
storage.save_proto(storage.load_proto("m.onnx"), "out/q.onnx", limit=limit)
"""
Files = dict[str, bytes]


def quantize(folder: Path, external: bool) -> subprocess.Popen[str]:
    """Starts `onnxq quantize m.onnx -o out/q.onnx`."""
    arguments = ["quantize", "m.onnx", "--data", "m.npz", "-o", "out/q.onnx", "--quiet"]
    return _process(folder, QUANTIZE, _limit(external), *arguments)


def save(folder: Path, external: bool, deadly: int = 0) -> subprocess.Popen[str]:
    """Starts to save m.onnx as out/q.onnx; it kills itself at the `deadly`-th change of names in
    the file system."""
    return _process(folder, SAVE, _limit(external), str(deadly))


def _limit(external: bool) -> str:
    return str(1024 if external else 1 << 30)


def _process(folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """A model to quantize in a folder, its samples, and the folder of the output."""
    weights = {"w": normal(64, 96), "v": normal(96, 64, seed=1)}
    text = "(float[n,64] x) => (float[n,64] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    onnx.save(model(text, **weights), folder / "m.onnx")
    rows = np.concatenate([feed["x"] for feed in feeds_of(16, x=(1, 64))])
    np.savez(folder / "m.npz", x=rows)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    return folder / "m.onnx", out


def older(out: Path, external: bool) -> Files:
    """An output of an earlier run, another model than the one that comes."""
    for name in files(out):
        (out / name).unlink()
    text = "(float[n,64] x) => (float[n,64] y) { y = MatMul (x, w) }"
    save_proto(model(text, w=normal(64, 64, seed=7)), out / "q.onnx", limit=0 if external else None)
    return files(out)


def files(out: Path) -> Files:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def whole(out: Path, before: Files, after: Files) -> str:
    """Whether the older or the newer output is there, with all that it points to."""
    now = files(out)
    load_proto(out / "q.onnx")  # its data file is there and long enough
    for name, output in (("old", before), ("new", after)):
        if now["q.onnx"] == output["q.onnx"]:
            assert all(now.get(file) == data for file, data in output.items())
            return name
    raise AssertionError("the output is neither the old one nor the new one")


def finish(work: subprocess.Popen[str], out: Path) -> Files:
    """What a run leaves that is not killed. Nothing else may lie beside it."""
    _, err = work.communicate(timeout=60)
    assert work.returncode == 0, err
    left = files(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(left)
    return left


def kill_at_random(folder: Path, times: int, external: bool, seed: int) -> dict[str, int]:
    """Kills `times` runs at moments spread over a run's time. Returns how often which output was
    found afterwards."""
    _, out = prepare(folder)
    rng = np.random.default_rng(seed)
    older(out, external)
    started = time.monotonic()
    after = finish(quantize(folder, external), out)
    duration = time.monotonic() - started
    seen = {"old": 0, "new": 0}
    for _ in range(times):
        before = older(out, external)
        work = quantize(folder, external)
        time.sleep(float(duration * rng.uniform(0.2, 1.02)))
        os.kill(work.pid, signal.SIGKILL)
        work.communicate(timeout=60)
        seen[whole(out, before, after)] += 1
    assert finish(quantize(folder, external), out) == after
    return seen
