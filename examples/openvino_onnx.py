# SPDX-License-Identifier: Apache-2.0
"""Embeds texts with OpenVINO, from the ONNX file as it is. A JSON line for each text.

    python convert_weights.py FOLDER OUT --onnx --task feature-extraction
    python examples/openvino_onnx.py OUT "a text" "another"

The environment:

    pip install openvino tokenizers -c constraints/clients/openvino.txt
"""

import argparse
import json
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path)
parser.add_argument("texts", nargs="+")
parser.add_argument("--file", default="onnx/model.onnx")
args = parser.parse_args()

tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
config = json.loads((args.folder / "config.json").read_text())
tokenizer.enable_truncation(config["max_position_embeddings"])
tokenizer.enable_padding(pad_id=config["pad_token_id"])
rows = tokenizer.encode_batch(args.texts)
inputs = {
    "input_ids": np.array([x.ids for x in rows]),
    "attention_mask": np.array([x.attention_mask for x in rows]),
    "token_type_ids": np.array([x.type_ids for x in rows]),
}
# Where a CPU has bfloat16, OpenVINO would compute in it.
precision = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.compile_model(args.folder / args.file, "CPU", precision)
hidden = model(inputs)["last_hidden_state"]

mask = inputs["attention_mask"][:, :, None]
embeddings = (hidden * mask).sum(1) / mask.sum(1)
embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
for text, embedding in zip(args.texts, embeddings, strict=True):
    print(json.dumps({"text": text, "embedding": embedding.tolist()}))
