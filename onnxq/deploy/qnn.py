"""For Qualcomm's NPU: a context binary where it can be made here, else what makes one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from onnxq.deploy.base import Made, Source, copy_model, fill, session_options, text_of
from onnxq.deploy.options import SessionOptions
from onnxq.deploy.smoke import Smoke
from onnxq.devices import Job, ask
from onnxq.errors import OnnxqError
from onnxq.runtime import Ends
from onnxq.target import load_target
from onnxq.verify import Comparison

_CONTEXT = "model_ctx.onnx"


def qnn(source: Source, smoke: Smoke, folder: Path) -> Made:
    """A context binary where a Python with onnxruntime-qnn is at hand, else what makes one."""
    for spec in source.inputs:
        if spec.shape is None or not all(isinstance(size, int) for size in spec.shape):
            raise OnnxqError(
                f"the input {spec} has dimensions that are no numbers, and the NPU takes fixed "
                "shapes alone: export the model with numbers there"
            )
    if source.place is not None:  # a compiler that is not on the device has to be told its chip
        known = load_target("qnn-htp").provider_options
        source = replace(source, options={**known, **source.options})
    session = session_options(source, folder, "QNNExecutionProvider")
    notes: tuple[str, ...] = ()
    if source.place is None:
        copy_model(source, folder)
        fill(folder, "qnn/make_context.py")
    else:
        smoke, notes = _compile(source, smoke, session, folder)
    names = {"model": _CONTEXT, "threads": str(session.threads)}
    texts = [(json.dumps(key), json.dumps(value)) for key, value in session.options.items()]
    pairs = "".join(f", {key}: {value}" for key, value in texts)
    braced = "".join(f", {{{key}, {value}}}" for key, value in texts)
    fill(folder, "qnn/session.py", **names, settings=session.code("py"), options=pairs)
    fill(folder, "qnn/session.cpp", **names, settings=session.code("cpp"), options=braced)
    fill(folder, "smoke_test.py", needs="onnxruntime, onnxruntime-qnn and NumPy")
    step = "" if source.place else "python make_context.py   # once, on the device"
    use = text_of("qnn/README.md", make_context=step)
    test = source.place.command if source.place else ()
    why_not = "" if test else "it needs a Python that has onnxruntime-qnn (--ep qnn@PYTHON)"
    return Made("model.onnx" if why_not else _CONTEXT, session, smoke, use, test, why_not, notes)


def _compile(
    source: Source, smoke: Smoke, session: SessionOptions, folder: Path
) -> tuple[Smoke, tuple[str, ...]]:
    """Let the place write the context. What it then answers is what is expected of the device."""
    assert source.place is not None
    place = replace(source.place, options=session.options)
    context = {
        "ep.context_enable": "1",
        "ep.context_file_path": str((folder / _CONTEXT).absolute()),
        "ep.context_embed_mode": "0",
    }
    job = Job(source.path, config=session.config, custom_ops=source.custom_ops)
    [made] = ask(place, [replace(job, config={**session.config, **context})])
    if made.error or not (folder / _CONTEXT).is_file():
        why = made.error or "it takes no node of it"
        raise OnnxqError(
            f"{place.name} does not compile the model ({why}); quantize it for the NPU, with "
            "--preset int8-static --target qnn-htp"
        )
    [ran] = ask(place, [replace(job, model=folder / _CONTEXT, feeds=[smoke.inputs])])
    if ran.error:
        raise OnnxqError(f"{place.name} does not run what it compiled: {ran.error}")
    coded = Ends.of_model(source.model).coded
    answer = {
        name: coded[name].codes(array, smoke.outputs[name].dtype) if name in coded else array
        for name, array in ran.outputs[0].items()
    }
    left = sum(provider == "CPUExecutionProvider" for provider in made.placement.values())
    nodes = f"{left} of {len(made.placement)} nodes run" if left else "no node runs"
    chip = session.options["soc_model"]
    notes = [
        f"Compiled by onnxruntime {made.version}: {nodes} on the CPU. For the chip {chip} of QNN's "
        "list; --ep-option soc_model=N compiles for another.",
    ]
    for name, array in answer.items():
        if array.dtype.kind in "fiu":
            seen = Comparison()
            seen.update(smoke.outputs[name], array)
            notes.append(f"Cosine of {name} on the NPU to that on the CPU: {seen.cosine:.4f}.")
    rule = f"expected is what {place.name} answered where this was made; {smoke.rule}"
    return replace(smoke, outputs=answer, rule=rule), tuple(notes)
