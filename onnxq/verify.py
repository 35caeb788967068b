"""Run the quantized model beside the float one: same answers, which layer errs, how fast.

Two models are compared tensor by tensor by name: a pass keeps the name of whatever it does not
change the meaning of, so `x` in one model is `x` in the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.report import Latency, OutputRecord
from onnxq.runtime import Session
from onnxq.samples import Samples
from onnxq.tap import Tap

Array = NDArray[Any]
Feed = Mapping[str, Array]
_NO_SCORES = ("embed", "hidden", "present", "state", "cache", "box")
MAX_SQNR = 200.0  # dB; stands for "equal", which has no finite value


@dataclass
class Comparison:
    """Sums over samples that give cosine, SQNR and top-1 agreement of one output."""

    scores: bool = True
    dot: float = 0.0
    reference_energy: float = 0.0
    other_energy: float = 0.0
    error_energy: float = 0.0
    agreed: int = 0
    rows: int = 0

    def update(self, reference: Array, other: Array) -> None:
        a, b = (np.asarray(v, np.float64) for v in (reference, other))
        if a.shape != b.shape:
            raise OnnxqError(f"outputs differ in shape: {a.shape} and {b.shape}")
        self.dot += float(np.vdot(a, b))
        self.reference_energy += float(np.vdot(a, a))
        self.other_energy += float(np.vdot(b, b))
        self.error_energy += float(np.vdot(a - b, a - b))
        if self.scores and a.ndim >= 2 and a.shape[-1] > 1 and a.size:
            self.agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
            self.rows += a.size // a.shape[-1]

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.reference_energy * self.other_energy)
        return self.dot / norm if norm else float(self.error_energy == 0)

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.reference_energy, self.error_energy)

    @property
    def agreement(self) -> float | None:
        return self.agreed / self.rows if self.rows else None


def sqnr_db(signal: float, noise: float) -> float:
    """10 log₁₀(signal / noise) in dB, between ±MAX_SQNR."""
    if noise <= 0:
        return MAX_SQNR
    if signal <= 0:
        return -MAX_SQNR
    return float(np.clip(10 * math.log10(signal / noise), -MAX_SQNR, MAX_SQNR))


class Recorded:
    """What a session said on some feeds, for when it is gone: large models fit one at a time."""

    def __init__(self, session: Session, feeds: Iterable[Feed]) -> None:
        self.outputs = session.outputs
        self._said = {id(feed): session.run(feed) for feed in feeds}

    def run(self, feed: Feed, names: Sequence[str] | None = None) -> dict[str, Array]:
        said = self._said[id(feed)]
        return {name: said[name] for name in names or self.outputs}


Runs = Session | Recorded


class Watching(Protocol):
    """Whatever else measures what two models say of each feed."""

    def update(
        self, feed: Feed, reference: Mapping[str, Array], other: Mapping[str, Array]
    ) -> None: ...


def compare(
    reference: Runs, other: Runs, feeds: Iterable[Feed], watching: Sequence[Watching] = ()
) -> dict[str, Comparison]:
    """Every floating-point output that both models have, over the feeds."""
    found = comparisons(names := shared_outputs(reference, other))
    for feed in feeds:
        said, answered = reference.run(feed, names), other.run(feed, names)
        update(found, said, answered)
        for distance in watching:
            distance.update(feed, said, answered)
    return {name: c for name, c in found.items() if c.reference_energy or c.other_energy}


def shared_outputs(reference: Runs, other: Runs) -> list[str]:
    names = [name for name in reference.outputs if name in other.outputs]
    if not names:
        raise OnnxqError(
            f"the models share no output: {', '.join(reference.outputs)} and "
            f"{', '.join(other.outputs)}"
        )
    return names


def comparisons(outputs: Iterable[str]) -> dict[str, Comparison]:
    """One of each output, of nothing yet."""
    return {name: Comparison(scores=not is_no_score(name)) for name in outputs}


def update(
    found: Mapping[str, Comparison], reference: Mapping[str, Array], other: Mapping[str, Array]
) -> None:
    """Add what two models said of one feed."""
    for name, comparison in found.items():
        if reference[name].dtype.kind in "fiu" or reference[name].dtype.name == "bfloat16":
            comparison.update(reference[name], other[name])


def is_no_score(output: str) -> bool:
    """Whether an output's name says that its largest entry is no answer."""
    return any(part in output.lower() for part in _NO_SCORES)


