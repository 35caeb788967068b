"""The page as one text: template, style, script, Vega and data."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.page import tuned, words
from onnxq.page.charts import CHARTS
from onnxq.page.compare import MOST, beside, differences
from onnxq.page.data import packed
from onnxq.page.runs import Run
from onnxq.tables import cosine, decibels, percent

LIMIT = 2_000_000  # bytes of a page
SPARE = 20_000  # of them for what is written around data
SCRIPTS = ("charts.js", "table.js", "layer.js", "page.js")
LIBRARIES = {"vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def require_libraries() -> None:
    """Raises OnnxqError where what makes the page is not installed."""
    missing = [package for module, package in LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise OnnxqError(
            f"a report page is made with {' and '.join(missing)}: pip install 'onnxq[report]'; "
            "or give --report a FILE.json"
        )


def page(runs: list[Run]) -> str:
    """The HTML page of a run, or of several to compare; below LIMIT bytes."""
    require_libraries()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    assets = Environment(
        loader=PackageLoader("onnxq.page", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    parts = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        "runs": [_view(run, number) for number, run in enumerate(runs)],
        "beside": beside(runs) if len(runs) > 1 else [],
        "differences": differences(runs)[:MOST] if len(runs) > 1 else [],
        "style": _asset("page.css"),
        "script": "\n".join(map(_asset, SCRIPTS)),
        "vega": _vega(),
        "licence": _asset("vega-licence.txt"),
    }
    template = assets.get_template("page.html.j2")
    empty = len(template.render(parts, data="").encode())
    return template.render(parts, data=packed(runs, CHARTS, LIMIT - SPARE - empty))


def _view(run: Run, number: int) -> dict[str, Any]:
    """What the template shows of a run."""
    report = run.report
    view: dict[str, Any] = {
        "id": f"run{number}",
        "name": run.name,
        "verdict": words.verdict(run),
        "warnings": run.warnings,
        "environment": run.environment,
        "tuning": run.tuning,
        "effects": run.effects,
        "candidates": tuned.candidates(run.tuning),
        "sensitivity": tuned.sensitivity(run),
        "report": report,
    }
    if report is None:
        return view
    return view | {
        "figures": words.figures(report),
        "outputs": [
            {
                "name": output.name,
                "cosine": cosine(output.cosine),
                "sqnr": decibels(output.sqnr_db),
                "agreement": percent(output.agreement),
            }
            for output in report.outputs
        ],
        "agreement": any(output.agreement is not None for output in report.outputs),
        "compared": words.compared_on(report),
        "worst": words.worst_layers(report),
        "left": words.left_float(report),
        "providers": words.providers(report),
        "groups": [
            {
                "name": group.group,
                "output": group.output,
                "samples": group.samples,
                "drop": percent(group.drop),
                "sqnr": decibels(group.sqnr_db),
                "stands_out": group.stands_out,
            }
            for group in report.groups
        ],
        "findings": sum(bool(record.finding) for record in report.ranges),
        "calibrated": any(record.calibration_low is not None for record in report.ranges),
        "ranges": words.ranges(report),
        "parameters": percent(report.share("parameters")),
        "macs": percent(report.share("macs")),
    }


@cache
def _vega() -> str:
    """Vega's source, which ends no script element and leaves nothing behind but `vegaEmbed`."""
    import vl_convert

    source = str(vl_convert.javascript_bundle(snippet="window.vegaEmbed = vegaEmbed;"))
    return f"(() => {{{source}}})();".replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return (resources.files("onnxq.page") / "assets" / name).read_text("utf-8")
