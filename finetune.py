# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on GLUE, or on rows of your own, to classify texts or pairs or to score them.

    accelerate launch finetune.py --model FOLDER_OR_ID --task all --output_dir runs/glue
    accelerate launch finetune.py --model FOLDER_OR_ID --task cola rte --data_dir glue --seeds 1 2 \
        --output_dir runs/glue
    accelerate launch finetune.py --model FOLDER_OR_ID --train_file train.csv \
        --validation_file dev.csv --output_dir runs/mine

Tasks, recipes and metrics are in mosaic_tools/glue_tasks.py, data in labelled_data.py, the model in
classifiers.py there. Every finished run leaves TASK/seed-N/result.json in output_dir, and the same
command again runs the others only; results.json has them all. A task's first seed also leaves a
complete Hub repository: weights, config, code, tokenizer and a model card.
"""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import EvalResult
from transformers import DataCollatorWithPadding, Trainer, set_seed
from transformers.hf_argparser import HfArgumentParser

from mosaic_tools.callbacks import LogFile
from mosaic_tools.cards import about_weights, write_card
from mosaic_tools.classifiers import (
    ClassifierArguments,
    build_classifier,
    has_token_types,
    is_trained_on,
    label_ids,
    max_length_of,
    read_config,
    read_tokenizer,
)
from mosaic_tools.devices import attention_backend, one_gpu_each, use_all_cores
from mosaic_tools.glue_tasks import (
    RESULT,
    RESULTS,
    SEEDS,
    TASKS,
    Task,
    collect,
    metrics,
    read_results,
    table,
    write_json,
)
from mosaic_tools.labelled_data import LabelledDataArguments, Part, describe, encode, load_task
from mosaic_tools.publishing import hub_id, publish
from mosaic_tools.recipe import RecipeArguments, option
from mosaic_tools.tokenization import make_tokenizer_portable

GLUE = "nyu-mll/glue"
# Of the arguments, what a result depends on.
SETTINGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm"),
    *("warmup_share", "warmup_steps", "lr_end", "lr_scheduler_type", "bf16", "fp16", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
)


@dataclass
class FinetuneArguments(RecipeArguments):
    """TrainingArguments, of which a task has its own values unless they are given."""

    seeds: list[int] | None = option(None, f"None: as many of {SEEDS} as published for the task")
    save_all_seeds: bool = option(False, "keep the model of every seed, not of the first only")
    save_strategy: str = "no"

    def __post_init__(self):
        super().__post_init__()
        if self.resume_from_checkpoint:
            raise ValueError(
                "leave out --resume_from_checkpoint: the same command again runs what is unfinished"
            )


def parse(argv: list[str]):
    groups = (ClassifierArguments, LabelledDataArguments, FinetuneArguments)
    return HfArgumentParser(groups).parse_args_into_dataclasses(argv, look_for_args_file=False)


# ---- a run ----


class FinetuneTrainer(Trainer):
    """Trainer that decays all parameters, as published, and saves tokenizers that every supported
    transformers reads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Models that take num_items_in_batch ignore it when they classify.
        self.model_accepts_loss_kwargs = False

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            config, tokenizer = self.model.config, self.processing_class
            wanted = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
            make_tokenizer_portable(
                output_dir or self.args.output_dir,
                max_length_of(config, tokenizer, wanted),
                has_token_types(config),
            )


@dataclass
class Run:
    """A task with one seed.

    Args:
        start: folder or Hub id of the weights to start from.
        keep: whether the model is saved.
        settings: what the result depends on, besides the seed.
    """

    name: str
    seed: int
    folder: Path
    start: str
    keep: bool
    settings: dict