def output_records(compared: Mapping[str, Comparison]) -> list[OutputRecord]:
    return [OutputRecord(n, c.cosine, c.sqnr_db, c.agreement) for n, c in compared.items()]


# ── what the runtime makes of the model ──────────────────────────────────────────────────────────


def check_optimizations(
    model: onnx.ModelProto,
    plain: Runs,
    optimized: Runs,
    reference: Runs,
    feeds: list[Feed],
) -> float:
    """SQNR, in dB, of the model with graph optimizations on against the same with them off.

    The two differ by roundings. Raises OnnxqError, naming the first node that differs, when they
    differ by more than quantization itself, twice over, changed the answers.
    """
    runtime = compare(plain, optimized, feeds)
    quantization = compare(reference, plain, feeds)
    for name, measured in runtime.items():
        # Codes that fall to either side of a tie make up to twice the error of rounding.
        tolerated = max(4 * quantization[name].error_energy, 1e-4 * measured.reference_energy)
        if measured.error_energy > tolerated:
            node = _first_difference(model, feeds[0])
            raise OnnxqError(
                f"the runtime's graph optimizations change what the model says: output {name!r} "
                f"has {measured.sqnr_db:.1f} dB SQNR between optimizations on and off; "
                f"first node that differs: {node}"
            )
    return min((c.sqnr_db for c in runtime.values()), default=MAX_SQNR)


def _first_difference(model: onnx.ModelProto, feed: Feed) -> str:
    """The first node, in order, whose result optimizations change; found by bisection.

    Each probe cuts the model off after a node, so that what is fused before it stays fused.
    """
    nodes = [n for n in model.graph.node if n.output and n.op_type != "QuantizeLinear"]

    def differs(index: int) -> bool:
        name = nodes[index].output[0]
        cut = onnx.ModelProto()
        cut.CopyFrom(model)
        del cut.graph.output[:]
        cut.graph.output.append(onnx.ValueInfoProto(name=name))
        off = Session(cut, optimize=False).run(feed, [name])[name]
        on = Session(cut).run(feed, [name])[name]
        if off.dtype.kind not in "fiu":
            return False
        seen = Comparison()
        seen.update(off, on)
        return seen.sqnr_db < 20

    low, high = 0, len(nodes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle + 1, high)
    # Where a node between does not show the difference, bisection ends below its cause.
    made = {name: index for index, node in enumerate(nodes) for name in node.output}
    while causes := [made[t] for t in nodes[low].input if t in made and differs(made[t])]:
        low = causes[0]
    return f"{nodes[low].name!r} ({nodes[low].op_type})"


def check_finite(compared: Mapping[str, Comparison]) -> None:
    """Raises OnnxqError for an output that is NaN or infinite where the reference's is not."""
    for name, c in compared.items():
        if math.isfinite(c.reference_energy) and not math.isfinite(c.other_energy):
            raise OnnxqError(
                f"output {name!r} is NaN or infinite, which float's is not: a number overflows; "
                "give real samples with --data, so that it is seen where, or --exclude that layer"
            )


def with_roundings(graph: g.Graph) -> g.Graph | None:
    """A float16 model with two Identities after every float16 tensor; None for other models.

    The CPU provider computes float16 in float32 and leaves out the Casts between two operators:
    what overflows or is rounded there on other devices is not seen. An Identity has a float16
    kernel, and one that is not alone keeps it, and the Casts around, with optimizations off.
    """
    twin = g.copy(graph)
    namer = g.Namer(twin)
    found = False
    for body in g.subgraphs(twin):
        for node in list(body.nodes):
            for slot, tensor in enumerate(node.outputs):
                if g.dtype(tensor) == np.float16 and node.op != "Cast":
                    exact = gs.Variable(namer(f"{tensor.name}_exact"), dtype=tensor.dtype)
                    between = gs.Variable(namer(f"{tensor.name}_rounded"), dtype=tensor.dtype)
                    node.outputs[slot] = exact
                    for given, made in ((exact, between), (between, tensor)):
                        name = namer(f"{made.name}_Identity")
                        body.nodes.append(gs.Node("Identity", name, {}, [given], [made]))
                    found = True
    if not found:
        return None
    g.sort(twin)
    return twin


