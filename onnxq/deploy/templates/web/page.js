// The smoke test, in this browser: load the model, run the sample, compare, show.

import { bytes, feed, latencies } from "./model.js";
import { fromNpy } from "./npy.js";
import { makeSession } from "./session.js";

const report = new URLSearchParams(location.search).has("report");
if (report) new EventSource("/alive"); // closes with the page, however it ends
const at = (id) => document.getElementById(id);
const number = (x) => (x === 0 ? "0" : Number.isFinite(x) ? x.toPrecision(3) : "∞");

// Of any two numbers at the same place; infinite for another shape, type or place of NaN.
function largestDifference(got, wanted) {
  if (got.type !== wanted.type || String(got.dims) !== String(wanted.dims)) return Infinity;
  let largest = 0;
  for (let i = 0; i < wanted.data.length; i++) {
    const [a, b] = [Number(got.data[i]), Number(wanted.data[i])];
    if (Object.is(a, b) || a === b) continue;
    const difference = Math.abs(a - b);
    largest = Math.max(largest, Number.isNaN(difference) ? Infinity : difference);
  }
  return largest;
}

function row(cells, ok) {
  const line = at("outputs").insertRow();
  for (const text of cells) line.insertCell().textContent = text;
  const mark = line.insertCell();
  mark.textContent = ok ? "✓" : "✗";
  mark.className = ok ? "good" : "bad";
}

function verdict(passed, text) {
  document.body.dataset.verdict = passed ? "pass" : "fail";
  at("verdict").textContent = passed ? "PASS" : "FAIL";
  at("said").textContent = text;
}

async function test() {
  const smoke = await (await fetch("smoke/smoke.json")).json();
  const urls = (rows) => Object.fromEntries(rows.map((r) => [r.name, `smoke/${r.file}`]));
  const start = performance.now();
  const { ort, session } = await makeSession();
  at("load").textContent = `${(performance.now() - start).toFixed(0)} ms`;
  at("threads").textContent = String(crossOriginIsolated ? ort.env.wasm.numThreads || "auto" : 1);
  const feeds = await feed(ort, urls(smoke.inputs));
  const made = await session.run(feeds);
  const lines = [];
  let passed = true;
  for (const { name, file, tolerance } of smoke.outputs) {
    const difference = largestDifference(made[name], fromNpy(ort, await bytes(`smoke/${file}`)));
    const ok = difference <= tolerance;
    passed &&= ok;
    row([name, number(difference), number(tolerance)], ok);
    lines.push(
      `${name}: the largest difference is ${number(difference)}, ` +
        `up to ${number(tolerance)} is allowed`,
    );
  }
  const times = (await latencies(session, feeds, 1)).sort((a, b) => a - b);
  at("latency").textContent = `${times[times.length >> 1].toFixed(2)} ms`;
  verdict(passed, passed ? "This browser gives the expected answer." : "The answer is another.");
  return { passed, lines };
}

let result;
try {
  result = await test();
} catch (error) {
  const text = String(error?.message ?? error).split(/\s+/).join(" ");
  verdict(false, text);
  result = { passed: false, lines: [text] };
}
if (report) await fetch("/result", { method: "POST", body: JSON.stringify(result) });
