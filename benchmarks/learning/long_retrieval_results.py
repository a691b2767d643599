# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of long_retrieval.py, from its records."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.records import print_table

TITLES = {
    ("mosaic_bert", "whole"): "MosaicBERT, whole",
    ("mosaic_bert", "chunks, nearest"): "MosaicBERT, nearest of its chunks",
    ("mosaic_bert", "chunks, mean"): "MosaicBERT, mean of its chunks",
    ("bert", "whole"): "BERT, whole (512 positions)",
    ("bert", "chunks, nearest"): "BERT, nearest of its chunks",
    ("bert", "chunks, mean"): "BERT, mean of its chunks",
    ("bm25", "BM25"): "BM25",
}


def by_cell(records: list[dict]) -> dict[tuple, list[dict[int, float]]]:
    """For each (task, model, method, length): nDCG@10 by depth, of each seed."""
    cells = {}
    for record in records:
        for task, rows in record["results"].items():
            for row in rows:
                key = task, record["model"], row["method"], row["length"]
                ndcg = {int(depth): x for depth, x in row["ndcg"].items()}
                cells.setdefault(key, []).append(ndcg)
    return cells


def over_depths(seeds: list[dict[int, float]]) -> list[float]:
    """nDCG@10 of each seed, all depths alike."""
    return [mean(x.values()) for x in seeds]


def print_tables(records: list[dict]) -> dict:
    """Prints nDCG@10, means over seeds and the spread over all depths, of each task.

    Returns:
        By task, how much more each seed of MosaicBERT finds by all tokens than by the fewest.
    """
    cells, rises = by_cell(records), {}
    for task in dict.fromkeys(key[0] for key in cells):
        rows = []
        for (of_task, model, method, length), seeds in cells.items():
            if of_task == task:
                whole = over_depths(seeds)
                row = {"method": TITLES[model, method], "tokens read": length}
                row |= {f"depth {x}": mean(seed[x] for seed in seeds) for x in seeds[0]}
                rows.append(row | {"all": mean(whole), "spread": max(whole) - min(whole)})
        print(f"\n{task}: nDCG@10 by tokens read and by depth of the passage, in tokens")
        depths = [x for x in rows[0] if x.startswith("depth")]
        formats = dict.fromkeys([*depths, "all", "spread"], ".3f")
        print_table(rows, {"method": "", "tokens read": ""} | formats)
        ours = {key[3]: x for key, x in cells.items() if key[:3] == (task, "mosaic_bert", "whole")}
        least, most = (over_depths(ours[length]) for length in (min(ours), max(ours)))
        rises[task] = [round(y - x, 3) for x, y in zip(least, most, strict=True)]
    return rises


def draw(records: list[dict], path: Path):
    """For each task nDCG@10 against tokens read: all methods, with the range over seeds; and
    MosaicBERT's whole texts by depth."""
    cells = by_cell(records)
    tasks = list(dict.fromkeys(key[0] for key in cells))
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
    for (methods, depths), task in zip(grid.T, tasks, strict=True):
        for i, ((model, method), title) in enumerate(TITLES.items()):
            curve = {key[3]: x for key, x in cells.items() if key[:3] == (task, model, method)}
            seeds = {length: over_depths(x) for length, x in curve.items()}
            look = {"color": f"C{i}", "linestyle": "--" if model == "bert" else "-"}
            means = [mean(x) for x in seeds.values()]
            methods.plot(list(seeds), means, marker=".", label=title, **look)
            low, high = ([f(x) for x in seeds.values()] for f in (min, max))
            methods.fill_between(list(seeds), low, high, alpha=0.15, color=f"C{i}", linewidth=0)
        ours = {key[3]: x for key, x in cells.items() if key[:3] == (task, "mosaic_bert", "whole")}
        for i, depth in enumerate(next(iter(ours.values()))[0]):
            heights = [mean(seed[depth] for seed in x) for x in ours.values()]
            look = {"marker": ".", "color": str(0.15 + 0.15 * i)}
            depths.plot(list(ours), heights, label=f"from token {depth}", **look)
        methods.set(title=f"{task}, all depths", ylabel="nDCG@10")
        depths.set(title=f"{task}, MosaicBERT whole, by depth", ylabel="nDCG@10")
        depths.set(xlabel="tokens read (trained on 256)")
        depths.set_xscale("log", base=2)
        depths.set_xticks(list(ours), [str(length) for length in ours])
        for axes in (methods, depths):
            axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
