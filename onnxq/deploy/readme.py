"""The README of a deployed model: what is inside, how to use it, how good it is, its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from onnxq.coded_io import from_metadata
from onnxq.deploy.base import Made, Source
from onnxq.feeds import InputSpec, type_text
from onnxq.storage import data_paths, file_hash, model_size

PURPOSES = {
    "smoke_test.py": "runs the model on a sample and compares the answer",
    "smoke": "the sample, the expected answer, the tolerance",
    "session.json": "the session options",
    "session.py": "the session options, Python",
    "session.cpp": "the session options, C++",
    "session.js": "the session options, JavaScript",
    "android": "the session options, Kotlin",
    "ios": "the session options, Swift",
    "run.py": "runs the model on arrays of your own",
    "required_operators.config": "operators and types for a reduced build of ONNX Runtime",
    "make_context.py": "compiles the model for the NPU at hand",
    "index.html": "the page, which runs the smoke test",
    "page.js": "the page's program",
    "model.js": "loads and runs a model in a page",
    "npy.js": "reads NumPy's files in a page",
    "browser.py": "serves the page and starts Chromium, for smoke_test.py",
    "ort": "ONNX Runtime Web",
}


def readme(kind: str, source: Source, made: Made, said: str, folder: Path) -> str:
    """Markdown. `said` is what the smoke test printed here; empty where it was not run."""
    parts = [
        f"# {source.name}, for {kind}",
        "\n".join(_files(source, made, folder)),
        "## Use",
        made.use.rstrip(),
        "## Inputs and outputs",
        "\n".join(_ends(source)),
        "## Smoke test",
        _smoke(made, said),
        "## Accuracy",
        _accuracy(_metadata(source)),
        "## Provenance",
        "\n".join(_provenance(source, made, folder)),
    ]
    return "\n\n".join(parts) + "\n"


def _files(source: Source, made: Made, folder: Path) -> list[str]:
    purposes = PURPOSES | {made.model: "the model"}
    purposes |= {library.name: "custom operators" for library in source.custom_ops}
    rows = ["| file | bytes | |", "|---|--:|---|"]
    for path in sorted(folder.iterdir()):
        inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        size = sum(file.stat().st_size for file in inside)
        name = path.name + "/" * path.is_dir()
        rows.append(f"| `{name}` | {size:,} | {purposes.get(path.name, 'data of the model')} |")
    return rows


def _ends(source: Source) -> list[str]:
    coded = from_metadata(_metadata(source))
    rows = ["| | name | type and shape |", "|---|---|---|"]

    def row(what: str, spec: InputSpec) -> str:
        text = type_text(spec.dtype, spec.shape)
        if spec.name in coded:
            value = coded[spec.name]
            text += f"; codes: real = {value.scale!r} · (code − {value.zero})"
        return f"| {what} | `{spec.name}` | {text} |"

    rows += [row("input", spec) for spec in source.inputs]
    return rows + [row("output", spec) for spec in source.outputs]


def _smoke(made: Made, said: str) -> str:
    lines = ["`python smoke_test.py` ends with exit code 0 where the answer is the one expected."]
    lines += [f"Tolerance: {made.smoke.rule}."]
    if not said:
        return "\n".join([*lines, f"It was not run when this folder was made: {made.why_not}."])
    where = f"When this folder was made, with onnxruntime {metadata.version('onnxruntime')} here:"
    return "\n".join([*lines, where]) + f"\n\n```\n{said}\n```"


def _accuracy(known: Mapping[str, str]) -> str:
    if "onnxq.preset" not in known:
        return "onnxq did not quantize this model, so nothing was measured."
    made = f"Quantized with the preset `{known['onnxq.preset']}`"
    if "onnxq.cosine" not in known:
        return f"{made}; its answers were not compared with those of the float model."
    cosines = json.loads(known["onnxq.cosine"])
    rows = [f"| `{name}` | {value} |" for name, value in cosines.items()]
    head = f"{made}. Cosine of its answers to those of the float model, when it was made:"
    return "\n".join([head, "", "| output | cosine |", "|---|--:|", *rows])


def _provenance(source: Source, made: Made, folder: Path) -> list[str]:
    known = _metadata(source)
    rows = [
        ("made by", f"onnxq {metadata.version('onnxq')}"),
        ("from", f"`{source.path.name}`, {model_size(source.path):,} bytes"),
        ("its SHA-256", f"`{file_hash(source.path)}`"),
    ]
    rows += [
        (f"SHA-256 of `{file.name}`", f"`{file_hash(file)}`")
        for file in _weights(source, made, folder)
    ]
    if "onnxq.preset" in known:
        rows += [("quantized for target", known.get("onnxq.target", "not known"))]
        rows += [("float model's SHA-256", f"`{known.get('onnxq.source_sha256', 'not known')}`")]
    rows += [("note", text) for text in made.notes]
    return ["| | |", "|---|---|", *(f"| {what} | {text} |" for what, text in rows)]


def _weights(source: Source, made: Made, folder: Path) -> list[Path]:
    model = folder / made.model
    data = sorted(data_paths(model)) if model.suffix == ".onnx" else []
    return [model, *data, *(folder / library.name for library in source.custom_ops)]


def _metadata(source: Source) -> dict[str, str]:
    return {entry.key: entry.value for entry in source.model.metadata_props}
