"""`bench`: latency and memory of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import verify
from onnxq.api.inputs import (
    Source,
    check_inputs,
    existing,
    with_custom_ops,
)
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.samples import Feed, Preprocessing
from onnxq.sampling import Sampling
from onnxq.scratch import scratch
from onnxq.storage import load_proto, model_size
from onnxq.text import MAX_TOKENS


@with_custom_ops
def bench(
    models: Sequence[str | Path],
    *,
    samples: Source = None,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    seconds: float = 5.0,
    runs: int = 200,
    threads: int | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
) -> list[dict[str, Any]]:
    """Latency of several models in turns, and the peak memory of each in a process of its own.

    `samples` (the first feed is what is run), `preprocess` and `states` are as for `quantize`.
    """
    first = existing(models[0])
    proto = load_proto(first)
    check_inputs(proto)
    sampling = Sampling(
        first, proto, preprocess, states,
        threads=threads, tokenizer=tokenizer, max_tokens=max_tokens,
    )  # fmt: skip
    given = sampling.made_up(1)[0] if samples is None else sampling.given(samples, None)
    feed = next(iter(sampling.carry(given)))
    sessions = [Session(existing(m), threads=threads) for m in models]
    for model, session in zip(models, sessions, strict=True):
        if set(session.inputs) != set(sessions[0].inputs):
            raise OnnxqError(
                f"{str(model)!r} takes {', '.join(session.inputs)} and {str(models[0])!r} takes "
                f"{', '.join(sessions[0].inputs)}; bench models that take the same inputs"
            )
    timed = verify.latency(sessions, feed, seconds=seconds * len(sessions), most=runs)
    memory = [_peak_memory(Path(m), feed, threads, custom_ops) for m in models]
    return [
        {
            "model": str(model),
            "bytes": model_size(model),
            "median_ms": t.median_ms,
            "low_ms": t.low_ms,
            "high_ms": t.high_ms,
            "ratio": t.median_ms / timed[0].median_ms,
            "peak_mb": peak,
        }
        for model, t, peak in zip(models, timed, memory, strict=True)
    ]


def _peak_memory(
    model: Path, feed: Feed, threads: int | None, libraries: Sequence[str | Path]
) -> float:
    """MiB that loading and running a model adds to a fresh process's peak."""
    import subprocess
    import sys

    with scratch() as folder:
        path = folder / "feed.npz"
        plain = {k: a.astype(str) if a.dtype.kind == "O" else a for k, a in feed.items()}
        np.savez(path, **plain)  # type: ignore[arg-type]
        code = (
            "import sys, numpy as np\n"
            "from onnxq.pipeline import peak_mb\n"
            "from onnxq.runtime import Session, custom_ops\n"
            "model, feed, threads, *libraries = sys.argv[1:]\n"
            "feed, before = dict(np.load(feed)), peak_mb()\n"
            "with custom_ops(libraries):\n"
            "    Session(model, threads=int(threads) or None).run(feed)\n"
            "print(peak_mb() - before)"
        )
        arguments = [sys.executable, "-P", "-c", code, model, path, threads or 0, *libraries]
        command = list(map(str, arguments))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OnnxqError(f"{str(model)!r} does not run in a process of its own: {last}")
    return float(done.stdout)