def finetune(run: Run, task: Task, parts: dict[str, Part], tokenizer, model_args, args) -> dict:
    """Trains, evaluates, and writes the run's folder, its result last."""
    set_seed(args.seed)
    max_length = run.settings["max_seq_length"]
    with args.main_process_first():
        model = build_classifier(model_args, run.start, task, tokenizer, max_length)
        ids, types = task.labels and label_ids(model.config), has_token_types(model.config)
        rows = {x: encode(y, task, ids, tokenizer, max_length, types) for x, y in parts.items()}
    trainer = FinetuneTrainer(
        model,
        args,
        DataCollatorWithPadding(tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows[next(iter(task.validation.values()))],
        processing_class=tokenizer,
        compute_metrics=lambda found: metrics(found.predictions, found.label_ids),
        callbacks=[LogFile()],
    )
    backend = attention_backend(model, args)
    trainer.accelerator.print(
        f"{run.folder}: from {run.start}, {args.precision()} ({args.why_bf16}), attention {backend}"
    )
    seconds = trainer.train().metrics["train_runtime"]
    found = {}
    for suffix, split in task.validation.items():
        output = trainer.predict(rows[split])
        values = metrics(output.predictions, output.label_ids)
        found |= {name + suffix: value for name, value in values.items()}
    result = {
        "task": run.name,
        "seed": run.seed,
        "score": sum(found[name] for name in task.score) / len(task.score),
        "metrics": found,
        "train_seconds": seconds,
        "kept": run.keep,
        "settings": run.settings,
    }
    if run.keep:
        trainer.save_model()
    if trainer.is_world_process_zero():
        if run.keep:
            write_task_card(run, task, found, args, model_args)
        write_json(run.folder / RESULT, result)
    return result


def write_task_card(run: Run, task: Task, found: dict, args, model_args):
    length = (
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    start = hub_id(model_args.model) or Path(model_args.model).name
    if run.settings["start"] != "model":
        start = f"{start}, fine-tuned on MNLI ({Path(run.start).name})"
    facts = {
        "task": f"{task.title}: {', '.join(task.labels) if task.labels else 'a score'}",
        "started from": start,
        "run": f"{length} of {run.settings['train_rows']:,} rows, {args.rows_per_step()} a step, "
        f"cut at {run.settings['max_seq_length']} tokens, seed {run.seed}",
        "optimizer": f"{args.optim.value}, learning rate {args.learning_rate:g}, weight decay "
        f"{args.weight_decay:g}",
    } | {f"{name}, validation": f"{value:.4f}" for name, value in found.items()}
    pair = '{"text": "A sentence.", "text_pair": "Another one."}'
    write_card(
        run.folder,
        f"{Path(model_args.model).name}-{run.name}",
        f"Fine-tuned on {task.title} by finetune.py.",
        facts,
        example_input=pair if len(task.columns) == 2 else None,
        base_model=hub_id(model_args.model),
        datasets=[GLUE] if run.name in TASKS else None,
        eval_results=eval_results(run.name, task, found),
        **about_weights(args.license, args.language),
    )


def eval_results(name: str, task: Task, found: dict[str, float]) -> list[EvalResult]:
    """The evaluation for the Hub, by its names of metrics, which draws tables of it.

    Args:
        name: of the task.
        found: values by the names of `metrics`, each with its split's suffix.
    """
    is_glue = name in TASKS
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification" if task.labels else "Regression on texts",
            dataset_type=GLUE if is_glue else "custom",
            dataset_name=f"GLUE {task.title}" if is_glue else task.title,
            dataset_config=name if is_glue else None,
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=found[metric + suffix],
        )
        for suffix, split in task.validation.items()
        for metric, (kind, title) in metric_names(task).items()
    ]


def metric_names(task: Task) -> dict[str, tuple[str, str]]:
    """The Hub's type and a title for each of `metrics` that such a task has."""
    if not task.labels:
        return {
            "pearson": ("pearsonr", "Pearson's correlation"),
            "spearman": ("spearmanr", "Spearman's correlation"),
            "loss": ("mse", "Mean squared error"),
        }
    return {
        "accuracy": ("accuracy", "Accuracy"),
        "f1": ("f1", "F1" if len(task.labels) == 2 else "F1, mean over labels"),
        "matthews": ("matthews_correlation", "Matthews' correlation"),
        "loss": ("loss", "Loss"),
    }


# ---- all runs ----


def finished_runs(args: FinetuneArguments) -> dict[Path, dict]:
    """Results in output_dir by folder, none that --overwrite forgets.

    Raises:
        ValueError: there is no output_dir, or it holds something else.
    """
    if not args.output_dir:
        raise ValueError("give --output_dir, the folder that models and results are written to")
    folder = Path(args.output_dir)
    if args.overwrite:
        return {}
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise ValueError(
            f"output_dir {folder} is not empty and has no {RESULTS}: choose another, or write into "
            "it with --overwrite true"
        )
    return read_results(folder)


