# SPDX-License-Identifier: Apache-2.0
"""Runs of finetune.py, each a task with a seed: their arguments, the plan of those asked for, which
refuses results of other settings, and the table of what they gave."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from mosaic_tools.classifiers import ClassifierArguments, is_trained_on
from mosaic_tools.files import check_folder, read_json
from mosaic_tools.glue_tasks import SEEDS, TASKS, Task
from mosaic_tools.labelled_data import LabelledDataArguments
from mosaic_tools.recipe import RecipeArguments, option
from mosaic_tools.recipe_trainer import max_length_of

# Of one run, and of all in an output folder.
RESULT, RESULTS = "result.json", "results.json"
# Of the arguments, what a result depends on.
SETTINGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm"),
    *("warmup_ratio", "warmup_steps", "lr_end", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("bf16", "fp16", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("label_smoothing_factor", "neftune_noise_alpha", "data_seed"),
)


@dataclass
class FinetuneArguments(RecipeArguments):
    """TrainingArguments, of which a task has its own values unless they are given."""

    seeds: list[int] | None = option(None, f"None: as many of {SEEDS} as published for the task")
    save_all_seeds: bool = option(False, "keep the model of every seed, not of the first only")
    save_strategy: str = "no"

    CAN_RESUME = False
    # Not given, a task has its own.
    DEFAULT_DEPENDS = (
        *("learning_rate", "num_train_epochs", "global_batch_size", "decoupled_weight_decay"),
        "bf16",
    )

    def __post_init__(self):
        super().__post_init__()
        if wrong := [x for x in self.seeds or [] if not 0 <= x < 2**32]:
            raise ValueError(f"--seeds must be from 0 to 2**32 - 1, got {wrong[0]}")
        if self.resume_from_checkpoint:
            raise ValueError(
                "leave out --resume_from_checkpoint: the same command again runs what is unfinished"
            )


# ---- what is to be made ----


@dataclass
class Run:
    """A task with one seed.

    Args:
        start: folder or Hub id of the weights to start from.
        keep: whether the model is saved.
        settings: what the result depends on, besides the seed.
        values: its FinetuneArguments, made of them when it begins: they set up the process.
    """

    name: str
    seed: int
    folder: Path
    start: str
    keep: bool
    settings: dict
    values: dict


def finished_runs(args: FinetuneArguments) -> dict[Path, dict]:
    """Results in output_dir by folder, none that --overwrite forgets.

    Raises:
        ValueError: there is no output_dir, or it holds something else.
    """
    if not args.output_dir:
        raise ValueError("give --output_dir, the folder that models and results are written to")
    folder = Path(args.output_dir)
    check_folder(folder)
    if args.overwrite:
        return {}
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise ValueError(
            f"output_dir {folder} is not empty and has no {RESULTS}: choose another, or write into "
            "it with --overwrite true"
        )
    return read_results(folder)


def plan(
    loaded: dict,
    finished: dict[Path, dict],
    config,
    tokenizer,
    model_args: ClassifierArguments,
    data: LabelledDataArguments,
    given: dict,
) -> list[Run]:
    """The runs asked for, finished ones included.

    Args:
        loaded: `load_task`'s answers by task.
        given: the values given of FinetuneArguments.

    Raises:
        ValueError: the model was trained on other labels, or a result in output_dir is of another
            model, other data or other settings.
    """
    args = FinetuneArguments(**given)
    folder, model = Path(args.output_dir), model_args.model
    weights = {"weights": model_args.version()}
    of_mnli = {
        x: result["settings"]
        for x, result in finished.items()
        if result["task"] == "mnli" and result["kept"]
    }
    runs = []
    for name, (task, parts, source) in loaded.items():
        seeds = list(dict.fromkeys(args.seeds or SEEDS[: task.seeds]))
        first = folder / "mnli" / f"seed-{seeds[0]}"
        start = model
        if task.from_mnli and of_mnli:
            start = str(first if first in of_mnli else min(of_mnli))
        if start == model and not model_args.new_classifier:
            is_trained_on(model, config, task)
        values = task.recipe() | given
        begins = "model"
        if start != model:
            made = digest(of_mnli[Path(start)])
            begins = f"mnli/{Path(start).name}, {made}"
        settings = weights | {"start": begins, "data": source}
        settings["max_seq_length"] = max_length_of(config, tokenizer, data.max_seq_length)
        settings["train_rows"] = len(parts["train"].rows)
        settings |= settings_of(task, model_args, data, FinetuneArguments(**values))
        check_settings(finished, name, settings)
        for seed in seeds:
            keep = seed == seeds[0] or args.save_all_seeds
            place = folder / name / f"seed-{seed}"
            if Path(model).resolve().is_relative_to(place.resolve()):
                raise ValueError(
                    f"--model {model} lies in {place}, which this command writes: choose another "
                    "--output_dir"
                )
            its_own = values | {"seed": seed, "output_dir": str(place)}
            runs.append(Run(name, seed, place, start, keep, settings, its_own))
        if name == "mnli":
            of_mnli[first] = settings
    # Results of tasks that are not asked for now, which results.json has too.
    check_settings(finished, None, weights)
    return runs


def settings_of(
    task: Task,
    model_args: ClassifierArguments,
    data: LabelledDataArguments,
    args: FinetuneArguments,
) -> dict:
    """What of the arguments a result of the task depends on."""
    best_of = (
        *(args.metric_for_best_model, args.greater_is_better),
        *(args.eval_strategy, args.eval_steps),
    )
    # lr_end is among them already; transformers 4 has empty keywords where 5 has none.
    keywords = None if args.lr_end else args.lr_scheduler_kwargs or None
    return {
        "rows_per_step": args.rows_per_step(),
        **{key: getattr(args, key) for key in SETTINGS},
        "lr_scheduler_kwargs": keywords,
        "best_of": args.load_best_model_at_end and list(best_of),
        "dropout": model_args.dropout(),
        "low_precision_layernorm": model_args.low_precision_layernorm,
        "tokenizer_name": model_args.tokenizer_name,
        "new_classifier": model_args.new_classifier,
        "columns": [*task.columns, data.label_column],
        "labels": task.labels and list(task.labels),
    }


def digest(settings: dict) -> str:
    """Tells settings from others. One that is None is none, as earlier versions lacked some."""
    values = {key: x for key, x in settings.items() if x is not None}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_settings(finished: dict[Path, dict], name: str | None, settings: dict):
    """ValueError: a result of this task, or of any if None, has other settings."""
    for folder, result in finished.items():
        for key, value in settings.items():
            theirs = result["settings"].get(key)
            if name in (None, result["task"]) and theirs != value:
                keep = f"give --{key} {theirs}, " if key in SETTINGS else ""
                raise ValueError(
                    f"{folder} was made with {key} {theirs}, not {value}: {keep}choose another "
                    "--output_dir, or forget all that it has with --overwrite true"
                )


# ---- results ----


def read_results(folder: Path) -> dict[Path, dict]:
    """What finetune.py wrote of its finished runs, by the run's folder."""
    results = {}
    for file in sorted(folder.glob(f"*/seed-*/{RESULT}")):
        result = results[file.parent] = read_json(file)
        if not {"task", "score", "metrics", "settings"} <= set(result):
            raise ValueError(
                f"{file} is no result of finetune.py: delete it, or forget all results with "
                "--overwrite true"
            )
        if "warmup_share" in result["settings"]:
            # As it was called.
            result["settings"]["warmup_ratio"] = result["settings"].pop("warmup_share")
    return results


