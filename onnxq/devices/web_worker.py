"""Runs models in a browser: `worker.py` for ONNX Runtime Web, with a page for its Python.

    python web_worker.py --dist node_modules/onnxruntime-web/dist worker.py FOLDER

is a command that a `Place` takes: `cpu@"python web_worker.py --dist ..."`. The argument before the
folder, another worker, is not read. `webgpu@...` runs WebGPU, by SwiftShader on the CPU. Stands
alone with `browser.py`, `worker.py` and the folder `web` beside it, for any Python. Needs Chromium:
on the path, or named by $CHROMIUM.

A page gives neither a profile, nor the optimized graph, nor which provider took a node: an answer
lacks what the job asked of these. With the config entry `session.disable_cpu_ep_fallback` 1 a model
loads only where no node of it is left to WebAssembly.
"""

from __future__ import annotations

import argparse
import json
import mmap
import re
import sys
import threading
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

try:
    from onnxq.devices.browser import NO_GPU, SOFTWARE_GPU, Site, find_browser, opened, within
    from onnxq.devices.worker import write
except ImportError:  # a Python without onnxq, which runs this file by its path
    from browser import (  # type: ignore[import-not-found,no-redef]
        NO_GPU,
        SOFTWARE_GPU,
        Site,
        find_browser,
        opened,
        within,
    )
    from worker import write  # type: ignore[import-not-found,no-redef]

PAGES = Path(__file__).with_name("web")
RUNTIMES = {  # provider → its name on the web, and the file of onnxruntime-web that has it
    "CPUExecutionProvider": ("wasm", "ort.wasm.bundle.min.mjs"),
    "WebGpuExecutionProvider": ("webgpu", "ort.webgpu.bundle.min.mjs"),
}
_POLL = 0.2  # seconds
# An entry of a tensor's `external_data`, as protobuf writes it: key 1 "location", value 2, whose
# length is one byte, or two for 128 and more.
_LOCATION = re.compile(rb"\n\x08location\x12([\x00-\x7f]|[\x80-\xff][\x00-\x7f])")


class Jobs:
    """The folder of jobs, as a site: what the page asks for, and what it says."""

    def __init__(self, folder: Path, dist: Path) -> None:
        self._folder, self._dist = folder, dist
        names = json.loads((folder / "jobs.json").read_text("utf-8"))
        self._waiting = [name for name in names if not (folder / name / "answer.json").exists()]
        self._made: dict[str, dict[int, bytes]] = defaultdict(dict)
        self.done = threading.Event()

    def want_gpu(self) -> bool:
        return any(
            self._given(name)["provider"] == "WebGpuExecutionProvider" for name in self._waiting
        )

    def get(self, path: str) -> Path | bytes | None:
        """`/ort/FILE` of the runtime, `/JOB/model`, `/JOB/data/FILE`, `/JOB/sample/N/NAME`."""
        first, _, rest = path.strip("/").partition("/")
        if first == "ort":
            return within(self._dist, rest)
        if first not in self._waiting:
            return within(PAGES, path)
        kind, _, rest = rest.partition("/")
        if kind == "sample":
            number, _, index = rest.partition("/")
            with zipfile.ZipFile(self._sample(first, int(number))) as arrays:
                return arrays.read(arrays.namelist()[int(index)])
        model = self._model(first)
        if kind == "model":
            return model
        return model.parent / rest if rest in _data(model) else None

    def post(self, path: str, body: bytes) -> bytes:
        """`/next` asks for a job, `/JOB/output/N/INDEX` and `/JOB/answer` tell of one."""
        if path == "/next":
            return json.dumps(self._next()).encode()
        name, kind, *rest = path.strip("/").split("/")
        if kind == "output":
            self._made[rest[0]][int(rest[1])] = body
            return b"null"
        for number, arrays in self._made.items():
            with zipfile.ZipFile(self._folder / name / f"output-{number}.npz", "w") as file:
                for index, array in arrays.items():
                    file.writestr(f"arr_{index}.npy", array)
        self._made.clear()
        write(str(self._folder / name / "answer.json"), json.loads(body))
        self._waiting.remove(name)
        return b"null"

    def _next(self) -> dict[str, Any] | None:
        write(str(self._folder / "ready.json"), {})
        while self._waiting:
            name = self._waiting[0]
            given = self._given(name)
            why_not = _refusal(given)
            if not why_not:
                return self._job(name, given)
            answer = {"version": "", "stage": "start", "error": why_not}
            write(str(self._folder / name / "answer.json"), answer)
            self._waiting.pop(0)
        self.done.set()
        return None

    def _job(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        provider, runtime = RUNTIMES[given["provider"]]
        samples = []
        for number in range(given["samples"]):
            with zipfile.ZipFile(self._sample(name, number)) as arrays:
                inputs = [entry.removesuffix(".npy") for entry in arrays.namelist()]
            samples.append({x: f"/{name}/sample/{number}/{i}" for i, x in enumerate(inputs)})
        return {
            "name": name,
            "runtime": f"/ort/{runtime}",
            "provider": given["provider"],
            "model": f"/{name}/model",
            "data": [
                {"path": path, "url": f"/{name}/data/{path}"} for path in _data(self._model(name))
            ],
            "samples": samples,
            "seconds": given["seconds"],
            "threads": given["threads"],
            "session": {
                "executionProviders": [{"name": provider, **given["options"]}],
                "graphOptimizationLevel": "all" if given["optimize"] else "disabled",
                "extra": given["config"],
            },
        }

    def _given(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / name / "job.json").read_text("utf-8"))
        return found

    def _model(self, name: str) -> Path:
        return self._folder / name / str(self._given(name)["model"])

    def _sample(self, name: str, number: int) -> Path:
        return self._folder / name / f"sample-{number}.npz"


def _refusal(given: dict[str, Any]) -> str:
    """Why a page cannot do a job, or nothing."""
    if given["provider"] not in RUNTIMES:
        return f"onnxruntime-web has no {given['provider']}; it has {', '.join(RUNTIMES)}"
    if given["custom_ops"]:
        return "onnxruntime-web loads no libraries of custom operators"
    return ""


def _data(model: Path) -> list[str]:
    """The files beside a model that hold its weights, as it names them."""
    found: set[str] = set()
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        for match in _LOCATION.finditer(held):
            length = match[1][0] % 128 + 128 * sum(match[1][1:])
            found.add(held[match.end() : match.end() + length].decode())
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, required=True)
    parser.add_argument("worker")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("there is no Chromium here: install it, or name it in $CHROMIUM")
    if not (given.dist / RUNTIMES["CPUExecutionProvider"][1]).is_file():
        sys.exit(f"{given.dist} is no dist folder of onnxruntime-web")
    jobs = Jobs(given.folder, given.dist)
    flags = SOFTWARE_GPU if jobs.want_gpu() else NO_GPU
    profile = given.folder / "browser"
    profile.mkdir(exist_ok=True)
    with (
        Site(jobs.get, jobs.post) as site,
        opened(browser, f"{site.url}/jobs.html", profile, flags) as process,
    ):
        while not jobs.done.wait(_POLL):
            if process.poll() is not None:
                sys.exit("the browser ended")
            if site.lost:
                sys.exit("the page died")


if __name__ == "__main__":
    main()
