// A model in ONNX Runtime Web: loaded, run and timed.

import { fromNpy } from "./npy.js";

export async function bytes(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

// `data` lists the files beside the model that hold its weights: [{path, url}].
export async function load(ort, url, options, data = []) {
  const model = new Uint8Array(await bytes(url));
  const externalData = [];
  for (const file of data) {
    externalData.push({ path: file.path, data: new Uint8Array(await bytes(file.url)) });
  }
  return ort.InferenceSession.create(model, { ...options, externalData });
}

// {input's name: address of a .npy file} -> {input's name: tensor}
export async function feed(ort, urls) {
  const feeds = {};
  for (const [name, url] of Object.entries(urls)) feeds[name] = fromNpy(ort, await bytes(url));
  return feeds;
}

// Milliseconds of each run, five at least, after one that is not counted.
export async function latencies(session, feeds, seconds) {
  await session.run(feeds);
  const times = [];
  const begin = performance.now();
  while (times.length < 5 || (times.length < 200 && performance.now() - begin < 1e3 * seconds)) {
    const start = performance.now();
    await session.run(feeds);
    times.push(performance.now() - start);
  }
  return times;
}
