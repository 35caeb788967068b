"""`scripts/benchmark verdicts`: what check says of a model, beside what the provider then does.

Over every model × preset and 300 generated graphs, on each provider at hand. An answer of a model
is one of: it runs whole on the provider, in part, or does not load.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from matrix import foretells, happened, matrix
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq import graph as g
from onnxq.devices import Job, Place, ask
from onnxq.devices.happened import compare
from onnxq.devices.judge import judge
from onnxq.devices.verdicts import CheckReport
from onnxq.errors import OnnxqError
from onnxq.recipe import preset_names
from onnxq.target import Target, load_target

TARGETS = {
    "cpu": "cpu", "openvino": "openvino", "qnn": "qnn-htp", "web": "web-wasm", "arm64": "cpu-arm64",
}  # fmt: skip
SIZES = {  # of open dimensions, by model; 1 where nothing is said
    "all-MiniLM-L6-v2": {"sequence": 32},
    "stories260K": {"seq": 32},
    "stories260K_kv": {"seq": 4, "past": 28},
    "silero_vad_16k": {"sequence": 576},
}
AT_ONCE = 20  # models per question
console = Console()


def fix_shapes(path: Path, to: Path) -> None:
    """The model with a number for every dimension of its inputs."""
    model = onnx.load(path)
    sizes = SIZES.get(path.stem, {})
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim if value.name not in weights else ():
            if dim.dim_param and (dim.dim_param in sizes or value in model.graph.input):
                dim.dim_value = sizes.get(dim.dim_param, 1)
            elif dim.dim_param:
                dim.ClearField("dim_param")
    onnx.save(model, to)


def place_of(text: str) -> tuple[str, tuple[Place, Target]]:
    """`EP@PYTHON`, by its name in scripts/providers: cpu@.providers/web/python is `web`."""
    provider, _, command = text.partition("@")
    label = Path(command).parent.name if command else provider
    target = load_target(TARGETS.get(label) or TARGETS[provider])
    return label, (Place.parse(text, target.provider_options), target)


def every_model(shared: Path, folder: Path, wanted: list[str], make: bool) -> Iterator[Path]:
    """Each model as it is and of every preset, with fixed shapes; made where they are missing."""
    for path in sorted((shared / "models").glob("*.onnx")):
        if wanted and path.stem not in wanted:
            continue
        fixed = folder / f"{path.stem}.onnx"
        if not fixed.exists():
            fix_shapes(path, fixed)
        yield fixed
        for preset in preset_names():
            made = folder / f"{path.stem}.{preset}.onnx"
            if not made.exists() and not make:
                continue
            if not made.exists():
                try:
                    onnxq.quantize(fixed, preset, output=made, check=False)
                except OnnxqError as error:
                    console.print(f"{preset} refuses {path.stem}: {error}", soft_wrap=True)
                    continue
            yield made


def generated(folder: Path, count: int, chosen: int) -> Iterator[Path]:
    """Random graphs, float and by the presets in turn; the same ones for the same seed."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from graphs import pipeline
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from random_graphs import Case, random_graphs

    cases: list[Case] = []

    @seed(chosen)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(random_graphs())
    def collect(case: Case) -> None:
        cases.append(case)

    collect()
    ways = ["float", *preset_names()]
    for number, case in enumerate(cases):
        way = ways[number % len(ways)]
        path = folder / f"generated-{chosen}-{number:03}.{way}.onnx"
        if not path.exists():
            try:
                model = case.model
                if way != "float":
                    model = g.to_proto(pipeline(model, case.feeds, way).graph)
                onnx.save(model, path)
            except OnnxqError:  # a preset that has nothing to do here: the graph as it is
                onnx.save(case.model, path)
        yield path


@dataclass
class Tally:
    """What was right, on one provider."""

    nodes: int = 0
    right: int = 0
    models: int = 0
    models_right: int = 0
    unforeseen: list[str] = field(default_factory=list)  # did not load, and check had not said so
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, report: CheckReport) -> None:
        right, said = report.agreement
        self.right, self.nodes = self.right + right, self.nodes + said
        foretold, was = foretells(report), happened(report)
        self.models += 1
        self.models_right += foretold == was
        name = Path(report.model).stem
        if foretold != was:
            self.wrong[f"a model: {foretold}, {was}"] += 1
            console.print(f"  {name}: {foretold} was said, {was} it is {report.error[:120]}")
        if report.error and report.runs:
            self.unforeseen.append(name)
        for verdict in report.verdicts:
            if verdict.agrees is False:
                self.wrong[f"{verdict.op}: {verdict.kind}, {verdict.happened}"] += 1


def ask_of(place: Place, target: Target, paths: list[Path]) -> Iterator[CheckReport]:
    for start in range(0, len(paths), AT_ONCE):
        part = paths[start : start + AT_ONCE]
        graphs = [g.load(path) for path in part]
        jobs = [
            Job(g.to_proto(graph), threads=1, optimized=place.name == "cpu") for graph in graphs
        ]
        for path, graph, answer in zip(part, graphs, ask(place, jobs, patience=120), strict=True):
            found = judge(graph, target)
            report = CheckReport(str(path), target.name, place.provider, found)
            compare(report, graph, place, answer)
            yield report


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="scripts/benchmark verdicts", description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--ep", action="append", default=[], metavar="EP[@PYTHON]")
    parser.add_argument("--keep", type=Path, required=True, help="where models are made, or are")
    parser.add_argument("--no-make", action="store_true", help="only models that are there")
    parser.add_argument("--model", action="append", default=[], dest="models")
    parser.add_argument("--graphs", type=int, default=300, help="how many to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the generated graphs")
    parser.add_argument("--json", type=Path, help="run all, without graphs, and add lines to this")
    parser.add_argument("--samples", type=Path, help="a folder of MODEL.npz, for --json")
    options = parser.parse_args(arguments)
    options.keep.mkdir(parents=True, exist_ok=True)
    places = dict(place_of(text) for text in options.ep or ["cpu"])
    paths = [*every_model(options.shared, options.keep, options.models, not options.no_make)]
    if options.json:
        for line in matrix(paths, places, options.samples, options.json):
            wrong = "" if line.said == line.happened else f", and {line.said} was said"
            console.print(f"{line.model} {line.preset} {line.place}: {line.happened}{wrong}")
        return
    paths += generated(options.keep, options.graphs, options.seed)
    table = Table("provider", "models", "verdict right", "nodes", "verdict right", "unforeseen")
    for label, (place, target) in places.items():
        tally = Tally()
        console.print(f"{label}:")
        for report in ask_of(place, target, paths):
            tally.add(report)
        for what, times in tally.wrong.most_common(40):
            console.print(f"  {times} × {what}", soft_wrap=True)
        if tally.unforeseen:
            console.print(f"  did not load, unforeseen: {', '.join(tally.unforeseen)}")
        table.add_row(
            label, str(tally.models), f"{tally.models_right / max(tally.models, 1):.4f}",
            str(tally.nodes), f"{tally.right / max(tally.nodes, 1):.4f}",
            str(len(tally.unforeseen)),
        )  # fmt: skip
    console.print(table)
