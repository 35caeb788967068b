// Draws charts: Vega-Lite's specifications come with the data, colours from the style sheet.
const drawn = new Map(); // element → its chart, or the promise of it

// Draws a chart of `kind` in `element` with `rows` and other named data; the view. One that stands
// there goes, but never while it is being drawn.
function draw(element, kind, data, change = () => {}) {
  const spec = structuredClone(page.charts[kind]);
  change(spec);
  spec.datasets = data;
  spec.config.legend.columns = Math.max(1, Math.floor(element.clientWidth / 170));
  const options = { renderer: "svg", actions: false, tooltip: false, defaultStyle: false };
  const before = drawn.get(element) ?? Promise.resolve();
  const made = before.then(async (old) => {
    old?.finalize();
    const inside = make("div", { ariaHidden: "true" }); // `element` has the words for it
    element.replaceChildren(inside);
    return vegaEmbed(inside, spec, options);
  });
  drawn.set(element, made);
  return made.then((chart) => chart.view);
}

function counted(values, range) {
  const width = (values.high - values.low) / values.counts.length || 1;
  return values.counts.map((count, bin) => {
    const low = values.low + bin * width;
    const middle = low + width / 2;
    return { low, high: low + width, count, outside: !!range && (middle < range[0] || middle > range[1]) };
  });
}

// Where values are that no code reaches.
function outside(values, [low, high]) {
  return [
    { low: values.low, high: Math.min(low, values.high) },
    { low: Math.max(high, values.low), high: values.high },
  ].filter((part) => part.low < part.high);
}

// A figure with a histogram of `values` and the `range` that codes hold.
function histogram(parent, heading, values, range, text, axis) {
  const figure = chartIn(parent, heading, text);
  const ends = range ? range.map((at) => ({ at })) : [];
  const beyond = range ? outside(values, range) : [];
  const rows = counted(values, range);
  const named = { rows, ends, beyond };
  const titled = (spec) => {
    spec.layer[1].encoding.x.title = axis;
    spec.layer = spec.layer.filter((part) => named[part.data?.name ?? "rows"].length); // Vega warns of none
  };
  return draw(figure, "histogram", named, titled);
}

function scales(parent, heading, scales, channels) {
  const each = channels / scales.length;
  const text = `Scales of ${channels} output channels${each > 1 ? `, the largest of ${Math.ceil(each)} neighbours each` : ""}.`;
  const rows = scales.map((scale, n) => ({ first: n * each, last: (n + 0.9) * each, scale }));
  return draw(chartIn(parent, heading, text), "scales", { rows });
}

function chartIn(parent, heading, text) {
  const figure = make("figure", {}, parent);
  make("h3", { textContent: heading }, figure);
  const chart = make("div", { className: "chart" }, figure);
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `${heading}. ${text}`);
  make("figcaption", { textContent: text }, figure);
  return chart;
}

function make(tag, properties, parent) {
  const element = Object.assign(document.createElement(tag), properties);
  parent?.append(element);
  return element;
}

const number = (value, digits = 3) => (value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString());
const percent = (share) => (share === null || share === undefined ? "–" : share && share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`);
const decibels = (value) => (value === null || value === undefined ? "–" : value >= 200 ? "exact" : `${value.toFixed(1)} dB`);
function quantity(value) {
  const power = value >= 1e9 ? 9 : value >= 1e6 ? 6 : value >= 1e3 ? 3 : 0;
  return value ? `${Number((value / 10 ** power).toPrecision(3))}${{ 0: "", 3: " k", 6: " M", 9: " G" }[power]}` : "–";
}
