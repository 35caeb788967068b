// How this model wants to be run in a page.

import { load } from "./model.js";

export const RUNTIME = new URL("$runtime", import.meta.url).href; // ONNX Runtime Web $version
const DATA = $data; // files beside the model that hold its weights

const OPTIONS = {
  executionProviders: ["wasm"],
  graphOptimizationLevel: "all",
  extra: $config,
};

export async function makeSession() {
  const ort = await import(RUNTIME + "ort.wasm.bundle.min.mjs");
  ort.env.wasm.wasmPaths = RUNTIME;
  ort.env.wasm.numThreads = crossOriginIsolated ? $threads : 1; // 0: the runtime chooses
  const data = DATA.map((path) => ({ path, url: new URL(path, import.meta.url).href }));
  const model = new URL("$model", import.meta.url).href;
  return { ort, session: await load(ort, model, OPTIONS, data) };
}
