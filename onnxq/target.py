"""What an execution provider runs, as data: `targets/*.toml`, one rule per line of evidence."""

from __future__ import annotations

import platform
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs

from onnxq import toml
from onnxq.errors import OnnxqError, suggest
from onnxq.graph import is_depthwise, weight_view
from onnxq.qtype import FLOAT8, QType

CPU = "CPUExecutionProvider"
Form = Literal["static", "dynamic", "weights", "integer"]

_FORMAT = re.compile(r"(?:w(\d+)(?::(\d+))?)?(?:a(\d+))?(e4m3|e5m2)?")
_SINCE = {2: 25, 4: 21, 16: 21}  # bits → the opset whose DequantizeLinear takes them
_BLOCKS = 21  # the same of blocks
_FLOAT8 = 19  # and of FP8


@dataclass(frozen=True)
class Format:
    """Widths of weights and of activations, in bits; None stays float.

    `block` is how many neighbouring weights share a scale, where blocks of them do; `float8` is
    `e4m3` or `e5m2` where the 8 bits are floating-point numbers.

    >>> Format.parse("w4a8"), str(Format.parse("float"))
    (Format(weight_bits=4, activation_bits=8, block=None, float8=''), 'float')
    >>> Format.parse("w4:128")
    Format(weight_bits=4, activation_bits=None, block=128, float8='')
    >>> Format.parse("w8a8e4m3").float8
    'e4m3'
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    block: int | None = None
    float8: str = ""

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read `wBITSaBITS`, either half alone, `wBITS:BLOCK`, `w8a8e4m3` (FP8) or `float`.

        Raises ValueError for anything else.
        """
        match = _FORMAT.fullmatch("" if text == "float" else text)
        if match is None or not text or text in FLOAT8:
            raise ValueError(
                f"{text!r} is no format; write for example w8a8, w4a8, w8 (weights alone), w4:128 "
                "(in blocks), a8 (activations alone), w8a8e4m3 (FP8) or float"
            )
        weight, block, activation = (int(n) if n else None for n in match.groups()[:3])
        return cls(weight, activation, block, match[4] or "")

    def __str__(self) -> str:
        halves = (("w", self.weight_bits), (":", self.block), ("a", self.activation_bits))
        said = "".join(f"{key}{bits}" for key, bits in halves if bits is not None)
        return said + self.float8 or "float"

    @property
    def opset(self) -> int:
        """The least that can say it. Activations below 8 bits are 8-bit codes that use few."""
        weight, activation = self.weight_bits or 8, max(self.activation_bits or 8, 8)
        return max(
            _SINCE.get(weight, 1),
            _SINCE.get(activation, 1),
            _BLOCKS if self.block else 1,
            _FLOAT8 if self.float8 else 1,
        )

    @property
    def opset_of_bytes(self) -> int:
        """The same where codes are bytes to their kernel, of 3 bits put together by BitwiseOr."""
        return 18 if self.weight_bits == 3 else 1


W8A8 = Format(8, 8)


@dataclass(frozen=True)
class OpRule:
    """One way in which a target runs one operator in integers, and how we know.

    `output` says what the kernel hands on: `quantized` codes only, `float` only, or `any`.
    `bias` is `float` where the kernel adds one that is no int32 of the accumulator's scale.
    `pair_limit` bounds |w_k + w_k+1| of neighbouring weights of one sign (None: no bound).
    `blocks` are the numbers of neighbouring weights that may share a scale (none: only those of
    `weight`), `accuracy_level` is what the kernel for them computes in (4: 8-bit activations).
    `keeps_grid`: its result must have the scale of its input.
    """

    form: Form
    source: str
    activation: QType | None = None
    weight: QType | None = None
    output: Literal["quantized", "float", "any"] = "quantized"
    bias: Literal["int32", "float"] = "int32"
    fuses: tuple[str, ...] = ()
    pair_limit: int | None = None
    depthwise: bool | None = None
    constant_weight: bool | None = None
    batched: bool | None = None
    blocks: tuple[int, ...] = ()
    accuracy_level: int = 0
    keeps_grid: bool = False

    def takes(self, format: Format) -> bool:
        """Whether it is of these widths, and something is left of it."""
        if self.blocks and format.block not in self.blocks:
            return False
        if format.block is not None and not self.blocks:
            return False
        widths = (self.weight, format.weight_bits), (self.activation, format.activation_bits)
        fits = all(
            q is None or bits is None or (q.bits, q.float8) == (bits, format.float8)
            for q, bits in widths
        )
        return fits and any(q is not None and bits is not None for q, bits in widths)

    def only(self, format: Format) -> OpRule:
        """Without what the format leaves float. Pairs of products in 16 bits come of two halves."""
        if format.weight_bits is None:
            return replace(self, weight=None, pair_limit=None)
        if format.activation_bits is None:
            return replace(self, activation=None, pair_limit=None)
        return self

    def matches(self, node: gs.Node) -> bool:
        if self.depthwise is not None and self.depthwise != is_depthwise(node):
            return False
        view = weight_view(node)
        if self.batched is not None and self.batched != (view is not None and view.batched):
            return False
        return self.constant_weight is None or self.constant_weight == (view is not None)


