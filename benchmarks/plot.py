# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of benchmarks/RESULTS.md from the records.

    python benchmarks/plot.py

results/cpu_pretraining.png: BERT's and ModernBERT's time over ours on a CPU, forward and training
step; results/cpu_inference.png: the same for embeddings; results/serving.png: BERT's time over ours
in each way of serving, and which way is fastest. results/gpu.png: the same for training
steps on a GPU against the length of rows, and attention's time against it, forward and backward
over full rows. Of each case the newest record counts. CPUs of other instructions have panels of
their own, other GPUs curves. Prints what was drawn and what is missing.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.records import RESULTS, is_cpu, place

NAMES = {
    "bert": "BERT", "bert-no-dropout": "BERT without attention dropout",
    "bert-compiled": "BERT, compiled", "bert-flex": "BERT, FlexAttention, unpadded, compiled",
    "modernbert": "ModernBERT", "modernbert-compiled": "ModernBERT, compiled",
    "modernbert-flex": "ModernBERT, FlexAttention, unpadded, compiled",
}  # fmt: skip
# The arguments of draw_cpu by the records' file.
ON_CPU = {
    "pretraining": {
        "batch": "lengths",
        "tasks": {"fill-mask": "fill-mask, forward, 8 × 128", "step": "training step, 8 × 128"},
    },
    "inference": {"batch": "batch", "tasks": {"embeddings": "embeddings"}},
}
# Ways to serve, and the panels of draw_serving: title, value, model.
WAYS = {
    "eager": "PyTorch", "aot": "compiled ahead of time", "onnx": "ONNX Runtime",
    "openvino": "OpenVINO", "torch-int8": "PyTorch, int8",
    "torch-int8-but-wo": "PyTorch, int8 but mlp.wo",
    "torchao-int8": "torchao, int8, compiled", "onnx-int8": "ONNX Runtime, int8",
}  # fmt: skip
SERVED = (
    ("BERT's time / MosaicBERT's, run the same way", "over_ours", "bert"),
    ("MosaicBERT's time / its time in PyTorch", "over_eager", "mosaic"),
)
PROVIDERS = {
    "ours": "ours", "ours-all-tiles": "ours, all tiles visited", "flex": "FlexAttention, ALiBi",
    "varlen_attn": "FlashAttention 2, no bias", "sdpa": "SDPA, dense bias",
}  # fmt: skip


def newest(folder, name, value, *keys):
    """dict: values of these keys, and the place, to the last record that has `value`."""
    file = Path(folder, f"{name}.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    records = (json.loads(line) for line in lines)
    return {
        (*(record.get(key) for key in keys), place(record)): record
        for record in records
        if value in record
    }


def is_half(case):
    dtype, _ = case
    return dtype != "float32"


def finish(figure, path):
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def draw_cpu(folder, name, batch, tasks):
    """Bars of time over ours from {name}.jsonl, a row of panels for each place.

    Args:
        batch: the key that tells batches apart.
        tasks: a panel's title by its task.
    """
    records = newest(folder, name, "ratio", "task", "dtype", batch, "setting")
    records = {key: x for key, x in records.items() if is_cpu(x) and key[3] in NAMES}
    if not records:
        print(f"no CPU record in {name}.jsonl: make bench-cpu ONLY={name}")
        return
    places = list(dict.fromkeys(key[-1] for key in records))
    figure = Figure(figsize=(9, 3.6 * len(places)), layout="constrained")
    bars = {}
    grid = figure.subplots(len(places), len(tasks), sharey=True, squeeze=False)
    for panels, where in zip(grid, places, strict=True):
        here = {key[:-1]: x for key, x in records.items() if key[-1] == where}
        bars |= draw_bars(panels, here, tasks)
        panels[0].set_ylabel("time / MosaicBERT's best")
        if len(places) > 1:
            for axes in panels:
                axes.set_title(f"{axes.get_title()}\n{where}", fontsize="small")
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=4)
    finish(figure, folder / f"cpu_{name}.png")


