# SPDX-License-Identifier: Apache-2.0
"""Does a masked language model tell acceptable sentences from others, without fine-tuning?

Scores each sentence of CoLA by its pseudo-log-likelihood (Salazar et al. 2020): the mean, over its
tokens, of the log-probability of the token where it is masked. The area under the ROC curve is the
chance that an acceptable sentence scores above another: 0.5 says nothing.

    python benchmarks/learning/acceptability.py MODEL glue/cola/dev.jsonl

The last line is JSON, and goes to --output too: the area, with the number of sentences.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorWithPadding


@torch.inference_mode()
def score(model, tokenizer, sentences: list[str], rows: int = 256) -> list[float]:
    """Pseudo-log-likelihoods in nats a token, special tokens left out.

    Args:
        model: on the CPU, in evaluation mode.
        rows: that are computed at once, each a sentence with one token masked.
    """
    encoded = tokenizer(sentences, return_special_tokens_mask=True, truncation=True)
    places = [
        (i, j)
        for i, special in enumerate(encoded["special_tokens_mask"])
        for j, is_special in enumerate(special)
        if not is_special
    ]
    # Rows of like length lie together.
    places.sort(key=lambda place: len(encoded["input_ids"][place[0]]))
    pad, sums = DataCollatorWithPadding(tokenizer), torch.zeros(len(sentences), dtype=torch.float64)
    for at in range(0, len(places), rows):
        which, where = torch.tensor(places[at : at + rows]).T  # (rows,) each
        batch = pad([{"input_ids": list(encoded["input_ids"][i])} for i in which])
        row = torch.arange(len(which))
        hidden = batch["input_ids"][row, where]
        batch["input_ids"][row, where] = tokenizer.mask_token_id
        logits = model(**batch).logits[row, where]  # (rows, vocab)
        found = logits.double().log_softmax(-1)[row, hidden]
        sums.index_add_(0, which, found)
    return (sums / torch.tensor(places)[:, 0].bincount(minlength=len(sentences))).tolist()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("sentences", type=Path, help="a JSON object a line: sentence, label")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.sentences.read_text().splitlines()]
    model = AutoModelForMaskedLM.from_pretrained(args.model, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    scores = score(model, tokenizer, [row["sentence"] for row in rows])
    area = roc_auc_score([row["label"] for row in rows], scores)
    found = json.dumps({"auc": area, "sentences": len(rows)})
    if args.output:
        args.output.write_text(found)
    print(found)


if __name__ == "__main__":
    main()