def plan(loaded: dict, finished: dict[Path, dict], config, tokenizer, argv) -> list[Run]:
    """The runs asked for, finished ones included.

    Args:
        loaded: `load_task`'s answers by task.

    Raises:
        ValueError: the model was trained on other labels, or a result in output_dir is of another
            model, other data or other settings.
    """
    model_args, data, args = parse(argv)
    folder, model = Path(args.output_dir), model_args.model
    weights = {"weights": model_args.version()}
    of_mnli = {x for x, result in finished.items() if result["task"] == "mnli" and result["kept"]}
    runs = []
    for name, (task, parts, source) in loaded.items():
        seeds = list(dict.fromkeys(args.seeds or SEEDS[: task.seeds]))
        first = folder / "mnli" / f"seed-{seeds[0]}"
        start = model
        if task.from_mnli and of_mnli:
            start = str(first if first in of_mnli else min(of_mnli))
        if start == model and not model_args.new_classifier:
            is_trained_on(model, config, task)
        own = parse([*task.flags(), *argv])[-1]
        place = "model" if start == model else f"mnli/{Path(start).name}"
        settings = weights | {"start": place, "data": source}
        settings["max_seq_length"] = max_length_of(config, tokenizer, data.max_seq_length)
        settings["train_rows"] = len(parts["train"].rows)
        settings["rows_per_step"] = own.rows_per_step()
        settings |= {key: getattr(own, key) for key in SETTINGS}
        settings["best_of"] = own.load_best_model_at_end and [
            *(own.metric_for_best_model, own.greater_is_better, own.eval_strategy, own.eval_steps)
        ]
        settings["dropout"] = model_args.dropout()
        settings["low_precision_layernorm"] = model_args.low_precision_layernorm
        settings["tokenizer_name"] = model_args.tokenizer_name
        settings["new_classifier"] = model_args.new_classifier
        settings["columns"] = [*task.columns, data.label_column]
        settings["labels"] = task.labels and list(task.labels)
        check_settings(finished, name, settings)
        for seed in seeds:
            keep = seed == seeds[0] or args.save_all_seeds
            runs.append(Run(name, seed, folder / name / f"seed-{seed}", start, keep, settings))
        if name == "mnli":
            of_mnli.add(first)
    # Results of tasks that are not asked for now, which results.json has too.
    check_settings(finished, None, weights)
    return runs


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


def main(argv: list[str]):
    model_args, data, args = parse(argv)
    if not model_args.model:
        raise ValueError("give --model, a folder or a Hub id")
    if any(word.split("=")[0] == "--seed" for word in argv):
        raise ValueError("give --seeds, one or more, in place of --seed")
    names = data.names()
    if args.publish_to and len(names) > 1:
        raise ValueError(f"--push_to_hub is for one model: give one --task of {', '.join(names)}")
    one_gpu_each(args)
    use_all_cores(args)
    main_process = args.process_index == 0
    finished = broadcast_object_list([finished_runs(args) if main_process else None])[0]
    with args.main_process_first():
        config = read_config(model_args.model, model_args.trust_remote_code)
        tokenizer = read_tokenizer(model_args, config)
        loaded = {name: load_task(name, data) for name in names}
    runs = plan(loaded, finished, config, tokenizer, argv)
    folder = Path(args.output_dir)
    record = {"model": model_args.model, "weights": runs[0].settings["weights"]}
    if main_process:
        for file in folder.glob(f"*/seed-*/{RESULT}") if args.overwrite else ():
            file.unlink()
        write_json(folder / RESULTS, record | {"tasks": collect(folder)})
        for task, parts, _ in loaded.values():
            print(describe(task, parts))
    for run in runs:
        result = finished.get(run.folder)
        if result and (result["kept"] or not run.keep):
            if main_process:
                print(f"{run.folder} is finished")
            continue
        task, parts, _ = loaded[run.name]
        its_own = ["--seed", str(run.seed), "--output_dir", str(run.folder)]
        # Made when the run begins: it sets the precision of the process.
        run_args = parse([*task.flags(), *argv, *its_own])[-1]
        finetune(run, task, parts, tokenizer, model_args, run_args)
        gc.collect()
        torch.cuda.empty_cache()
        if main_process:
            write_json(folder / RESULTS, record | {"tasks": collect(folder)})
    if main_process:
        print(f"\n{table(collect(folder))}\n\n{folder / RESULTS}")
        if args.publish_to:
            print(publish(runs[0].folder, args.publish_to, args.private, args.revision))


if __name__ == "__main__":
    main(sys.argv[1:])
