# SPDX-License-Identifier: Apache-2.0
"""Pre-trains MosaicBERT by masked language modelling, from scratch or from a checkpoint.

    accelerate launch train_mlm.py recipes/demo.yaml                   # minutes on a CPU, no data
    accelerate launch train_mlm.py recipes/mosaic-bert-base-128.yaml   # the paper's run, on C4
    accelerate launch train_mlm.py recipes/demo.yaml --max_steps 100   # flags override the YAML
    accelerate launch train_mlm.py --train_file 'text/*.txt' --output_dir out
    ... the same command again with --resume_from_checkpoint last, after an interruption

Arguments are in recipe.py, text and tokenizer in prepare_data.py, masking in mlm_batches.py, what
is logged and saved in train_callbacks.py. The output folder is a complete Hub repository: weights,
config, code, tokenizer and a model card. Without data it reads English text that Python carries.
"""

import math
import os
import sys
from pathlib import Path

import datasets.distributed
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from huggingface_hub import EvalResult
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, set_seed

from mlm_batches import EndlessStream, MaskingCollator
from mosaic_tools.family import HERE, is_ours, load, model_class, read_config
from prepare_data import (
    choose_tokenizer,
    encode,
    is_stream,
    largest_id,
    load_documents,
    load_prepared,
    size,
    usable_cores,
)
from publishing import (
    about_weights,
    load_tokenizer,
    make_tokenizer_portable,
    publish,
    write_card,
)
from recipe import DataArguments, ModelArguments, RecipeArguments, TokenizerArguments, parse
from train_callbacks import (
    COMPLETE,
    Checkpoints,
    Later,
    LogFile,
    MaskEpoch,
    StopOnSigterm,
    Throughput,
    change_of_precision,
    draw_training,
    newest_checkpoint,
    saving,
    what_is_torn,
)

# Every evaluation masks the same tokens, whatever the training seed.
EVALUATION_SEED = 17


# ---- model ----


def build_model(args: ModelArguments, tokenizer, max_seq_length: int):
    """The model to train: by this folder's code, or transformers' BERT of the same sizes."""
    if args.model_name_or_path:
        return continued_model(args, tokenizer, max_seq_length)
    length = args.alibi_starting_size or max_seq_length
    values = {
        "vocab_size": -(-(largest_id(tokenizer) + 1) // 64) * 64,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": length,
        **args.shape(),
        **args.dropout(),
    }
    if args.model_type == "bert":
        config = AutoConfig.for_model("bert", **values)
    else:
        values["alibi_starting_size"] = length
        values["low_precision_layernorm"] = args.low_precision_layernorm
        config = AutoConfig.from_pretrained(HERE, trust_remote_code=True, **values)
    return AutoModelForMaskedLM.from_config(
        config, trust_remote_code=True, attn_implementation=args.attn_implementation
    )


def continued_model(args: ModelArguments, tokenizer, max_seq_length: int):
    """The weights of a checkpoint, whatever code it brings, in this folder's model.

    Raises:
        ValueError: it is no MosaicBERT, or lacks something, an MLM head unless args.new_head; a
            shape is given too; the tokenizer is another than the checkpoint's.
    """
    source = args.model_name_or_path
    if args.shape():
        raise ValueError(f"{source} has its own shape: leave out {args.shape()}")
    config = read_config(source)
    if largest_id(tokenizer) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest_id(tokenizer)}, {source} a "
            f"vocabulary of {config.vocab_size}: give the --tokenizer_name it was trained with"
        )
    if not has_vocabulary_of(source, tokenizer):
        raise ValueError(
            f"the tokenizer has other entries than that of {source}: leave out "
            "--tokenizer_name and --train_tokenizer"
        )
    length = args.alibi_starting_size or max(config.alibi_starting_size, max_seq_length)
    config.alibi_starting_size = config.max_position_embeddings = length
    config.low_precision_layernorm = args.low_precision_layernorm
    config.update(args.dropout())
    config.pad_token_id = tokenizer.pad_token_id
    model, _ = load(
        model_class("AutoModelForMaskedLM"),
        source,
        config,
        other_head=args.new_head,
        flag="--new_head true",
        attn_implementation=args.attn_implementation,
    )
    return model