@dataclass(frozen=True)
class Support:
    """Operators that a provider runs, and how we know.

    As they stand: `types` are the element types of the data they compute on; `ranks` the least of
    its dimensions and the most of its and the results' (none: any), `operand_ranks` those of what
    comes second; `attributes` the values that an attribute may have. Where a target `takes_units`,
    all this bounds what it takes between codes too.
    Between QuantizeLinear and DequantizeLinear, in integers: `codes` are the element types of what
    they read, `weights` those of their constants (none: those of `codes`; `["none"]`: it takes no
    constants); with `types` instead of `codes`, only constants are codes. `output` says what such
    a kernel hands on: codes, float, or either.
    `among` is how many nodes a model has at least of which the provider takes any, where it begins
    with this one. `whole_blocks` wants blocks that share a scale to lie along the first axis or the
    second, and to divide it; `depthwise` a Conv of one channel each; `after` one of these operators
    before it, outside of a layer between codes.
    `fails` says what becomes of a model that has such a node: the provider takes it, and then does
    not load.
    """

    source: str
    types: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    output: Literal["quantized", "float", "any"] = "quantized"
    ranks: tuple[int, ...] = ()
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    among: int = 1
    whole_blocks: bool = False
    operand_ranks: tuple[int, ...] = ()
    depthwise: bool = False
    after: tuple[str, ...] = ()
    fails: str = ""


@dataclass(frozen=True)
class Target:
    """A device as onnxq sees it."""

    name: str
    summary: str
    providers: tuple[str, ...]
    opset: int
    ops: dict[str, tuple[OpRule, ...]]
    left_float: dict[str, str] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    provider_options: dict[str, str] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)  # of what its base has, and why
    standard_only: bool = False  # no operators beyond those of ONNX, such as MatMulNBits
    fixed_shapes: bool = False  # every dimension must be a number when the model is loaded
    whole: bool = False  # what stays float is slow there: all that has a rule becomes integer
    takes_units: bool = False  # a layer between quantizers is taken as one, or left as a whole
    unsigned: bool = False  # activations stay unsigned where a recipe makes them symmetric
    supports: dict[str, tuple[Support, ...]] = field(default_factory=dict)  # none known: any
    integer_operators: tuple[str, ...] = ()  # those that `fuse-integer` may write
    dense_channels: int = 1  # input channels that QLinearConv takes at once
    depthwise_channels: int = 1  # the same of a depthwise one
    float32: dict[str, str] = field(default_factory=dict)  # operators to keep, and why
    slow: dict[str, str] = field(default_factory=dict)  # operators that float ones outrun; the fix
    float16_operators: tuple[str, ...] = ()  # the provider's own, wherever they take float32
    custom_operators: bool = False  # models for it may use onnxq's own operators
    machines: tuple[str, ...] = ()  # as `uname -m` names them; none: any

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's CPU or of its kind: what is timed here holds there."""
        kind = not self.machines or platform.machine().lower() in self.machines
        return kind and self.is_cpu

    @property
    def is_cpu(self) -> bool:
        """Whether the provider that this process has runs it."""
        return not self.providers or CPU in self.providers

    @property
    def stand_in(self) -> tuple[str, ...]:
        """The providers by which this process runs its models: the CPU's for any but its own."""
        return (tuple(self.providers) if self.is_cpu else ()) or (CPU,)

    def with_custom_operators(self) -> Target:
        """The same, allowing onnxq's own operators. Raises OnnxqError where no session has them."""
        if CPU not in self.providers or self.standard_only:
            raise OnnxqError(
                f"--ops is for targets of onnxruntime's own CPU provider, and {self.name} is none; "
                "leave it out, and the model is made of operators that the target knows"
            )
        return replace(self, custom_operators=True)

    def rule(self, node: gs.Node, form: Form, format: Format = W8A8) -> OpRule | None:
        """The first rule that takes this node in this form and these widths."""
        rules = (r for r in self.ops.get(node.op, ()) if r.form == form and r.takes(format))
        return next((rule.only(format) for rule in rules if rule.matches(node)), None)

    def formats(self, form: Form) -> set[Format]:
        """Every format that some rule of this form takes.

        Weights or activations alone are left of a static rule; a dynamic one multiplies codes.
        Block sizes apart.
        """
        rules = [rule for rules in self.ops.values() for rule in rules if rule.form == form]
        found = {
            Format(r.weight.bits, r.activation.bits, float8=r.weight.float8)
            for r in rules
            if r.weight and r.activation
        }
        if form != "dynamic":
            found |= {
                Format(weight.bits, float8=weight.float8)
                for weight in (rule.weight for rule in rules)
                if weight
            }
            found |= {
                Format(None, activation.bits, float8=activation.float8)
                for activation in (rule.activation for rule in rules)
                if activation
            }
        return found

    def why_float(self, node: gs.Node, form: Form, format: Format = W8A8) -> str:
        """Why no rule takes this node, for the report."""
        for key in (f"{form} {node.op}", node.op):
            if reason := self.left_float.get(key):
                return reason
        rules = [rule for rule in self.ops.get(node.op, ()) if rule.form == form]
        if any(rule.takes(format) for rule in rules):
            return f"{self.name} has a rule for {node.op}, but not of this shape"
        if rules:
            return f"{self.name} has no {form} rule for {node.op} as {format}"
        kind = form if form == "integer" else f"{form} integer"
        return f"{self.name} has no {kind} form of {node.op}"


