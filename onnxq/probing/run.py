"""Probe a place: measure every candidate there and write the target that comes of it."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnxruntime as ort

from onnxq import cache
from onnxq.devices.place import PROVIDERS, Answer, Job, Place, ask, is_emulated
from onnxq.devices.single import Verdict, singles, verdicts
from onnxq.errors import OnnxqError
from onnxq.probing.candidates import Candidate, candidates, shipped_rules
from onnxq.probing.channels import at_once
from onnxq.probing.decide import decide
from onnxq.probing.forms import format_of
from onnxq.probing.measure import Measured, measure
from onnxq.probing.write import supports, target_toml
from onnxq.runtime import default_threads
from onnxq.target import OpRule, Support, Target, cpu_flags, cpu_name, load_target, target_names

Progress = Callable[[str, int, int], None]
_TYPES_ELSEWHERE = ("float32", "float16", "int32", "int64", "uint8", "int8", "bool")


@dataclass
class Probed:
    """What probing a place found. `target` is TOML for `load_target`; `dropped` are the rules that
    do not hold here, as (operator, form, format, reason)."""

    provider: str
    version: str
    machine: str
    target: str
    measured: list[Measured] = field(default_factory=list)
    dropped: list[tuple[str, str, str, str]] = field(default_factory=list)
    timed: bool = True
    cached: bool = False

    @property
    def timed_rules(self) -> list[tuple[str, OpRule]]:
        """(operator, rule) of all that was run beside float, bounds on pairs apart."""
        keys = ((r.op, replace(r.rule, pair_limit=None)) for r in self.measured)
        return list(dict.fromkeys(key for key in keys if key[1].form != "integer"))

    def rows_of(self, op: str, rule: OpRule) -> list[Measured]:
        """What was measured of a rule."""
        return [
            row
            for row in self.measured
            if row.op == op and replace(row.rule, pair_limit=None) == rule
        ]


def default_places() -> list[Place]:
    """The providers of this Python's onnxruntime, those that run models apart from Azure's."""
    known = [name for name in ort.get_available_providers() if name in PROVIDERS.values()]
    return [Place(name) for name in known]


def base_of(place: Place) -> str:
    """The shipped target that speaks of a provider; `cpu` for those that none does."""
    fitting = [n for n in target_names() if load_target(n).providers[:1] == (place.provider,)]
    return "cpu" if "cpu" in fitting or not fitting else fitting[0]


def probe(
    place: Place,
    *,
    base: str | None = None,
    ops: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Probed:
    """Measure what a place runs, of the operators `ops` (None: of all that some rule names).

    The answer comes from the cache where the same provider, onnxruntime, CPU and onnxq were probed
    before. Rules that are not measured, those of operators outside `ops`, are the base's.

    Raises OnnxqError where the place does not work, or the base is no target.
    """
    started = load_target(base or base_of(place))
    if started.provider_options and not place.options:
        place = replace(place, options=started.provider_options)
    first = _first(place)
    key = cache.key(
        "probe", place.provider, list(place.command), dict(place.options), first.version,
        first.machine, sorted(cpu_flags()), cpu_name(), os.cpu_count(),
        threads or default_threads(), base or "", list(ops) if ops is not None else None,
    )  # fmt: skip
    if (known := cache.get(key)) is not None:
        return replace(known, cached=True)
    found = _Probe(place, started, first, ops, threads, progress).run()
    cache.put(key, found)
    return found


def _first(place: Place) -> Answer:
    """A model that any place runs, to know who answers. Raises OnnxqError where it does not."""
    single = next(iter(singles(["Add"], ("float32",))))
    answer = ask(place, [Job(single.model, (single.feed,), threads=1)])[0]
    if answer.error and answer.stage in ("start", "crash"):
        raise OnnxqError(f"{place.name} does not work here: {answer.error}")
    return answer


class _Probe:
    def __init__(
        self,
        place: Place,
        base: Target,
        first: Answer,
        ops: Sequence[str] | None,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.place, self.base, self.ops, self.threads = place, base, ops, threads
        self.progress = progress
        self.machine, self.version = first.machine, first.version
        self.runtime = f"onnxruntime {first.version}"
        self.emulated = is_emulated(place, first)
        # A page in a browser, which names no machine, times no models in turns.
        self.timed = bool(first.machine) and not self.emulated

    def run(self) -> Probed:
        rules = [
            (op, rule)
            for op, rule in shipped_rules(self.base.name)
            if self.ops is None or op in self.ops
        ]
        wanted = self._candidates(rules)
        rows = measure(
            self.place, wanted, timed=self.timed, threads=self.threads,
            progress=lambda done, total: self.progress("measure", done, total),
        )  # fmt: skip
        by_rule: dict[tuple[str, OpRule], list[Measured]] = defaultdict(list)
        for row in rows:
            by_rule[row.op, replace(row.rule, pair_limit=None)].append(row)
        kept: dict[str, tuple[OpRule, ...]] = {}
        dropped: list[tuple[str, str, str, str]] = []
        for op, rule in rules:
            kept.setdefault(op, ())
            rule_here, why = self._decided(op, rule, by_rule)
            if rule_here is not None and not _shadowed(rule_here, kept[op]):
                kept[op] += (rule_here,)
            elif why:
                dropped.append((op, rule.form, str(format_of(rule)), why))
        target = self._target(kept, dropped)
        notes = [
            f"Measured by onnxq probe on {cpu_name()}, {os.cpu_count()} cores, "
            f"{self.place.provider} of {self.runtime}.",
        ]
        if not self.timed:
            notes.append(f"Not timed: {'it is emulated' if self.emulated else 'in a browser'}.")
        return Probed(
            self.place.name, self.version, self.machine, target_toml(target, notes), rows, dropped,
            self.timed,
        )  # fmt: skip

    def _candidates(self, rules: Sequence[tuple[str, OpRule]]) -> list[Candidate]:
        found: list[Candidate] = []
        made: set[str] = set()  # of integers alone: one model by all the rules of an operator
        for number, (op, rule) in enumerate(rules):
            self.progress("make models", number, len(rules))
            if rule.form != "integer" or op not in made or op == "MatMul":
                found += candidates(op, rule, self.base)
                made |= {op} if rule.form == "integer" else set()
        return found

    def _decided(
        self, op: str, rule: OpRule, by_rule: dict[tuple[str, OpRule], list[Measured]]
    ) -> tuple[OpRule | None, str]:
        rows = by_rule.get((op, rule))
        if rows is None and rule.form == "integer":
            rows = next(
                (r for (o, k), r in by_rule.items() if (o, k.form) == (op, rule.form)), None
            )
        if rows:
            made, why = decide(rows, self.runtime)
            return made and replace(rule, source=made.source, pair_limit=made.pair_limit,
                                    blocks=made.blocks), why  # fmt: skip
        wider = [
            known for known in by_rule
            if known[0] == op and known[1].form == rule.form and rule.activation is not None
            and rule.activation.bits == 4 and known[1].activation is not None
            and known[1].activation.bits == 8 and rule.weight is None
        ]  # fmt: skip
        if not wider:
            return None, "onnxq makes no model of one operator by it"
        made, why = decide(by_rule[wider[0]], self.runtime)
        if made is None:
            return None, why
        return replace(rule, source=f"{made.source}, for 8 bits; a Clip of codes behind it"), ""

    def _target(
        self, kept: dict[str, tuple[OpRule, ...]], dropped: list[tuple[str, str, str, str]]
    ) -> Target:
        ops = {op: rules for op, rules in (self.base.ops | kept).items() if rules}
        reasons = {
            f"{form} {op}": why
            for op, form, _, why in dropped
            if not any(rule.form == form for rule in ops.get(op, ()))
        }
        own_float16, only_float32 = self._float16()
        dense, depthwise = self.base.dense_channels, self.base.depthwise_channels
        if self.place.provider == "CPUExecutionProvider" and self.timed and self.ops is None:
            dense, depthwise = at_once(self.place, self.threads)
        found: dict[str, tuple[Support, ...]] = self.base.supports
        if self.place.provider != "CPUExecutionProvider":  # which runs whatever has a kernel
            found = self._supports()
        return replace(
            self.base, name="probed", providers=(self.place.provider,),
            provider_options=dict(self.place.options), ops=ops,
            summary=f"{cpu_name()}: {self.place.provider}, measured",
            left_float=self.base.left_float | reasons, supports=found,
            float16_operators=own_float16, float32=only_float32, dense_channels=dense,
            depthwise_channels=depthwise, machines=(self.machine,),
        )  # fmt: skip

    def _supports(self) -> dict[str, tuple[Support, ...]]:
        found = self._verdicts(_TYPES_ELSEWHERE, "operators as they stand")
        return self.base.supports | supports(found, f"measured here, {self.runtime}")

    def _float16(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """The provider's own operators that take float16, and the standard ones that do not."""
        found = self._verdicts(("float16",), "float16")
        own = {v.single.op: v.runs for v in found if v.single.call.domain}
        kept = [op for op in self.base.float16_operators if own.get(op, self.ops is not None)]
        ran = {v.single.op for v in found if v.runs}
        refused = {
            v.single.op: f"takes no float16 here: {v.reason}"
            for v in found
            if v.single.op not in ran and not v.single.call.domain
        }
        return tuple(kept), refused | self.base.float32

    def _verdicts(self, types: Sequence[str], what: str) -> list[Verdict]:
        models = singles(self.ops, types)
        return verdicts(
            self.place, models, progress=lambda done, total: self.progress(what, done, total)
        )


