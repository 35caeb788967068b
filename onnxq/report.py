"""What was done and what was measured: a plain record, its JSON, its tables in the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from onnxq.distribution import Distribution, WeightRecord


@dataclass
class PassRecord:
    """One pass as it ran. `peak_mb` is the process's peak so far, MiB."""

    name: str
    settings: dict[str, str]
    changes: int
    seconds: float
    peak_mb: float


@dataclass
class TrialRecord:
    """An optional pass that was tried: the outputs' SQNR in dB without it and with it.

    `reason` says why it could not be measured with it.
    """

    name: str
    kept: bool
    without_db: float
    with_db: float | None
    reason: str = ""


@dataclass
class LayerRecord:
    """One layer with weights, or one left in float that others were quantized around.

    `sqnr_db` is the error of this layer's own output on float inputs; `contribution` the share of
    output energy that this layer's error alone makes at the model's outputs. Both measured.
    `inputs` are the tensors it reads as codes, `weights` those that have codes, of recurrent layers
    two, `before` and `after` the layers next to it; these are only there where they are asked for.
    """

    name: str
    op: str
    form: str
    reason: str = ""
    output: str = ""
    parameters: int = 0
    macs: int = 0
    sqnr_db: float | None = None
    contribution: float | None = None
    inputs: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    weights: list[WeightRecord] = field(default_factory=list)


@dataclass
class OutputRecord:
    """One model output, quantized against float, over the verification samples."""

    name: str
    cosine: float
    sqnr_db: float
    agreement: float | None = None


@dataclass
class MetricRecord:
    """One metric of `onnxq.metrics` over the verification samples: the distance to float in `unit`,
    and what the float model and the quantized one score where the metric scores models.
    """

    name: str
    title: str
    unit: str
    distance: float
    float_score: float | None = None
    quantized_score: float | None = None


CLIPPED = 0.001  # share of values; the percentile 99.99 clips a tenth of that by design
WIDER, NARROWER = 1.5, 0.25  # times the range in calibration


@dataclass
class RangeRecord:
    """The range that a tensor's codes hold beside what samples showed, in the tensor's own unit.

    `low` to `high` are the lowest and the highest code; `calibration_…` and `validation_…` are the
    extremes that those samples showed, `…_clipped` the share of their values that lie more than a
    step outside the codes, `clipped_runs` the runs in validation with any such value. `set_by` is
    the calibration sample that alone sets the range. Of calibration that was not seen they are
    None. `values` are those in validation, where that was asked for. `finding` is "" or

    - clipped: more than CLIPPED of the values in validation are;
    - wider: validation makes the range more than WIDER times as wide;
    - one sample: of calibration sets the range;
    - narrower: less than NARROWER of the range is used in validation.
    """

    tensor: str
    low: float
    high: float
    calibration_low: float | None
    calibration_high: float | None
    calibration_clipped: float | None
    validation_low: float
    validation_high: float
    validation_clipped: float
    clipped_runs: int
    set_by: int | None = None
    finding: str = ""
    values: Distribution | None = None


@dataclass
class GroupRecord:
    """One output on one group of samples, quantized against float.

    `drop` is the mean over the samples of what they lose: 1 − top-1 agreement where the output is
    class scores, 1 − cosine elsewhere; `error` is its standard error. The others are of all the
    group's values together. `stands_out`: the group loses much more than the rest.
    """

    group: str
    output: str
    samples: int
    drop: float
    error: float
    agreement: float | None
    cosine: float
    sqnr_db: float
    stands_out: bool = False


