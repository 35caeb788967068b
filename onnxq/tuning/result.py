"""What tuning found: every candidate with what was measured of it, and the one that was taken."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from onnxq.report import Latency, Report
from onnxq.tuning.bounds import Bounds
from onnxq.tuning.candidates import Candidate, FormatSensitivity


@dataclass
class Tuning:
    """`drop_title` says what a drop is one of. Candidates were all measured on `held_out` samples
    that calibration did not see; those without a latency were not worth timing.
    `sensitivities` are what mixes were made by.
    """

    model: str
    output: str
    recipe: str
    target: str
    bounds: Bounds
    drop_title: str
    samples: str
    calibrated_on: int
    held_out: int
    chosen: Candidate
    candidates: list[Candidate]
    float_bytes: int
    float_latency: Latency
    replay: str
    report: Report
    sensitivities: list[FormatSensitivity] = field(default_factory=list)
    measured: int = 0
    seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def holds(self, candidate: Candidate) -> bool:
        """All bounds, as far as they were measured."""
        size = self.bounds.size
        small = size is None or size.holds(candidate.bytes, self.float_bytes)
        timed = candidate.latency is None or candidate.fast(self.bounds, self.float_latency)
        return small and timed and candidate.accurate(self.bounds)

    @property
    def front(self) -> list[Candidate]:
        """The timed candidates that no other beats in drop, latency and size."""

        def figures(c: Candidate) -> tuple[float, ...]:
            return c.drop, c.ratio or 0.0, c.bytes

        timed = [c for c in self.candidates if c.ratio is not None]
        return [
            c
            for c in timed
            if not any(
                all(a <= b for a, b in zip(figures(o), figures(c), strict=True))
                and figures(o) != figures(c)
                for o in timed
            )
        ]

    def to_json(self) -> str:
        front = {id(c) for c in self.front}

        def row(c: Candidate) -> dict[str, Any]:
            return {
                "name": c.name,
                "layers": c.layers,
                "drop": c.drop,
                "cosine": c.cosine,
                "agreement": c.agreement,
                "bytes": c.bytes,
                "latency": asdict(c.latency) if c.latency else None,
                "ratio": c.ratio,
                "holds": self.holds(c),
                "on_front": id(c) in front,
                "recipe": c.recipe.text,
            }

        plain = {
            key: value
            for key, value in vars(self).items()
            if key
            not in ("bounds", "chosen", "candidates", "report", "float_latency", "sensitivities")
        }
        return json.dumps(
            plain
            | {
                "bounds": asdict(self.bounds),
                "float_latency": asdict(self.float_latency),
                "chosen": self.chosen.name,
                "candidates": [row(c) for c in self.candidates],
                "sensitivities": [asdict(s) for s in self.sensitivities],
                "report": json.loads(self.report.to_json()),
            },
            indent=2,
        )
