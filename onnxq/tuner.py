"""Choose for each layer whether it is quantized, so that the model keeps to bounds and is fast.

1. Every preset is built and measured as a whole: a candidate, and one of them the base to mix from.
2. Each layer is quantized alone: its loss (KL or cosine at the outputs, on calibration samples).
   Each is timed among its quantized neighbours, in float and quantized: its cost.
3. A knapsack gives every trade-off of the two sums. Losses do not simply add, so the sums say in
   which order to try, and the model as a whole decides: bisection along the front finds the last
   choice that holds its bound when it is built and measured on held-out samples.
4. Whatever holds all bounds is timed in turns with the float model. The fastest is taken; where
   accuracy is not bounded, the most accurate.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import cache
from onnxq import graph as g
from onnxq.api import (
    Source,
    _check_inputs,
    _check_paths,
    _check_weights,
    _environment,
    _with_custom_ops,
    quantize,
)
from onnxq.bounds import Bounds, parse_bounds
from onnxq.candidates import Candidate, Workshop, mixed
from onnxq.errors import OnnxqError
from onnxq.knapsack import Choice, front
from onnxq.meter import Meter, float_session
from onnxq.metrics import Metric, class_scores
from onnxq.metrics import metric as metric_of
from onnxq.pipeline import Progress
from onnxq.recipe import Recipe, load_recipe, preset_names
from onnxq.report import Latency, Report
from onnxq.samples import Preprocessing
from onnxq.sampling import Sampling
from onnxq.scratch import scratch
from onnxq.storage import load_proto
from onnxq.target import Target, load_target
from onnxq.timing import layer_times
from onnxq.tuning import Tuning
from onnxq.variants import Variants, assign_of, variants

PRESETS = ("int8-accurate", "int8-static", "int8-dynamic")  # those of them that are installed
LEAST_SAMPLES = 8
HELD_OUT = 512
WEIGHED_ON = 32  # calibration samples that layers are measured on
TRIED = 48  # entries of the front that bisection runs over
NOISE = 0.03  # of a time: differences below it say nothing
EVEN = 0.02  # a mixed model must be so much faster than a preset's to be taken


@_with_custom_ops
def tune(
    model: str | Path,
    *,
    samples: Source,
    max_drop: str | float | None = None,
    min_cosine: float | None = None,
    max_latency: str | float | None = None,
    max_size: str | float | None = None,
    metric: str = "auto",
    presets: Sequence[str] = (),
    target: str | Target = "cpu",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    output: str | Path | None = None,
    limit: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    threads: int | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress = lambda what, done, total: None,
) -> Tuning:
    """Find the fastest model (without a bound on accuracy: the most accurate) within bounds.

    `max_drop` bounds the share of the metric's value that is lost against the float model, "0.5%"
    or 0.005; `min_cosine` the cosine of the outputs; `max_latency` and `max_size` are "0.7x" of the
    float model's, or "12ms" and "3MB". `metric` is a name of `onnxq.metrics` or `module:function`,
    called with the outputs of the held-out samples in order; `auto` is `top1` where outputs are
    class scores and `cosine` otherwise.

    The first half of the samples calibrates, `limit` at most; up to 512 after them are held out.
    `presets` are recipes to try as they are and to mix from. Writes the model to `output` (default
    `<model>.tuned.onnx`) and its recipe beside it. What was measured is cached: an interrupted run
    goes on where it was.

    Raises OnnxqError, with nothing written, for bad input and where no model holds the bounds.
    """
    began = time.perf_counter()
    bounds = parse_bounds(max_drop, min_cosine, max_latency, max_size)
    if samples is None:
        raise OnnxqError("a tuned model is chosen by measuring on samples, and there are none")
    path = Path(model)
    place = Path(output) if output else path.with_name(f"{path.stem}.tuned.onnx")
    _check_paths(path, place)
    device = target if isinstance(target, Target) else load_target(target)
    names = presets or [name for name in PRESETS if name in preset_names()]
    recipes = [_with_patterns(load_recipe(name), include, exclude) for name in names]
    original, proto = g.load(path), load_proto(path)
    _check_inputs(proto)
    _check_weights(original)
    progress("samples", 0, 1)
    sampling = Sampling(path, proto, preprocess, states, batch_size, seed, threads)
    drawn = sampling.given(samples, 2 * limit + HELD_OUT)
    half = min(limit, len(drawn) // 2)
    if len(drawn) < LEAST_SAMPLES:
        raise OnnxqError(
            f"{len(drawn)} samples are too few to tune on: half of them calibrate and half judge; "
            f"give {LEAST_SAMPLES} or more, better hundreds"
        )
    calibration = sampling.carry(drawn.slice(0, half))
    held_out = sampling.carry(drawn.slice(half, half + HELD_OUT))
    report = Report()
    judge = _judge(metric, float_session(path, original, threads).run(next(iter(held_out))))
    with scratch() as folder:
        shop = Workshop(path, original, device, calibration, held_out, judge, folder, threads)
        machine = {k: v for k, v in _environment(path, seed).items() if k not in ("seed", "onnxq")}
        held = held_out.identity()
        shop.identity = (repr(machine), repr(device), calibration.identity(), held)
        search = _Search(shop, bounds, report, progress)
        candidates, refused = search.uniform(recipes)
        base = search.base(candidates)
        candidates += search.mixes(base)
        chosen, float_latency = search.choose(candidates)
        progress("write", 0, 1)
        final = place.with_suffix(".toml")
        chosen.recipe = replace(chosen.recipe, name=final.stem)
        result = quantize(
            path, recipe=chosen.recipe, samples=samples, preprocess=preprocess, states=states,
            output=place, target=device, limit=half, batch_size=batch_size, seed=seed,
            threads=threads, write=False, progress=progress,
        )  # fmt: skip
        search.confirm(result.save, folder / "final.onnx", chosen)
        result.report.output, result.report.quantized_bytes = str(place), result.save(place)
        (folder / "recipe").write_text(chosen.recipe.text, "utf-8")
        shutil.move(folder / "recipe", final)
        cache.prune()
    return Tuning(
        model=str(path),
        output=str(place),
        recipe=str(final),
        target=device.name,
        bounds=bounds,
        drop_title=judge.title,
        samples=drawn.description,
        calibrated_on=half,
        held_out=len(held_out),
        chosen=chosen,
        candidates=candidates,
        float_bytes=shop.float_bytes,
        float_latency=float_latency,
        replay=f"onnxq quantize {path} --recipe {final} --data … --samples {half}",
        report=result.report,
        measured=shop.measured + search.weighed,
        seconds=time.perf_counter() - began,
        refused=refused,
        warnings=report.warnings,
    )


def _with_patterns(recipe: Recipe, include: Sequence[str], exclude: Sequence[str]) -> Recipe:
    """The recipe with the user's patterns in it, so that it is whole."""
    if not include and not exclude:
        return recipe
    assign = assign_of(recipe)
    more = replace(assign, include=(*assign.include, *include), exclude=(*assign.exclude, *exclude))
    return replace(recipe, passes=tuple(more if s is assign else s for s in recipe.passes))


