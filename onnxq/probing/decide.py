"""From measurements of one rule on one operator to the rule that holds here, or why none does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnxq.graph import RECURRENT
from onnxq.probing.measure import Measured
from onnxq.target import OpRule

SLOWER = 0.9  # times as fast as float: less is slower, whatever the machine was busy with
NO_KERNEL = 0.2  # of the speed of the fastest size of blocks
_CODES_OFF = 1.0  # steps that a fused kernel may round otherwise than float between quantizers
_RANGE_OFF = 0.02  # of floats' range: kernels for blocks round activations to 8 bits


def decide(rows: Sequence[Measured], runtime: str) -> tuple[OpRule | None, str]:
    """The rule with what was measured for its source, or None and the reason.

    A rule whose kernel is slower than float in every kind of shape is none, unless it is there to
    spare bytes: weights alone, or recurrent layers, whose codes expand when a model is loaded.
    """
    rule = replace(rows[0].rule, pair_limit=None)
    speeds = [row for row in rows if row.purpose != "sums"]
    broken = [row for row in speeds if row.error]
    if len(broken) == len(speeds):
        return None, f"does not run here: {broken[0].error}" if broken else "no form of it"
    good = [row for row in speeds if not row.error and not wrong(row)]
    if not good:
        worst = max(speeds, key=lambda row: row.off)
        return None, f"gives other answers here: off by {worst.off:.2g} ({worst.label})"
    sums = [row for row in rows if row.purpose == "sums" and not row.error]
    limit, why = pair_limit(sums)
    if why:
        return None, why
    if rule.blocks:
        rule = replace(rule, blocks=_blocks(rule, good, sums))
        if not rule.blocks:
            return None, "gives other answers here in blocks of every size"
        good = [row for row in good if row.block in rule.blocks]
    timed = [row for row in good if row.speedup is not None]
    spares = rule.activation is None or rule.form == "integer" or rows[0].op in RECURRENT
    if timed and not spares and all((row.speedup or 0) < SLOWER for row in timed):
        best = max(timed, key=lambda row: row.speedup or 0)
        return None, f"slower than float here: {best.speedup:.2g} × ({best.label})"
    source = _source(good, sums, runtime)
    return replace(rule, pair_limit=limit, source=source), ""


def wrong(row: Measured) -> bool:
    """Whether answers are other ones than the reference's, roundings apart."""
    if row.purpose == "bits":
        return row.off > 0
    codes = row.off == round(row.off) if math.isfinite(row.off) else False
    return row.off > (_CODES_OFF if codes else _RANGE_OFF)


def pair_limit(sums: Sequence[Measured]) -> tuple[int | None, str]:
    """How far neighbouring weights must be bound for exact sums, or why no bound helps."""
    for limit in sorted({row.rule.pair_limit for row in sums}, key=lambda n: n is not None):
        here = [row for row in sums if row.rule.pair_limit == limit]
        bits = here[0].rule.activation.bits if here[0].rule.activation else 8
        if any(row.off <= rounding(bits) for row in here):
            return limit, ""
    if sums:
        return None, f"sums of products are wrong here, by {min(s.off for s in sums):.0%}"
    return None, ""


def rounding(bits: int) -> float:
    """Half a step of codes of a result from -n to n, in parts of n, and some."""
    return 1.1 / (2 ** min(bits, 8) - 1) + 0.005


def _blocks(rule: OpRule, good: Sequence[Measured], sums: Sequence[Measured]) -> tuple[int, ...]:
    """The sizes that are right, without those for which there is no fast kernel."""
    exact = {row.block for row in sums if row.off <= rounding(8)} if sums else set(rule.blocks)
    best = {
        block: max(row.speedup or math.inf for row in good if row.block == block)
        for block in rule.blocks
        if block in exact and any(row.block == block for row in good)
    }
    least = NO_KERNEL * max(filter(math.isfinite, best.values()), default=0.0)
    return tuple(block for block, speedup in best.items() if speedup >= least)


def _source(good: Sequence[Measured], sums: Sequence[Measured], runtime: str) -> str:
    parts = []
    if good[0].purpose == "bits":
        exact = all(row.off == 0 for row in good)
        parts.append("the bits of exact integer arithmetic" if exact else "runs")
    elif all(row.off == 0 for row in good):
        parts.append("exact")
    elif all(row.off <= 1 and row.off == round(row.off) for row in good):
        parts.append("exact but for roundings of one code")
    elif all(math.isfinite(row.off) for row in good):
        parts.append(f"within {max(row.off for row in good):.1g} of float's range")
    if sums:
        parts.append("the largest sums too")
    timed = sorted(
        (row for row in good if row.speedup is not None), key=lambda row: -(row.speedup or 0)
    )
    ends = timed[:1] + timed[1:][-1:]  # the best and the worst
    parts += [f"{row.speedup:.2g} × float ({row.label})" for row in ends]
    kernels = list(dict.fromkeys(k for row in good for k in row.kernels or ()))
    if good[0].purpose == "speed" and any(row.kernels is not None for row in good):
        parts.append("+".join(kernels) or "no integer kernel")
    return f"measured here: {', '.join([*parts, runtime])}"