def draw_bars(panels, records, tasks):
    """Draws a panel for each task; returns the bars by what they show.

    Args:
        records: of one place, by task, dtype, batch and setting.
    """
    bars = {}
    for axes, (task, title) in zip(panels, tasks.items(), strict=True):
        # In the order of the records, float32 first.
        cases = sorted(dict.fromkeys(key[1:3] for key in records if key[0] == task), key=is_half)
        settings = [x for x in NAMES if any((task, *case, x) in records for case in cases)]
        for i, setting in enumerate(settings):
            found = [
                (x + 0.8 * i / len(settings), records[(task, *case, setting)]["ratio"])
                for x, case in enumerate(cases)
                if (task, *case, setting) in records
            ]
            color = f"C{[*NAMES].index(setting)}"
            bars[NAMES[setting]] = axes.bar(
                *zip(*found, strict=True), 0.75 / len(settings), color=color
            )
        axes.axhline(1, color="black", linewidth=0.8)
        labels = [f"{rows.replace(', ', ',' + chr(10))}\n{dtype}" for dtype, rows in cases]
        ticks = [x + 0.4 - 0.4 / len(settings) for x in range(len(cases))]
        axes.set_xticks(ticks, labels, fontsize="small")
        axes.set_title(title)
    return bars


def draw_serving(folder):
    """Bars of serving.jsonl's embeddings in float32 and int8, a row of panels for each place and
    number of threads."""
    keys = ("task", "dtype", "threads", "batch", "setting")
    records = {
        key: x
        for key, x in newest(folder, "serving", "least_ms", *keys).items()
        if key[:2] == ("embeddings", "float32")
    }
    if not records:
        print("no record in serving.jsonl: make bench-cpu ONLY=serving")
        return
    places = sorted({(key[-1], key[2]) for key in records})
    figure = Figure(figsize=(10, 3.6 * len(places)), layout="constrained")
    bars = {}
    grid = figure.subplots(len(places), len(SERVED), squeeze=False)
    for panels, (where, threads) in zip(grid, places, strict=True):
        here = {key[3:5]: x for key, x in records.items() if (key[-1], key[2]) == (where, threads)}
        batches = list(dict.fromkeys(batch for batch, _ in here))
        for axes, (title, value, model) in zip(panels, SERVED, strict=True):
            for i, (way, name) in enumerate(WAYS.items()):
                found = [
                    (x + i / (len(WAYS) + 1), here[batch, f"{model}-{way}"][value])
                    for x, batch in enumerate(batches)
                    if value in here.get((batch, f"{model}-{way}"), {})
                ]
                if found:
                    bars[name] = axes.bar(
                        *zip(*found, strict=True), 0.9 / (len(WAYS) + 1), color=f"C{i}"
                    )
            axes.axhline(1, color="black", linewidth=0.8)
            labels = [batch.replace(" ", "\n", 1) for batch in batches]
            axes.set_xticks([x + 0.4 for x in range(len(batches))], labels, fontsize="small")
            count = f"{threads} thread{'s' if threads > 1 else ''}"
            several = f"\n{where}" if len({place for place, _ in places}) > 1 else ""
            axes.set_title(f"{title}, {count}{several}", fontsize="small")
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=4)
    finish(figure, folder / "serving.png")


def draw_gpu(folder):
    """Ratios of a step, and attention's time, against the length of rows, in bfloat16."""
    keys = ("dtype", "task", "lengths", "setting", "seqlen")
    steps = newest(folder, "pretraining", "ratio", *keys)
    keys = ("dtype", "pass", "lengths", "inputs", "provider", "seqlen")
    attention = newest(folder, "attention", "kernels_ms", *keys)
    passes = "attention, full rows, both passes (ms)"
    panels = (
        [
            ("step", "c4", name, title, steps, "ratio", "time of a step / MosaicBERT's, C4 lengths")
            for name, title in NAMES.items()
        ],
        [
            ("both", "fixed", "N(0, 1)", name, title, attention, "kernels_ms", passes)
            for name, title in PROVIDERS.items()
        ],
    )
    found = {key[-1]: x for key, x in [*steps.items(), *attention.items()]}
    gpus = [where for where, record in found.items() if not is_cpu(record)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    drawn = 0
    for axes, curves in zip(figure.subplots(1, 2), panels, strict=True):
        for (*case, title, records, value, label), gpu in itertools.product(curves, gpus):
            points = sorted(
                (key[-2], x[value])
                for key, x in records.items()
                if [*key[:-2]] == ["bfloat16", *case] and key[-1] == gpu
            )
            if points:
                name = f"{title}, {gpu}" if len(gpus) > 1 else title
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                drawn += 1
            axes.set_ylabel(label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens a row, at most")
    ratios, times = figure.axes
    ratios.axhline(1, color="black", linewidth=0.8)
    ratios.margins(y=0.3)
    ratios.set_ylim(bottom=0)
    times.set_yscale("log", base=2)
    times.yaxis.set_major_formatter("{x:g}")
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
    for name, values in ON_CPU.items():
        draw_cpu(args.results, name, **values)
    draw_serving(args.results)
    draw_gpu(args.results)


if __name__ == "__main__":
    main()
