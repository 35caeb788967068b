"""The charts as Vega-Lite specifications; the page fills in the data, colours come from its CSS."""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]

ROW = 26  # height of one in charts with a row for each name; the page multiplies it
COLOURS = 8  # of the CSS, --c1 and on
CONFIG: Spec = {
    "background": None,
    "aria": False,  # a chart has one label, on its element
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--quiet)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
        "domainColor": "var(--edge)",
        "tickColor": "var(--edge)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 500,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "orient": "top",
        "direction": "horizontal",
        "labelLimit": 150,
        "symbolType": "square",
    },
    "range": {"category": [f"var(--c{n + 1})" for n in range(COLOURS)]},
}


def _field(name: str, title: str | None = None, **more: Any) -> Spec:
    return {"field": name, "type": "quantitative", "title": title, **more}


def _chart(height: int, **spec: Any) -> Spec:
    return {
        "width": "container",
        "height": height,
        "data": {"name": "rows"},
        "config": CONFIG,
        **spec,
    }


def _group(title: str | None = None, **more: Any) -> Spec:
    return {"field": "group", "type": "nominal", "title": title, **more}


_ZERO = {"datum": 0}
_WHOLE = {"tickMinStep": 1, "format": "d", "grid": False}
_POINTS = {"nice": False, "zero": False, "padding": 8}

# A bar per layer; `group` colours it, `first` to `last` is where it stands.
BARS = _chart(
    230,
    mark={"type": "rect", "strokeWidth": 0.75, "cursor": "pointer"},
    encoding={
        "x": _field("first", "layer", axis=_WHOLE, scale={"nice": False, "zero": False}),
        "x2": {"field": "last"},
        "y": _field("value", None),
        "y2": _ZERO,
        "color": _group(sort=None),
        "stroke": _group(sort=None),
    },
)

# Values in bins, where no code reaches in another colour and shaded; rules where codes end.
HISTOGRAM = _chart(
    150,
    layer=[
        {
            "data": {"name": "beyond"},
            "mark": {"type": "rect", "color": "var(--bad)", "opacity": 0.14},
            "encoding": {"x": _field("low", None), "x2": {"field": "high"}},
        },
        {
            "mark": "rect",
            "encoding": {
                "x": _field("low", None, scale={"nice": False, "zero": False}),
                "x2": {"field": "high"},
                "y": _field("count", "values, √", scale={"type": "sqrt"}, axis={"tickCount": 3,
                            "format": "~s"}),
                "y2": _ZERO,
                "color": {
                    "field": "outside",
                    "type": "nominal",
                    "legend": None,
                    "scale": {"domain": [False, True], "range": ["var(--c1)", "var(--bad)"]},
                },
            },
        },
        {
            "data": {"name": "ends"},
            "mark": {"type": "rule", "strokeWidth": 2, "color": "var(--ink)", "strokeDash": [4, 3]},
            "encoding": {"x": _field("at", None)},
        },
    ],
)  # fmt: skip

# A scale per output channel.
SCALES = _chart(
    120,
    mark={"type": "rect", "color": "var(--c3)"},
    encoding={
        "x": _field("first", "output channel", axis=_WHOLE, scale={"nice": False}),
        "x2": {"field": "last"},
        "y": _field("scale", "scale", axis={"format": ".1~e", "tickCount": 3}),
        "y2": _ZERO,
    },
)

# What codes hold, what calibration showed and what validation did, of each tensor.
_TENSOR = {
    "field": "tensor", "type": "nominal", "title": None, "sort": None,
    "axis": {"labelLimit": {"signal": "max(90, min(320, 0.28 * containerSize()[0]))"}},
}  # fmt: skip
_SPANS = {  # thickness, colour, outline
    "codes": (0.92, "var(--band)", "var(--edge)"),
    "calibration": (0.6, "var(--c1)", None),
    "validation": (0.24, "var(--c2)", None),
}


