"""`inspect`: what a model is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from onnxq import graph as g
from onnxq.api.inputs import (
    environment,
    existing,
    with_custom_ops,
)
from onnxq.errors import OnnxqError
from onnxq.layers import count_macs, record_layers
from onnxq.passes import (
    Assign,
    FoldBatchNorm,
    FoldFakeQuant,
    Normalize,
    Widen,
)
from onnxq.passes.solve.fake_quant import is_trained
from onnxq.pipeline import Pass, Pipeline
from onnxq.report import Report
from onnxq.storage import load_proto, model_size
from onnxq.synthesize import synthesize
from onnxq.target import load_target


@with_custom_ops
def inspect(
    model: str | Path,
    *,
    target: str = "cpu",
    form: str = "static",
    custom_ops: Sequence[str | Path] = (),
) -> Report:
    """What a model is made of and what a target could quantize of it, without changing it."""
    device = load_target(target)
    path = existing(model)
    report = Report(
        model=str(path), target=device.name, float_bytes=model_size(path),
        environment=environment(path, 0),
    )  # fmt: skip
    original = g.load(path)
    report.operators = dict(Counter(node.op for node in g.walk(original)))
    steps: list[Pass] = [Widen(), Normalize(), FoldBatchNorm(), Assign(form=form)]  # type: ignore[arg-type]
    if is_trained(original):
        steps = [Widen(), Normalize(), FoldFakeQuant()]
    try:
        result = Pipeline(steps).run(original, None, device, report=report)
    except OnnxqError as error:
        report.warn(str(error))
        result = Pipeline(steps[:-1]).run(original, None, device, report=report)
    record_layers(result, report)
    try:
        feed = synthesize(load_proto(path), n=1, seed=0, path=path)[0][0]
        count_macs(result, report, feed)
    except OnnxqError as error:
        report.warn(f"multiply-accumulates not counted: {error}")
    return report