def _shadowed(rule: OpRule, before: Sequence[OpRule]) -> bool:
    """Whether a rule takes nothing that one before it does not take."""
    return any(
        known.form == rule.form
        and format_of(known) == format_of(rule)
        and (known.depthwise, known.constant_weight, known.batched, known.blocks)
        == (rule.depthwise, rule.constant_weight, rule.batched, rule.blocks)
        for known in before
    )


def paths_of(output: Path, places: Sequence[Place]) -> list[Path]:
    """A file for each place: FILE, or FILE.PROVIDER.toml where there are several.

    Raises OnnxqError where two places would have the same, and for another suffix than .toml.
    """
    if output.suffix != ".toml":
        raise OnnxqError(f"a target is a .toml file, and {str(output)!r} is none")
    if len(places) == 1:
        return [output]
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        raise OnnxqError("the same provider twice: probe it in another run, with another --output")
    return [output.with_name(f"{output.stem}.{name}.toml") for name in names]


def to_json(found: Sequence[Probed], paths: Sequence[Path]) -> str:
    """For other programs."""
    return json.dumps([
        {
            "target": str(path), "provider": one.provider, "onnxruntime": one.version,
            "machine": one.machine, "cached": one.cached, "timed": one.timed,
            "measured": [row.to_dict() for row in one.measured],
            "dropped": [
                dict(zip(("op", "form", "format", "reason"), row, strict=True))
                for row in one.dropped
            ],
        }
        for one, path in zip(found, paths, strict=True)
    ])  # fmt: skip
