# SPDX-License-Identifier: Apache-2.0
"""Embeds texts with fastembed, which needs neither PyTorch nor transformers. A JSON line for each
text.

    python convert_weights.py FOLDER OUT --onnx --int8 --task feature-extraction
    python examples/fastembed_custom.py OUT "a text" "another"
    python examples/fastembed_custom.py OUT "a text" --file onnx/model_quantized.onnx

The environment:

    pip install fastembed -c constraints/clients/fastembed.txt
"""

import argparse
import json
from pathlib import Path

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path)
parser.add_argument("texts", nargs="+")
parser.add_argument("--file", default="onnx/model.onnx")
args = parser.parse_args()

config = json.loads((args.folder / "config.json").read_text())
TextEmbedding.add_custom_model(
    model="mosaic-bert",
    pooling=PoolingType.MEAN,
    normalization=True,
    # fastembed asks for a place to download from. The local folder is what it reads.
    sources=ModelSource(hf="local/mosaic-bert"),
    dim=config["hidden_size"],
    model_file=args.file,
)
encoder = TextEmbedding("mosaic-bert", specific_model_path=str(args.folder))
for text, embedding in zip(args.texts, encoder.embed(args.texts), strict=True):
    print(json.dumps({"text": text, "embedding": embedding.tolist()}))