# ── error by layer ───────────────────────────────────────────────────────────────────────────────


@dataclass
class LayerError:
    """One layer's own error and what it does to the model's outputs, each an SQNR's two parts."""

    signal: float = 0.0
    noise: float = 0.0
    output_signal: float = 0.0
    output_noise: float = 0.0

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.signal, self.noise)

    @property
    def contribution(self) -> float:
        return self.output_noise / self.output_signal if self.output_signal else 0.0


def layer_errors(
    reference: g.Graph, quantized: g.Graph, layers: Sequence[str], feeds: Iterable[Feed]
) -> dict[str, LayerError]:
    """The error that each layer alone makes, by the name of its output tensor.

    Of the quantized graph the part that makes a layer's output from tensors that the float graph
    also has is cut out and fed with the float graph's tensors: its difference to the float output
    is the layer's own error. Added to the float graph at that place and nowhere else, it gives the
    layer's share of the error at the model's outputs.
    """
    float_tensors = reference.tensors()
    shadow = g.copy(reference)
    pieces = {
        name: piece
        for name in layers
        if name in float_tensors and (piece := _layer(quantized, name, float_tensors)) is not None
    }
    namer = g.Namer(shadow)
    shadow_names = {name: _attach(shadow, name, piece, namer) for name, piece in pieces.items()}
    outputs = _outputs(reference)
    wanted = [*pieces, *shadow_names.values(), *outputs]
    errors = {name: LayerError() for name in pieces}
    feeds = list(feeds)
    seen: list[tuple[dict[str, Array], dict[str, Array]]] = []
    local = _session_with_outputs(shadow, wanted)
    for feed in feeds:
        values = local.run(feed)
        differences: dict[str, Array] = {}
        for name, error in errors.items():
            exact = values[name]
            difference = (values[shadow_names[name]] - exact).astype(np.float32)
            error.signal += float(np.vdot(exact, exact))
            error.noise += float(np.vdot(difference, difference))
            differences[name] = difference
        seen.append(({name: values[name] for name in outputs}, differences))
    del local  # of large models one session fits at a time
    injected, deltas = _with_deltas(reference, list(pieces))
    quiet = {delta: np.zeros((), np.float32) for delta in deltas.values()}
    for feed, (exact_outputs, differences) in zip(feeds, seen, strict=True):
        for name, error in errors.items():
            said = injected.run({**feed, **quiet, deltas[name]: differences[name]})
            for output in outputs:
                a = np.asarray(exact_outputs[output], np.float64)
                b = np.asarray(said[output], np.float64) - a
                error.output_signal += float(np.vdot(a, a))
                error.output_noise += float(np.vdot(b, b))
    return errors


def shapes(graph: g.Graph, layers: Sequence[str], feed: Feed) -> dict[str, tuple[int, ...]]:
    """Shapes of layers' outputs and first inputs, as they come out when the model runs.

    Of a tensor in a body that ran more than once, its last; none where it did not run or cannot be
    brought out.
    """
    unseen = {name for body in g.hidden(graph) for name in body.tensors()}
    tensors = {name: t for name, t in g.tensors(graph).items() if name not in unseen}
    known = [tensors[name] for name in layers if name in tensors]
    wanted = {t.name for t in known} | {
        t.inputs[0].inputs[0].name for t in known if t.inputs and t.inputs[0].inputs
    }
    variable = sorted(n for n in wanted & set(tensors) if not g.is_constant(tensors[n]))
    seen = Tap(graph, variable).run(feed)
    return {name: values[-1].shape for name, values in seen.items() if values}


def _outputs(graph: g.Graph) -> list[str]:
    return [t.name for t in graph.outputs if t.dtype is None or g.is_float(t)]


def _layer(quantized: g.Graph, name: str, known: Mapping[str, Any]) -> list[gs.Node] | None:
    """The nodes that make `name` out of tensors with names in `known`."""
    target = quantized.tensors().get(name)
    if target is None or not target.inputs:
        return None
    nodes: list[gs.Node] = []
    pending = [target.inputs[0]]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.append(node)
        if any(t.name in known and _differ(t, known[t.name]) for t in node.inputs):
            return None  # codes under the name of what they stand for
        pending += [t.inputs[0] for t in node.inputs if t.inputs and t.name not in known]
    return nodes if len(nodes) > 1 or g.dtype(target) == np.float16 else None


