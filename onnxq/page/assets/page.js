// Unpacks the data, fills the charts that stand in the page, wires the controls.
let page;

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Charts in a closed <details> have no width yet: they are drawn when it opens.
function standing(within) {
  const charts = [];
  for (const element of within.querySelectorAll(".chart[data-chart]")) {
    const closed = element.closest("details:not([open])");
    if (closed || drawn.has(element)) continue;
    const number = Number(element.dataset.run);
    const rows = { front: "front", losses: "losses", named: "providers", ranges: "ranges", codes: "ranges" };
    const data = number < 0 ? page.lines : page.runs[number][rows[element.dataset.chart]];
    const fitted = (spec) => {
      if (element.dataset.of) spec.encoding.y.title = element.dataset.of;
      const named = new Set(data.map((row) => row[spec.layer ? "tensor" : "name"]));
      if (element.dataset.chart in { ranges: 1, codes: 1, named: 1 }) spec.height *= named.size;
    };
    if (data.length) charts.push(draw(element, element.dataset.chart, { rows: data }, fitted));
    else element.parentElement.hidden = true;
  }
  return Promise.all(charts);
}

async function start() {
  page = await unpacked(document.getElementById("data").textContent);
  const first = page.runs.findIndex((one) => one.layers.length);
  if (first >= 0) {
    document.getElementById("explorer").hidden = false;
    const listed = page.runs.map((one, n) => [one, n]).filter(([one]) => one.layers.length);
    controls.run.replaceChildren(...listed.map(([one, n]) => new Option(one.name, n)));
    document.getElementById("run-choice").hidden = listed.length < 2;
    await chooseRun(first);
  }
  await standing(document);
  document.documentElement.dataset.readyAfter = performance.now();
  document.documentElement.dataset.ready = "yes";
}

controls.onsubmit = (event) => event.preventDefault();
controls.run.onchange = () => chooseRun(Number(controls.run.value));
for (const name of ["op", "form", "measure", "colour", "order"]) controls[name].onchange = update;
let typed;
controls.search.oninput = () => {
  clearTimeout(typed);
  typed = setTimeout(update, 120);
};
document.getElementById("more").onclick = () => {
  const from = state.most;
  state.most += 10 * STEP;
  rows();
  table.tBodies[0].rows[from]?.querySelector("button")?.focus();
};
for (const details of document.querySelectorAll("details")) details.ontoggle = () => details.open && standing(details);
for (const button of document.querySelectorAll("[data-copy]")) {
  button.onclick = async () => {
    const source = document.getElementById(button.dataset.copy);
    const status = button.parentElement.querySelector("[role=status]");
    try {
      await navigator.clipboard.writeText(source.textContent);
      status.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source); // not every browser lets a page write to the clipboard
      status.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
  };
}
// What is wider than its place scrolls by keyboard too; what is not is no stop on the way.
const watched = new ResizeObserver((seen) => {
  for (const { target } of seen) {
    const scrolls = target.scrollWidth > target.clientWidth;
    const named = { tabindex: 0, role: "group", "aria-label": target.querySelector("caption").textContent };
    for (const [name, value] of Object.entries(named)) {
      if (scrolls) target.setAttribute(name, value);
      else target.removeAttribute(name);
    }
  }
});
document.querySelectorAll(".wide").forEach((one) => watched.observe(one));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
setTimeout(start); // after the first paint
