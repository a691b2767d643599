// SPDX-License-Identifier: Apache-2.0
// Fills masks with transformers.js in Node. A JSON line for each text.
//
//   python convert_weights.py FOLDER OUT --onnx --int8
//   (cd examples && npm install --ignore-scripts --no-package-lock)
//   node examples/node/fill_mask.mjs OUT "The function returns the [MASK] of the list."
//   node examples/node/fill_mask.mjs OUT "a [MASK] text" --dtype q8

import { basename, dirname, resolve } from "node:path";
import { parseArgs } from "node:util";

import { env, pipeline } from "@huggingface/transformers";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  // fp32 reads onnx/model.onnx, q8 onnx/model_quantized.onnx.
  options: { dtype: { type: "string", default: "fp32" } },
});
const [folder, ...texts] = positionals;
if (texts.length === 0) {
  console.error("usage: node fill_mask.mjs FOLDER TEXT ... [--dtype fp32|q8]");
  process.exit(2);
}

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const fillMask = await pipeline("fill-mask", basename(resolve(folder)), values);
for (const text of texts) {
  const found = await fillMask(text, { top_k: 5 });
  const guesses = found.map((x) => ({ token: x.token_str, score: x.score }));
  console.log(JSON.stringify({ text, guesses }));
}
