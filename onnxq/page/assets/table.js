// The layers of a run: filtered, ordered, as bars and as a table.
const STEP = 100; // rows that are shown at a time
const CAP = 100; // dB that a bar is long at most: equal outputs have no finite ratio

const REPORTED = {
  measures: { share: "error share", sqnr: "SQNR" },
  titles: { share: "share of the error at the outputs, %", sqnr: "SQNR, dB; lower is worse" },
  columns: [
    ["place", "#", "number"], ["name", "layer", ""], ["op", "operator", "optional"], ["form", "format", "form optional"],
    ["parameters", "parameters", "number optional"], ["macs", "MACs", "number optional"],
    ["sqnr", "SQNR", "number"], ["share", "error", "number"],
  ],
};
const EFFECTS = {
  measures: { alone: "it alone quantized", spared: "all but it quantized" },
  titles: { alone: "distance to float when it alone is quantized", spared: "distance to float when all but it are" },
  columns: [
    ["place", "#", "number"], ["name", "layer", ""], ["op", "operator", ""], ["form", "format", "form"],
    ["alone", "it alone quantized", "number"], ["spared", "all but it", "number"],
  ],
};

// Compares layers, the one first that `key` says is worse; those without a figure are last.
const worse = (key) => (a, b) => {
  const low = key === "sqnr" || key === "spared"; // what is worse the lower it is
  const of = (layer) => (layer[key] ?? null) === null ? Infinity : low ? layer[key] : -layer[key];
  return of(a) === of(b) ? a.place - b.place : of(a) - of(b);
};

const state = { run: 0, sort: "place", down: false, most: STEP, shown: [] };
const controls = document.getElementById("controls");
const table = document.getElementById("table");
const run = () => page.runs[state.run];
const kind = () => ("alone" in (run().layers[0] ?? {}) ? EFFECTS : REPORTED);

// Those that any layer has something in.
const columns = () => kind().columns.filter(([key]) => run().layers.some((layer) => layer[key] || layer[key] === 0));

const CELLS = {
  parameters: (layer) => quantity(layer.parameters),
  macs: (layer) => quantity(layer.macs),
  sqnr: (layer) => decibels(layer.sqnr),
  share: (layer) => percent(layer.share),
  alone: (layer) => distance(layer.alone),
  spared: (layer) => distance(layer.spared),
};
const distance = (value) => (value === null ? "–" : `${number(value)} ${run().unit}`.trim());

function chooseRun(number) {
  state.run = number;
  run().layers.forEach((layer, n) => (layer.place = n + 1));
  options(controls.op, "all", new Set(run().layers.map((l) => l.op)));
  options(controls.form, "all", new Set(run().layers.map((l) => l.form)));
  controls.measure.replaceChildren(...Object.entries(kind().measures).map(([key, text]) => new Option(text, key)));
  heads();
  const left = run().layers.filter((l) => l.sqnr !== null && l.form !== "float").length - run().detailed;
  const note = document.getElementById("undetailed");
  note.hidden = !(left > 0 && "share" in (run().layers[0] ?? {}));
  note.textContent = `To keep the page small, the ${left} layers that do least go without histograms.`;
  return update();
}

function options(select, all, values) {
  select.replaceChildren(new Option(all, ""), ...[...values].sort().map((value) => new Option(value, value)));
}

function heads() {
  const row = make("tr", {});
  for (const [key, title, name] of columns()) {
    const cell = make("th", { scope: "col", className: name }, row);
    const button = make("button", { type: "button", textContent: title }, cell);
    button.onclick = () => {
      state.down = state.sort === key ? !state.down : name.startsWith("number") && key !== "place" && key !== "sqnr";
      state.sort = key;
      rows();
    };
    cell.dataset.key = key;
  }
  table.tHead.replaceChildren(row);
}

function update() {
  const wanted = controls.search.value.toLowerCase();
  state.shown = run().layers.filter(
    (layer) =>
      (!controls.op.value || layer.op === controls.op.value) &&
      (!controls.form.value || layer.form === controls.form.value) &&
      (!wanted || layer.name.toLowerCase().includes(wanted)),
  );
  const worst = controls.order.value === "worst";
  if (worst) state.shown.sort(worse(controls.measure.value));
  state.sort = worst ? "" : "place";
  state.down = false;
  state.most = STEP;
  rows();
  return bars();
}