def has_vocabulary_of(checkpoint: str, tokenizer) -> bool:
    """Whether the checkpoint's tokenizer has the same entries, or it has none."""
    try:
        return load_tokenizer(checkpoint).get_vocab() == tokenizer.get_vocab()
    except ValueError:
        return True


def attention_backend(model, args: RecipeArguments) -> str:
    """The backend that the model will choose on this device, in this dtype."""
    config = model.config
    if not is_ours(config):
        return config._attn_implementation
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    head_dim = config.hidden_size // config.num_attention_heads
    choose_backend = sys.modules[type(model).__module__].choose_backend
    return choose_backend(config._attn_implementation, args.device, dtype, head_dim)


# ---- training ----


class MlmTrainer(Trainer):
    """Trainer for rows of token ids, in training and evaluation masked each in its own way.

    Decays all parameters, as published; reads streams by process and resumes them in their place;
    logs throughput; stops where the loss is not finite or has risen by more than `divergence`, with
    the batch saved; saves tokenizers that every supported transformers reads.

    What the host reads of a GPU in a step: the loss of the micro-batch before, and with several
    processes the SIGTERM flag of the step before, each by an event, so that it waits for nothing
    queued since. At a log transformers reads the loss and the norm of the gradients.
    """

    def __init__(self, model, args, train_rows, eval_rows, tokenizer, data: DataArguments):
        collator = MaskingCollator(
            tokenizer, data.mlm_probability, args.seed, unpads=is_ours(model.config)
        )
        self.eval_collator = MaskingCollator(tokenizer, data.eval_mlm_probability, EVALUATION_SEED)
        self.throughput = Throughput(model, args.peak_tflops)
        self.sigterm = StopOnSigterm()
        self.streams = is_stream(train_rows)
        # A stream is put back in its place, instead of reading again all that was read.
        args.ignore_data_skip = self.streams
        self.resumed_from = self.unchecked = None
        super().__init__(
            model,
            args,
            collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            compute_metrics=masked_accuracy,
            preprocess_logits_for_metrics=most_likely_tokens,
            callbacks=[
                # Before the clock, which saving does not count for.
                Checkpoints(self.streams),
                self.throughput,
                self.sigterm,
                LogFile(),
                MaskEpoch(collator),
            ],
        )
        # transformers' BERT takes num_items_in_batch and ignores it.
        self.model_accepts_loss_kwargs = is_ours(model.config)

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.resumed_from = resume_from_checkpoint
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.check_loss()
        return result

    def get_train_dataloader(self):
        return self.stream_loader() if self.streams else super().get_train_dataloader()

    def stream_loader(self):
        """The part of the stream that this process reads, from where a resumed run left it."""
        args = self.args
        rows = datasets.distributed.split_dataset_by_node(
            self.train_dataset, args.process_index, args.world_size
        )
        loader = StatefulDataLoader(
            EndlessStream(rows),
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            # A worker needs a file of its own.
            num_workers=min(args.dataloader_num_workers, rows.num_shards),
            pin_memory=args.dataloader_pin_memory,
            # Its own, or a resumed run would draw other dropout.
            generator=torch.Generator(),
        )
        if self.resumed_from:
            Checkpoints.load_place(loader, self.resumed_from, args)
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # A stream's batches are still on the CPU; to move them later would wait for the device.
        moved = (send_to_device(x, device, non_blocking=True) for x in epoch_iterator)
        return super().get_batch_samples(moved, num_batches, device)

    def training_step(self, model, inputs, *args, **kwargs):
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.check_loss()
        self.unchecked = self.state.global_step + 1, inputs, Later(loss)
        return loss

    def check_loss(self):
        """Stops if the loss of the micro-batch before is not finite."""
        if self.unchecked and not math.isfinite(loss := self.unchecked[2].read()):
            self.stop_with_batch(f"the loss is {loss}")

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= self.throughput.report(self.accelerator)
        super().log(logs, *args, **kwargs)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        if "loss" in logs and losses[-1] > min(losses) + self.args.divergence:
            self.stop_with_batch(
                f"the loss rose from {min(losses):.3f} to {losses[-1]:.3f}, by more than "
                f"--divergence {self.args.divergence:g}"
            )

    def stop_with_batch(self, reason: str):
        """Saves the last batch looked at and raises FloatingPointError."""
        step, inputs, _ = self.unchecked
        folder = Path(self.args.output_dir)
        file = folder / f"step-{step}-process-{self.args.process_index}.safetensors"
        packed = {f"batch.{name}": x for name, x in inputs.get("batch", {}).items()}
        tensors = {k: x for k, x in (inputs | packed).items() if isinstance(x, torch.Tensor)}
        try:
            save_file({k: x.contiguous() for k, x in tensors.items()}, file)
            where = f"is in {file}"
        except (OSError, SafetensorError) as error:
            where = f"could not be saved ({error})"
        checkpoint, _ = newest_checkpoint(folder)
        raise FloatingPointError(
            f"stopped in step {step}: {reason}. Its batch {where}; the last complete "
            f"checkpoint: {checkpoint or 'none'}. Try a lower --learning_rate, a longer "
            "--warmup_share or --max_grad_norm 1"
        )

    def _save_checkpoint(self, *args, **kwargs):
        # No checkpoint of weights that a loss that is not finite has reached.
        self.check_loss()
        name = f"checkpoint-{self.state.global_step}"
        with saving(name, self.args.output_dir):
            # Written again, it is not complete until it is.
            if self.is_world_process_zero():
                Path(self.args.output_dir, name, COMPLETE).unlink(missing_ok=True)
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            make_tokenizer_portable(folder, self.model.config.max_position_embeddings)


