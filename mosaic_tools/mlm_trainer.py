# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: the model to train, the Trainer that trains it, its metrics."""

import inspect
import math
from pathlib import Path

import datasets.distributed
import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForMaskedLM

from mosaic_tools.callbacks import Later, LogFile, MaskEpoch, StopOnSigterm, Throughput
from mosaic_tools.checkpoints import Checkpoints, newest_checkpoint
from mosaic_tools.corpus import is_stream
from mosaic_tools.family import HERE, is_ours, load, model_class, read_config
from mosaic_tools.files import read_json
from mosaic_tools.masking import MaskingCollator
from mosaic_tools.muon import MuonWithAdamW
from mosaic_tools.recipe import MUON, DataArguments, ModelArguments
from mosaic_tools.recipe_trainer import RecipeTrainer
from mosaic_tools.shuffling import WINDOW, BlockShuffle, EndlessStream
from mosaic_tools.tokenization import has_vocabulary_of, largest_id

# Every evaluation masks the same tokens, whatever the training seed.
EVALUATION_SEED = 17
# Of config.json, what a resumed run has to have as its checkpoint does.
THE_SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
THE_SAME += ("vocab_size", "hidden_act", "tie_word_embeddings")
# So many files for each worker of a loader, and their sizes hardly matter.
MANY_FILES = 16


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


class MlmTrainer(RecipeTrainer):
    """RecipeTrainer for rows of token ids, in training and evaluation masked each in its own way.

    Reads streams by process and resumes them in their place; logs throughput; stops where the loss
    is not finite or has risen by more than `divergence`, with the batch saved.

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
        self.shuffle_buffer = data.shuffle_buffer
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
            compute_metrics=of_masked_tokens,
            preprocess_logits_for_metrics=guesses_and_losses,
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
        smoother = self.label_smoother
        if smoother and "num_items_in_batch" not in inspect.signature(smoother).parameters:
            # Older ones' smoothed loss is a micro-batch's mean.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *model):
        if self.args.optim != MUON:
            return super().create_optimizer(*model)
        if self.optimizer is None:
            adamw = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "weight_decay": self.args.weight_decay,
                "fused": True,
            }
            self.optimizer = MuonWithAdamW(self.model, self.args.muon(), adamw)
        return self.optimizer

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.resumed_from = resume_from_checkpoint
        if resume_from_checkpoint:
            self.check_model(Path(resume_from_checkpoint))
            self.check_optimizer(Path(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.check_loss()
        return result

    def check_model(self, checkpoint: Path):
        """ValueError: the checkpoint is of another model, though its tensors may have the same
        shapes. Sharded ones have no config.json, and are not looked at."""
        before, config = read_json(checkpoint / "config.json"), self.model.config
        if before:
            # Which transformers leaves out.
            before.setdefault("tie_word_embeddings", True)
        wrong = [x for x in THE_SAME if x in before and before[x] != getattr(config, x)]
        if wrong:
            has = ", ".join(f"{x} {before[x]}" for x in wrong)
            now = ", ".join(str(getattr(config, x)) for x in wrong)
            raise ValueError(f"{checkpoint} has {has}, this run {now}: give the same")

    def check_optimizer(self, checkpoint: Path):
        """ValueError: it was trained with Muon and this run is not, or the other way round."""
        file = checkpoint / "optimizer.pt"
        if not file.is_file():
            return
        # Of the tensors it reads none.
        groups = torch.load(str(file), "meta", weights_only=True, mmap=True)["param_groups"]
        had, has = any("parts" in group for group in groups), self.args.optim == MUON
        if had != has:
            raise ValueError(
                f"{checkpoint} was trained {'with' if had else 'without'} --optim muon, this run "
                f"is {'with' if has else 'without'}: give the same"
            )

    def get_train_dataloader(self):
        if not self.args.auto_find_batch_size:
            # A resumed run has the checkpoint's by now, with transformers 4.
            self._train_batch_size = self.args.train_batch_size
        return self.stream_loader() if self.streams else super().get_train_dataloader()

    def stream_loader(self):
        """The part of the stream that this process reads, from where a resumed run left it."""
        args = self.args
        rows = datasets.distributed.split_dataset_by_node(
            self.train_dataset, args.process_index, args.world_size
        )
        # A worker needs a file of its own.
        workers = min(args.dataloader_num_workers, rows.num_shards)
        files = self.train_dataset.num_shards
        # Processes share files only if each has as many.
        readers = max(1, workers) * (1 if files % args.world_size else args.world_size)
        if readers > 1 and files < MANY_FILES * readers:
            self.accelerator.print(
                f"{files} files are shared by {readers} readers, each of which goes round in its "
                "own: if they are of unequal size, rows of small ones come more often. Give files "
                f"of one size, or {MANY_FILES} for each reader, or prepare the rows"
            )
        loader = StatefulDataLoader(
            EndlessStream(rows, self.shuffle_buffer, args.seed),
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
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

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler) or len(sampler) <= WINDOW:
            return sampler
        # In place of a list of all indices in each process.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BlockShuffle(len(sampler), seed, self.data_collator.epoch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.throughput.waiting_for(epoch_iterator)
        # A stream's batches are still on the CPU; to move them later would wait for the device.
        moved = (send_to_device(x, device, non_blocking=True) for x in batches)
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
            "--warmup_ratio or --max_grad_norm 1; in fp16 also --bf16 true"
        )

    def _save_checkpoint(self, *args, **kwargs):
        # No checkpoint of weights that a loss that is not finite has reached.
        self.check_loss()
        super()._save_checkpoint(*args, **kwargs)


def guesses_and_losses(logits, labels):
    """All that the metrics need of (batch, seqlen, vocab) logits: the most likely tokens and the
    cross-entropies, nats in float32, 0 where there is no label; (batch, seqlen) each."""
    masked = labels != -100
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[masked] = cross_entropy(logits[masked].float(), labels[masked], reduction="none")
    return logits.argmax(-1), losses


def of_masked_tokens(evaluated) -> dict[str, float]:
    """Share of masked tokens guessed, what always guessing the commonest of them would give, and
    their mean cross-entropy. Trainer's own loss is a mean over rows of their batches' means, which
    depends on how rows are put into batches."""
    masked = evaluated.label_ids != -100
    labels, guesses, losses = (x[masked] for x in (evaluated.label_ids, *evaluated.predictions))
    count = max(len(labels), 1)
    return {
        "loss": float(losses.mean(dtype=np.float64)) if len(labels) else math.nan,
        "masked_accuracy": float((guesses == labels).sum() / count),
        "commonest_token_accuracy": float(np.bincount(labels, minlength=1).max() / count),
    }
