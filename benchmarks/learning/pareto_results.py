# SPDX-License-Identifier: Apache-2.0
"""What pareto.py's records say: what is claimed, rows of its table, and the figure."""

from bisect import bisect_left
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.interpolate import interp1d

TITLES = {
    "mosaic": "MosaicBERT",
    "bert": "BERT, same recipe",
    "bert_old": "BERT, old recipe",
    "muon_no_dropout": "Muon, no dropout",
    "no_glu": "no GLU",
    "learned_positions": "learned positions",
    "fp32_layernorm": "fp32 LayerNorm",
    "padding_kept": "padding kept",
    "dense_logits": "logits of all tokens",
    "masking_15": "15 % masking",
    "masking_falls": "30 %, then 15 % masking",
    "muon": "Muon",
    "z_loss": "z-loss",
    "no_dropout": "no dropout",
    "clipping": "gradients clipped at 1",
    "linear_decay": "linear decay",
}
# All budgets of these are trained, of others the longest.
AT_ALL_BUDGETS = ("mosaic", "bert", "bert_old", "muon_no_dropout")
# Between budgets that are more times apart nothing is interpolated.
FAR = 2.2
# So much more or less than the outermost budgets cost, the line is drawn on. At 4 x 256 loss falls
# by 0.51 to 0.53 nats with each doubling of minutes from 5 to 40: a quarter more is off by 0.01.
BEYOND = 1.25
# What a run costs: keys of its record, and units.
AXES = {"minutes": ("seconds_by_trial", 60), "Mtokens": ("tokens", 1e6), "TFLOP": ("flop", 1e12)}


def claim(theirs: list[float], ours: list[float], lower_is_better: bool = False) -> str | None:
    """Whether theirs are better or worse, or no different; None: fewer than 3 seeds cannot say."""
    if min(len(theirs), len(ours)) < 3:
        return None
    difference = mean(theirs) - mean(ours)
    if abs(difference) <= max(max(x) - min(x) for x in (theirs, ours)):
        return "same"
    return "worse" if (difference > 0) == lower_is_better else "better"


def ours_at(cost: float, axis: str, y: str, ours: list[dict]) -> list[float]:
    """What MosaicBERT has at this cost, a value for each seed that the budgets on both sides have:
    on a line between these over the cost's logarithm, or through the outermost two; none further
    than BEYOND what budgets cost on average, or between two more than FAR times apart."""
    budgets = {}
    for run in ours:
        budgets.setdefault(run["minutes"], {})[run["seed"]] = run
    budgets = [budgets[minutes] for minutes in sorted(budgets)]
    costs = [mean(run[axis] for run in of.values()) for of in budgets]
    if len(budgets) < 2 or not costs[0] / BEYOND <= cost <= costs[-1] * BEYOND:
        return []
    after = min(max(bisect_left(costs, cost), 1), len(costs) - 1)
    before, pair = costs[after - 1], budgets[after - 1 : after + 1]
    seeds = sorted(set.intersection(*map(set, pair)))
    if not seeds or before < cost < costs[after] and costs[after] > FAR * before:
        return []
    found = [[of[seed] for seed in seeds] for of in pair]
    log_costs = [np.log(mean(run[axis] for run in runs)) for runs in found]
    heights = [[run[y] for run in runs] for runs in found]  # (budgets, seeds)
    return interp1d(log_costs, heights, axis=0, fill_value="extrapolate")(np.log(cost)).tolist()


def differences(runs: list[dict], ours: list[dict], axis: str, y: str) -> list[float]:
    """How much more of y each run has than MosaicBERT's mean at the runs' mean cost; none if that
    is unknown."""
    at_equal = ours_at(mean(run[axis] for run in runs), axis, y, ours)
    return [run[y] - mean(at_equal) for run in runs if at_equal]


def compared(runs: list[dict], ours: list[dict], axis: str, y: str) -> str | None:
    """Their mean difference, and what it is: the same at the least and the most that a seed of
    theirs cost, or it is "same". None: unknown."""
    if not (found := differences(runs, ours, axis, y)):
        return None
    theirs, costs = [run[y] for run in runs], [run[axis] for run in runs]
    claims = {
        claim(theirs, ours_at(cost, axis, y, ours), lower_is_better=y == "eval_loss")
        for cost in (min(costs), max(costs))
    }
    said = "unclaimed" if None in claims else claims.pop() if len(claims) == 1 else "same"
    return f"{mean(found):+.3f} {said}"


