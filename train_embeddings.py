# SPDX-License-Identifier: Apache-2.0
"""Trains embeddings contrastively, from a pre-trained encoder, by sentence-transformers.

    accelerate launch train_embeddings.py recipes/embeddings-demo.yaml   # minutes on a CPU, no data
    accelerate launch train_embeddings.py --model_name_or_path FOLDER_OR_ID \
        --train_file pairs.jsonl --output_dir runs/pairs
    accelerate launch train_embeddings.py --model_name_or_path runs/pairs \
        --train_file pairs.jsonl --mine_hard_negatives 4 --output_dir runs/hard
    ... the same command again with --resume_from_checkpoint last, after an interruption

Data and its arguments are in mosaic_tools/pairs.py; the model, losses, evaluation and trainer in
embedding_trainer.py there. The output folder is a complete Hub repository, for
sentence-transformers and servers. Without data it reads text that Python carries.
"""

import sys
from pathlib import Path

from huggingface_hub import EvalResult
from transformers import set_seed

from mosaic_tools.callbacks import OF_EMBEDDINGS, draw_training
from mosaic_tools.cards import about_weights, write_card
from mosaic_tools.checkpoints import checkpoint_to_resume, saving
from mosaic_tools.devices import (
    attention_backend,
    leave_group,
    one_gpu_each,
    prepare_environment,
    use_all_cores,
)
from mosaic_tools.embedding_trainer import (
    CORRELATION,
    RANKING,
    EmbedderArguments,
    EmbeddingArguments,
    EmbeddingTrainer,
    baselines,
    build_embedder,
    build_evaluator,
    build_loss,
    check_sources,
    describe_loss,
    prompts_of_columns,
    with_negatives,
)
from mosaic_tools.pairs import PairArguments, load_pairs, seen_in_training
from mosaic_tools.publishing import hub_id, publish
from mosaic_tools.recipe import parse
from mosaic_tools.recipe_trainer import reading_rows, train_and_save


def describe(
    trainer: EmbeddingTrainer, model: EmbedderArguments, data: PairArguments, held_out: dict
) -> dict[str, str]:
    """What is about to run, for the start of the log and for the model card."""
    seen, texts = seen_in_training(trainer.train_dataset, held_out)
    args, encoder = trainer.args, trainer.model[0].model
    run = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    sources = {
        name: f"{len(rows):,} rows of {', '.join(rows.column_names)}"
        for name, rows in trainer.train_dataset.items()
    }
    for name, weight in zip(sources, args.source_weights or [], strict=False):
        sources[name] += f", {weight / sum(args.source_weights):.0%} of the batches"
    losses = dict.fromkeys(describe_loss(x, model) for x in trainer.train_dataset.values())
    prompts = " and ".join(repr(x) for x in trainer.model.prompts.values() if x)
    return {
        "started from": hub_id(model.model_name_or_path) or Path(model.model_name_or_path).name,
        "model": f"{encoder.config.model_type}, {encoder.num_parameters():,} parameters, the mean "
        "over a text's tokens",
        "data": f"{data.source()}: " + "; ".join(f"{x}: {y}" for x, y in sources.items()),
        "held out": f"{sum(map(len, held_out.values())):,} rows; of their {texts:,} texts training "
        f"has {seen:,} too",
        "prompts": prompts or "none",
        "run": f"{run} of {args.rows_per_step()} rows, texts cut at {trainer.model.max_seq_length} "
        "tokens",
        "loss": "; ".join(losses),
        "optimizer": f"{args.optim.value}, learning rate {args.learning_rate:g} after a warm-up of "
        f"{args.share_of_warmup():.0%}, weight decay {args.weight_decay:g}",
        "computed in": f"{args.precision()} ({args.why_bf16}), the evaluation too; attention "
        f"{attention_backend(encoder, args)}, on {args.device.type}",
    }


