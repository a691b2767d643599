# SPDX-License-Identifier: Apache-2.0
"""Fills masks with transformers' own pipeline and ONNX Runtime, by optimum. A JSON line for each
text.

    python convert_weights.py FOLDER OUT --onnx --int8
    python examples/optimum_onnx.py OUT "The function returns the [MASK] of the list."
    python examples/optimum_onnx.py OUT "a [MASK] text" --file model_quantized.onnx

The environment:

    pip install torch optimum-onnx onnxruntime -c constraints/clients/optimum.txt
"""

import argparse
import json

from optimum.onnxruntime import ORTModelForMaskedLM
from transformers import AutoTokenizer, pipeline

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder")
parser.add_argument("texts", nargs="+", help="each with one [MASK]")
parser.add_argument("--file", default="model.onnx", help="of the folder's onnx/")
args = parser.parse_args()

model = ORTModelForMaskedLM.from_pretrained(args.folder, file_name=args.file)
tokenizer = AutoTokenizer.from_pretrained(args.folder)
fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
for text in args.texts:
    guesses = [{"token": x["token_str"], "score": x["score"]} for x in fill_mask(text)]
    print(json.dumps({"text": text, "guesses": guesses}))
