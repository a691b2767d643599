# SPDX-License-Identifier: Apache-2.0
"""The Trainer of all commands: the recipe's weight decay, and folders that others can read."""

import contextlib
from pathlib import Path

from transformers import Trainer, TrainerCallback

from mosaic_tools.checkpoints import (
    COMPLETE,
    change_of_precision,
    saving,
    way_on,
)
from mosaic_tools.family import is_ours, listed
from mosaic_tools.files import read_json, write_json
from mosaic_tools.publishing import remove_derived
from mosaic_tools.tokenization import make_tokenizer_portable

# Of a group of parameters, what belongs to an optimizer's state, not to its settings.
KEPT = ("params", "lr", "fused", "foreach", "capturable", "differentiable")

# Of a checkpoint: what decides which rows a step has.
ORDER = "order.json"


class RecipeTrainer(Trainer):
    """Trainer that decays all parameters, as published, and saves no export of older weights, but
    tokenizers that every supported transformers reads."""

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]

    def get_eval_dataloader(self, *args, **kwargs):
        with self.no_row_dropped():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        with self.no_row_dropped():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def no_row_dropped(self):
        """Trainer would leave the last rows out of evaluations too."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Takes their states from a checkpoint; learning rate, decay, betas and the like are what
        this run was told, and another learning rate is printed. A schedule that goes by the loss
        keeps its rate."""
        told = [{k: x for k, x in g.items() if k not in KEPT} for g in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not checkpoint:
            return
        self.say_if_rows_change(Path(checkpoint, ORDER))
        groups, schedule = self.optimizer.param_groups, self.lr_scheduler
        before = [group.get("initial_lr") for group in groups]
        for group, values in zip(groups, told, strict=True):
            group.update(values)
        if not hasattr(schedule, "lr_lambdas"):
            return
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
        # What the log reads.
        schedule._last_lr = [group["lr"] for group in groups]
        for group, rate in zip(groups, before, strict=True):
            if group["initial_lr"] != rate:
                name = "muon_learning_rate" if "parts" in group else "learning_rate"
                change = f"{name} {rate:g}, and goes on with {group['initial_lr']:g}"
                self.accelerator.print(f"{checkpoint} was trained with {change}")

    def _save_checkpoint(self, *args, **kwargs):
        name = f"checkpoint-{self.state.global_step}"
        self.check_weights()
        with saving(name, self.args):
            # Written again, it is not complete until it is.
            if self.is_world_process_zero():
                Path(self.args.output_dir, name, COMPLETE).unlink(missing_ok=True)
            super()._save_checkpoint(*args, **kwargs)
            if self.is_world_process_zero():
                write_json(Path(self.args.output_dir, name, ORDER), self.order())

    def order(self) -> dict[str, int | None]:
        """What decides which rows a step has; of a stream nothing, whose place is saved."""
        rows = self.train_dataset
        parts = list(rows.values()) if isinstance(rows, dict) else [rows]
        if not all(hasattr(x, "__len__") for x in parts):
            return {}
        args = self.args
        return {
            "rows": sum(map(len, parts)),
            "global_batch_size": args.rows_per_step(),
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def say_if_rows_change(self, file: Path):
        """Prints how a checkpoint's rows were ordered, if this run orders them otherwise."""
        before, now = (read_json(file) if file.is_file() else {}), self.order()
        changed = [f"{x} {before[x]}, not {now[x]}" for x in now if before.get(x, now[x]) != now[x]]
        if changed:
            self.accelerator.print(
                f"{file.parent} was trained with {listed(changed)}: in this epoch some rows are "
                "left out or come twice"
            )

    def check_weights(self):
        """FloatingPointError: weights are not finite, of which nothing must be saved."""
        wrong = [name for name, x in self.model.named_parameters() if not x.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"stopped in step {self.state.global_step}: nan or infinity in {listed(wrong)}. "
                f"Try a lower --learning_rate; in fp16 also --bf16 true. {way_on(self.args)}"
            )

    def save_model(self, output_dir=None, _internal_call=False):
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            remove_derived(folder)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.finish_folder(folder)

    def finish_folder(self, folder: str | Path):
        """What is done to a folder once the model and the tokenizer are in it."""
        config, tokenizer = self.model.config, self.processing_class
        longest = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        make_tokenizer_portable(
            folder, max_length_of(config, tokenizer, longest), has_token_types(config)
        )


@contextlib.contextmanager
def reading_rows(args):
    """RuntimeError: a loader's worker died; it says what is intact and how to go on."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # torch raises in whatever this process does at that moment, be it a save.
        deaths = [x for x in (error.__cause__, error) if is_of_dead_worker(x)]
        if not (deaths and args.dataloader_num_workers):
            raise
        # An EOFError says nothing.
        reason = str(deaths[0]).rstrip(" .") or type(deaths[0]).__name__
        try:
            left = way_on(args)
        except RuntimeError:
            # An EOFError came first, and torch heard of the death just now.
            left = way_on(args)
        raise RuntimeError(
            f"a process that loads rows died: {reason}. {left}. Where memory was short, "
            "give fewer --dataloader_num_workers (a stream keeps their number)"
        ) from error


def is_of_dead_worker(error: Exception | None) -> bool:
    """Whether it means that a worker is gone. torch says so by its pid, unless it was just reading
    from it. An error inside a worker names the worker too, but ends as what it is."""
    inside = "DataLoader worker process" in str(error)
    cut_off = isinstance(error, (ConnectionResetError, EOFError)) and not inside
    return cut_off or "DataLoader worker (pid" in str(error)


class TrainingComplete(Exception):
    """All steps are taken."""


class StopAfterLastStep(TrainerCallback):
    """For a run that is resumed after its last step: within an epoch Trainer would take another."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > state.max_steps:
            raise ValueError(
                f"the checkpoint is of step {state.global_step}, of which the run has "
                f"{state.max_steps}: give more --max_steps, or another --output_dir"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            raise TrainingComplete


def train_and_save(trainer: RecipeTrainer, facts: dict[str, str], checkpoint: str | None) -> bool:
    """Says what is about to run, trains, and saves the model.

    Args:
        trainer: with a StopOnSigterm as `sigterm`.
        facts: printed, a line each.
        checkpoint: to go on from, or None.

    Returns:
        False if SIGTERM ended the training, whose last step is then in a checkpoint.
    """
    say, args = trainer.accelerator.print, trainer.args
    for name, value in facts.items():
        say(f"{name}: {value}")
    if checkpoint and (change := change_of_precision(Path(checkpoint), args)):
        say(f"{change}: --bf16 true or false chooses")
    trainer.add_callback(StopAfterLastStep())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except TrainingComplete:
        trainer.is_in_train = False
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)
    # A resumed run has a state of its own.
    state = trainer.state
    if trainer.sigterm.stopped and state.global_step < state.max_steps:
        say(
            f"stopped by SIGTERM after step {state.global_step}, which is saved: repeat the "
            "command with --resume_from_checkpoint last"
        )
        return False
    trainer.check_weights()
    with saving("the model", args):
        trainer.save_model()
    return True


def max_length_of(config, tokenizer, wanted: int) -> int:
    """Tokens of a row: what is wanted, or as many as a model with positions can read."""
    if is_ours(config):
        return wanted
    positions = getattr(config, "max_position_embeddings", wanted)
    return min(wanted, tokenizer.model_max_length, positions)


def has_token_types(config) -> bool:
    """Whether the model tells the texts of a pair apart by them."""
    return getattr(config, "type_vocab_size", 0) > 1
