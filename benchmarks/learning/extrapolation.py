# SPDX-License-Identifier: Apache-2.0
"""Does a model trained on short text read longer text, as `alibi_starting_size` promises?

Trains a small MosaicBERT (ALiBi) and transformers' BERT (learned positions, as many as the longest
evaluation asks for) on rows of 64 tokens, and evaluates both on the same long documents cut at 64
to 1024 tokens: held-out loss at 15 % masked tokens, of the whole row. On a CPU both train at the
same time, each on a core of its own.

    python prepare_data.py --train_file wiki.train.txt.xz --validation_file wiki.valid.txt \
        --vocab_size 4096 --max_seq_length 64 --prepared_data runs/wiki-64
    python benchmarks/learning/extrapolation.py --prepared_data runs/wiki-64 \
        --documents wiki.valid.txt

Writes extrapolation.jsonl, a record for each model, and extrapolation.png; prints a table. The last
line is JSON: the loss of each model at each length.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.learning.side_by_side import train
from benchmarks.records import RESULTS, environment
from mosaic_tools.corpus import load_files
from mosaic_tools.family import check_loaded

# Trained on the first, evaluated on all.
LENGTHS = (64, 128, 256, 512, 1024)
NAMES = {"mosaic_bert": "MosaicBERT, ALiBi", "bert": "BERT, learned positions"}


def recipes(args) -> dict[str, dict]:
    """Flags of train_mlm.py for each model; the MLPs have as many weights in both."""
    shared = {
        "prepared_data": args.prepared_data,
        "max_seq_length": LENGTHS[0],
        "alibi_starting_size": max(LENGTHS),
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "global_batch_size": 64,
        "per_device_train_batch_size": 64,
        "max_steps": args.steps,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    return {
        "mosaic_bert": shared | {"intermediate_size": 1024},
        "bert": shared | {"intermediate_size": 1536, "model_type": "bert"},
    }


def long_documents(path: str, tokenizer, length: int, count: int) -> torch.Tensor:
    """(documents, length) ids of the first documents that are long enough."""
    documents = (row["text"] for row in load_files([path], streaming=True))
    rows = (tokenizer(x, truncation=True, max_length=length)["input_ids"] for x in documents)
    found = list(itertools.islice((x for x in rows if len(x) == length), count))
    if not found:
        raise ValueError(f"{path} has no document of {length} tokens: give longer ones")
    return torch.tensor(found)


def cut(ids: torch.Tensor, length: int, last: int) -> torch.Tensor:
    """(documents, length) ids, the last of each row replaced by [SEP] as in training."""
    ids = ids[:, :length].clone()
    ids[:, -1] = last
    return ids


@torch.inference_mode()
def masked_loss(model, ids: torch.Tensor, tokenizer) -> tuple[float, float]:
    """(mean loss, accuracy) at 15 % masked tokens, the same of a document at every length."""
    mask_id, special = tokenizer.mask_token_id, tokenizer.all_special_ids
    loss = right = count = 0.0
    for i, row in enumerate(ids):
        generator = torch.Generator().manual_seed(i)
        chosen = torch.rand(max(LENGTHS), generator=generator)[: len(row)] < 0.15
        chosen &= ~torch.isin(row, torch.tensor(special))
        masked = torch.where(chosen, mask_id, row).to(model.device)
        logits = model(masked[None]).logits[0][chosen].float()
        labels = row[chosen].to(model.device)
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return loss / count, right / count


def draw(losses: dict[str, dict[int, float]], path: Path):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, by_length in losses.items():
        axes.plot(list(by_length), list(by_length.values()), marker="o", label=NAMES[name])
    axes.axvline(LENGTHS[0], linestyle=":", color="gray")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_xlabel(f"tokens read (trained on {LENGTHS[0]})")
    axes.set_ylabel("held-out loss, 15 % masked (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepared_data", required=True, help="folder of prepare_data.py")
    parser.add_argument("--documents", required=True, help="held-out text, a document a line")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/extrapolation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=100, help="of documents read")
    args = parser.parse_args()

    # Before training: the commit that trained may not be the one at its end.
    where, plan = environment(), recipes(args)
    train(plan, args.output_dir)
    figures = {}
    for name in plan:
        folder = args.output_dir / name
        model, loaded = AutoModelForMaskedLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        check_loaded(folder, model, loaded)
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = long_documents(args.documents, tokenizer, max(LENGTHS), args.count)
        figures[name] = {
            length: masked_loss(model, cut(ids, length, tokenizer.sep_token_id), tokenizer)
            for length in LENGTHS
        }
    losses = {name: {k: loss for k, (loss, _) in x.items()} for name, x in figures.items()}
    with open(args.results / "extrapolation.jsonl", "a") as file:
        for name, by_length in figures.items():
            facts = {"model": name, "trained_length": LENGTHS[0], "documents": len(ids)}
            results = {"loss": losses[name], "accuracy": {k: a for k, (_, a) in by_length.items()}}
            file.write(json.dumps(facts | where | results) + "\n")
    draw(losses, args.results / "extrapolation.png")

    print(f"{'loss (accuracy) at':<26}" + "".join(f"{length:>16}" for length in LENGTHS))
    for name, by_length in figures.items():
        cells = "".join(f"{f'{loss:.3f} ({acc:.1%})':>16}" for loss, acc in by_length.values())
        print(f"{NAMES[name]:<26}{cells}")
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
