# SPDX-License-Identifier: Apache-2.0
"""Does MosaicBERT learn faster than BERT, by tokens and by seconds?

Trains a small MosaicBERT and transformers' BERT of the same width, depth and number of weights in
the MLPs (the gated one has three matrices, so it is two thirds as wide) by the same recipe, on the
same text in the same order, masked alike, at several peak learning rates, since what suits one may
not suit the other. On a CPU both run at the same time, each on a core of its own. Held-out loss is
at 15 % masked tokens, of which both are shown the same.

    python prepare_data.py --train_file wiki.train.txt.xz --validation_file wiki.valid.txt \
        --vocab_size 4096 --prepared_data runs/wiki-128
    python benchmarks/learning/learning.py --prepared_data runs/wiki-128 \
        --learning_rates 5e-4 1e-3 2e-3

Adds a record with a curve to learning.jsonl for each model and rate. From all in that file that are
of this size and processor it draws learning.png and prints a table. The last line is JSON: the
tokens and seconds that each model, at its best rate, needed to the loss at which BERT ended.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.learning.side_by_side import curve, train
from benchmarks.records import RESULTS, environment, place

NAMES = {"mosaic_bert": "MosaicBERT", "bert": "BERT"}
BATCH = 32


def recipes(args, rate: float) -> dict[str, dict]:
    """Flags of train_mlm.py for each model, at this peak learning rate."""
    width = args.hidden_size
    shared = {
        "prepared_data": args.prepared_data,
        "hidden_size": width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": width // 64,
        "global_batch_size": BATCH,
        "per_device_train_batch_size": BATCH,
        "max_steps": args.steps,
        "learning_rate": rate,
        "logging_steps": args.steps // 40,
        "eval_strategy": "steps",
        "eval_steps": args.steps // 10,
        "save_strategy": "no",
    }
    return {
        "mosaic_bert": shared | {"intermediate_size": 4 * width},
        "bert": shared | {"intermediate_size": 6 * width, "model_type": "bert"},
    }


def needed(points: list[dict], loss: float, axis: str) -> float | None:
    """Where on the axis the curve reaches the loss, between two points linearly; None: nowhere."""
    losses = [point["eval_loss"] for point in points]
    if min(losses) > loss:
        return None
    last = next(i for i, value in enumerate(losses) if value <= loss)
    pair = points[max(last - 1, 0) : last + 1]
    return float(
        np.interp(-loss, [-point["eval_loss"] for point in pair], [point[axis] for point in pair])
    )


def comparable(args, where: dict) -> list[dict]:
    """The records of runs of this size on this processor, the newest of each model and rate."""
    newest = {}
    for line in (args.results / "learning.jsonl").read_text().splitlines():
        run = json.loads(line)
        size = run["hidden_size"], run["num_hidden_layers"], run["curve"][-1]["step"]
        if size == (args.hidden_size, args.layers, args.steps) and place(run) == place(where):
            newest[run["model"], run["learning_rate"]] = run
    return [newest[key] for key in sorted(newest)]


def best_of(runs: list[dict]) -> dict[str, dict]:
    """Each model's run that ended at the lowest loss."""
    ending = sorted(runs, key=lambda run: -run["curve"][-1]["eval_loss"])
    return {run["model"]: run for run in ending}


def draw(runs: list[dict], path: Path):
    """Loss against tokens for all runs, marked with their rate, and against minutes for the best of
    each model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_tokens, by_minutes = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(NAMES, ("C0", "C1"), strict=True))
    best = best_of(runs)
    for run in runs:
        loss = [point["eval_loss"] for point in run["curve"]]
        tokens = [point["tokens"] / 1e6 for point in run["curve"]]
        minutes = [point["seconds"] / 60 for point in run["curve"]]
        look = {"color": colors[run["model"]]}
        by_tokens.annotate(
            f" {run['learning_rate']:g}", (tokens[-1], loss[-1]), va="center", fontsize=8
        )
        if run is best[run["model"]]:
            by_minutes.plot(minutes, loss, marker=".", label=NAMES[run["model"]], **look)
            by_tokens.plot(tokens, loss, marker=".", **look)
        else:
            by_tokens.plot(tokens, loss, linewidth=0.8, alpha=0.6, **look)
    by_tokens.margins(x=0.12)
    by_tokens.set(xlabel="million tokens", ylabel="held-out loss, 15 % masked (nats)")
    by_minutes.set(xlabel="minutes of training, each at its best rate")
    by_minutes.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepared_data", required=True, help="folder of prepare_data.py")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    args = parser.parse_args()

    # Before training: the commit that trained may not be the one at its end.
    where = environment()
    for rate in args.learning_rates:
        plan, folder = recipes(args, rate), args.output_dir / f"{rate:g}"
        train(plan, folder)
        with open(args.results / "learning.jsonl", "a") as file:
            for name, flags in plan.items():
                sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "learning_rate")
                facts = {"model": name} | {key: flags[key] for key in sizes}
                record = facts | where | {"curve": curve(folder / name, BATCH)}
                file.write(json.dumps(record) + "\n")

    runs = comparable(args, where)
    draw(runs, args.results / "learning.png")
    print(
        f"{'model':<12}{'rate':>8}{'step':>7}{'Mtokens':>9}{'minutes':>9}{'loss':>8}{'accuracy':>10}"
    )
    for run in runs:
        for p in run["curve"]:
            print(
                f"{NAMES[run['model']]:<12}{run['learning_rate']:>8g}{p['step']:>7}"
                f"{p['tokens'] / 1e6:>9.2f}{p['seconds'] / 60:>9.1f}{p['eval_loss']:>8.3f}"
                f"{p['eval_masked_accuracy']:>10.1%}"
            )
    curves = {name: run["curve"] for name, run in best_of(runs).items()}
    target = curves["bert"][-1]["eval_loss"]
    print(
        json.dumps(
            {"loss": target}
            | {
                axis: {name: needed(points, target, axis) for name, points in curves.items()}
                for axis in ("tokens", "seconds")
            }
        )
    )


if __name__ == "__main__":
    main()
