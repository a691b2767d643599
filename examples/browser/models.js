// SPDX-License-Identifier: Apache-2.0
// The two models of the page, by transformers.js. Nothing is loaded from anywhere but the folder
// that is served: models/, and node_modules/ for the library and ONNX Runtime's WebAssembly.

import { env, pipeline } from "../node_modules/@huggingface/transformers/dist/transformers.min.js";

const FOLDERS = { "fill-mask": "fill-mask", "feature-extraction": "embeddings" };
const COMMAND = "python convert_weights.py FOLDER examples/models/";

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.localModelPath = new URL("../models/", import.meta.url).pathname;
// A kept copy would outlive a new export.
env.useBrowserCache = env.useWasmCache = false;
// These name a content network. The same files came with the library.
const runtime = new URL("../node_modules/onnxruntime-web/dist/", import.meta.url);
const { wasmPaths } = env.backends.onnx.wasm;
for (const [kind, address] of Object.entries(wasmPaths)) {
  wasmPaths[kind] = new URL(address.split("/").pop(), runtime).href;
}

const pipelines = new Map();

/** The task's pipeline, loaded once. `dtype`: fp32 or q8; `onProgress` gets per cents. */
function load(task, dtype, onProgress) {
  const key = `${task} ${dtype}`;
  if (!pipelines.has(key)) {
    const loading = pipeline(task, FOLDERS[task], {
      dtype,
      progress_callback: (x) => x.status === "progress_total" && onProgress?.(x.progress),
    }).catch((error) => {
      pipelines.delete(key);
      const flags = `--onnx --int8 --task ${task}`;
      throw /not found|404|locate/i.test(error.message)
        ? new Error(`There is no model: ${COMMAND}${FOLDERS[task]} ${flags}`, { cause: error })
        : error;
    });
    pipelines.set(key, loading);
  }
  return pipelines.get(key);
}

/** The five likeliest [{ token, score }] for the text's [MASK]. */
export async function fill(text, dtype = "q8", onProgress) {
  const fillMask = await load("fill-mask", dtype, onProgress);
  const mask = fillMask.tokenizer.mask_token;
  const masks = text.split(mask).length - 1;
  if (masks !== 1) {
    throw new Error(`The text has ${masks} ${mask}: write one.`);
  }
  const found = await fillMask(text, { top_k: 5 });
  return found.map((x) => ({ token: x.token_str, score: x.score }));
}

/** The texts' mean embeddings, each of length 1. */
export async function embed(texts, dtype = "q8", onProgress) {
  const extract = await load("feature-extraction", dtype, onProgress);
  return (await extract(texts, { pooling: "mean", normalize: true })).tolist();
}
