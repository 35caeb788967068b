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

from onnxq import cache
from onnxq import graph as g
from onnxq.api import quantize
from onnxq.api.inputs import (
    Source,
    check_inputs,
    check_paths,
    check_weights,
    environment,
    with_custom_ops,
)
from onnxq.errors import OnnxqError
from onnxq.metrics import Metric, class_scores
from onnxq.metrics import metric as metric_of
from onnxq.passes import Assign
from onnxq.pipeline import Progress
from onnxq.recipe import Recipe, load_recipe
from onnxq.report import Latency, Report
from onnxq.samples import Feed, Preprocessing
from onnxq.sampling import Sampling
from onnxq.scratch import scratch
from onnxq.storage import load_proto, model_size
from onnxq.target import Target, load_target
from onnxq.text import MAX_TOKENS
from onnxq.tuning.bounds import Bounds, parse_bounds
from onnxq.tuning.candidates import Candidate, FormatSensitivity, Workshop
from onnxq.tuning.meter import float_session
from onnxq.tuning.mixing import Mixer
from onnxq.tuning.result import Tuning
from onnxq.tuning.variants import assign_of

PRESETS = ("int8-accurate", "int8-static", "int8-dynamic", "int8-weights")
LEAST_SAMPLES = 8
HELD_OUT = 512
FAR = 1.25  # times the latency of the fastest preset: from slower ones nothing is mixed
EVEN = 0.02  # a mixed model must be so much faster than a preset's to be taken


@with_custom_ops
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
    formats: Sequence[str] = (),
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
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
    details: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Tuning:
    """Find the fastest model (without a bound on accuracy: the most accurate) within bounds.

    `max_drop` bounds the share of the metric's value that is lost against the float model, "0.5%"
    or 0.005; `min_cosine` the cosine of the outputs; `max_latency` and `max_size` are "0.7x" of the
    float model's, or "12ms" and "3MB". `metric` is a name of `onnxq.metrics` or
    `module:function`, called with the outputs of the held-out samples in order; `auto` is `top1`
    where outputs are class scores and `cosine` otherwise.

    The first half of the samples calibrates, `limit` at most; up to 512 after them are held out.
    `presets` are recipes to try as they are and to mix from; `formats` those that layers may have
    beside the preset's own and float, `w4a8` by default where size is bounded. Writes the model to
    `output` (default `<model>.tuned.onnx`) and its recipe beside it. What was measured is cached:
    an interrupted run goes on where it was. `details` are those of `quantize`.

    Raises OnnxqError, with nothing written, for bad input and where no model holds the bounds.
    """
    began = time.perf_counter()
    bounds = parse_bounds(max_drop, min_cosine, max_latency, max_size)
    if samples is None:
        raise OnnxqError("a tuned model is chosen by measuring on samples, and there are none")
    path = Path(model)
    place = Path(output) if output else path.with_name(f"{path.stem}.tuned.onnx")
    check_paths(path, place)
    device = target if isinstance(target, Target) else load_target(target)
    names = presets or PRESETS
    recipes = [_with_patterns(load_recipe(name), include, exclude) for name in names]
    proto = load_proto(path)
    original = g.load(proto, path.parent)
    check_inputs(proto)
    check_weights(original)
    progress("samples", 0, 1)
    sampling = Sampling(
        path, proto, preprocess, states, batch_size, seed, threads, tokenizer, max_tokens
    )
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
    first = next(iter(held_out))
    judge = _judge(metric, first, float_session(path, original, threads).run(first))
    with scratch() as folder:
        shop = Workshop(path, original, device, calibration, held_out, judge, folder, threads)
        machine = {k: v for k, v in environment(path, seed).items() if k not in ("seed", "onnxq")}
        held = held_out.identity()
        shop.identity = (repr(machine), repr(device), calibration.identity(), held)
        search = _Search(shop, bounds, report, progress)
        candidates, refused = search.uniform(recipes)
        weighed = 0
        sensitivities: list[FormatSensitivity] = []
        for base in search.bases(candidates):
            mixer = Mixer(shop, base, bounds, formats, progress)
            candidates += mixer.mixes()
            weighed += mixer.weighed
            sensitivities += mixer.sensitivities.values()
        chosen, float_latency = search.choose(candidates)
        progress("write", 0, 1)
        final = place.with_suffix(".toml")
        named = replace(chosen.recipe, name=final.stem)
        result = quantize(
            path, recipe=named, samples=samples, preprocess=preprocess, states=states,
            output=place, target=device, limit=half, batch_size=batch_size, seed=seed,
            threads=threads, tokenizer=tokenizer, max_tokens=max_tokens, write=False,
            details=details, progress=progress,
        )  # fmt: skip
        search.confirm(result.save, folder / "final.onnx", chosen)
        result.report.output, result.report.quantized_bytes = str(place), result.save(place)
        (folder / "recipe").write_text(named.text, "utf-8")
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
        sensitivities=sensitivities,
        measured=shop.measured + weighed,
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


def _judge(name: str, feed: Feed, outputs: Mapping[str, Any]) -> Metric:
    """The metric that drops are drops of."""
    if name == "auto":
        name = "top1" if class_scores(outputs) else "cosine"
    judge = metric_of(name, feed, outputs)
    if name in ("kl", "sqnr"):
        raise OnnxqError(
            f"{name} has no value that the float model's could drop from; tune by top1, agreement, "
            "cosine, perplexity or module:function"
        )
    return judge


class _Search:
    """The steps of tuning that deal with whole models."""

    def __init__(self, shop: Workshop, bounds: Bounds, report: Report, progress: Progress) -> None:
        self.shop, self.bounds, self.report, self.progress = shop, bounds, report, progress

    def uniform(self, recipes: Sequence[Recipe]) -> tuple[list[Candidate], dict[str, str]]:
        """Each recipe as it is, and why others cannot be."""
        found: list[Candidate] = []
        refused: dict[str, str] = {}
        for number, recipe in enumerate(recipes):
            self.progress(f"measure {recipe.name}", number, len(recipes))
            try:
                recipe = self.shop.decided(recipe, self.report, self.progress)
                found.append(self.shop.measure(Candidate(recipe.name, recipe)))
            except OnnxqError as error:
                refused[recipe.name] = str(error)
        if not found:
            raise OnnxqError("; ".join(f"{name}: {why}" for name, why in refused.items()))
        return found, refused

    def bases(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The presets that can be mixed from and are not far behind the fastest of them."""
        mixable = [c for c in candidates if any(isinstance(s, Assign) for s in c.recipe.passes)]
        if mixable:
            self.shop.time(mixable)
        fastest = min((c.ratio or 0.0 for c in mixable), default=0.0)
        return [c for c in mixable if (c.ratio or 0.0) <= FAR * fastest]

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, Latency]:
        """The best of those that hold all bounds, by timing them together; the float latency."""
        good = [
            c for c in candidates if c.accurate(self.bounds) and self.shop.small(c, self.bounds)
        ]
        if not good:
            raise OnnxqError(self._nothing(candidates))
        self.progress("time candidates", 0, 1)
        reference = self.shop.time(good)
        fast = [c for c in good if c.fast(self.bounds, reference)]
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
        chosen.bytes = model_size(path)