@dataclass
class Latency:
    """Milliseconds per inference, interleaved runs of both models."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass
class FloatOperatorRecord:
    """An operator of an integer model that still computes with floats, and why."""

    name: str
    op: str
    reason: str


@dataclass
class DisagreementRecord:
    """The first layer that a provider computes otherwise than the CPU, on the CPU's own input.

    `share` of its values differ, by up to `largest`, in `unit`: a step of its codes, or the largest
    value of its floats. `why` is what gives the provider's values of the share `explained` of those
    that differ, or "" where nothing tried gives half of them.
    """

    layer: str
    operators: list[str]
    unit: str
    share: float
    largest: float
    why: str = ""
    explained: float = 0.0


@dataclass
class ProviderRecord:
    """The quantized model on one execution provider.

    `nodes` are those that the provider took, `elsewhere` how many others ran, of which
    `first_elsewhere` is the first. `outputs` are against the float model on the CPU, `against_cpu`
    against the quantized one there; `steps` is the largest difference from that of an output that
    is made of codes, in steps. `ratio` is the median latency ÷ that of the float model on the CPU;
    where the device is `emulated` nothing is timed.
    """

    name: str
    provider: str = ""
    version: str = ""
    nodes: int = 0
    elsewhere: int = 0
    first_elsewhere: str = ""
    error: str = ""
    outputs: list[OutputRecord] = field(default_factory=list)
    against_cpu: list[OutputRecord] = field(default_factory=list)
    same_bits: bool = False
    steps: float | None = None
    disagreement: DisagreementRecord | None = None
    emulated: bool = False
    latency: Latency | None = None
    ratio: float | None = None

    def problem(self, allow_fallback: bool = False) -> str:
        """Why the model cannot be said to run there, in a line; "" where it does."""
        if self.error:
            return self.error
        if not self.elsewhere or allow_fallback:
            return ""
        nodes = f"{self.elsewhere} node{'s' * (self.elsewhere > 1)}"
        return f"{nodes} ran on another provider, the first {self.first_elsewhere}"


@dataclass
class Report:
    """Everything a run has to say. Each figure was measured in it, or is None."""

    model: str = ""
    output: str = ""
    target: str = ""
    preset: str = ""
    recipe: str = ""
    samples: str = ""
    verified: bool = False
    operators: dict[str, int] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)
    outputs: list[OutputRecord] = field(default_factory=list)
    metrics: list[MetricRecord] = field(default_factory=list)
    ranges: list[RangeRecord] = field(default_factory=list)
    groups: list[GroupRecord] = field(default_factory=list)
    providers: list[ProviderRecord] = field(default_factory=list)
    verification_samples: int = 0
    verification_unseen: bool = False
    optimizations_sqnr_db: float | None = None
    float_operators: list[FloatOperatorRecord] | None = None  # None: not an integer model
    exact_with: list[str] = field(default_factory=list)  # what gave the same bits
    parameters: int = 0
    float_bytes: int = 0
    quantized_bytes: int = 0
    float_latency: Latency | None = None
    quantized_latency: Latency | None = None
    environment: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def skip(self, layer: str, op: str, reason: str) -> None:
        """Note that a pass left a node out, and why."""
        if not any(record.name == layer for record in self.layers):
            self.layers.append(LayerRecord(layer, op, "float", reason))

    @property
    def ranked(self) -> list[LayerRecord]:
        """Quantized layers, the one that hurts the output most first."""
        measured = [layer for layer in self.layers if layer.sqnr_db is not None]
        return sorted(measured, key=lambda r: (-(r.contribution or 0.0), r.sqnr_db or 0.0, r.name))

    @property
    def error_shares(self) -> list[tuple[LayerRecord, float]]:
        """The ranked layers, each with its share of what all of them, one by one, do to outputs."""
        ranked = self.ranked
        total = sum(layer.contribution or 0.0 for layer in ranked)
        return [(r, (r.contribution or 0.0) / total if total else 0.0) for r in ranked]

    def share(self, what: str) -> float | None:
        """The share of `parameters` or `macs` in layers that are quantized."""
        if self.float_operators == []:
            return 1.0
        total = sum(getattr(layer, what) for layer in self.layers)
        if what == "parameters":  # those of no layer count too: they stay float
            total = max(total, self.parameters)
        if not total:
            return None
        done = sum(getattr(layer, what) for layer in self.layers if layer.form != "float")
        return float(done / total)

    def to_json(self) -> str:
        shares = {f"{what}_quantized": self.share(what) for what in ("parameters", "macs")}
        return json.dumps(asdict(self) | shares, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """A saved report. Raises ValueError or TypeError for what is none."""
        data: dict[str, Any] = json.loads(text)
        for key in ("parameters_quantized", "macs_quantized"):
            data.pop(key, None)
        if "model" not in data:
            raise ValueError("no report of a model")
        read: Report = _read(cls, data)
        return read


def _read(kind: Any, value: Any) -> Any:
    """What JSON holds of `kind`: a record, a list of them, one that may be None, or plain."""
    if value is None:
        return None
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"no {kind}: {value}")
        kinds = get_type_hints(kind)
        given = {key: _read(kinds.get(key), part) for key, part in value.items()}
        return kind(**given)  # type: ignore[operator]
    parts = get_args(kind)
    if get_origin(kind) is list:
        return [_read(parts[0], part) for part in value]
    if isinstance(kind, UnionType):
        return _read(next(part for part in parts if part is not NoneType), value)
    return value