def _judge(name: str, outputs: Mapping[str, Any]) -> Metric:
    """The metric that drops are drops of."""
    if name == "auto":
        name = "top1" if class_scores(outputs) else "cosine"
    judge = metric_of(name, outputs)
    if name in ("kl", "sqnr"):
        raise OnnxqError(
            f"{name} has no value that the float model's could drop from; tune by top1, agreement, "
            "cosine or module:function"
        )
    return judge


class _Search:
    """The steps of tuning. `weighed` counts layers that were measured, not known."""

    def __init__(self, shop: Workshop, bounds: Bounds, report: Report, progress: Progress) -> None:
        self.shop, self.bounds, self.report, self.progress = shop, bounds, report, progress
        self.weighed = 0
        self.solved: Variants | None = None

    def uniform(self, recipes: Sequence[Recipe]) -> tuple[list[Candidate], dict[str, str]]:
        """Each recipe as it is, and why others cannot be."""
        found: list[Candidate] = []
        refused: dict[str, str] = {}
        for number, recipe in enumerate(recipes):
            self.progress(f"measure {recipe.name}", number, len(recipes))
            try:
                found.append(self.shop.measure(Candidate(recipe.name, recipe)))
            except OnnxqError as error:
                refused[recipe.name] = str(error)
        if not found:
            raise OnnxqError("; ".join(f"{name}: {why}" for name, why in refused.items()))
        return found, refused

    def base(self, candidates: Sequence[Candidate]) -> Candidate:
        """Of the presets about as fast as the fastest, the most accurate one."""
        self.shop.time(candidates)
        fastest = min(c.ratio or 0.0 for c in candidates)
        fast = [c for c in candidates if (c.ratio or 0.0) <= 1.1 * fastest]
        return min(fast, key=lambda c: (c.drop, -c.cosine))

    def mixes(self, base: Candidate) -> list[Candidate]:
        """Candidates on the way to the best mix of float and quantized layers."""
        shop = self.shop
        self.progress(f"solve {base.name}", 0, 1)
        self.solved = variants(
            base.recipe, shop.graph, shop.calibration, shop.target, threads=shop.threads
        )
        names = [node.name for node in self.solved.layers]
        losses, costs = self._losses(base, names), self._costs(base, names)
        tried: dict[tuple[int, ...], Candidate] = {}

        def build(choice: Choice) -> Candidate | None:
            """None for the float model, which is no candidate."""
            left_float = {
                n: "float" for n, option in zip(names, choice.options, strict=True) if option
            }
            if len(left_float) == len(names):
                return None
            if not left_float:
                return base
            if choice.options not in tried:
                name = f"{base.name}, {len(left_float)} of {len(names)} layers float"
                recipe = mixed(base.recipe, left_float, base.recipe.name)
                made = Candidate(name, recipe, left_float)
                self.progress(name, len(tried), 2 * TRIED.bit_length())
                tried[choice.options] = shop.measure(made, self.solved)
            return tried[choice.options]

        # Options: quantized, float.
        by_time = front([[losses[n], 0.0] for n in names], [costs[n] for n in names])
        if self.bounds.drop is not None or self.bounds.cosine is not None:
            last_that(_thinned(by_time), lambda c: c is None or c.accurate(self.bounds), build)
        elif self.bounds.latency is not None:
            last_that(_thinned(by_time[::-1]), self._fast, build)
        if self.bounds.size is not None:
            by_size = front([[losses[n], 0.0] for n in names], [self._bytes(n) for n in names])
            last_that(_thinned(by_size[::-1]), self._small, build)
        return list(tried.values())

    def _losses(self, base: Candidate, names: Sequence[str]) -> dict[str, float]:
        """What each layer does to the outputs when it alone is quantized."""
        shop = self.shop
        assert self.solved is not None
        few = shop.calibration.slice(0, WEIGHED_ON)
        outputs = shop.reference().run(next(iter(few)))
        identity = (*shop.identity, base.recipe.text)
        weighing = metric_of("auto", outputs)
        meter = Meter(shop.model, self.solved, weighing, few, identity, shop.threads, self.progress)
        found = meter.distances("alone", names)
        self.weighed += meter.evaluations
        return found

    def _costs(self, base: Candidate, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """ms quantized and in float; a layer that could not be timed is taken to gain a little."""
        assert self.solved is not None
        key = cache.key("layer times", self.shop.identity, base.recipe.text, str(self.shop.threads))
        times: Any = cache.get(key)
        if times is None:
            self.progress("time layers", 0, 1)
            feed = next(iter(self.shop.held_out))
            times = layer_times(self.solved, feed, self.shop.threads)
            self.weighed += len(times)
            cache.put(key, times)
        smallest = min((min(pair) for pair in times.values()), default=1.0) * NOISE
        costs: dict[str, tuple[float, float]] = {}
        for name in names:
            in_float, quantized = times.get(name, (smallest, 0.0))
            gain = in_float - quantized
            slower = gain < -NOISE * in_float
            costs[name] = (0.0, gain if slower else max(gain, smallest))
        return costs

    def _bytes(self, name: str) -> tuple[float, float]:
        """Bytes of a layer's weights as codes and as floats."""
        assert self.solved is not None
        node = next(node for node in self.solved.layers if node.name == name)
        plan = self.solved.context.plan[name]
        codes = floats = 0.0
        for view in g.weight_views(node) if plan.weight else ():
            count = float(np.prod(view.tensor.shape))
            codes += count * plan.weight.bits / 8 if plan.weight else 0.0
            floats += count * (g.dtype(view.tensor) or np.dtype(np.float32)).itemsize
        return codes, floats

    def _fast(self, candidate: Candidate | None) -> bool:
        limit = self.bounds.latency
        if candidate is None:
            return limit is None or (limit.relative and limit.holds(1.0, 1.0))
        return self._within_time(candidate, self.shop.time([candidate], self.solved))

    def _within_time(self, candidate: Candidate, of_float: Latency) -> bool:
        limit, taken = self.bounds.latency, candidate.latency
        if limit is None or taken is None:
            return limit is None
        return limit.holds(taken.median_ms, of_float.median_ms)

    def _small(self, candidate: Candidate | None) -> bool:
        limit, of_float = self.bounds.size, self.shop.float_bytes
        return limit is None or limit.holds(candidate.bytes if candidate else of_float, of_float)

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, Latency]:
        """The best of those that hold all bounds, by timing them together; the float latency."""
        good = [c for c in candidates if c.accurate(self.bounds) and self._small(c)]
        if not good:
            raise OnnxqError(self._nothing(candidates))
        self.progress("time candidates", 0, 1)
        reference = self.shop.time(good, self.solved)
        fast = [c for c in good if self._within_time(c, reference)]
        if not fast:
            best = min(good, key=lambda c: c.ratio or 0.0)
            raise OnnxqError(
                f"no model holds {self.bounds}: the fastest that holds the others takes "
                f"{best.latency.median_ms if best.latency else 0:.3g} ms, {best.ratio:.3g} × float"
            )
        if self.bounds.drop is None and self.bounds.cosine is None:
            return min(fast, key=lambda c: (c.drop, -c.cosine, c.ratio or 0.0)), reference
        return min(fast, key=lambda c: (c.ratio or 0.0) * (1 + EVEN * bool(c.layers))), reference

    def _nothing(self, candidates: Sequence[Candidate]) -> str:
        best = max(candidates, key=lambda c: (c.accurate(self.bounds), -c.drop, c.cosine))
        return (
            f"no quantized model holds {self.bounds}: the nearest, {best.name!r}, has a drop of "
            f"{best.drop:.2%}, a cosine of {best.cosine:.4f} and {best.bytes:,} bytes on "
            f"{len(self.shop.held_out)} held-out samples; loosen the bounds, or try other presets"
        )

    def confirm(self, save: Callable[[str], Any], path: Path, chosen: Candidate) -> None:
        """That the model of the recipe, made anew, is what was measured."""
        save(str(path))
        drop, cosine, agreement = self.shop.score(path)
        again = replace(chosen, drop=drop, cosine=cosine)
        if not again.accurate(self.bounds):
            raise OnnxqError(
                f"the model that the recipe makes has a drop of {drop:.2%} and a cosine of "
                f"{cosine:.4f}, unlike when it was tried ({chosen.drop:.2%}, {chosen.cosine:.4f})"
            )
        chosen.drop, chosen.cosine, chosen.agreement = drop, cosine, agreement


def _thinned(choices: list[Choice]) -> list[Choice]:
    if len(choices) <= TRIED:
        return choices
    kept = np.linspace(0, len(choices) - 1, TRIED).round().astype(int)
    return [choices[k] for k in kept]


def last_that(
    choices: Sequence[Choice],
    holds: Callable[[Candidate | None], bool],
    build: Callable[[Choice], Candidate | None],
) -> int:
    """By bisection, the last of the choices that holds; -1 where the first does not.

    The further, the less likely it is to hold. Where that is not so, one that holds is found still.
    """
    if holds(build(choices[-1])):
        return len(choices) - 1
    low, high = -1, len(choices) - 1  # the last that is known to hold, the first known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(build(choices[middle])) else (low, middle)
    return low
