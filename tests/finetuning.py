# SPDX-License-Identifier: Apache-2.0
"""What the tests of fine-tuning share, as a plugin of pytest: tiny models, made-up rows, and two
finished runs that several modules look at."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import GOLDENS
from training import flags, read_json, write_vocab

import convert_weights
import finetune
from mosaic_tools.glue_tasks import TASKS
from mosaic_tools.tokenization import SPECIAL_TOKENS

AGES, READERS, SIZES = ("old", "young", "tall", "wise"), ("man", "woman", "child"), ("long", "new")
SENTENCES = [f"the {x} {y} reads a {z} book" for z in SIZES for y in READERS for x in AGES]
# Enough for a tiny model to learn a word by heart.
QUICK = {"learning_rate": 1e-3, "num_train_epochs": 8, "global_batch_size": 8, "cpu_threads": 1}

STOCK_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="session")
def vocab(tmp_path_factory):
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    return write_vocab(tmp_path_factory.mktemp("vocab") / "vocab.txt", *words, entries=160)


@pytest.fixture(scope="session")
def golden(tmp_path_factory, vocab):
    """A converted published checkpoint, of an MLM."""
    folder = tmp_path_factory.mktemp("golden") / "golden"
    convert_weights.main([str(GOLDENS / "mosaic_tiny"), str(folder), "--tokenizer", str(vocab)])
    return folder


@pytest.fixture(scope="session")
def stock(tmp_path_factory, vocab):
    """transformers' own BERT, which has learned positions, 16 of them."""
    folder = tmp_path_factory.mktemp("stock") / "stock"
    config = transformers.BertConfig(**STOCK_SIZES, max_position_embeddings=16)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(vocab)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def modern(tmp_path_factory, vocab):
    """transformers' ModernBERT, which has no token types, and a pre-trained layer before its
    classifier."""
    folder = tmp_path_factory.mktemp("modern") / "modern"
    config = transformers.ModernBertConfig(
        **STOCK_SIZES, max_position_embeddings=32, pad_token_id=0
    )
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    # Of a class that transformers 5 names otherwise than 4.
    backend = transformers.BertTokenizerFast(str(vocab)).backend_tokenizer
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS, strict=True))
    names = {f"{name}_token": token for name, token in names.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_own(folder: Path, rows: list[dict]) -> dict:
    """Files of one's own, as flags."""
    return {
        "train_file": write_rows(folder / "train.jsonl", rows),
        "validation_file": write_rows(folder / "dev.jsonl", rows[::3]),
        "output_dir": folder / "out",
    }


def by_age(name=str) -> list[dict]:
    """Sentences, and whether the reader is old."""
    return [{"text": x, "label": name("old" if " old " in x else "other")} for x in SENTENCES]


def write_glue(folder: Path) -> Path:
    """A folder with MNLI, RTE, CoLA and STS-B, as far as their layout goes."""
    for name in ("mnli", "rte", "cola", "stsb"):
        task = TASKS[name]
        rows = [
            {column: SENTENCES[i - j] for j, column in enumerate(task.columns)}
            | {"label": i % len(task.labels) if task.labels else i / 5, "idx": i}
            for i in range(12)
        ]
        for split in ("train", *(x.replace("validation", "dev") for x in task.validation.values())):
            write_rows(folder / name / f"{split}.jsonl", rows)
    return folder


def start(**values):
    finetune.main(flags(**values))


def result_of(folder: Path, name="own", seed=19) -> dict:
    return read_json(folder, name, f"seed-{seed}", "result.json")


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def classify(folder: Path, *texts):
    return transformers.pipeline("text-classification", model=str(folder), trust_remote_code=True)(
        *texts
    )


@pytest.fixture(scope="session")
def finetuned(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    start(model=golden, **QUICK, **write_own(folder, by_age()))
    return folder / "out"


@pytest.fixture(scope="session")
def glue(golden, tmp_path_factory):
    """Two seeds of four tasks, at learning rate 0: models keep the weights they start from."""
    cwd = tmp_path_factory.mktemp("glue")
    values = {"model": golden, "data_dir": write_glue(cwd / "data"), "output_dir": cwd / "out"}
    command = flags(**values, learning_rate=0, max_steps=1, cpu_threads=1)
    command += ["--save_all_seeds", "--seeds", "1", "2", "--task", "rte", "cola", "mnli", "stsb"]
    finetune.main(command)
    return SimpleNamespace(cwd=cwd, out=cwd / "out", command=command)
