# SPDX-License-Identifier: Apache-2.0
"""What pareto.py's records say: what is claimed, rows of its table, and the figure."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

TITLES = {
    "mosaic": "MosaicBERT",
    "bert": "BERT, same recipe",
    "bert_old": "BERT, old recipe",
    "no_glu": "no GLU",
    "learned_positions": "learned positions",
    "fp32_layernorm": "fp32 LayerNorm",
    "padding_kept": "padding kept",
    "masking_15": "15 % masking",
}


def claim(theirs: list[float], ours: list[float], lower_is_better: bool = False) -> str | None:
    """Whether theirs are better or worse, or no different; None: too few seeds to say."""
    if min(len(theirs), len(ours)) < 2:
        return None
    difference = mean(theirs) - mean(ours)
    if abs(difference) <= max(max(x) - min(x) for x in (theirs, ours)):
        return "same"
    return "worse" if (difference > 0) == lower_is_better else "better"


def summary(runs: list[dict], ours: list[dict] | None) -> dict:
    """A row of the table: means over the seeds of a model and budget, and what is claimed."""
    losses, scores = ([x[y] for x in runs] for y in ("eval_loss", "glue"))
    row = {"model": runs[0]["model"], "budget": runs[0]["minutes"], "seeds": len(runs)}
    units = {"minutes": ("seconds", 60), "Mtokens": ("tokens", 1e6), "TFLOP": ("flop", 1e12)}
    row |= {name: mean(x[key] for x in runs) / unit for name, (key, unit) in units.items()}
    row |= {"loss": mean(losses), "all loss": losses, "GLUE": mean(scores), "all GLUE": scores}
    row |= {task: mean(x["scores"][task] for x in runs) for task in runs[0]["scores"]}
    if ours and row["model"] != "mosaic":
        row["by loss"] = claim(losses, [x["eval_loss"] for x in ours], lower_is_better=True)
        row["by GLUE"] = claim(scores, [x["glue"] for x in ours])
    return row


def draw(rows: list[dict], path: Path):
    """Means over seeds, with bars from the worst to the best."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    labels = {"loss": "held-out loss, 15 % masked (nats)", "GLUE": "mean score of the GLUE tasks"}
    for axes, (y, label) in zip(grid, labels.items(), strict=True):
        axes[0].set_ylabel(label)
        for i, (name, title) in enumerate(TITLES.items()):
            look = {"color": f"C{i}", "marker": "x" if i > 2 else "o", "capsize": 2}
            points = [row for row in rows if row["model"] == name]
            bars = [[x[y] - min(x[f"all {y}"]) for x in points]]
            bars += [[max(x[f"all {y}"]) - x[y] for x in points]]
            for panel, x in zip(axes, ("minutes", "TFLOP"), strict=True):
                places, heights = ([p[key] for p in points] for key in (x, y))
                panel.errorbar(places, heights, bars, label=title if points else None, **look)
                panel.set(xscale="log", xlabel=f"{x} of pre-training")
                panel.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
