"""Exports a Hugging Face model to a folder of ONNX files, through optimum-onnx (extra `hf`)."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from onnxq.errors import OnnxqError, one_line
from onnxq.scratch import scratch

WRITES_TEXT = {"text-generation", "text2text-generation", "automatic-speech-recognition"}
WRITES_TEXT |= {"image-to-text"}


def export(
    model: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    opset: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Export `model`, a folder or a name on the Hugging Face Hub, to the new folder `output`.

    `task` is as optimum names it ("text-generation-with-past", "feature-extraction", …); by default
    that of the model's architecture, with past and present where it writes text. `opset` defaults
    to optimum's own. `trust_remote_code` runs code that comes with the model. Optimum runs what
    it wrote beside the model, and warns where they differ.

    Raises OnnxqError, with nothing written, where the extra is missing or optimum cannot export it.
    """
    place = Path(output)
    if place.exists() or place.is_symlink():
        raise OnnxqError(f"the output {str(place)!r} exists; remove it, or choose another folder")
    if not place.absolute().parent.is_dir():
        raise OnnxqError(f"there is no folder {str(place.absolute().parent)!r}; make it first")
    name = str(model)
    if Path(name).is_file():
        raise OnnxqError(f"{name!r} is a file; give a folder with a config.json, or a model's name")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise OnnxqError(f"the folder {name!r} holds no config.json: it is no Hugging Face model")
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise OnnxqError(
            f"exporting needs more packages ({one_line(error)}): pip install 'onnxq[hf]'"
        ) from None
    chosen = task or (_task_of(Path(name)) if Path(name).is_dir() else "auto")
    with scratch(place.absolute().parent) as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, which optimum expects
        staged = room / "folder"
        try:
            main_export(
                name,
                output=str(staged),
                task=chosen,
                opset=opset,
                trust_remote_code=trust_remote_code,
                local_files_only=Path(name).is_dir(),
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)[:400]}"
            raise OnnxqError(f"optimum cannot export {name!r} as {chosen} ({reason})") from error
        os.rename(staged, place)
    return place


def _task_of(folder: Path) -> str:
    """The task of a local model, which optimum tells of models on the hub alone."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    config = folder / "config.json"
    try:
        architectures = json.loads(config.read_text("utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as error:
        raise OnnxqError(f"{str(config)!r} cannot be read: {one_line(error)}") from None
    kind = getattr(transformers, architectures[0], None)
    try:
        task = str(TasksManager.infer_task_from_model(kind))
    except Exception:
        raise OnnxqError(
            f"{str(config)!r} names the architecture {architectures[0]!r}, which does not tell the "
            "task; name it with --task, such as text-generation-with-past or feature-extraction"
        ) from None
    return f"{task}-with-past" if task in WRITES_TEXT else task
