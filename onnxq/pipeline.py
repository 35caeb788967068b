"""The pass manager: passes declare what they measure and rewrite; the manager runs and records."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.checkpoint import NOTHING_KEPT, Checkpoint
from onnxq.codebook import CodebookTensor
from onnxq.errors import OnnxqError
from onnxq.lattice import LatticeTensor
from onnxq.notebook import summary_html
from onnxq.observe import Observer
from onnxq.qtype import QParams, QTensor, QType
from onnxq.report import PassRecord, Report
from onnxq.samples import Samples
from onnxq.spool import Weights
from onnxq.target import OpRule, Target

MEMORY_BUDGET = 1 << 30

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node.

    `inputs` are the slots whose activations are quantized; `output` says whether its result is.
    `result` is the format of that result where it is not `activation`. A node left in float has a
    reason and nothing else.
    """

    reason: str = ""
    weight: QType | None = None
    activation: QType | None = None
    inputs: tuple[int, ...] = ()
    output: bool = False
    rule: OpRule | None = None
    result: QType | None = None

    @property
    def handed_on(self) -> QType | None:
        """The format of its outputs, None where they are float."""
        return (self.result or self.activation) if self.output else None

    @property
    def quantized(self) -> bool:
        return self.weight is not None or self.activation is not None

    @property
    def weights_alone(self) -> bool:
        """Codes in the file, float arithmetic."""
        return self.weight is not None and self.activation is None


class Plan(dict[str, NodePlan]):
    """Node name → NodePlan; made by the pass `assign`, followed by every solver and lowering."""

    def quantized(self, nodes: Iterable[g.Node]) -> list[tuple[g.Node, NodePlan]]:
        """Those that become integer: of `g.walk(graph)`, bodies too, or of one body's `nodes`."""
        return [
            (node, self[node.name])
            for node in nodes
            if node.name in self and self[node.name].quantized
        ]


class Factors(NamedTuple):
    """A (out, r) and B (r, in), float16: AB is added to a quantized weight (out, in)."""

    a: NDArray[np.float16]
    b: NDArray[np.float16]


@dataclass
class Context:
    """What passes share beside the graph."""

    target: Target
    samples: Samples | None
    report: Report
    unseen: Samples | None = None  # which nothing is calibrated on: to measure with
    plan: Plan = field(default_factory=Plan)
    stats: dict[str, Any] = field(default_factory=dict)
    weights: Weights[QTensor] = field(default_factory=Weights)
    # None of these is in `weights` too.
    codebooks: Weights[CodebookTensor | LatticeTensor] = field(default_factory=Weights)
    activations: dict[str, QParams] = field(default_factory=dict)
    corrections: dict[str, Factors] = field(default_factory=dict)  # by the name of the weight
    tied: set[str] = field(default_factory=set)  # weights that are stored as one: rounded alike
    # What batch normalisation said of a tensor before it was folded: (mean, deviation) by channel.
    batch_statistics: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    # The model before a pass that plans and lowers at once; stands for `prepared`.
    float_form: g.Graph | None = None
    # The model as float tensors join its layers, where a lowering took those away: for comparing.
    qdq_form: g.Graph | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    threads: int | None = None
    progress: Progress = lambda what, done, total: None
    memory_budget: int = MEMORY_BUDGET  # bytes that statistics of one run over the samples may take
    solved: set[tuple[str, str]] = field(default_factory=set)  # (pass, weight or layer): final
    checkpoint: Checkpoint = NOTHING_KEPT  # of weights that an interrupted run solved
    lowering: tuple[Pass, ...] = ()  # the passes of this run that write the plan down

    def quantized(self, graph: g.Graph, *, qdq: bool = False) -> g.Graph:
        """What `graph` would become of the present plan, codes and ranges: to measure, on a copy.

        With `qdq`, float tensors join its layers under their names, whatever form is written in
        the end. Neither the graph nor this context is changed.
        """
        trial = replace(
            self,
            report=Report(),
            plan=Plan(self.plan),
            weights=self.weights.copy(),
            codebooks=self.codebooks.copy(),
            activations=dict(self.activations),
            solved=set(self.solved),
            checkpoint=NOTHING_KEPT,
            progress=lambda what, done, total: None,
        )
        lowered = g.copy(graph)
        for step in self.lowering:
            step.apply(lowered, trial)
            g.sort(lowered)
        return (trial.qdq_form if qdq else None) or lowered


