# SPDX-License-Identifier: Apache-2.0
"""Compares what a client computed with the PyTorch model; `make test-clients` runs it after each.

    python tests/clients.py FOLDER OUTPUT --at-most 1e-5

OUTPUT has a JSON line for each text, as the scripts of examples/ print them: its embedding, of
length 1, or its guesses and their scores. FOLDER is what the client's ONNX files were made of.
Fails if 1 - a cosine, or a score, differs by more than asked for.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, logging


@torch.no_grad()
def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    """(texts, dim) float32: means over all tokens, of length 1. Each text is a row of its own."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = [tokenizer(text, return_tensors="pt", truncation=True) for text in texts]
    means = [model.eval()(**row).last_hidden_state[0].mean(0) for row in rows]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


@torch.no_grad()
def scores(folder: Path, text: str, tokens: list[str]) -> tuple[list[str], torch.Tensor]:
    """The likeliest tokens for the text's mask, as many as `tokens`, and the scores of `tokens`."""
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    row = tokenizer(text, return_tensors="pt")
    at = row["input_ids"][0].eq(tokenizer.mask_token_id)
    found = model.eval()(**row).logits[0, at][0].softmax(-1)
    best = [tokenizer.decode([i]).strip() for i in found.topk(len(tokens)).indices]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    return best, found[ids]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--at-most", type=float, required=True)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    embedded = [line for line in lines if "embedding" in line]
    guessed = [line for line in lines if "guesses" in line]
    worst = []
    if embedded:
        expected = embeddings(args.folder, [line["text"] for line in embedded])
        found = torch.tensor([line["embedding"] for line in embedded])
        # In float64, or a product of equal rows may differ from 1.
        distance = 1 - torch.cosine_similarity(found.double(), expected.double()).min().item()
        others = (expected @ expected.T).fill_diagonal_(-1).max()
        print(
            f"{len(embedded)} embeddings: 1 - cosine to PyTorch's up to {distance:.1e}, "
            f"largest difference {(found - expected).abs().max():.1e}; "
            f"cosines of different texts up to {others:.3f}"
        )
        worst.append(distance)
    for line in guessed:
        tokens = [x["token"] for x in line["guesses"]]
        best, expected = scores(args.folder, line["text"], tokens)
        difference = (torch.tensor([x["score"] for x in line["guesses"]]) - expected).abs().max()
        print(
            f"{len(tokens)} guesses: {' '.join(tokens)}; PyTorch's: {' '.join(best)}; "
            f"scores differ by up to {difference:.1e}"
        )
        worst.append(difference.item())
    if not worst:
        sys.exit(f"{args.output} has no output")
    # Of nan neither is true.
    if wrong := [x for x in worst if not x <= args.at_most]:
        sys.exit(f"{args.output}: {wrong} is more than {args.at_most}")


if __name__ == "__main__":
    main()