def _differ(tensor: gs.Tensor, other: gs.Tensor) -> bool:
    """Whether one is floats and the other is not."""
    kinds = {g.dtype(t) for t in (tensor, other)}
    return None not in kinds and len({g.is_float(t) for t in (tensor, other)}) > 1


def _attach(shadow: g.Graph, name: str, piece: list[gs.Node], namer: g.Namer) -> str:
    """Copy a layer of the quantized graph into the float graph, where it reads float tensors."""
    made = {t.name: gs.Variable(namer(f"{t.name}_shadow")) for n in piece for t in n.outputs}
    here = shadow.tensors()

    def source(tensor: gs.Tensor) -> gs.Tensor:
        if tensor.name in made:
            return made[tensor.name]
        if g.is_constant(tensor):
            return g.renamed(tensor, namer(f"{tensor.name}_shadow"))
        if not tensor.name:
            return gs.Variable.empty()
        known = here[tensor.name]
        if g.dtype(tensor) != np.float16 or g.dtype(known) == np.float16:
            return known
        half = gs.Variable(namer(f"{tensor.name}_half"), dtype=np.dtype(np.float16))
        cast = {"to": int(onnx.TensorProto.FLOAT16)}
        shadow.nodes.append(gs.Node("Cast", namer(f"{tensor.name}_Cast"), cast, [known], [half]))
        return half

    for node in piece:
        shadow.nodes.append(
            gs.Node(
                node.op,
                namer(f"{node.name}_shadow"),
                dict(node.attrs),
                [source(t) for t in node.inputs],
                [made[t.name] for t in node.outputs],
                domain=node.domain,
            )
        )
    shadow.toposort()
    return made[name].name


def _session_with_outputs(graph: g.Graph, names: Sequence[str]) -> Session:
    model, weights = g.to_proto_without_weights(graph)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names))
    return Session(model, initializers=weights)


def _with_deltas(reference: g.Graph, layers: Sequence[str]) -> tuple[Session, dict[str, str]]:
    """The float model with an input per layer that is added to that layer's output."""
    graph = g.copy(reference)
    namer = g.Namer(graph)
    deltas: dict[str, str] = {}
    tensors = graph.tensors()
    for name in layers:
        tensor = tensors[name]
        maker = tensor.inputs[0]
        raw = gs.Variable(namer(f"{name}_raw"), dtype=tensor.dtype)
        delta = gs.Variable(namer(f"{name}_delta"), dtype=np.dtype(np.float32))
        maker.outputs[maker.outputs.index(tensor)] = raw
        graph.nodes.append(gs.Node("Add", namer(f"{name}_add"), {}, [raw, delta], [tensor]))
        graph.inputs.append(delta)
        deltas[name] = delta.name
    graph.toposort()
    model, weights = g.to_proto_without_weights(graph)
    model = _without_input_shapes(model, set(deltas.values()))
    return Session(model, initializers=weights), deltas


def _without_input_shapes(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.ClearField("shape")
    return model


# ── speed ────────────────────────────────────────────────────────────────────────────────────────


def latency(
    sessions: Sequence[Session], feed: Feed, *, seconds: float = 2.0, most: int = 100
) -> list[Latency]:
    """Milliseconds per run of each session, in turns, so that a drifting machine hits all alike.

    At least five rounds after one that is not counted; `low` and `high` are the quartiles.
    """
    for session in sessions:
        session.run(feed)
    times: list[list[float]] = [[] for _ in sessions]
    started = time.perf_counter()
    for done in range(most):
        if done >= 5 and time.perf_counter() - started > seconds:
            break
        for row, session in zip(times, sessions, strict=True):
            begin = time.perf_counter()
            session.run(feed)
            row.append(1e3 * (time.perf_counter() - begin))
    quartiles = [np.percentile(row, [50, 25, 75]) for row in times]
    return [Latency(*map(float, q)) for q in quartiles]


def take(samples: Samples, n: int) -> list[Feed]:
    return list(islice(samples, n))
