// Runs the jobs that web_worker.py hands out, one after another. The other end of devices/place.py.

import { feed, latencies, load } from "./model.js";
import { toNpy } from "./npy.js";

new EventSource("/alive"); // closes with the page, however it ends
const post = async (url, body) => (await fetch(url, { method: "POST", body })).json();

async function work(ort, job, answer) {
  answer.stage = "load";
  const begin = performance.now();
  const session = await load(ort, job.model, job.session, job.data);
  answer.load_ms = performance.now() - begin;
  answer.stage = "run";
  answer.outputs = session.outputNames;
  let feeds = {};
  for (const [number, urls] of job.samples.entries()) {
    feeds = await feed(ort, urls);
    const made = await session.run(feeds);
    for (const [index, name] of session.outputNames.entries()) {
      await post(`/${job.name}/output/${number}/${index}`, toNpy(made[name]));
    }
  }
  if (job.seconds && job.samples.length) {
    answer.latency_ms = await latencies(session, feeds, job.seconds);
  }
  await session.release();
  answer.stage = "";
}

async function runtime(job) {
  const ort = await import(job.runtime);
  ort.env.wasm.numThreads = job.threads;
  ort.env.wasm.wasmPaths = "/ort/";
  ort.env.logLevel = "fatal";
  if (job.threads > 1 && !crossOriginIsolated) throw new Error("this page gets no threads");
  return ort;
}

async function loadPageAgain() {
  location.reload();
  await new Promise(() => {}); // what follows is left to the new page
}

let threads;
for (let job; (job = await post("/next", "")); ) {
  if (threads && threads !== job.threads) await loadPageAgain(); // settled once for a page
  threads = job.threads;
  const answer = { version: "", providers: [job.provider], stage: "start" };
  try {
    const ort = await runtime(job);
    answer.version = ort.env.versions.web;
    await work(ort, job, answer);
  } catch (error) {
    answer.error = String(error?.message ?? error).split(/\s+/).join(" ");
  }
  await post(`/${job.name}/answer`, JSON.stringify(answer));
  if (answer.error) await loadPageAgain(); // a runtime that aborted runs nothing more
}
