# SPDX-License-Identifier: Apache-2.0
"""Saves a trained layer's q, k and v for attention.py: how many tiles the kernel can
skip depends on their norms, which N(0, 1) does not have.

    python benchmarks/kernel/layer_qkv.py runs/demo --text corpus.txt --output layer.pt

Reads the text in rows of --seqlen tokens, without masks, and writes (tokens, 3, heads, head_dim) in
bfloat16. The last line is JSON: shape, and the largest norms of q and k.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from einops import rearrange
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mosaic_tools.family import check_loaded


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a trained model")
    parser.add_argument("--text", required=True, help="a document a line")
    parser.add_argument("--layer", type=int, help="None: the middle one")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--output", default="layer.pt")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    model, loaded = AutoModel.from_pretrained(
        args.folder, trust_remote_code=True, add_pooling_layer=False, output_loading_info=True
    )
    check_loaded(args.folder, model, loaded, other_head=True)
    with open(args.text) as file:
        documents = (tokenizer(line)["input_ids"] for line in file)
        ids = list(itertools.islice(itertools.chain.from_iterable(documents), args.tokens))
    rows = torch.tensor(ids[: len(ids) // args.seqlen * args.seqlen]).view(-1, args.seqlen)
    layers, outputs = model.encoder.layer, []
    layer = layers[len(layers) // 2 if args.layer is None else args.layer].attention.self
    layer.Wqkv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        for row in rows.split(8):
            model(row)
    qkv = rearrange(
        torch.cat(outputs).bfloat16(),
        "total (qkv heads head_dim) -> total qkv heads head_dim",
        qkv=3,
        heads=layer.heads,
    )
    torch.save(qkv, args.output)
    q_norm, k_norm, _ = qkv.float().norm(dim=-1).amax((0, 2)).tolist()
    print(json.dumps({"shape": list(qkv.shape), "largest |q|": q_norm, "largest |k|": k_norm}))


if __name__ == "__main__":
    main()
