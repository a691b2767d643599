# SPDX-License-Identifier: Apache-2.0
"""Embeds texts with sentence-transformers and ONNX Runtime. A JSON line for each text.

    python convert_weights.py FOLDER OUT --onnx --int8 --task feature-extraction
    python examples/sentence_transformers_onnx.py OUT "a text" "another"
    python examples/sentence_transformers_onnx.py OUT "a text" --file model_quantized.onnx

OUT has no PyTorch weights and needs no trust_remote_code. The environment:

    pip install torch sentence-transformers optimum-onnx onnxruntime \\
        -c constraints/clients/optimum.txt
"""

import argparse
import json

from sentence_transformers import SentenceTransformer

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder")
parser.add_argument("texts", nargs="+")
parser.add_argument("--file", default="model.onnx", help="of the folder's onnx/")
args = parser.parse_args()

encoder = SentenceTransformer(args.folder, backend="onnx", model_kwargs={"file_name": args.file})
embeddings = encoder.encode(args.texts, normalize_embeddings=True)
for text, embedding in zip(args.texts, embeddings, strict=True):
    print(json.dumps({"text": text, "embedding": embedding.tolist()}))
