# SPDX-License-Identifier: Apache-2.0
"""Compares what a client computed with the PyTorch model; `make test-clients` runs it after each.

    python tests/clients.py FOLDER OUTPUT
    python tests/clients.py FOLDER OUTPUT --quantized examples/models

OUTPUT has a JSON line for each text, as the scripts of examples/ print them: its embedding, of
length 1, or its guesses and their scores. FOLDER is what the client's ONNX files were made of.
Fails if 1 - a cosine, or a score, differs by more than 1e-5 from PyTorch's. With --quantized from
what ONNX Runtime computes here of the same 8-bit file: how far that is from PyTorch is printed, and
what it costs is for benchmarks/learning/quantized.py to say.
"""

import argparse
import json
import sys
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, logging

AT_MOST = 1e-5


def by_pytorch(folder: Path, auto_class, **kwargs):
    """A function from rows, as the tokenizer makes them, to the model's (rows, seqlen, size)."""
    model = auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()
    return torch.no_grad()(lambda rows: model(**rows)[0])


def by_onnx(folder: Path):
    """`by_pytorch` of the 8-bit file of an exported folder."""
    session = onnxruntime.InferenceSession(folder / "onnx" / "model_quantized.onnx")
    names = [x.name for x in session.get_inputs()]

    def run(rows):
        inputs = {name: rows[name].numpy() for name in names}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def embeddings(run, tokenizer, texts: list[str]) -> torch.Tensor:
    """(texts, dim) float32: means over all tokens, of length 1. All texts are computed at once, as
    clients do: the scale of 8 bits is that of all together."""
    rows = tokenizer(texts, return_tensors="pt", truncation=True, padding=True)
    real = rows["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((run(rows) * real).sum(1) / real.sum(1), dim=1)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - the least cosine of two rows."""
    # In float64, or a product of equal rows may differ from 1.
    return 1 - torch.cosine_similarity(found.double(), expected.double()).min().item()


def scores(run, tokenizer, text: str) -> torch.Tensor:
    """(vocab,) float32, for the text's mask."""
    row = tokenizer(text, return_tensors="pt")
    return run(row)[row["input_ids"].eq(tokenizer.mask_token_id)][0].softmax(-1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--quantized", type=Path, help="has embeddings/ and fill-mask/")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    embedded = [line for line in lines if "embedding" in line]
    guessed = [line for line in lines if "guesses" in line]
    differences = []
    if embedded:
        texts = [line["text"] for line in embedded]
        run = by_pytorch(args.folder, AutoModel, add_pooling_layer=False)
        found = torch.tensor([line["embedding"] for line in embedded])
        expected = embeddings(run, tokenizer, texts)
        others = (expected @ expected.T).fill_diagonal_(-1).max()
        print(
            f"{len(embedded)} embeddings: 1 - cosine to PyTorch's up to "
            f"{distance(found, expected):.1e}, largest difference "
            f"{(found - expected).abs().max():.1e}; cosines of different texts up to {others:.3f}"
        )
        if args.quantized:
            expected = embeddings(by_onnx(args.quantized / "embeddings"), tokenizer, texts)
        differences.append(distance(found, expected))
    for line in guessed:
        tokens = [x["token"] for x in line["guesses"]]
        ids = tokenizer.convert_tokens_to_ids(tokens)
        found = torch.tensor([x["score"] for x in line["guesses"]])
        run = by_pytorch(args.folder, AutoModelForMaskedLM)
        expected = scores(run, tokenizer, line["text"])
        best = [tokenizer.decode([i]).strip() for i in expected.topk(len(tokens)).indices]
        print(
            f"{len(tokens)} guesses: {' '.join(tokens)}; PyTorch's: {' '.join(best)}; "
            f"scores differ by up to {(found - expected[ids]).abs().max():.1e}"
        )
        if args.quantized:
            expected = scores(by_onnx(args.quantized / "fill-mask"), tokenizer, line["text"])
        differences.append((found - expected[ids]).abs().max().item())
    if not differences:
        sys.exit(f"{args.output} has no output")
    if args.quantized:
        print(f"from ONNX Runtime here: {', '.join(f'{x:.1e}' for x in differences)}")
    # Of nan neither is true.
    if wrong := [x for x in differences if not x <= AT_MOST]:
        sys.exit(f"{args.output}: {wrong} is more than {AT_MOST}")


if __name__ == "__main__":
    main()