// The layers that were measured, a bar each; a small one is drawn over a large one.
function bars() {
  const key = controls.measure.value;
  const scale = key === "share" ? 100 : 1;
  const measured = state.shown.filter((layer) => layer[key] !== null && layer[key] !== undefined);
  const colours = named(measured.map((layer) => layer[controls.colour.value]));
  const all = measured.map((layer, n) => ({
    layer: layer.place - 1, first: n + 0.55, last: n + 1.45, value: Math.min(scale * layer[key], key === "sqnr" ? CAP : Infinity),
    group: colours(layer[controls.colour.value]),
  }));
  const many = state.shown.length !== run().layers.length ? ` of ${run().layers.length}` : "";
  document.getElementById("count").textContent =
    `${state.shown.length}${many} layers, of which ${measured.length} have a measured error.`;
  const element = document.getElementById("bars");
  element.parentElement.hidden = !measured.length;
  if (!measured.length) return undefined;
  const text = kind().titles[key];
  const order = controls.order.value ? "layers by #, the worst first" : "layers by #, in the order of the model";
  all.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const places = measured.map((layer) => layer.place);
  const worst = [...measured].sort(worse(key)).slice(0, 3).map((layer) => `${layer.name} ${CELLS[key](layer)}`);
  element.ariaLabel = `Bars of ${measured.length} layers: ${text}. The worst: ${worst.join(", ")}. The table below has all, and opens them.`;
  const titled = (spec) => {
    spec.encoding.y.title = text;
    spec.encoding.x.title = order;
    spec.encoding.x.axis.labelExpr = `${JSON.stringify(places)}[datum.value - 1] || ""`;
  };
  return draw(element, "bars", { rows: all }, titled).then((view) => {
    view.addEventListener("mouseover", (_, item) => read(item?.datum));
    view.addEventListener("click", (_, item) => item?.datum?.layer !== undefined && openLayer(item.datum.layer));
  });
}

// The most frequent names keep theirs, as many as there are colours; the rest are "other".
function named(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const kept = new Set([...counts].sort((a, b) => b[1] - a[1]).slice(0, counts.size > 8 ? 7 : 8).map(([value]) => value));
  return (value) => (kept.has(value) ? value : "other");
}

function read(datum) {
  if (datum?.layer === undefined) return;
  const layer = run().layers[datum.layer];
  const figures = kind() === EFFECTS ? `${distance(layer.alone)} alone` : `SQNR ${decibels(layer.sqnr)}, ${percent(layer.share)} of the error`;
  document.getElementById("readout").textContent = `${layer.place}. ${layer.name}: ${layer.op}, ${layer.form}, ${figures}`;
}

function rows() {
  const key = state.sort;
  if (key) {
    const sign = state.down ? -1 : 1;
    const last = state.down ? -Infinity : Infinity;
    const of = (layer) => layer[key] ?? last;
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b || 0);
    state.shown.sort((a, b) => sign * compare(of(a), of(b)));
  }
  for (const cell of table.tHead.rows[0].cells) {
    cell.ariaSort = cell.dataset.key === key ? (state.down ? "descending" : "ascending") : "none";
  }
  table.tBodies[0].replaceChildren(...state.shown.slice(0, state.most).map(line));
  const left = state.shown.length - state.most;
  const more = document.getElementById("more");
  more.hidden = left <= 0;
  more.textContent = `Show ${Math.min(left, 10 * STEP)} more of ${left}`;
}

function line(layer) {
  const row = document.createElement("tr");
  for (const [key, , name] of columns()) {
    const cell = make(key === "name" ? "th" : "td", { className: name }, row);
    if (key === "name") {
      cell.scope = "row";
      const button = make("button", { type: "button" }, cell);
      for (const part of layer.name.split(/(?<=[./_])/)) button.append(part, document.createElement("wbr"));
      button.setAttribute("aria-haspopup", "dialog");
      button.onclick = () => openLayer(layer.place - 1);
    } else {
      cell.textContent = CELLS[key]?.(layer) ?? layer[key];
      if (key === "share" && layer.share !== null) {
        const meter = make("meter", { value: layer.share, max: 1 });
        meter.setAttribute("aria-hidden", "true");
        cell.append(" ", meter);
      }
    }
  }
  return row;
}
