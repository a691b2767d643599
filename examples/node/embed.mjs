// SPDX-License-Identifier: Apache-2.0
// Embeds texts with transformers.js in Node. A JSON line for each text.
//
//   python convert_weights.py FOLDER OUT --onnx --int8 --task feature-extraction
//   (cd examples && npm install --ignore-scripts --no-package-lock)
//   node examples/node/embed.mjs OUT "a text" "another"
//   node examples/node/embed.mjs OUT "a text" --dtype q8

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
  console.error("usage: node embed.mjs FOLDER TEXT ... [--dtype fp32|q8]");
  process.exit(2);
}

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const extract = await pipeline("feature-extraction", basename(resolve(folder)), values);
const embeddings = await extract(texts, { pooling: "mean", normalize: true });
for (const [i, embedding] of embeddings.tolist().entries()) {
  console.log(JSON.stringify({ text: texts[i], embedding }));
}
