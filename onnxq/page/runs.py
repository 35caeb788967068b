"""What a page shows: runs, read from the JSON that commands save."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.report import Report


@dataclass
class Run:
    """One run by a name of its own: a report, what tuning tried, what layers do, or several.

    `tuning` and `effects` are as `onnxq tune` and `onnxq sensitivity` write them, without their
    report.
    """

    name: str
    report: Report | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    effects: dict[str, Any] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        found = self.report.environment if self.report else self.effects.get("environment", {})
        return dict(found)

    @property
    def warnings(self) -> list[str]:
        own = self.report.warnings if self.report else []
        more = [*self.tuning.get("warnings", ()), *self.effects.get("warnings", ())]
        return list(dict.fromkeys([*own, *more]))


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs in files of `--report` or `--json`, each by a name that no other has.

    Raises OnnxqError for a file that holds none.
    """
    found: list[Run] = []
    for path in paths:
        try:
            found += runs_in(path.read_text("utf-8"), path.stem)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise OnnxqError(
                f"{str(path)!r} is no report; make one with: "
                "onnxq quantize MODEL --report FILE.json"
            ) from None
    return distinct(found)


def runs_in(text: str, name: str) -> list[Run]:
    """Of a report, of tuning, of sensitivities, or of a folder of models."""
    data = json.loads(text)
    if "candidates" in data:
        report = Report.from_json(json.dumps(data.pop("report")))
        return [Run(name, report, tuning=data)]
    if "all_quantized" in data:
        return [Run(name, effects=data)]
    if "reports" in data:
        return [Run(file, Report.from_json(json.dumps(r))) for file, r in data["reports"].items()]
    return [Run(name, Report.from_json(text))]


def distinct(runs: list[Run]) -> list[Run]:
    """Those of one name are numbered."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({names[: number + 1].count(names[number])})"
    return runs