def load_target(name: str) -> Target:
    """A shipped target by name, `auto` for this machine, or a TOML file of your own."""
    if name == "auto":
        name = detect()
    if name.endswith(".toml"):
        return _parse(Path(name).stem, toml.read_text(Path(name), "target"))
    return _parse(name, target_text(name))


def target_names() -> list[str]:
    folder = resources.files("onnxq") / "targets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def target_text(name: str) -> str:
    """The TOML of a shipped target. Raises OnnxqError when there is none of that name."""
    if name not in target_names():
        raise OnnxqError(f"there is no target {name!r}{suggest(name, [*target_names(), 'auto'])}")
    return (resources.files("onnxq") / "targets" / f"{name}.toml").read_text("utf-8")


def detect() -> str:
    """The shipped target that suits this machine."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "cpu-arm64"
    flags = cpu_flags()
    return "cpu-vnni" if flags & {"avx512_vnni", "avx_vnni"} else "cpu-avx2"


def cpu_flags() -> set[str]:
    """Instruction sets as Linux names them; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def cpu_name() -> str:
    """As Linux names it, or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _parse(name: str, text: str) -> Target:
    where = f"target {name!r}"
    data = toml.parse(text, where)
    ops = _by_operator(OpRule, data, "rule", where)
    supports = _by_operator(Support, data, "supports", where)
    inherited: dict[str, Any] = {"name": name, "providers": (), "opset": 13, "ops": {}}
    if "base" in data:
        base_name = toml.coerce(data.pop("base"), str, f"{where}: base")
        base = _parse(base_name, target_text(base_name))
        kept = (
            "providers",
            "opset",
            "ops",
            "left_float",
            "session",
            "provider_options",
            "standard_only",
            "fixed_shapes",
            "takes_units",
            "whole",
            "unsigned",
            "supports",
            "integer_operators",
            "dense_channels",
            "depthwise_channels",
            "float32",
            "slow",
            "float16_operators",
            "custom_operators",
            "machines",
        )
        inherited |= {key: getattr(base, key) for key in kept}
    if "float16_as" in data:  # what overflows does so on any device
        like = toml.coerce(data.pop("float16_as"), str, f"{where}: float16_as")
        other = _parse(like, target_text(like))
        inherited |= {key: getattr(other, key) for key in ("float32", "float16_operators")}
    adds_pairs = toml.coerce(data.pop("adds_pairs", True), bool, f"{where}: adds_pairs")
    if not adds_pairs:  # the base's rules hold, without their bounds on pairs
        inherited["ops"] = {
            op: tuple(replace(rule, pair_limit=None) for rule in rules)
            for op, rules in inherited["ops"].items()
        }
    lacks = toml.coerce(data.get("lacks", {}), dict[str, str], f"{where}: lacks")
    inherited["ops"] = {
        op: kept
        for op, rules in inherited["ops"].items()
        if (kept := tuple(rule for rule in rules if rule.form not in lacks))
    }
    own = toml.fill(
        Target,
        {k: v for k, v in data.items() if k not in ("rule", "ops", "supports")},
        f"{where}: ",
    )
    # A target's own rules come first; what it does not mention is its base's.
    own["ops"] = ops
    own["supports"] = supports or inherited.get("supports", {})  # one provider's list, as a whole
    for key in ("ops", "left_float", "float32", "slow", "session", "provider_options"):
        own[key] = inherited.get(key, {}) | own.get(key, {})
    target: Target = _made(Target, inherited | own, where)
    if not 1 <= target.opset <= onnx.defs.onnx_opset_version():
        raise OnnxqError(f"{where}: there is no opset {target.opset}")
    if min(target.dense_channels, target.depthwise_channels) < 1:
        raise OnnxqError(f"{where}: a kernel takes at least 1 of its channels at once")
    return target


def _by_operator(
    kind: type[Any], data: dict[str, Any], key: str, where: str
) -> dict[str, tuple[Any, ...]]:
    """The tables under a key, each with its `ops`, by operator, in the order of the file."""
    found: dict[str, tuple[Any, ...]] = {}
    for number, row in enumerate(toml.tables(data, key, where), 1):
        label = f"{where}, {key} {number}"
        names = toml.coerce(row.pop("ops", []), tuple[str, ...], f"{label}: ops")
        if not names:
            raise OnnxqError(f"{label} lacks the key 'ops', the operators that it is for")
        made = _made(kind, toml.fill(kind, row, f"{label}: "), label)
        for op in names:
            found[op] = (*found.get(op, ()), made)
    return found


def _made(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    lacking = [
        f.name
        for f in fields(kind)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if lacking:
        raise OnnxqError(f"{where} lacks the key {lacking[0]!r}")
    return kind(**values)
