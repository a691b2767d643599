# SPDX-License-Identifier: Apache-2.0
"""Draws the README's plots from the records.

    python benchmarks/plot.py

results/cpu.png: BERT's and ModernBERT's time over ours on a CPU, forward and training step.
results/gpu.png: the same for training steps on a GPU against the length of rows, and attention's
time against it. Of each case the newest record counts. Prints what was drawn and what is missing.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from records import RESULTS

NAMES = {
    "bert": "BERT", "bert-no-dropout": "BERT without attention dropout",
    "bert-compiled": "BERT, compiled", "bert-flex": "BERT, FlexAttention, unpadded, compiled",
    "modernbert": "ModernBERT", "modernbert-compiled": "ModernBERT, compiled",
    "modernbert-flex": "ModernBERT, FlexAttention, unpadded, compiled",
}  # fmt: skip
PROVIDERS = {
    "ours": "ours", "ours-all-tiles": "ours, no tile skipped", "flex": "FlexAttention, ALiBi",
    "varlen_attn": "FlashAttention 2, no bias", "sdpa": "SDPA, dense bias",
}  # fmt: skip


def newest(folder, name, value, *keys):
    """dict: values of these keys, and "CPU" or "GPU", to the last record that has `value`."""
    file = Path(folder, f"{name}.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    records = (json.loads(line) for line in lines)
    return {
        (*(record.get(key) for key in keys), "CPU" if is_cpu(record) else "GPU"): record
        for record in records
        if value in record
    }


def is_cpu(record):
    """Only a CPU's name has its cores."""
    return record["device"].endswith("cores")


def finish(figure, path):
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def draw_cpu(folder):
    """Bars of time over ours, for each task, dtype and batch."""
    records = newest(folder, "pretraining", "ratio", "task", "dtype", "lengths", "setting")
    records = {key[:-1]: x for key, x in records.items() if key[-1] == "CPU"}
    if not records:
        print("no CPU record in pretraining.jsonl: make bench-cpu ONLY=pretraining")
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    tasks = {"fill-mask": "fill-mask, forward", "step": "training step"}
    bars = {}
    for axes, (task, title) in zip(figure.subplots(1, 2, sharey=True), tasks.items(), strict=True):
        cases = sorted({key[1:3] for key in records if key[0] == task})[::-1]
        settings = [name for name in NAMES if any((task, *x, name) in records for x in cases)]
        for i, name in enumerate(settings):
            found = [
                (x + 0.8 * i / len(settings), records[(task, *case, name)]["ratio"])
                for x, case in enumerate(cases)
                if (task, *case, name) in records
            ]
            color = f"C{[*NAMES].index(name)}"
            bars[NAMES[name]] = axes.bar(
                *zip(*found, strict=True), 0.75 / len(settings), color=color
            )
        axes.axhline(1, color="black", linewidth=0.8)
        labels = [f"{lengths}\n{dtype}" for dtype, lengths in cases]
        axes.set_xticks([x + 0.4 - 0.4 / len(settings) for x in range(len(cases))], labels)
        axes.set_title(f"{title}, 8 × 128")
    figure.axes[0].set_ylabel("time / MosaicBERT's best")
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=4)
    finish(figure, folder / "cpu.png")


def draw_gpu(folder):
    """Ratios of a step, and attention's time, against the length of rows, in bfloat16."""
    keys = ("dtype", "task", "lengths", "setting", "seqlen")
    steps = newest(folder, "pretraining", "ratio", *keys)
    keys = ("dtype", "pass", "lengths", "inputs", "provider", "seqlen")
    attention = newest(folder, "attention", "ms", *keys)
    panels = (
        [
            ("step", "c4", name, title, steps, "ratio", "time of a step / MosaicBERT's, C4 lengths")
            for name, title in NAMES.items()
        ],
        [
            ("both", "c4", "N(0, 1)", name, title, attention, "ms", "attention, C4 lengths (ms)")
            for name, title in PROVIDERS.items()
        ],
    )
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    drawn = 0
    for axes, curves in zip(figure.subplots(1, 2), panels, strict=True):
        for *case, title, records, value, label in curves:
            points = sorted(
                (key[-2], x[value])
                for key, x in records.items()
                if [*key[:-2]] == ["bfloat16", *case] and key[-1] == "GPU"
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=title)
                drawn += 1
            axes.set_ylabel(label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens a row, at most")
    if drawn:
        finish(figure, folder / "gpu.png")
    else:
        print("no GPU record in pretraining.jsonl and attention.jsonl: make bench-gpu on a GPU")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    draw_cpu(args.results)
    draw_gpu(args.results)


if __name__ == "__main__":
    main()