def most_likely_tokens(logits, labels):
    """(batch, seqlen, vocab) -> (batch, seqlen): all that the metrics need of the logits."""
    return logits.argmax(-1)


def masked_accuracy(evaluated) -> dict[str, float]:
    """Share of masked tokens guessed, and what always guessing the commonest of them would give."""
    masked = evaluated.label_ids != -100
    labels, guesses = evaluated.label_ids[masked], evaluated.predictions[masked]
    count = max(len(labels), 1)
    return {
        "masked_accuracy": float((guesses == labels).sum() / count),
        "commonest_token_accuracy": float(np.bincount(labels, minlength=1).max() / count),
    }


# ---- the run ----


def checkpoint_to_resume(args: RecipeArguments) -> str | None:
    """What `choose_checkpoint` says in the main process, for all: they may see other disks."""
    choice = [choose_checkpoint(args) if args.process_index == 0 else None]
    return broadcast_object_list(choice)[0]


def choose_checkpoint(args: RecipeArguments) -> str | None:
    """The checkpoint asked for, None to start anew.

    Torn checkpoints are named and passed over by 'last', which starts anew if none is complete.

    Raises:
        ValueError: there is no output_dir, files would be overwritten, or the checkpoint asked for
            is not there, not complete, or older than another, which 'last' would take.
    """
    if not args.output_dir:
        raise ValueError("give --output_dir, the folder that the model is written to")
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    newest, torn = newest_checkpoint(folder)
    if wanted == "last":
        for reason in torn:
            print(f"passed over {reason}")
        print(f"resuming from {newest or 'the start: there is no complete checkpoint'}")
    elif wanted:
        reason = what_is_torn(Path(wanted)) if Path(wanted).is_dir() else "there is no such folder"
        if reason:
            raise ValueError(f"resume_from_checkpoint {wanted}: {reason}")
        same_run = newest and Path(wanted).resolve().parent == newest.resolve().parent
        if same_run and Path(wanted).resolve() != newest.resolve():
            raise ValueError(f"{newest} is newer than {wanted}: move it away first")
        return wanted
    elif newest:
        raise ValueError(
            f"output_dir {folder} holds {newest.name} of another run: choose another folder, "
            "continue with --resume_from_checkpoint last, or move the checkpoints away"
        )
    goes_on = wanted == "last" and (newest or torn)
    if folder.exists() and any(folder.iterdir()) and not (goes_on or args.overwrite):
        raise ValueError(
            f"output_dir {folder} is not empty: choose another, continue with "
            "--resume_from_checkpoint last, or write into it with --overwrite"
        )
    return newest and str(newest)