def figures(found: dict[str, dict[str, float]], dims: list[int]) -> dict[str, str]:
    """Each metric's value by when or by what it was found, of whole embeddings and of their first
    dimensions, for the model card."""
    parts = {"held out": "eval_"} | {
        f"held out, first {x} dimensions": f"eval_dim_{x}_" for x in dims
    }
    return {
        f"{name}, {part}": ", ".join(f"{x[key]:.3f} {by}" for by, x in found.items() if key in x)
        for part, prefix in parts.items()
        for metric, name in (RANKING | CORRELATION).items()
        if (key := metric.replace("eval_", prefix)) in found["after training"]
    }


def eval_results(metrics: dict[str, float], data: PairArguments, when: str) -> list[EvalResult]:
    """The evaluation for the Hub, which draws tables of it."""
    return [
        EvalResult(
            task_type="information-retrieval" if key in RANKING else "semantic-similarity",
            task_name="Retrieval" if key in RANKING else "Semantic similarity",
            dataset_type=hub_id(data.dataset_name) or "custom",
            dataset_name=f"{data.source()}, held out",
            dataset_config=data.dataset_config_name,
            metric_type=key.removeprefix("eval_"),
            metric_name=f"{name} {when}",
            metric_value=metrics[key],
        )
        for key, name in (RANKING | CORRELATION).items()
        if key in metrics
    ]


def report(trainer, facts: dict[str, str], found: dict[str, dict[str, float]], model_args, data):
    """Writes the picture and the model card, of what was found before and after training."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    name, dataset = folder.resolve().name, hub_id(data.dataset_name)
    draw_training(trainer.state.log_history, folder / "training.png", name, OF_EMBEDDINGS)
    write_card(
        folder,
        name,
        "Embeddings of texts, trained contrastively by train_embeddings.py and evaluated on pairs "
        "that were held out.\n\n![Loss and held-out figures](training.png)",
        facts,
        base_model=hub_id(model_args.model_name_or_path),
        datasets=[dataset] if dataset else None,
        eval_results=eval_results(found["after training"], data, "after training")
        + eval_results(found["before"], data, "before training"),
        **about_weights(args.license, args.language),
    )


def main():
    prepare_environment()
    groups = (EmbedderArguments, PairArguments, EmbeddingArguments)
    model_args, data, args = parse(sys.argv[1:], groups)
    one_gpu_each(args)
    checkpoint = checkpoint_to_resume(args)
    use_all_cores(args)
    set_seed(args.seed)

    with args.main_process_first():
        train, held_out = load_pairs(data)
        embedder = build_embedder(model_args, data).to(args.device)
    if data.mine_hard_negatives:
        batch = args.per_device_eval_batch_size
        train = with_negatives(train, data.mine_hard_negatives, embedder, batch)
    gather = args.world_size > 1
    check_sources(train, args)
    args.prompts = prompts_of_columns(train, embedder.prompts)
    # A resumed run has the figures before training in its log.
    args.eval_on_start = checkpoint is None
    size = embedder[0].model.config.hidden_size
    dims = [x for x in model_args.matryoshka_dims or [] if x < size]
    evaluator = build_evaluator(held_out, args.per_device_eval_batch_size, dims)
    losses = {name: build_loss(x, embedder, model_args, gather) for name, x in train.items()}
    trainer = EmbeddingTrainer(embedder, args, train, loss=losses, evaluator=evaluator)
    facts = describe(trainer, model_args, data, held_out)
    with reading_rows(args):
        if not train_and_save(trainer, facts, checkpoint):
            return
        after = trainer.evaluate()
        found = {"after training": after}
        if trainer.is_world_process_zero():
            found["before"] = next(x for x in trainer.state.log_history if "eval_runtime" in x)
            found |= baselines(embedder, evaluator, args.seed)
            for name, value in figures(found, dims).items():
                print(f"{name}: {value}")
        with saving("the report", args):
            trainer.save_metrics("eval", after, combined=False)
            if trainer.is_world_process_zero():
                report(trainer, facts | figures(found, dims), found, model_args, data)
    if trainer.is_world_process_zero() and args.publish_to:
        print(publish(Path(args.output_dir), args.publish_to, args.private, args.revision))


if __name__ == "__main__":
    main()
    leave_group()
