"""`onnxq check`: what of a model a target runs, and what it did when it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from onnxq import graph as g
from onnxq import ops
from onnxq.devices.happened import compare
from onnxq.devices.judge import judge
from onnxq.devices.place import Job, Place, ask
from onnxq.devices.verdicts import CheckReport
from onnxq.errors import OnnxqError
from onnxq.ops.library import find_library
from onnxq.runtime import names_operators
from onnxq.target import CPU, Target, load_target


def check(
    model: str | Path,
    *,
    target: str | Target,
    run: bool = False,
    ep: str | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> CheckReport:
    """Say node by node what of a model a target runs in integers, as it stands, or not at all.

    The verdicts come from the target's data alone. `run` asks its provider, in this Python or where
    `ep` says (`openvino@/path/to/python`), and sets what happened beside each.

    Raises OnnxqError for a model or target that cannot be read, and where the provider is missing.
    """
    device = target if isinstance(target, Target) else load_target(target)
    place = _place(device, ep) if run or ep else None
    progress("check", 0, 1)
    kernels = CPU in device.providers and device.is_here and find_library() is not None
    graph = g.load(model, operators=kernels)
    found = judge(graph, device, bool(custom_ops))
    report = CheckReport(str(model), device.name, (device.providers or (CPU,))[0], found)
    if "integer" in device.lacks and _has_integer_functions(model):
        report.warnings.append(
            f"this model of integers alone says something else on {device.name}: "
            f"{device.lacks['integer']}; quantize with another preset"
        )
    if wrong := other_numbers(graph, device):
        report.warnings.append(f"{wrong}; take 8-bit weights, or quantize with --exclude")
    if "branches" in device.lacks and any(v.op == "If" and v.kind == "folded" for v in found):
        report.warnings.append(
            f"an If of this model has a condition that is known: {device.name} takes the branch "
            f"when it loads the model, and {device.lacks['branches']}; onnxq quantize leaves none"
        )
    report.warnings += [
        f"{op} is slow on {device.name}: {reason}"
        for op, reason in device.slow.items()
        if any(verdict.op == op for verdict in found)
    ]
    if not kernels and names_operators(model):
        report.warnings.append(
            f"{device.name} has no kernels for the operators of onnxq in this model: functions of "
            "standard operators compute them, slowly and with float weights in memory; quantize "
            "without --ops"
        )
    if place is None:
        return report
    progress(f"ask {place.name}", 0, 1)
    is_cpu = place.provider == CPU
    job = Job(
        g.to_proto(graph),  # in which every node has a name of its own
        config=device.session,
        custom_ops=custom_ops,
        optimized=is_cpu,
    )
    (answer,) = ask(place, [job])
    if answer.stage == "start":
        raise OnnxqError(f"{place.name} is not to be had: {answer.error}")
    compare(report, graph, place, answer)
    return report


def will_not_run(graph: g.Graph, target: Target, custom_ops: bool = False) -> str:
    """What of a model a target will not run, in a sentence; "" where it runs all, if elsewhere."""
    barred = [v for v in judge(g.copy(graph), target, custom_ops) if v.kind == "will not run"]
    if not barred:
        return ""
    first, more = barred[0], f" and {len(barred) - 1} more" * (len(barred) > 1)
    return f"{target.name} will not run {first.node!r} ({first.op}){more}: {first.reason}"


def other_numbers(graph: g.Graph, target: Target) -> str:
    """What of a model a target runs and gets wrong, in a sentence; "" where nothing is known."""
    why = target.lacks.get("scaled-4-bits")
    wrong = [node.name for node in g.walk(graph) if _is_scaled(node)] if why else []
    if not wrong:
        return ""
    more = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
    return f"{target.name} gives other numbers for {wrong[0]!r}{more}: {why}"


def _is_scaled(node: g.Node) -> bool:
    """Whether a product with 4-bit weights in blocks is then multiplied by a constant."""
    if node.op == "MatMul":
        made_by = [maker for tensor in node.inputs for maker in tensor.inputs]
        few = any(
            maker.op == "DequantizeLinear" and maker.attrs.get("block_size")
            and str(g.dtype(maker.inputs[0])) in ("int4", "uint4")
            for maker in made_by
        )  # fmt: skip
    else:
        few = node.op == "MatMulNBits" and node.attrs.get("bits", 4) < 8
    readers = node.outputs[0].outputs if few else []
    if len(readers) == 1 and readers[0].op == "Add" and any(map(g.is_constant, readers[0].inputs)):
        readers = readers[0].outputs[0].outputs
    return any(
        reader.op == "Neg"
        or (reader.op in ("Mul", "Div") and any(map(g.is_constant, reader.inputs)))
        for reader in readers
    )


def _has_integer_functions(model: str | Path) -> bool:
    functions = onnx.load(model, load_external_data=False).functions
    return any(f.domain == ops.DOMAIN and f.name in ops.FUNCTIONS for f in functions)


def _place(target: Target, ep: str | None) -> Place:
    """Where to ask: the target's provider in this Python, or what the user says."""
    provider = (target.providers or (CPU,))[0]
    place = Place.parse(ep or provider, target.provider_options)
    if place.provider != provider:
        raise OnnxqError(
            f"{target.name} is for {provider}, and --ep is {place.provider}: name the target of "
            "that provider, or another --ep"
        )
    return place
