# SPDX-License-Identifier: Apache-2.0
"""Trained on texts of at most 256 tokens, does an embedding model find long documents better if it
reads more of them, and from which depth on?

Pre-trains a small MosaicBERT and transformers' BERT (512 positions) on rows of at most 512 tokens,
trains both contrastively on (sentence, passage before it) of at most 256 tokens with several seeds,
and lets them search documents that are read up to 256, 512, 1024, 2048 or 4096 tokens. The longest
articles are in neither training.

- Controlled: each document is passages of as many articles, 4096 tokens. At five depths begins a
  passage whose article is nowhere else; the query is the sentence after it in its article.
- Natural: an article, less the passages of about 100 tokens that its queries were drawn from.

Beside the whole text as one vector: its chunks of 256 tokens, by the mean of their vectors or by
the nearest of them, and BM25 (bm25s) on the same part of the text. BERT reads 512 tokens whole.

    pip install bm25s
    python benchmarks/learning/long_retrieval.py --articles wiki.train.txt.xz wiki.valid.txt

About two hours of one core. The same command again trains only what is not trained. Adds a record a
model and seed to long_retrieval.jsonl, draws long_retrieval.png, and prints nDCG@10 in tables. The
last line is JSON: by how much nDCG@10 rises from 256 to 4096 tokens, of each seed.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

import bm25s
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import set_verbosity_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.learning.long_retrieval_results import draw, print_tables
from benchmarks.learning.retrieval_texts import (
    DEPTHS,
    Task,
    controlled,
    natural,
    passages,
    read_articles,
    training_pairs,
)
from benchmarks.learning.side_by_side import run, train, words_of
from benchmarks.records import RESULTS, ROOT, environment
from mosaic_tools.tokenization import load_tokenizer

CHUNK = 256  # tokens, as in training
LENGTHS = tuple(DEPTHS.values())
ROW = 512  # of pre-training, BERT's positions
MODELS = {"mosaic_bert": LENGTHS, "bert": tuple(x for x in LENGTHS if x <= ROW)}


# ---- training ----


def write_texts(args, short: list[str]) -> Path:
    """A prepared folder for pre-training, and pairs.jsonl beside it."""
    folder = args.output_dir / "prepared"
    if not folder.exists():
        args.output_dir.mkdir(parents=True, exist_ok=True)
        text, pairs = args.output_dir / "short.txt", args.output_dir / "pairs.jsonl"
        # 300 words are about 450 tokens.
        rows = (" ".join(run) for x in short for run in passages(x, 300) or [[x]])
        text.write_text("\n".join(rows) + "\n")
        lines = map(json.dumps, training_pairs(short, Random(0)))
        pairs.write_text("\n".join(lines) + "\n")
        flags = {"train_file": text, "validation_split": 1, "max_seq_length": ROW}
        flags |= {"vocab_size": args.vocab_size, "prepared_data": folder}
        run({"texts": [ROOT / "prepare_data.py", *words_of(flags)]})
    return folder


def pretrain(args, prepared: Path):
    """Both encoders, side by side; the MLPs have as many weights in both, the rates are the best of
    learning.jsonl."""
    shared = {
        "prepared_data": prepared,
        "max_seq_length": ROW,
        "alibi_starting_size": ROW,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
        "attention_probs_dropout_prob": 0.0,
        "global_batch_size": 16,
        "per_device_train_batch_size": 16,
        "max_steps": args.steps,
        "logging_steps": max(1, args.steps // 20),
        "save_strategy": "no",
    }
    own = {
        "mosaic_bert": {"intermediate_size": 4 * args.hidden_size, "learning_rate": 2e-3},
        "bert": {
            "intermediate_size": 6 * args.hidden_size,
            "learning_rate": 1e-3,
            "model_type": "bert",
        },
    }
    missing = {x: shared | own[x] for x in MODELS if not is_trained(args.output_dir / x)}
    train(missing, args.output_dir)


def train_embeddings(args):
    """An embedding model of each encoder and seed."""
    commands = {}
    for seed in args.seeds:
        for name in MODELS:
            flags = {
                "model_name_or_path": args.output_dir / name,
                "train_file": args.output_dir / "pairs.jsonl",
                "validation_split": 2,
                "max_seq_length": CHUNK,
                "per_device_train_batch_size": args.batch,
                "learning_rate": 5e-4,
                "save_strategy": "no",
                "logging_steps": 5,
                "seed": seed,
                "output_dir": args.output_dir / f"{name}-{seed}",
                "disable_tqdm": "true",
                "cpu_threads": 1,
            }
            if not is_trained(flags["output_dir"]):
                commands[name, seed] = [ROOT / "train_embeddings.py", *words_of(flags)]
    run(commands)


def is_trained(folder: Path) -> bool:
    """A command that ended has written its card last."""
    return Path(folder, "README.md").is_file()


# ---- search ----


@torch.inference_mode()
def embed(model: SentenceTransformer, rows: list[list[int]], tokens: int = 8192) -> np.ndarray:
    """(rows, dim) unit vectors of rows of ids; equal rows are computed once."""
    distinct = sorted({tuple(row) for row in rows}, key=len)
    vectors, batch = {}, []
    for i, row in enumerate(distinct):
        batch.append(row)
        # Of padded rows, which grow.
        if i + 1 == len(distinct) or (len(batch) + 1) * len(distinct[i + 1]) > tokens:
            ids = {"input_ids": [list(x) for x in batch]}
            inputs = model.tokenizer.pad(ids, return_tensors="pt")
            found = model(dict(inputs.to(model.device)))["sentence_embedding"].float()
            found = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
            vectors.update(zip(batch, found, strict=True))
            batch = []
    return np.stack([vectors[tuple(row)] for row in rows])


def cut(tokenizer, texts: list[str], length: int, **options):
    return tokenizer(texts, truncation=True, max_length=length, **options)


def search(model: SentenceTransformer, task: Task, whole: tuple[int, ...]):
    """((method, length), (queries, documents) similarities), where `whole` are the lengths that the
    model reads at once."""
    tokenizer = model.tokenizer
    queries = embed(model, cut(tokenizer, task.queries, CHUNK)["input_ids"])
    for length in whole:
        documents = embed(model, cut(tokenizer, task.documents, length)["input_ids"])
        yield ("whole", length), queries @ documents.T
    chunks = cut(tokenizer, task.documents, CHUNK, return_overflowing_tokens=True)
    owner = np.array(chunks["overflow_to_sample_mapping"])
    number = np.arange(len(owner)) - np.searchsorted(owner, owner)
    vectors = embed(model, chunks["input_ids"])
    starts = np.searchsorted(owner, np.arange(len(task.documents)))
    for length in LENGTHS[1:]:
        read = number < length // CHUNK
        # (queries, chunks), and those that are not read have no part.
        similar = np.where(read, queries @ vectors.T, -np.inf)
        yield ("chunks, nearest", length), np.maximum.reduceat(similar, starts, axis=1)
        means = np.add.reduceat(vectors * read[:, None], starts)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        yield ("chunks, mean", length), queries @ means.T


def search_words(tokenizer, task: Task):
    """As `search`, by BM25 of the part of the text that so many tokens are."""
    queries = bm25s.tokenize(task.queries, show_progress=False, return_ids=False)
    for length in LENGTHS:
        offsets = cut(tokenizer, task.documents, length, return_offsets_mapping=True)
        ends = [max(end for _, end in row) for row in offsets["offset_mapping"]]
        parts = [text[:end] for text, end in zip(task.documents, ends, strict=True)]
        index = bm25s.BM25()
        index.index(bm25s.tokenize(parts, show_progress=False), show_progress=False)
        yield ("BM25", length), np.stack([index.get_scores(words) for words in queries])


def ndcg(similarities: np.ndarray, relevant: list[int]) -> np.ndarray:
    """nDCG@10 of each query: 1 / log2(1 + rank) of its only relevant document, 0 beyond the tenth
    (Järvelin & Kekäläinen, 2002). A document as similar as it ranks before it.

    Args:
        similarities: (queries, documents).
        relevant: the document of each query.
    """
    own = similarities[np.arange(len(relevant)), relevant]
    ranks = (similarities >= own[:, None]).sum(axis=1)
    return np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)


def evaluate(found, task: Task) -> list[dict]:
    """What `search` found, as nDCG@10 by depth."""
    depths = np.array(task.depths)
    return [
        {
            "method": method,
            "length": length,
            "ndcg": {d: round(float(gains[depths == d].mean()), 4) for d in DEPTHS},
        }
        for (method, length), similarities in found
        for gains in [ndcg(similarities, task.relevant)]
    ]


def records(args, tasks: dict[str, Task]):
    """What each model, and BM25, finds: as records, without the environment."""
    sizes = {x: getattr(args, x) for x in ("hidden_size", "layers", "vocab_size", "steps", "batch")}
    for name, whole in MODELS.items():
        for seed in args.seeds:
            model = SentenceTransformer(
                str(args.output_dir / f"{name}-{seed}"), trust_remote_code=True
            ).eval()
            results = {x: evaluate(search(model, task, whole), task) for x, task in tasks.items()}
            yield {"model": name, "seed": seed, "results": results} | sizes
    words = {x: evaluate(search_words(model.tokenizer, task), task) for x, task in tasks.items()}
    yield {"model": "bm25", "seed": None, "results": words} | sizes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--articles", nargs="+", required=True, help="text, an article a line")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long-retrieval"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=600, help="of pre-training, 16 rows each")
    parser.add_argument("--batch", type=int, default=128, help="of contrastive training")
    parser.add_argument("--held_out", type=int, default=1000, help="longest articles, not trained")
    parser.add_argument("--count", type=int, default=100, help="documents of the controlled task")
    parser.add_argument("--longest", type=int, default=640, help="documents of the natural task")
    args = parser.parse_args()

    # Before training: the commit that trained may not be the one at its end.
    where = environment("sentence-transformers", "bm25s")
    set_verbosity_error()
    short, long = read_articles(args.articles, args.held_out)
    prepared = write_texts(args, short)
    tokenizer = load_tokenizer(prepared)

    def size(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    by_length = sorted(long, key=lambda text: -len(text.split()))
    tasks = {
        "controlled": controlled(long, args.count, max(LENGTHS), size, Random(0)),
        "natural": natural(by_length[: args.longest], size, Random(0)),
    }
    pretrain(args, prepared)
    train_embeddings(args)
    found = []
    with open(args.results / "long_retrieval.jsonl", "a") as file:
        for record in records(args, tasks):
            found.append(record)
            file.write(json.dumps(record | where) + "\n")
            file.flush()
    for task in tasks:
        queries = tasks[task].depths
        print(f"{task}: {len(tasks[task].documents)} documents, {len(queries)} queries")
    draw(found, args.results / "long_retrieval.png")
    print(json.dumps(print_tables(found)))


if __name__ == "__main__":
    main()