def _spans(*names: str) -> Spec:
    colours = {"domain": [*names], "range": [_SPANS[name][1] for name in names]}
    return _chart(
        ROW,
        layer=[
            {
                "transform": [{"filter": f"datum.group === {name!r}"}],
                "mark": {"type": "bar", "height": {"band": _SPANS[name][0]}, "opacity": 1,
                         "stroke": _SPANS[name][2]},
                "encoding": {
                    "y": _TENSOR,
                    "x": _field("low", "÷ the farthest code", axis={"tickCount": 6}),
                    "x2": {"field": "high"},
                    "color": _group(scale=colours),
                },
            }
            for name in names
        ],
    )  # fmt: skip


# What tuning tried: the lower left is best.
_KINDS = ["chosen", "on the front", "others", "float"]
_PLACE = {
    "x": _field(
        "ratio", "latency ÷ float", axis={"tickCount": 8}, scale={"zero": False, "padding": 14}
    ),
    "y": _field("drop", "drop, %", scale={"padding": 14}),
}
_SIZES = {
    "tickCount": 4,
    "labelExpr": "datum.value && format(datum.value, '~s')",
    "titleOrient": "left",
    "symbolType": "circle",
    "symbolFillColor": "var(--edge)",
}
FRONT = _chart(
    300,
    layer=[
        {
            "mark": {"type": "point", "filled": True, "opacity": 0.9},
            "encoding": {
                **_PLACE,
                "size": _field("size", "file, bytes", scale={"range": [40, 500]}, legend=_SIZES),
                "color": _group(
                    scale={
                        "domain": _KINDS,
                        "range": ["var(--c2)", "var(--c1)", "var(--edge)", "var(--ink)"],
                    }
                ),
                "shape": _group(
                    scale={"domain": _KINDS, "range": ["diamond", "circle", "circle", "cross"]}
                ),
            },
        },
        {
            "transform": [{"filter": "datum.group === 'chosen' || datum.group === 'float'"}],
            "mark": {
                "type": "text",
                "dy": -16,
                "fontSize": 12,
                "color": "var(--ink)",
                "stroke": "var(--paper)",
                "strokeWidth": 4,
            },
            "encoding": {**_PLACE, "text": {"field": "name"}},
        },
    ],
)

# One horizontal bar for each name.
NAMED = _chart(
    ROW,
    mark={"type": "bar", "height": {"band": 0.6}, "color": "var(--c1)"},
    encoding={
        "y": {"field": "name", "type": "nominal", "title": None, "sort": None,
              "axis": {"labelLimit": 140}},
        "x": _field("value", "median, ms", axis={"tickCount": 8}),
    },
)  # fmt: skip

# A line of points over the layers for each format.
LOSSES = _chart(
    260,
    mark={"type": "line", "point": {"filled": True, "size": 30}, "strokeWidth": 1},
    encoding={
        "x": _field("at", "layers, in order", axis=_WHOLE, scale=_POINTS),
        "y": _field("value", scale={"type": "sqrt"}, axis={"tickCount": 5, "format": "~g"}),
        "color": _group(sort=None),
    },
)

# A line of points over the layers for each run.
LINES = _chart(
    260,
    mark={"type": "line", "point": {"filled": True, "size": 30}, "strokeWidth": 1.5},
    encoding={
        "x": _field("at", "measured layers, in order", axis=_WHOLE, scale=_POINTS),
        "y": _field("value", "SQNR, dB", scale={"zero": False}),
        "color": _group(sort=None),
    },
)

CHARTS: dict[str, Spec] = {
    "bars": BARS,
    "histogram": HISTOGRAM,
    "scales": SCALES,
    "ranges": _spans("codes", "calibration", "validation"),
    "codes": _spans("codes", "validation"),
    "front": FRONT,
    "losses": LOSSES,
    "named": NAMED,
    "lines": LINES,
}