@dataclass(frozen=True)
class Pass(ABC):
    """One step. Its dataclass fields are its whole configuration; a recipe fills the same fields.

    `analysis` passes neither rewrite the graph nor need each other's results: neighbours of that
    kind share one run over the samples. A pass that `needs_samples` cannot do without; others may
    do better with them. A pass that `prepares` keeps the function even where it follows the plan:
    what it leaves is what results are compared with. A pass that `lowers` needs the plan, codes and
    ranges alone.
    """

    name: ClassVar[str]
    analysis: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    lowers: ClassVar[bool] = False

    def observe(self, graph: g.Graph, ctx: Context) -> Mapping[str, Observer]:
        """Tensors of the graph as it is now that this pass wants measured.

        The keys are `tensor` or `tensor#purpose`, so that two passes can watch one tensor; results
        are in `ctx.stats` under the same key when `apply` runs.
        """
        return {}

    @abstractmethod
    def apply(self, graph: g.Graph, ctx: Context) -> int:
        """Rewrite in place. Returns the number of rewrites; a second call makes none."""

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Result:
    """What a run gives: the graph, the report of how it came about, and what the passes shared.

    `prepared` is the graph that the plan is for: float still, names as in the report.
    """

    graph: g.Graph
    report: Report
    context: Context
    prepared: g.Graph

    def to_proto(self) -> onnx.ModelProto:
        return g.to_proto(self.graph)

    def save(self, path: str | Path) -> int:
        """Write the model whole or not at all. Returns the bytes written."""
        return g.save(self.graph, path)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return summary_html(self.report)


class Pipeline:
    """A list of passes to run in order.

    They have the names that recipes give them:

        >>> from onnxq.passes import FoldBatchNorm, Normalize
        >>> Pipeline([Normalize(), FoldBatchNorm()]).names
        ['normalize', 'fold-batchnorm']
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = list(passes)

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.passes]

    def run(
        self, graph: g.Graph, samples: Samples | None, target: Target, **options: Any
    ) -> Result:
        """Run every pass on a copy of the graph. `options` are further Context fields.

        Raises OnnxqError, naming the pass and those before it, when a pass breaks the graph.
        """
        graph = g.copy(graph)
        ctx = Context(target, samples, options.pop("report", None) or Report(), **options)
        ctx.lowering = tuple(step for step in self.passes if step.lowers)
        prepared: g.Graph | None = None
        for number, step in enumerate(self.passes):
            started = time.perf_counter()
            ctx.progress(step.name, number, len(self.passes))
            self._measure(number, graph, ctx)
            if prepared is None and step.lowers:
                prepared = g.copy(graph)  # of a recipe that makes no plan
            changes = step.apply(graph, ctx)
            if ctx.plan and (prepared is None or step.prepares):
                prepared = ctx.float_form or g.copy(graph)
            if not step.analysis:
                _check(graph, step, self.names[:number])
            ctx.report.passes.append(
                PassRecord(
                    name=step.name,
                    settings={k: str(v) for k, v in step.settings().items()},
                    changes=changes,
                    seconds=time.perf_counter() - started,
                    peak_mb=peak_mb(),
                )
            )
        return Result(graph, ctx.report, ctx, prepared or g.copy(graph))

    def _measure(self, number: int, graph: g.Graph, ctx: Context) -> None:
        """Stream the samples once for this pass and the analysis passes that follow it."""
        group = [self.passes[number]]
        if group[0].analysis:
            if number and self.passes[number - 1].analysis:
                return  # measured together with the first of its group
            for step in self.passes[number + 1 :]:
                if not step.analysis:
                    break
                group.append(step)
        wanted: dict[str, Observer] = {}
        for step in group:
            wanted |= {k: o for k, o in step.observe(graph, ctx).items() if k not in ctx.stats}
        if not wanted:
            return
        if ctx.samples is None:
            raise OnnxqError(f"the pass {group[0].name!r} needs samples, and there are none")
        ctx.stats |= observe(
            graph,
            wanted,
            ctx.samples,
            threads=ctx.threads,
            progress=lambda done, total: ctx.progress("calibrate", done, total),
        )


def _check(graph: g.Graph, step: Pass, before: Sequence[str]) -> None:
    """The invariants every rewrite keeps: names are unique, nodes are in order, all is produced."""
    try:
        g.sort(graph)
        _check_names(graph, {""})
    except Exception as error:
        raise OnnxqError(
            f"the pass {step.name!r} left a broken graph ({error}); "
            f"passes before it: {', '.join(before) or 'none'}"
        ) from error


def _check_names(graph: g.Graph, outside: set[str]) -> None:
    """Every tensor is made before it is read; `outside` are those of enclosing graphs."""
    known = outside | {t.name for t in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if not g.is_constant(tensor) and tensor.name not in known:
                raise ValueError(f"{node.name!r} reads {tensor.name!r}, which nothing makes")
        for body in g.bodies(node):
            _check_names(body, known)
        known |= {t.name for t in node.outputs}


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory until exec
        lines = status.read_text("ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
