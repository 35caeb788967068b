"""For the web: the model and a page that runs it with ONNX Runtime Web."""

from __future__ import annotations

import html
import json
import shutil
import sys
from importlib import resources
from pathlib import Path

from onnxq.deploy.base import Made, Source, copy_model, fill, session_options, text_of
from onnxq.deploy.smoke import Smoke
from onnxq.devices.browser import find_browser
from onnxq.errors import OnnxqError
from onnxq.storage import data_paths
from onnxq.tables import quantity

WEB_VERSION = "1.30.0"  # of onnxruntime-web, which pages were tested with
WEB_FILES = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{WEB_VERSION}/dist/"


def web(source: Source, smoke: Smoke, folder: Path) -> Made:
    """The model and a page that runs it with ONNX Runtime Web."""
    if source.custom_ops:
        raise OnnxqError("onnxruntime-web loads no libraries of custom operators")
    strings = [spec.name for spec in (*source.inputs, *source.outputs) if spec.dtype == object]
    if strings:
        raise OnnxqError(f"{strings[0]!r} holds strings, which the page does not take")
    session = session_options(source, folder, "wasm")
    model = copy_model(source, folder)
    runtime, version = _CDN, WEB_VERSION
    if source.runtime is not None:
        runtime, version = "./ort/", _copy_runtime(source.runtime, folder / "ort")
    data = sorted(str(path.relative_to(folder.resolve())) for path in data_paths(folder / model))
    fill(
        folder, "web/session.js", model=model, runtime=runtime, version=version,
        data=json.dumps(data), config=json.dumps(dict(session.config)),
        threads=str(session.threads),
    )  # fmt: skip
    size = sum((folder / file).stat().st_size for file in (model, *data))
    example = "\n".join(
        f'  {json.dumps(spec.name)}: new ort.Tensor("{smoke.inputs[spec.name].dtype}", values, '
        f"{list(smoke.inputs[spec.name].shape)}),"
        for spec in source.inputs
    )
    fill(
        folder, "web/index.html", name=html.escape(source.name), size=quantity(size, "B"),
        summary=f"Run in this page by ONNX Runtime Web {version}, WebAssembly",
        example=html.escape(example),
    )  # fmt: skip
    fill(folder, "web/smoke_test.py")
    fill(folder, "web/page.js")
    devices = Path(str(resources.files("onnxq") / "devices"))
    for file in (devices / "browser.py", devices / "web" / "npy.js", devices / "web" / "model.js"):
        shutil.copyfile(file, folder / file.name)
    where = (
        f"ONNX Runtime Web {version} is in `ort/`."
        if source.runtime is not None
        else f"ONNX Runtime Web {version} comes from jsdelivr.net; to serve it yourself, change "
        "`RUNTIME` in `session.js`."
    )
    here = source.runtime is not None and find_browser() is not None
    why_not = "" if here else "it needs Chromium, and the files of onnxruntime-web (--runtime)"
    use = text_of("web/README.md", runtime=where)
    return Made(model, session, smoke, use, (sys.executable,) if here else (), why_not)


def _copy_runtime(dist: Path, folder: Path) -> str:
    missing = [name for name in WEB_FILES if not (dist / name).is_file()]
    if missing:
        raise OnnxqError(f"{str(dist)!r} is no dist folder of onnxruntime-web: no {missing[0]}")
    folder.mkdir()
    for name in WEB_FILES:
        shutil.copyfile(dist / name, folder / name)
    package = dist.parent / "package.json"
    return str(json.loads(package.read_text("utf-8"))["version"]) if package.is_file() else "?"