def summary(runs: list[dict], ours: list[dict], floor: list[dict]) -> dict:
    """A row of the table: means over the seeds of a model and budget, how they compare with
    MosaicBERT's runs of all budgets, and scores with those of fine-tuning alone."""
    row = {"model": runs[0]["model"], "budget": runs[0]["minutes"], "seeds": len(runs)}
    row |= {name: mean(x[key] for x in runs) / unit for name, (key, unit) in AXES.items()}
    others = ours if row["model"] != "mosaic" else []
    losses = [x["eval_loss"] for x in runs]
    row |= {"loss": mean(losses), "all loss": losses}
    if areas := [x["cola_auc"] for x in runs if "cola_auc" in x]:
        row |= {"cola_auc": mean(areas), "all cola_auc": areas}
    for name, (key, _) in AXES.items():
        row[f"loss, equal {name}"] = compared(runs, others, key, "eval_loss")
        row[f"all loss, equal {name}"] = differences(runs, others, key, "eval_loss")
    for task in dict.fromkeys(task for x in runs for task in x["scores"]):
        theirs, alone, mosaic = (
            [x | {task: mean(x["scores"][task])} for x in of if task in x["scores"]]
            for of in (runs, floor, others)
        )
        values, least = ([y for x in of for y in x["scores"][task]] for of in (theirs, alone))
        row |= {task: mean(values), f"all {task}": values}
        row[f"{task}, spread"] = f"{min(values):.1%} to {max(values):.1%}"
        if len(theirs) >= 3:
            values, least = ([x[task] for x in of] for of in (theirs, alone))
        row[f"{task}, above the floor"] = claim(values, least)
        row[f"{task}, equal minutes"] = compared(theirs, mosaic, "seconds_by_trial", task)
    return row


LABELS = {"loss": "held-out loss, 15 % masked (nats)", "sst2": "SST-2, accuracy"}
LABELS |= {"stsb": "STS-B, Spearman", "mrpc": "MRPC, mean of accuracy and F1"}
LABELS |= {"cola": "CoLA, Matthews", "rte": "RTE, accuracy"}
LABELS |= {"cola_auc": "CoLA, area under ROC curve"}


def draw(rows: list[dict], tasks: list[str], path: Path):
    """Held-out loss, each task's score and CoLA's AUC, where they are known, against minutes and
    FLOP: means over seeds, with bars from the worst to the best. In grey, from worst to best, what
    there is without pre-training, tasks being fine-tuned."""
    known = set().union(*rows)
    quantities = [y for y in ("loss", *tasks, "cola_auc") if y in known]
    figure = Figure(figsize=(4.2 * len(quantities), 7), layout="constrained")
    grid = figure.subplots(2, len(quantities), sharex="row", sharey="col", squeeze=False)
    for panels, x in zip(grid, ("minutes", "TFLOP"), strict=True):
        for panel, y in zip(panels, quantities, strict=True):
            for i, (name, title) in enumerate(TITLES.items()):
                look = {
                    "color": colormaps["tab20"](i),
                    "marker": "o" if name in AT_ALL_BUDGETS else "x",
                    "capsize": 2,
                }
                points = [row for row in rows if row["model"] == name and y in row]
                bars = [[p[y] - min(p[f"all {y}"]) for p in points]]
                bars += [[max(p[f"all {y}"]) - p[y] for p in points]]
                places, heights = ([p[key] for p in points] for key in (x, y))
                panel.errorbar(places, heights, bars, label=title if points else None, **look)
            for row in rows:
                if row["model"] == "untrained" and y != "loss" and y in row:
                    panel.axhspan(min(row[f"all {y}"]), max(row[f"all {y}"]), color="0.9")
                    panel.axhline(row[y], color="grey", linestyle="--", label="no pre-training")
            panel.set(xscale="log", xlabel=f"{x} of pre-training", ylabel=LABELS.get(y, y))
            panel.grid(alpha=0.3)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    named = {}
    for panel in grid[0]:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)


def draw_differences(rows: list[dict], ours: list[dict], path: Path):
    """How much more held-out loss than MosaicBERT's runs each model has at its longest budget, at
    equal minutes and at equal tokens: a dot for each seed, a line at their mean. In grey, how
    MosaicBERT's seeds differ. Nothing is drawn where no difference is known."""
    titles = {"minutes": "at equal minutes", "Mtokens": "at equal tokens"}
    rows = [row for row in rows if any(row[f"all loss, equal {axis}"] for axis in titles)]
    longest = {row["model"]: row for row in sorted(rows, key=lambda row: row["budget"])}
    if not longest:
        return
    last = max(run["minutes"] for run in ours)
    losses = [run["eval_loss"] for run in ours if run["minutes"] == last]

    def lead(row):
        return -mean(row["all loss, equal minutes"] or row["all loss, equal Mtokens"])

    others = sorted(longest.values(), key=lead)
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(titles), sharex=True, sharey=True)
    for panel, (axis, title) in zip(panels, titles.items(), strict=True):
        spread = f"seeds of MosaicBERT: {len(losses)}"
        panel.axvspan(*(f(losses) - mean(losses) for f in (min, max)), color="0.9", label=spread)
        panel.axvline(0, color="grey", linestyle="--")
        for y, row in enumerate(others):
            if found := row[f"all loss, equal {axis}"]:
                panel.plot(found, [y] * len(found), "o", color="tab:blue", alpha=0.6)
                panel.plot(mean(found), y, "|", color="black", markersize=14)
        panel.set_yticks(range(len(others)), [TITLES[row["model"]] for row in others])
        panel.set_title(title)
        panel.set_xlabel("held-out loss, difference from MosaicBERT's (nats)")
        panel.grid(axis="x", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center")
    figure.savefig(path, dpi=100)
