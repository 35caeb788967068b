"""What `check` says of a model: a verdict for each node, and what they come to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal

Kind = Literal["integer", "runs", "folded", "not fused", "falls back", "will not run"]
KINDS: tuple[Kind, ...] = (
    "integer", "runs", "folded", "not fused", "falls back", "will not run",
)  # fmt: skip
HERE = ("integer", "runs", "not fused")  # those that say: on the provider


@dataclass
class Verdict:
    """What becomes of a node. `happened` is what did, where somebody ran the model."""

    node: str
    op: str
    kind: Kind
    reason: str = ""
    fix: str = ""
    happened: str = ""
    agrees: bool | None = None


@dataclass
class CheckReport:
    """A verdict for each node, bodies of control flow included, in order."""

    model: str
    target: str
    provider: str
    verdicts: list[Verdict]
    error: str = ""  # what the provider said when it did not run the model
    ran_on: str = ""
    elsewhere: int = 0  # nodes that the provider left to the CPU, when it was asked
    warnings: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[Kind, int]:
        counted = Counter(verdict.kind for verdict in self.verdicts)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    @property
    def runs(self) -> bool:
        """Whether the model will load and run there, on the CPU where it has to."""
        return not any(verdict.kind == "will not run" for verdict in self.verdicts)

    @property
    def whole(self) -> bool:
        """Whether the provider takes all of it."""
        return self.runs and not any(verdict.kind == "falls back" for verdict in self.verdicts)

    @property
    def agreement(self) -> tuple[int, int]:
        """Nodes whose verdict was right, and those of which the provider said anything."""
        said = [verdict.agrees for verdict in self.verdicts if verdict.agrees is not None]
        return sum(said), len(said)

    def to_json(self) -> str:
        found = asdict(self) | {"counts": self.counts, "runs": self.runs, "whole": self.whole}
        if self.ran_on:
            found["agreement"] = self.agreement
        return json.dumps(found, indent=2)
