# SPDX-License-Identifier: Apache-2.0
"""Pre-trains MosaicBERT by masked language modelling, from scratch or from a checkpoint.

    accelerate launch train_mlm.py recipes/demo.yaml                   # minutes on a CPU, no data
    accelerate launch train_mlm.py recipes/mosaic-bert-base-128.yaml   # the paper's run, on C4
    accelerate launch train_mlm.py recipes/demo.yaml --max_steps 100   # flags override the YAML
    accelerate launch train_mlm.py --train_file 'text/*.txt' --output_dir out
    ... the same command again with --resume_from_checkpoint last, after an interruption

Arguments are in mosaic_tools/recipe.py; the model, its trainer and metrics in mlm_trainer.py there.
The output folder is a complete Hub repository: weights, config, code, tokenizer and a model card.
Without data it reads English text that Python carries.
"""

import sys
from pathlib import Path

from huggingface_hub import EvalResult
from transformers import Trainer, set_seed

from mosaic_tools.callbacks import draw_training
from mosaic_tools.cards import about_weights, write_card
from mosaic_tools.checkpoints import checkpoint_to_resume, saving
from mosaic_tools.devices import (
    attention_backend,
    leave_group,
    one_gpu_each,
    prepare_environment,
    use_all_cores,
)
from mosaic_tools.family import is_ours
from mosaic_tools.mlm_trainer import MlmTrainer, build_model
from mosaic_tools.publishing import hub_id, publish
from mosaic_tools.recipe import DataArguments, parse
from mosaic_tools.recipe_trainer import reading_rows, train_and_save
from mosaic_tools.rows import load_rows, size


def describe(trainer: Trainer, data: DataArguments) -> dict[str, str]:
    """What is about to run, for the start of the log and for the model card."""
    args, config = trainer.args, trainer.model.config
    run = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    cut = "filled with documents up to" if data.pack else "cut at"
    return {
        "model": f"{config.model_type}, {config.num_hidden_layers} layers x {config.hidden_size}, "
        f"vocabulary {config.vocab_size}, {trainer.model.num_parameters():,} parameters",
        "data": f"{data.source()}: {size(trainer.train_dataset)}",
        "held out": size(trainer.eval_dataset),
        "run": f"{run} of {args.rows_per_step()} rows, {cut} {data.max_seq_length} tokens, "
        f"{data.mlm_probability:.0%} masked ({data.eval_mlm_probability:.0%} in evaluation)",
        "split": f"{args.world_size} process(es) x {args.train_batch_size} rows x "
        f"{args.gradient_accumulation_steps} micro-batches",
        "optimizer": f"{args.optimizer()}{schedule(args)}, weight decay {args.weight_decay:g}",
        "computed in": f"{args.precision()} ({args.why_bf16}), attention "
        f"{attention_backend(trainer.model, args)}, on {args.device.type}"
        + (", compiled" if args.torch_compile else ""),
    }


def schedule(args) -> str:
    """How the learning rate changes, in words."""
    name, steps = args.lr_scheduler_type.value, args.warmup_steps
    if name == "constant":
        # Which has no warm-up, whatever is asked for.
        return ", constant"
    warmup = f"{steps:g} steps" if steps >= 1 else f"{args.share_of_warmup():.0%}"
    if name == "linear" or args.lr_end:
        name = f"{name} to {100 * args.lr_end:g}%"
    elif args.lr_scheduler_kwargs:
        name = f"{name} with {args.lr_scheduler_kwargs}"
    return f" after a warm-up of {warmup}, then {name}"


def figures(metrics: dict[str, float]) -> dict[str, str]:
    """The evaluation in words, for the model card."""
    return {
        "evaluation loss": f"{metrics['eval_loss']:.3f}",
        "masked accuracy": f"{metrics['eval_masked_accuracy']:.1%}",
        "always the commonest token": f"{metrics['eval_commonest_token_accuracy']:.1%}",
    }


def eval_results(metrics: dict[str, float], data: DataArguments) -> list[EvalResult]:
    """The evaluation for the Hub, which draws tables of it."""
    masked = f"{data.eval_mlm_probability:.0%} of tokens masked, held out"
    names = {"accuracy": ("eval_masked_accuracy", "Masked accuracy"), "loss": ("eval_loss", "Loss")}
    return [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked language modelling",
            dataset_type=hub_id(data.dataset_name) or "custom",
            dataset_name=data.source(),
            dataset_config=data.dataset_config_name,
            metric_type=kind,
            metric_name=f"{title} ({masked})",
            metric_value=metrics[key],
        )
        for kind, (key, title) in names.items()
    ]


def report(trainer: Trainer, facts: dict[str, str], metrics: dict[str, float], model_args, data):
    """Writes the picture and the model card."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    name, dataset = folder.resolve().name, hub_id(data.dataset_name)
    draw_training(trainer.state.log_history, folder / "training.png", name)
    kind = "A BERT encoder"
    if is_ours(trainer.model.config):
        kind = "A MosaicBERT encoder (ALiBi, gated MLPs, no padding inside)"
    write_card(
        folder,
        name,
        f"{kind}, pre-trained by train_mlm.py and evaluated on documents that it had not seen.\n\n"
        "![Loss, masked accuracy, learning rate and tokens per second](training.png)",
        facts,
        base_model=hub_id(model_args.model_name_or_path),
        datasets=[dataset] if dataset else None,
        eval_results=eval_results(metrics, data),
        **about_weights(args.license, args.language),
    )


def main():
    prepare_environment()
    model_args, tokenizer_args, data_args, args = parse(sys.argv[1:])
    one_gpu_each(args)
    if data_args.pack and model_args.model_type == "bert":
        raise ValueError("leave out --pack: a bert would let packed documents see each other")
    checkpoint = checkpoint_to_resume(args)
    use_all_cores(args)
    set_seed(args.seed)

    # A resumed run keeps its tokenizer: one trained again would have other ids.
    tokenizer_name = tokenizer_args.tokenizer_name or model_args.model_name_or_path
    if checkpoint:
        tokenizer_name, tokenizer_args.train_tokenizer = checkpoint, None
    train, validation, tokenizer = load_rows(data_args, tokenizer_args, tokenizer_name, args)
    with args.main_process_first():
        model = build_model(model_args, tokenizer, data_args.max_seq_length)

    trainer = MlmTrainer(model, args, train, validation, tokenizer, data_args)
    facts = describe(trainer, data_args)
    with reading_rows(args):
        if not train_and_save(trainer, facts, checkpoint):
            return
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        with saving("the report", args):
            # Not into all_results.json, which a full disk may have torn, and Trainer reads first.
            trainer.save_metrics("eval", metrics, combined=False)
            if trainer.is_world_process_zero():
                report(trainer, facts | figures(metrics), metrics, model_args, data_args)
    if trainer.is_world_process_zero() and args.publish_to:
        print(publish(Path(args.output_dir), args.publish_to, args.private, args.revision))


if __name__ == "__main__":
    main()
    leave_group()
