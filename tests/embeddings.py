# SPDX-License-Identifier: Apache-2.0
"""What the tests of embeddings share: made-up pairs, and runs of train_embeddings.py in this
process."""

import sys
from pathlib import Path

from finetuning import SENTENCES, write_rows
from training import flags

import train_embeddings

# Each sentence, and the same without its size of book.
PAIRS = [{"query": x.rsplit(" ", 2)[0] + " thing", "passage": x} for x in SENTENCES[:12]]
SCORED = [
    {"sentence1": x, "sentence2": y, "score": len({*x.split()} & {*y.split()}) / 10}
    for x, y in zip(SENTENCES, SENTENCES[1:], strict=False)
]
RUN = {
    "max_seq_length": 16,
    "per_device_train_batch_size": 4,
    "mini_batch_size": 3,
    "learning_rate": 1e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": "false",
    "cpu_threads": 1,
}


def write_data(folder: Path) -> dict:
    """Files of pairs, as flags."""
    rows = {"train": PAIRS, "held_out": PAIRS[::2]}
    train, held_out = (write_rows(folder / f"{x}.jsonl", y) for x, y in rows.items())
    return {"train_file": train, "validation_file": held_out, "output_dir": folder / "out"}


def train(monkeypatch, *words, **values):
    """Runs the command with these flags."""
    argv = ["train_embeddings.py", *flags(**RUN | values), *map(str, words)]
    monkeypatch.setattr(sys, "argv", argv)
    train_embeddings.main()
