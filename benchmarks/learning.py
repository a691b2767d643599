# SPDX-License-Identifier: Apache-2.0
"""Does MosaicBERT learn faster than BERT, by tokens and by seconds?

Trains a small MosaicBERT and transformers' BERT of the same width, depth and number of weights in
the MLPs (the gated one has three matrices, so it is two thirds as wide) by the same recipe, on the
same text in the same order, masked alike. On a CPU both run at the same time, each on a core of its
own. Held-out loss is at 15 % masked tokens, of which both are shown the same.

    python prepare_data.py --train_file wiki.train.txt.xz --validation_file wiki.valid.txt \
        --vocab_size 4096 --prepared_data runs/wiki-128
    python benchmarks/learning.py --prepared_data runs/wiki-128

Writes learning.jsonl, a record for each model with its curve, and learning.png; prints a table. The
last line is JSON: seconds and tokens that BERT and MosaicBERT needed to the loss BERT ended at.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from records import RESULTS
from side_by_side import curve, environment, train

NAMES = {"mosaic_bert": "MosaicBERT", "bert": "BERT"}
BATCH = 32


def recipes(args) -> dict[str, dict]:
    """Flags of train_mlm.py for each model."""
    width = args.hidden_size
    shared = {
        "prepared_data": args.prepared_data,
        "hidden_size": width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": width // 64,
        "global_batch_size": BATCH,
        "per_device_train_batch_size": BATCH,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
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


def draw(curves: dict[str, list[dict]], path: Path):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (axis, label, unit) in zip(
        figure.subplots(1, 2, sharey=True),
        (("tokens", "million tokens", 1e6), ("seconds", "minutes of training", 60)),
        strict=True,
    ):
        for name, points in curves.items():
            x = [point[axis] / unit for point in points]
            axes.plot(x, [point["eval_loss"] for point in points], marker=".", label=NAMES[name])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("held-out loss, 15 % masked (nats)")
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
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()

    # Before training: the commit that trained may not be the one at its end.
    where, plan = environment(), recipes(args)
    train(plan, args.output_dir)
    curves = {name: curve(args.output_dir / name, BATCH) for name in plan}
    with open(args.results / "learning.jsonl", "a") as file:
        for name, points in curves.items():
            sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "learning_rate")
            facts = {key: plan[name][key] for key in sizes}
            file.write(json.dumps({"model": name, **facts, **where, "curve": points}))
            file.write("\n")
    draw(curves, args.results / "learning.png")

    print(f"{'model':<12}{'step':>7}{'Mtokens':>9}{'minutes':>9}{'loss':>8}{'accuracy':>10}")
    for name, points in curves.items():
        for p in points:
            print(
                f"{NAMES[name]:<12}{p['step']:>7}{p['tokens'] / 1e6:>9.2f}{p['seconds'] / 60:>9.1f}"
                f"{p['eval_loss']:>8.3f}{p['eval_masked_accuracy']:>10.1%}"
            )
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
