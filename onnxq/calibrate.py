"""Stream samples through ONNX Runtime into observers, those alone whose results are not at hand.

A result depends on what its tensor is computed from, on the samples and on the observer, and on
nothing else of the model or the recipe: it is cached under these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from onnxq import cache
from onnxq import graph as g
from onnxq.digest import digests
from onnxq.errors import OnnxqError
from onnxq.observe import Observer
from onnxq.samples import Samples
from onnxq.tap import Tap


def observe(
    graph: g.Graph,
    observers: Mapping[str, Observer],
    samples: Samples,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run every sample once; return each observer's result under its key.

    A key is `tensor` or `tensor#purpose`. Raises OnnxqError for a tensor that is not in the graph
    and for a sample that makes one NaN or infinite.
    """
    names = _cache_keys(graph, observers, samples)
    known = {key: value for key, name in names.items() if (value := cache.get(name)) is not None}
    fresh = {key: observer for key, observer in observers.items() if key not in known}
    if fresh:
        known |= _observe(graph, fresh, samples, threads, progress)
        for key in fresh.keys() & names.keys():
            with suppress(TypeError):  # a result of a kind that cannot be kept
                cache.put(names[key], known[key])
        cache.prune()
    return {key: known[key] for key in observers}


def _cache_keys(
    graph: g.Graph, observers: Mapping[str, Observer], samples: Samples
) -> dict[str, str]:
    """None where nothing is cached, and for an observer that is no plain record."""
    if cache.folder() is None:
        return {}
    origins, fed = digests(graph), samples.identity()
    keys: dict[str, str] = {}
    for key, observer in observers.items():
        if (tensor := key.split("#")[0]) in origins:
            with suppress(TypeError):
                keys[key] = cache.key("observe", origins[tensor], fed, observer)
    return keys


def _observe(
    graph: g.Graph,
    observers: Mapping[str, Observer],
    samples: Samples,
    threads: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    wanted = sorted({key.split("#")[0] for key in observers})
    probe = Tap(graph, wanted, threads=threads)
    total = len(samples)
    for done, feed in enumerate(samples):
        progress(done, total)
        try:
            values = probe.run(feed)
        except OnnxqError as error:
            raise OnnxqError(f"{samples.where(done)}: {error}") from None
        for key, observer in observers.items():
            name = key.split("#")[0]
            try:
                for value in values[name]:
                    if value.size:
                        observer.update(value)
            except FloatingPointError:
                raise OnnxqError(
                    f"{samples.where(done)} makes {name!r} NaN or infinite; leave that sample out, "
                    "or check its preprocessing"
                ) from None
    progress(total, total)
    return {key: observer.result() for key, observer in observers.items()}