def collect(folder: Path) -> dict[str, dict]:
    """All results in an output folder by task: `score` and `metrics`, each with mean and spread
    over seeds, and `runs`."""
    tasks = {}
    for result in read_results(folder).values():
        tasks.setdefault(result["task"], []).append(result)
    return {
        name: {
            "score": summary([run["score"] for run in runs]),
            "metrics": {
                metric: summary([run["metrics"][metric] for run in runs])
                for metric in runs[0]["metrics"]
            },
            "runs": runs,
        }
        for name, runs in tasks.items()
    }


def summary(values: list[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation, which a single value does not have, and number of seeds."""
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "std": spread, "seeds": len(values)}


def table(tasks: dict[str, dict]) -> str:
    """The model card's table, in per cent: each task's mean score, ± its standard deviation over
    so many seeds, and the mean of the tasks.

    Args:
        tasks: as `collect` gives them.
    """
    columns = {}
    for name in sorted(tasks, key=[*TASKS, *tasks].index):
        score = tasks[name]["score"]
        n = score["seeds"]
        spread = f" ± {100 * score['std']:.2f} (n = {n})" if n > 1 else ""
        title = TASKS[name].title if name in TASKS else name
        columns[title] = f"{100 * score['mean']:.2f}{spread}"
    if len(tasks) > 1:
        title = "Average" if set(TASKS) <= set(tasks) else "Average of these"
        columns[title] = f"{100 * mean(task['score']['mean'] for task in tasks.values()):.2f}"
    rows = (columns, ["---"] * len(columns), columns.values())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