def one_gpu_each(args: RecipeArguments):
    """ValueError: this process would spread a batch over several GPUs by itself."""
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, it can use one: start one process for each by "
            f"accelerate launch --num_processes {args.n_gpu}, or set CUDA_VISIBLE_DEVICES"
        )


def use_all_cores(args: RecipeArguments):
    """accelerate launch leaves a process one thread unless it is told otherwise."""
    if args.use_cpu:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(args.cpu_threads or max(1, usable_cores() // processes))


def load_rows(data: DataArguments, tokenizer_args: TokenizerArguments, name, args):
    """(training rows, held-out rows, tokenizer).

    Args:
        name: of the tokenizer, None to train one.

    Raises:
        ValueError: prepared rows were made with other entries than that tokenizer's.
    """
    # The main process fills the caches of data, the others read them.
    with args.main_process_first():
        if data.prepared_data:
            rows = load_prepared(data)
            if name and not has_vocabulary_of(name, rows[-1]):
                raise ValueError(
                    f"{data.prepared_data} was prepared with another tokenizer than {name}: leave "
                    "out --tokenizer_name, or prepare again"
                )
            return rows
        train, validation = load_documents(data)
    tokenizer = choose_tokenizer(name, tokenizer_args, train, data.text_column)
    with args.main_process_first():
        train, validation = (encode(x, data, tokenizer, args.seed) for x in (train, validation))
    return train, validation, tokenizer


def describe(trainer: Trainer, data: DataArguments) -> dict[str, str]:
    """What is about to run, for the start of the log and for the model card."""
    args, config = trainer.args, trainer.model.config
    run = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    steps = args.warmup_steps
    warmup = f"{steps:g} steps" if steps >= 1 else f"{args.share_of_warmup():.0%}"
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
        "optimizer": f"{args.optim.value}, learning rate {args.learning_rate:g} after a warm-up of "
        f"{warmup}, then {args.lr_scheduler_type.value} to {args.lr_end:.0%}, weight decay "
        f"{args.weight_decay:g}",
        "computed in": f"{args.precision()} ({args.why_bf16}), attention "
        f"{attention_backend(trainer.model, args)}, on {args.device.type}"
        + (", compiled" if args.torch_compile else ""),
    }


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


def hub_id(name: str | None) -> str | None:
    """The name, unless it is None or a folder of this machine."""
    return None if name is None or Path(name).exists() else name


def main():
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
    for name, value in facts.items():
        trainer.accelerator.print(f"{name}: {value}")
    if checkpoint and (change := change_of_precision(Path(checkpoint), args)):
        trainer.accelerator.print(f"{change}: --bf16 true or false chooses")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.sigterm.stopped and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.print(
            f"stopped by SIGTERM after step {trainer.state.global_step}, which is saved: repeat "
            "the command with --resume_from_checkpoint last"
        )
        return
    with saving("the model", args.output_dir):
        trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        draw_training(trainer.state.log_history, folder / "training.png", folder.resolve().name)
        kind = "A BERT encoder"
        if is_ours(model.config):
            kind = "A MosaicBERT encoder (ALiBi, gated MLPs, no padding inside)"
        dataset = hub_id(data_args.dataset_name)
        write_card(
            folder,
            folder.resolve().name,
            f"{kind}, pre-trained by train_mlm.py and evaluated on documents that it had not "
            "seen.\n\n"
            "![Loss, masked accuracy, learning rate and tokens per second](training.png)",
            facts | figures(metrics),
            base_model=hub_id(model_args.model_name_or_path),
            datasets=[dataset] if dataset else None,
            eval_results=eval_results(metrics, data_args),
            **about_weights(args.license, args.language),
        )
        if args.publish_to:
            print(publish(folder, args.publish_to, args.private, args.revision))


if __name__ == "__main__":
    main()
