// One layer: what it became and why, its numbers and what codes hold of them, its neighbours.
const dialog = document.getElementById("layer");
const body = document.getElementById("layer-body");

function openLayer(index) {
  const layer = run().layers[index];
  dialog.dataset.place = layer.place;
  document.getElementById("layer-name").textContent = layer.name;
  body.replaceChildren();
  if (!dialog.open) dialog.showModal();
  document.getElementById("layer-name").focus();
  dialog.scrollTop = 0;
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    const other = state.shown[state.shown.indexOf(layer) + step];
    const button = document.getElementById(id);
    button.disabled = !other || !state.shown.includes(layer);
    button.onclick = () => openLayer(other.place - 1);
  }
  facts(layer);
  const charts = make("div", { className: "pair" }, body);
  const weights = layer.weights ?? [];
  for (const one of weights) weight(one, weights.length > 1 ? ` ${one.name}` : "", charts);
  const tensors = [...(layer.inputs ?? []).map((name) => ["Input", name]), ["Output", layer.output]];
  const shown = tensors.filter(([what, name]) => tensor(what, name, charts));
  if (!weights.length && !shown.length && kind() === REPORTED) {
    make("p", { className: "quiet", textContent: missing(layer) }, body);
  }
  neighbours("Before it", layer.before);
  neighbours("After it", layer.after);
}

function missing(layer) {
  if (layer.form === "float") return "It stays float: there are no codes to show.";
  return "This run recorded no histograms of the layer; onnxq quantize --report does.";
}

function facts(layer) {
  if (layer.why && layer.why !== layer.form) make("p", { textContent: sentence(layer.why) }, body);
  const list = make("dl", { className: "facts" }, body);
  const rows = [["Operator", layer.op], ["Format", layer.full ?? layer.form]];
  if (kind() === EFFECTS) rows.push(["It alone quantized", distance(layer.alone)], ["All but it", distance(layer.spared)]);
  else {
    const ranked = run().layers.filter((l) => l.share !== null).sort(worse("share"));
    const rank = ranked.indexOf(layer) + 1;
    rows.push(["Parameters", quantity(layer.parameters)], ["Multiply-accumulates", quantity(layer.macs)]);
    rows.push(["SQNR of its own output", decibels(layer.sqnr)]);
    rows.push(["Share of the output error", rank ? `${percent(layer.share)}, rank ${rank} of ${ranked.length}` : "–"]);
  }
  for (const [name, text] of rows.filter((row) => row[1] !== "–")) {
    const pair = make("div", {}, list);
    make("dt", { textContent: name }, pair);
    make("dd", { textContent: text }, pair);
  }
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function weight(weight, name, parent) {
  const range = weight.low === null ? null : [weight.low, weight.high];
  const clips = range ? ` Codes hold ${number(range[0])} to ${number(range[1])} at most; ${percent(weight.clipped)} of the weights lie outside those of their channel.` : "";
  const text = `Float weights from ${number(weight.values.low)} to ${number(weight.values.high)}.${clips}`;
  histogram(parent, `Weights${name}`, weight.values, range, text, "weight");
  if (weight.scales.length > 1) scales(parent, `Scale per channel${name}`, weight.scales, weight.channels);
}

const between = ([low, high]) => `${number(low)} to ${number(high)}`;

// Whether anything is known of the tensor.
function tensor(what, name, parent) {
  const found = run().tensors[name];
  if (!found) return false;
  const range = [found.low, found.high];
  const calibrated = found.calibration[0] !== null;
  const text =
    `${name}: codes hold ${between(range)};${calibrated ? ` calibration showed ${between(found.calibration)},` : ""} ` +
    `validation${calibrated ? "" : " showed"} ${between(found.validation)}; ${percent(found.clipped)} of the values clip.`;
  if (found.values) histogram(parent, `${what} in validation`, found.values, range, text, "activation");
  else make("p", { textContent: `${what} ${text}` }, parent);
  return true;
}

function neighbours(title, names) {
  if (!names?.length) return;
  make("h3", { textContent: title }, body);
  const list = make("ul", { className: "names" }, body);
  for (const name of names) {
    const index = run().layers.findIndex((layer) => layer.name === name);
    const item = make("li", {}, list);
    if (index < 0) item.textContent = name;
    else {
      const layer = run().layers[index];
      make("button", { type: "button", textContent: name, onclick: () => openLayer(index) }, item);
      item.append(` ${layer.op}, ${layer.form}`);
    }
  }
}

document.getElementById("close").onclick = () => dialog.close();
dialog.onclick = (event) => event.target === dialog && dialog.close();
