# SPDX-License-Identifier: Apache-2.0
"""What pareto.py's records say: what is claimed, rows of its table, and the figure."""

from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.interpolate import interp1d

TITLES = {
    "mosaic": "MosaicBERT",
    "bert": "BERT, same recipe",
    "bert_old": "BERT, old recipe",
    "no_glu": "no GLU",
    "learned_positions": "learned positions",
    "fp32_layernorm": "fp32 LayerNorm",
    "padding_kept": "padding kept",
    "dense_logits": "logits of all tokens",
    "masking_15": "15 % masking",
}
# What a run costs: keys of its record, and units.
AXES = {"minutes": ("seconds", 60), "Mtokens": ("tokens", 1e6), "TFLOP": ("flop", 1e12)}


def claim(theirs: list[float], ours: list[float], lower_is_better: bool = False) -> str | None:
    """Whether theirs are better or worse, or no different; None: fewer than 3 seeds cannot say."""
    if min(len(theirs), len(ours)) < 3:
        return None
    difference = mean(theirs) - mean(ours)
    if abs(difference) <= max(max(x) - min(x) for x in (theirs, ours)):
        return "same"
    return "worse" if (difference > 0) == lower_is_better else "better"


def ours_at(cost: float, axis: str, y: str, ours: list[dict]) -> list[float]:
    """What MosaicBERT has at this cost, a value for each seed: between its budgets linearly over
    the cost's logarithm; none beyond a tenth less or more than they cost on average."""
    budgets = {}
    for run in sorted(ours, key=lambda run: (run["minutes"], run["seed"])):
        budgets.setdefault(run["minutes"], []).append(run)
    costs = [mean(run[axis] for run in runs) for runs in budgets.values()]
    if len(costs) < 2 or not costs[0] / 1.1 <= cost <= costs[-1] * 1.1:
        return []
    heights = [[run[y] for run in runs] for runs in budgets.values()]  # (budgets, seeds)
    line = interp1d(np.log(costs), heights, axis=0, fill_value="extrapolate")
    return line(np.log(cost)).tolist()


def compared(runs: list[dict], ours: list[dict], axis: str, y: str) -> str | None:
    """How much more of y the runs have than MosaicBERT at equal cost, and what that is: the same
    at the least and the most that a seed of theirs cost, or it is "same". None: unknown."""
    theirs, costs = [run[y] for run in runs], [run[axis] for run in runs]
    if not (at_equal := ours_at(mean(costs), axis, y, ours)):
        return None
    found = {
        claim(theirs, ours_at(cost, axis, y, ours) or at_equal, lower_is_better=y == "eval_loss")
        for cost in (min(costs), max(costs))
    }
    said = found.pop() if len(found) == 1 else "same"
    return f"{mean(theirs) - mean(at_equal):+.3f} {said or 'unclaimed'}"


def summary(runs: list[dict], ours: list[dict]) -> dict:
    """A row of the table: means over the seeds of a model and budget, and how they compare with
    MosaicBERT's runs of all budgets."""
    losses, scores = ([x[y] for x in runs] for y in ("eval_loss", "glue"))
    row = {"model": runs[0]["model"], "budget": runs[0]["minutes"], "seeds": len(runs)}
    row |= {name: mean(x[key] for x in runs) / unit for name, (key, unit) in AXES.items()}
    row |= {"loss": mean(losses), "all loss": losses, "GLUE": mean(scores), "all GLUE": scores}
    row |= {task: mean(x["scores"][task] for x in runs) for task in runs[0]["scores"]}
    others = ours if row["model"] != "mosaic" else []
    for name, (key, _) in AXES.items():
        row[f"loss, equal {name}"] = compared(runs, others, key, "eval_loss")
        row[f"GLUE, equal {name}"] = compared(runs, others, key, "glue")
    return row


def draw(rows: list[dict], path: Path):
    """Means over seeds, with bars from the worst to the best; dashed, GLUE without pre-training."""
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
    for panel in grid.flat:
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    for row in rows:
        if row["model"] == "untrained":
            for panel in grid[1]:
                panel.axhline(row["GLUE"], color="grey", linestyle="--")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
