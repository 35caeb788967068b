"""Peak memory of quantizing a large decoder made from a config, its weights in a data file."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from weights_models import Line

HIDDEN, FEED_FORWARD, VOCABULARY = 2048, 5632, 32000
BUDGET = 2 << 30
LARGEST = 4 * HIDDEN * VOCABULARY  # bytes of the largest weight
MB = 1 << 20
SAMPLES = """
import sys, numpy as np
from onnxq.pipeline import peak_mb
rng = np.random.default_rng(0)
feeds = [{"input_ids": rng.integers(0, 32000, (1, 64))} for _ in range(6)]
"""
FLOAT = """
from onnxq.runtime import Session
session = Session(sys.argv[1])
for feed in feeds:
    session.run(feed)
print(peak_mb())
"""
QUANTIZE = """
import time, onnxq
from onnxq import cache
started = time.perf_counter()
with cache.disabled():
    onnxq.quantize(sys.argv[1], sys.argv[3], output=sys.argv[2], check=False, limit=4,
                   samples=feeds if sys.argv[3] == "int4-gptq" else None,
                   memory_budget=int(sys.argv[4]))
print(peak_mb(), time.perf_counter() - started)
"""


@dataclass
class Writer:
    """A graph and its weights, which go to a data file one by one."""

    path: Path
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    offset: int = 0

    def weight(self, name: str, rows: int, columns: int) -> str:
        values = self.rng.standard_normal((rows, columns), np.float32)
        values *= np.float32(rows**-0.5)
        with self.path.with_suffix(".data").open("ab") as file:
            values.tofile(file)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": file_name(self.path), "offset": self.offset, "length": values.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        self.offset += values.nbytes
        return name

    def small(self, name: str, values: NDArray[np.float32]) -> str:
        self.weights.append(from_array(values, name))
        return name

    def node(self, op: str, name: str, *inputs: str) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name))
        return name

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        return self.node("MatMul", name, x, self.weight(f"{name}.weight", rows, columns))


def file_name(path: Path) -> str:
    return path.with_suffix(".data").name


def decoder(path: Path, gigabytes: float) -> int:
    """A decoder in a Llama's shape, whose attention looks at its own place alone.

    Returns the number of its layers, of which 12 make 3 GB.
    """
    one = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * FEED_FORWARD)
    count = max(1, round((gigabytes * 1e9 - 2 * LARGEST) / one))
    made = Writer(path)
    made.small("ones", np.ones(HIDDEN, np.float32))
    table = made.weight("embedding", VOCABULARY, HIDDEN)
    x = made.node("Gather", "embedded", table, "input_ids")
    for k in range(count):
        h = made.node("LayerNormalization", f"{k}.norm", x, "ones")
        q, key, v = (made.linear(f"{k}.{part}", h, HIDDEN, HIDDEN) for part in "qkv")
        gate = made.node("Sigmoid", f"{k}.attend", made.node("Mul", f"{k}.product", q, key))
        seen = made.node("Mul", f"{k}.seen", gate, v)
        x = made.node("Add", f"{k}.first", x, made.linear(f"{k}.o", seen, HIDDEN, HIDDEN))
        h = made.node("LayerNormalization", f"{k}.norm2", x, "ones")
        gate = made.linear(f"{k}.gate", h, HIDDEN, FEED_FORWARD)
        gate = made.node("Mul", f"{k}.silu", gate, made.node("Sigmoid", f"{k}.sigmoid", gate))
        up = made.node("Mul", f"{k}.gated", gate, made.linear(f"{k}.up", h, HIDDEN, FEED_FORWARD))
        x = made.node("Add", f"{k}.second", x, made.linear(f"{k}.down", up, FEED_FORWARD, HIDDEN))
    made.linear("logits", x, HIDDEN, VOCABULARY)
    value = helper.make_tensor_value_info
    ends = [value("input_ids", TensorProto.INT64, [1, "tokens"])]
    outputs = [value("logits", TensorProto.FLOAT, [1, "tokens", VOCABULARY])]
    graph = helper.make_graph(made.nodes, "decoder", ends, outputs, made.weights)
    opset = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    )
    return count


def child(code: str, *arguments: object) -> list[float]:
    """What a process of its own prints: its peak memory in MiB, and perhaps seconds.

    Where it and the processes that it starts took more together, that is the peak.
    """
    command = [sys.executable, "-c", SAMPLES + code, *map(str, arguments)]
    together = 0.0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=said, stderr=complaints)
        try:
            while process.poll() is None:
                together = max(together, memory_of(process.pid))
                time.sleep(0.2)
        finally:
            process.kill()
        said.seek(0)
        complaints.seek(0)
        if process.returncode:
            raise RuntimeError(complaints.read().strip().splitlines()[-1])
        peak, *others = map(float, said.read().split())
    return [max(peak, together), *others]


def memory_of(process: int) -> float:
    """MiB that a process and all that it started hold now, what they share counted once."""
    total, todo = 0.0, [process]
    while todo:
        folder = Path(f"/proc/{todo.pop()}")
        with contextlib.suppress(OSError):  # it has just ended
            lines = (folder / "smaps_rollup").read_text("ascii").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
            for started in folder.glob("task/*/children"):
                todo += map(int, started.read_text("ascii").split())
    return total


def figure(scratch: Path, gigabytes: float) -> Iterator[Line]:
    if shutil.disk_usage(scratch).free < 2e9 * gigabytes:
        raise SystemExit(f"{scratch} has no room for a model of {gigabytes:g} GB; set TMPDIR")
    model = scratch / "decoder.onnx"
    layers = decoder(model, gigabytes)
    size = f"{model.with_suffix('.data').stat().st_size / 1e9:.2f} GB, {layers} layers"
    out = scratch / "decoder.int4.onnx"
    peak, seconds = child(QUANTIZE, model, out, "int4-rtn", BUDGET)
    bound = 4 * LARGEST / MB + 500
    yield Line(
        f"peak memory, int4-rtn --no-verify, {size}", f"≤ {bound:.0f} MiB",
        f"{peak:.0f} MiB, {seconds:.0f} s", "yes" if peak <= bound else "no",
    )  # fmt: skip
    (alone,) = child(FLOAT, model)
    peak, seconds = child(QUANTIZE, model, out, "int4-gptq", BUDGET)
    yield Line(
        f"peak memory over the float session's, int4-gptq --memory-budget 2GB, {size}",
        f"≤ {BUDGET / MB:.0f} MiB",
        f"{peak - alone:.0f} MiB ({peak:.0f} - {alone:.0f}), {seconds:.0f} s",
        "yes" if peak - alone <= BUDGET / MB else "no",
    )  # fmt: skip
