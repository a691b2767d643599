# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on GLUE, or on rows of your own, to classify texts or pairs or to score them.

    accelerate launch finetune.py --model FOLDER_OR_ID --task all --output_dir runs/glue
    accelerate launch finetune.py --model FOLDER_OR_ID --task cola rte --data_dir glue --seeds 1 2 \
        --output_dir runs/glue
    accelerate launch finetune.py --model FOLDER_OR_ID --train_file train.csv \
        --validation_file dev.csv --output_dir runs/mine
    accelerate launch finetune.py RECIPE.yaml --model FOLDER_OR_ID   # of ours or mosaicml/examples

Tasks, recipes and metrics are in mosaic_tools/glue_tasks.py, data in labelled_data.py, the model in
classifiers.py, arguments and the plan of all runs in runs.py there. Every finished run leaves
TASK/seed-N/result.json in output_dir, and the same command again runs the others only; results.json
has them all. A task's first seed also leaves a complete Hub repository: weights, config, code,
tokenizer and a model card.
"""

import gc
import shutil
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import DataCollatorWithPadding, set_seed

from mosaic_tools.callbacks import LogFile
from mosaic_tools.cards import about_weights, write_card
from mosaic_tools.checkpoints import saving
from mosaic_tools.classifiers import (
    ClassifierArguments,
    build_classifier,
    label_ids,
    read_config,
    read_tokenizer,
)
from mosaic_tools.devices import (
    attention_backend,
    leave_group,
    one_gpu_each,
    prepare_environment,
    use_all_cores,
)
from mosaic_tools.files import write_json
from mosaic_tools.glue_tasks import GLUE, TASKS, Task, eval_results, metrics
from mosaic_tools.labelled_data import LabelledDataArguments, Part, describe, encode, load_task
from mosaic_tools.publishing import hub_id, publish
from mosaic_tools.recipe import read_arguments
from mosaic_tools.recipe_trainer import RecipeTrainer, has_token_types, reading_rows
from mosaic_tools.runs import (
    RESULT,
    RESULTS,
    FinetuneArguments,
    Run,
    collect,
    finished_runs,
    plan,
    table,
)

GROUPS = (ClassifierArguments, LabelledDataArguments, FinetuneArguments)


def parse(argv: list[str]) -> tuple[ClassifierArguments, LabelledDataArguments, dict]:
    """The model, the data, and of FinetuneArguments the values given: tasks fill in their own."""
    model, data, given = read_arguments(argv, GROUPS)
    return ClassifierArguments(**model), LabelledDataArguments(**data), given


def build(run: Run, task: Task, parts: dict[str, Part], tokenizer, model_args, args):
    """The model that a run trains, and the encoded rows of each part."""
    set_seed(args.seed)
    max_length = run.settings["max_seq_length"]
    with args.main_process_first():
        model = build_classifier(model_args, run.start, task, tokenizer, max_length)
        ids, types = task.labels and label_ids(model.config), has_token_types(model.config)
        rows = {x: encode(y, task, ids, tokenizer, max_length, types) for x, y in parts.items()}
    return model, rows


def finetune(run: Run, task: Task, model, rows: dict, tokenizer, model_args, args):
    """Trains, evaluates, and writes the run's folder, its result last."""
    # Of two labels F1 is of the task's second, whatever id the model has for it.
    two = len(task.labels or ()) == 2
    positive = label_ids(model.config)[task.labels[1]] if two else None
    trainer = RecipeTrainer(
        model,
        args,
        DataCollatorWithPadding(tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows[next(iter(task.validation.values()))],
        processing_class=tokenizer,
        compute_metrics=lambda found: metrics(found.predictions, found.label_ids, positive),
        callbacks=[LogFile()],
    )
    # Models that take num_items_in_batch ignore it when they classify.
    trainer.model_accepts_loss_kwargs = False
    backend = attention_backend(model, args)
    trainer.accelerator.print(
        f"{run.folder}: from {run.start}, {args.precision()} ({args.why_bf16}), attention {backend}"
    )
    if trainer.is_world_process_zero():
        # Of a run that was killed; one of them could pass for the best of this.
        for checkpoint in run.folder.glob("checkpoint-*/"):
            shutil.rmtree(checkpoint)
    seconds = trainer.train().metrics["train_runtime"]
    found = {}
    for suffix, split in task.validation.items():
        output = trainer.predict(rows[split])
        values = metrics(output.predictions, output.label_ids, positive)
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
    with saving("the result", args):
        if run.keep:
            trainer.save_model()
        if trainer.is_world_process_zero():
            if run.keep:
                write_task_card(run, task, found, args, model_args)
            write_json(run.folder / RESULT, result)


def write_task_card(run: Run, task: Task, found: dict, args, model_args):
    length = (
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    start = hub_id(model_args.model) or Path(model_args.model).name
    if run.start != model_args.model:
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


def write_results(args: FinetuneArguments, record: dict):
    """results.json, of all that output_dir has."""
    folder = Path(args.output_dir)
    with saving(RESULTS, args):
        write_json(folder / RESULTS, record | {"tasks": collect(folder)})


def main(argv: list[str]):
    prepare_environment()
    model_args, data, given = parse(argv)
    args = FinetuneArguments(**given)
    if not model_args.model:
        raise ValueError("give --model, a folder or a Hub id")
    if "seed" in given:
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
    runs = plan(loaded, finished, config, tokenizer, model_args, data, given)
    folder = Path(args.output_dir)
    record = {"model": model_args.model, "weights": runs[0].settings["weights"]}
    if main_process:
        for task, parts, _ in loaded.values():
            print(describe(task, parts))
    for run in runs:
        result = finished.get(run.folder)
        if result and (result["kept"] or not run.keep):
            if main_process:
                print(f"{run.folder} is finished")
            continue
        task, parts, _ = loaded[run.name]
        prepare_environment()
        run_args = FinetuneArguments(**run.values)
        model, rows = build(run, task, parts, tokenizer, model_args, run_args)
        # Nothing is deleted or written before there is a model.
        if main_process and run is runs[0]:
            for file in folder.glob(f"*/seed-*/{RESULT}") if args.overwrite else ():
                file.unlink()
            write_results(args, record)
        with reading_rows(run_args):
            finetune(run, task, model, rows, tokenizer, model_args, run_args)
        del model, rows
        gc.collect()
        torch.cuda.empty_cache()
        if main_process:
            write_results(args, record)
    if main_process:
        print(f"\n{table(collect(folder))}\n\n{folder / RESULTS}")
        if args.publish_to:
            print(publish(runs[0].folder, args.publish_to, args.private, args.revision))


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_group()
