"""What an execution provider runs, as data: `targets/*.toml`, one rule per line of evidence."""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import onnx_graphsurgeon as gs

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

    def has_bits(self, activation_bits: int) -> bool:
        """Whether activations are of this width, or of no matter to the rule."""
        return self.activation is None or self.activation.bits == activation_bits

    def matches(self, node: gs.Node) -> bool:
        if self.depthwise is not None and self.depthwise != is_depthwise(node):
            return False
        has_weight = weight_view(node) is not None
        return self.constant_weight is None or self.constant_weight == has_weight


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
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise OnnxqError(f"there is no target file {name!r}")
        return _parse(path.stem, path.read_text("utf-8"))
    if name not in target_names():
        raise OnnxqError(f"there is no target {name!r}{suggest(name, [*target_names(), 'auto'])}")
    return _parse(name, target_text(name))


def target_names() -> list[str]:
    folder = resources.files("onnxq") / "targets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def target_text(name: str) -> str:
    """The TOML of a shipped target."""
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
    try:
        data = tomllib.loads(text)
        base = _parse(data["base"], target_text(data["base"])) if "base" in data else None
        ops: dict[str, list[OpRule]] = {}
        for row in data.get("rule", []):
            rule = _rule(row)
            for op in row["ops"]:
                ops.setdefault(op, []).append(rule)
        inherited = base.ops if base else {}
        return Target(
            name=data.get("name", name),
            summary=data["summary"],
            providers=tuple(data.get("providers", base.providers if base else ())),
            opset=int(data.get("opset", base.opset if base else 13)),
            # A target's own rules come first; what it does not mention is its base's.
            ops=inherited | {op: tuple(rules) for op, rules in ops.items()},
            left_float=(base.left_float if base else {}) | data.get("left_float", {}),
            integer_operators=tuple(
                data.get("integer_operators", base.integer_operators if base else ())
            ),
            session=(base.session if base else {}) | data.get("session", {}),
        )
    except tomllib.TOMLDecodeError as error:
        raise OnnxqError(f"target {name!r} is not valid TOML: {error}") from None
    except KeyError as error:
        raise OnnxqError(f"target {name!r} lacks the key {error}") from None
    except (TypeError, ValueError) as error:
        raise OnnxqError(f"target {name!r}: {error}") from None


def _rule(row: dict[str, Any]) -> OpRule:
    fields = {key: value for key, value in row.items() if key != "ops"}
    for key in ("activation", "weight"):
        if key in fields:
            fields[key] = QType.parse(fields[key])
    if "fuses" in fields:
        fields["fuses"] = tuple(fields["fuses"])
    return OpRule(**fields)
