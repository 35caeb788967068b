"""What an execution provider runs, as data: `targets/*.toml`, one rule per line of evidence."""

from __future__ import annotations

import platform
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs

from onnxq import toml
from onnxq.errors import OnnxqError, suggest
from onnxq.graph import is_depthwise, weight_view
from onnxq.qtype import QType

Form = Literal["static", "dynamic"]


@dataclass(frozen=True)
class OpRule:
    """One way in which a target runs one operator in integers, and how we know.

    `output` says what the kernel hands on: `quantized` codes only, `float` only, or `any`.
    `pair_limit` bounds |w_k + w_k+1| of neighbouring weights of one sign (None: no bound).
    """

    form: Form
    source: str
    activation: QType | None = None
    weight: QType | None = None
    output: Literal["quantized", "float", "any"] = "quantized"
    fuses: tuple[str, ...] = ()
    pair_limit: int | None = None
    depthwise: bool | None = None
    constant_weight: bool | None = None
    batched: bool | None = None

    def has_bits(self, activation_bits: int) -> bool:
        """Whether activations are of this width, or of no matter to the rule."""
        return self.activation is None or self.activation.bits == activation_bits

    def matches(self, node: gs.Node) -> bool:
        if self.depthwise is not None and self.depthwise != is_depthwise(node):
            return False
        view = weight_view(node)
        if self.batched is not None and self.batched != (view is not None and view.batched):
            return False
        return self.constant_weight is None or self.constant_weight == (view is not None)


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
    integer_operators: tuple[str, ...] = ()  # those that the QOperator form may use
    machines: tuple[str, ...] = ()  # as `uname -m` names them; none: any

    @property
    def is_here(self) -> bool:
        """Whether this machine is of the target's kind: what is timed here holds there."""
        return not self.machines or platform.machine().lower() in self.machines

    def rule(self, node: gs.Node, form: Form, activation_bits: int = 8) -> OpRule | None:
        """The first rule that takes this node in this form, with activations of so many bits."""
        rules = (r for r in self.ops.get(node.op, ()) if r.form == form)
        return next((r for r in rules if r.has_bits(activation_bits) and r.matches(node)), None)

    def activation_bits(self, form: Form) -> set[int]:
        """The widths of activations that some rule of this form takes."""
        rules = (rule for rules in self.ops.values() for rule in rules if rule.form == form)
        return {rule.activation.bits for rule in rules if rule.activation is not None}

    def why_float(self, node: gs.Node, form: Form) -> str:
        """Why no rule takes this node, for the report."""
        for key in (f"{form} {node.op}", node.op):
            if reason := self.left_float.get(key):
                return reason
        if any(r.form == form for r in self.ops.get(node.op, ())):
            return f"{self.name} has a rule for {node.op}, but not of this shape"
        return f"{self.name} has no {form} integer form of {node.op}"


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


def _parse(name: str, text: str) -> Target:
    where = f"target {name!r}"
    data = toml.parse(text, where)
    ops: dict[str, list[OpRule]] = {}
    for number, row in enumerate(toml.tables(data, "rule", where), 1):
        label = f"{where}, rule {number}"
        names = toml.coerce(row.pop("ops", []), tuple[str, ...], f"{label}: ops")
        if not names:
            raise OnnxqError(f"{label} lacks the key 'ops', the operators that it is for")
        rule = _made(OpRule, toml.fill(OpRule, row, f"{label}: "), label)
        for op in names:
            ops.setdefault(op, []).append(rule)
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
            "integer_operators",
            "machines",
        )
        inherited |= {key: getattr(base, key) for key in kept}
    adds_pairs = toml.coerce(data.pop("adds_pairs", True), bool, f"{where}: adds_pairs")
    if not adds_pairs:  # the base's rules hold, without their bounds on pairs
        inherited["ops"] = {
            op: tuple(replace(rule, pair_limit=None) for rule in rules)
            for op, rules in inherited["ops"].items()
        }
    own = toml.fill(
        Target, {k: v for k, v in data.items() if k not in ("rule", "ops")}, f"{where}: "
    )
    # A target's own rules come first; what it does not mention is its base's.
    own["ops"] = {op: tuple(rules) for op, rules in ops.items()}
    for key in ("ops", "left_float", "session"):
        own[key] = inherited.get(key, {}) | own.get(key, {})
    target: Target = _made(Target, inherited | own, where)
    if not 1 <= target.opset <= onnx.defs.onnx_opset_version():
        raise OnnxqError(f"{where}: there is no opset {target.opset}")
    return target


def _made(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    lacking = [
        f.name
        for f in fields(kind)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if lacking:
        raise OnnxqError(f"{where} lacks the key {lacking[0]!r}")
    return kind(**values)
