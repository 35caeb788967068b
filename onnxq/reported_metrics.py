"""Which metrics a report measures, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.metrics import Distance, Metric, Outputs, class_scores, metric
from onnxq.perplexity import NextToken
from onnxq.report import MetricRecord
from onnxq.verify import Runs


def shown(names: Sequence[str], said: Runs, feed: Outputs, session: Runs) -> list[Metric]:
    """What a report measures beside cosine and SQNR: the KL divergence where outputs are class
    scores, perplexity where they are a language model's, and the metrics `names`. `said` knows what
    `session` says of the feed.
    """
    outputs = said.run(feed)
    where = NextToken.find(feed, outputs)
    fitting = ["kl"] if class_scores(outputs) else []
    fitting += ["perplexity"] if where is not None and where.holds(session, feed) else []
    wanted = dict.fromkeys([*fitting, *(name for name in names if name != "auto")])
    return [metric(name, feed, outputs) for name in wanted]


def records(metrics: Sequence[Metric], distances: Sequence[Distance]) -> list[MetricRecord]:
    """What was measured, for a report."""
    return [
        MetricRecord(m.name, m.title, m.unit, seen.value(), *(seen.scored() or (None, None)))
        for m, seen in zip(metrics, distances, strict=True)
    ]
