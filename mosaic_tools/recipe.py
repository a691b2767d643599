# SPDX-License-Identifier: Apache-2.0
"""What a pre-training run can be told: groups of arguments, read from a YAML recipe and from flags.

Defaults are MosaicBERT's recipe at sequence length 128. train_mlm.py and prepare_data.py take the
same recipes and flags; transformers' TrainingArguments are flags too.
"""

import argparse
import difflib
import importlib.util
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate.utils import gather_object
from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg, HfArgumentParser

from mosaic_tools.cards import about_weights
from mosaic_tools.composer_recipe import is_composers, translate
from mosaic_tools.devices import native_bf16
from mosaic_tools.family import say
from mosaic_tools.publishing import check_repo_id


def option(default, help, aliases=()):
    return HfArg(default=default, help=help, aliases=list(aliases))


def check_range(args, *names: str, least: float = 0, below: float = math.inf):
    """ValueError: one of these numbers is not from `least` on and below `below`. None is none."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < below:
            bound = f" and below {below}" if below < math.inf or value == math.inf else ""
            raise ValueError(f"{name} must be at least {least}{bound}, got {value}")


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass
class ModelArguments:
    """A checkpoint, or a new model described by config.json and the sizes given here."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None, "checkpoint to continue from", aliases=["--model"]
    )
    new_head: bool = option(False, "of a checkpoint that has no MLM head: train a new one")
    model_type: Literal["mosaic_bert", "bert"] = option(
        "mosaic_bert", "bert: transformers' own, to compare with"
    )
    hidden_size: int | None = option(None, "of a new model; None, here and below: config.json's")
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    hidden_dropout_prob: float | None = option(
        None, "None: the configuration's, a checkpoint's own"
    )
    attention_probs_dropout_prob: float | None = None
    alibi_starting_size: int | None = option(
        None, "length to prepare for, or positions of a bert; None: max_seq_length"
    )
    low_precision_layernorm: bool = option(True, "LayerNorm in autocast's dtype, not in float32")
    attn_implementation: str | None = option(None, "None: the best that the device has")

    def __post_init__(self):
        check_range(self, "alibi_starting_size", *SIZES, least=1)
        check_range(self, *DROPOUT, below=1)

    def shape(self) -> dict:
        """What describes a new model, as far as it is given."""
        return self.given(*SIZES)

    def dropout(self) -> dict:
        """Rates that replace the configuration's."""
        return self.given(*DROPOUT)

    def given(self, *names: str) -> dict:
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TokenizerArguments:
    """An existing tokenizer, or one trained on the training text."""

    _argument_group_name = "tokenizer"

    tokenizer_name: str | None = option(
        None, "Hub id, folder or BERT's vocab.txt; None: the checkpoint's, or a new one"
    )
    train_tokenizer: Literal["wordpiece", "bpe"] | None = option(
        None,
        "wordpiece: words as BERT cuts them; bpe: of bytes, for DNA and for scripts without "
        "spaces. None: wordpiece, where no other tokenizer is named",
    )
    vocab_size: int = option(30522, "most entries of a new tokenizer")
    lowercase: bool | None = option(
        None, "None: as a vocab.txt's entries are; of new ones, wordpiece does and bpe does not"
    )

    def __post_init__(self):
        if self.train_tokenizer and self.tokenizer_name:
            raise ValueError(
                f"give --tokenizer_name {self.tokenizer_name} or --train_tokenizer "
                f"{self.train_tokenizer}, not both"
            )
        # The special tokens, before one of bytes all of these too, and something to learn.
        check_range(self, "vocab_size", least=262 if self.train_tokenizer == "bpe" else 6)


class SourceOfText:
    """Of arguments that have train_file, validation_file, validation_split, dataset_name and
    dataset_config_name: what must hold of them, and their name."""

    def check_source(self):
        """ValueError: they contradict each other."""
        if self.train_file and self.dataset_name:
            raise ValueError(f"give train_file or dataset_name ({self.dataset_name}), not both")
        if self.validation_file and not (self.train_file or self.dataset_name):
            raise ValueError(f"validation_file {self.validation_file} needs a train_file")
        if not 0 < self.validation_split < 100:
            raise ValueError(f"validation_split is a percentage, got {self.validation_split}")

    def named_source(self) -> str:
        """The dataset's or the files' names, empty without either."""
        name = " ".join(filter(None, (self.dataset_name, self.dataset_config_name)))
        return name or ", ".join(Path(file).name for file in self.train_file or [])


@dataclass
class DataArguments(SourceOfText):
    """Documents, each cut at max_seq_length tokens, or packed."""

    _argument_group_name = "data"

    train_file: list[str] | None = option(
        None,
        "files or glob patterns: .txt (a document a line), .json(l), .csv, .parquet; or a folder "
        "of MosaicML StreamingDataset shards",
    )
    validation_file: list[str] | None = option(None, "as train_file")
    dataset_name: str | None = option(None, "Hub dataset, in place of train_file")
    dataset_config_name: str | None = None
    prepared_data: str | None = option(
        None, "folder that prepare_data.py writes, in place of the above and of a tokenizer"
    )
    streaming: bool = option(False, "read while training; needs max_steps")
    shuffle_buffer: int = option(20_000, "rows of a stream that a loader's worker shuffles at once")
    text_column: str = "text"
    validation_split: float = option(5.0, "per cent held out if the data has no validation part")
    max_eval_documents: int = option(10_000, "documents that an evaluation reads at most")
    max_seq_length: int = 128
    pack: bool = option(
        False, "fill rows with several documents, which do not see each other, and cut none short"
    )
    preprocessing_num_workers: int | None = option(None, "processes that tokenize; None: all cores")
    mlm_probability: float = option(0.3, "share of tokens masked in training")
    eval_mlm_probability: float = option(0.15, "share of tokens masked in evaluation")

    def __post_init__(self):
        if self.max_seq_length < 3:
            raise ValueError(
                f"max_seq_length is {self.max_seq_length}: [CLS], a token and [SEP] need at least 3"
            )
        counts = ("max_eval_documents", "preprocessing_num_workers", "shuffle_buffer")
        check_range(self, *counts, least=1)
        self.check_source()
        for name in ("mlm_probability", "eval_mlm_probability"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is a share between 0 and 1, got {getattr(self, name):g}: the recipe "
                    "masks 0.3 in training and 0.15 in evaluation"
                )

    def source(self) -> str:
        """Where the documents come from, in words."""
        if self.prepared_data and (facts := Path(self.prepared_data, "prepared.json")).is_file():
            return json.loads(facts.read_text())["source"]
        return self.text_source()

    def text_source(self) -> str:
        """`source`, also of rows that are prepared from it just now."""
        return self.named_source() or "English text that CPython carries"


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with MosaicBERT's recipe as defaults."""

    output_dir: str = option("", "where the model goes: new, or empty")
    overwrite: bool = option(False, "write into output_dir although it holds files")
    resume_from_checkpoint: str | None = option(None, "a checkpoint's folder, or 'last'")
    push_to_hub: str | None = option(None, "ORG/NAME, where the finished folder is uploaded")
    private: bool = option(False, "make that repository private")
    revision: str | None = option(None, "branch of that repository; None: the main one")
    license: str | None = option(None, "of the weights, for the model card: apache-2.0, mit, ...")
    language: list[str] | None = option(None, "of the text, for the model card: en, zh, ...")
    global_batch_size: int | None = option(
        None,
        "rows of an optimizer step on all devices together, the recipe's are 4096; split into "
        "micro-batches. None: per_device_train_batch_size on each",
    )
    per_device_train_batch_size: int = option(64, "most rows that a device takes at once")
    per_device_eval_batch_size: int = 64
    learning_rate: float = option(5e-4, "at its peak")
    lr_end: float = option(
        0.0, "at the end of a linear decay, as a share of the peak; 0.02 in the published YAML"
    )
    warmup_ratio: float = option(
        0.06,
        "share of all steps, unless warmup_steps is above 0",
        aliases=["--warmup_share", "--warmup-share"],
    )
    decoupled_weight_decay: float = option(
        1e-5, "at the peak learning rate a step multiplies each weight by 1 minus this"
    )
    weight_decay: float | None = option(
        None, "of torch's AdamW; None: decoupled_weight_decay / learning_rate, the same thing"
    )
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    optim: str = "adamw_torch_fused"
    max_grad_norm: float = option(0.0, "clips gradients; the recipe does not (0)")
    bf16: bool | None = option(
        None, "bfloat16 autocast; None: where the device computes it natively, not by emulation"
    )
    cpu_threads: int | None = option(None, "of each process on the CPU; None: all, shared equally")
    dataloader_num_workers: int | None = option(None, "None: 4 beside a GPU, none on a CPU")
    logging_steps: float = 50
    # The filter would wait for the device at every step, and hide what should stop the run.
    logging_nan_inf_filter: bool = False
    # Every parameter is used in every step.
    ddp_find_unused_parameters: bool | None = False
    report_to: str = "none"
    # Rows hold what the collator needs, which are no arguments of the model.
    remove_unused_columns: bool = False

    # Whether the command takes --resume_from_checkpoint.
    CAN_RESUME = True

    def __post_init__(self):
        self.check_numbers()
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a share between 0 and 1, got {self.warmup_ratio:g}")
        if self.save_total_limit == 1:
            raise ValueError(
                "save_total_limit must be at least 2: with 1 the only complete checkpoint is gone "
                "before the next is known to be complete"
            )
        if self.auto_find_batch_size and self.global_batch_size is not None:
            raise ValueError(
                "leave out --auto_find_batch_size: a step would have fewer rows than the "
                "global_batch_size; lower --per_device_train_batch_size, which changes the speed "
                "and nothing else"
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"leave out --{name}: it casts the weights themselves, which are then saved; "
                    "evaluations have the precision of training"
                )
        if self.push_to_hub:
            check_repo_id(self.push_to_hub, self.revision)
        elif self.private or self.revision:
            raise ValueError("--private and --revision need --push_to_hub")
        about_weights(self.license, self.language)
        # Trainer would say so only after the data is prepared.
        writers = ("tensorboard", "tensorboardX")
        if "tensorboard" in self.report_to and not any(map(importlib.util.find_spec, writers)):
            raise ValueError("--report_to tensorboard needs it: pip install tensorboard")
        # Trainer's own would upload every checkpoint, optimizer states and arguments.
        self.publish_to, self.push_to_hub = self.push_to_hub, False
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.why_bf16, chosen = "as set", self.bf16 is None and not self.fp16
        if chosen:
            self.bf16, self.why_bf16 = native_bf16(self.use_cpu)
        self.bf16 = bool(self.bf16)
        if self.weight_decay is None:
            self.weight_decay = self.decoupled_weight_decay / (self.learning_rate or 1)
        if self.lr_end:
            self.check_end()
            self.lr_scheduler_type = "polynomial"
            self.lr_scheduler_kwargs = {"lr_end": self.lr_end * self.learning_rate, "power": 1.0}
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 4
        # Each process reads its part of a stream: one cannot send others batches of unequal length.
        self.accelerator_config = self.accelerator_config or {
            "dispatch_batches": False,
            "non_blocking": True,
        }
        # transformers 5.0 would put it in place of warmup_steps; get_warmup_steps has it here.
        ratio, default = self.warmup_ratio, getattr(TrainingArguments, "warmup_ratio", None)
        self.warmup_ratio = default
        super().__post_init__()
        self.warmup_ratio = ratio
        if chosen and self.world_size > 1:
            self.check_agreement()
        if self.global_batch_size is not None:
            given = self.gradient_accumulation_steps
            self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
                self.global_batch_size, self.world_size, self.per_device_train_batch_size
            )
            if given not in (1, self.gradient_accumulation_steps):
                raise ValueError(
                    f"leave out --gradient_accumulation_steps {given}: a global_batch_size of "
                    f"{self.global_batch_size} is split into micro-batches by "
                    "--per_device_train_batch_size"
                )

    @property
    def device(self) -> torch.device:
        # accelerate numbers the CPU by process, to which transformers 4.57 and 5.0 load what a
        # checkpoint has, and torch knows no such place.
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def check_numbers(self):
        """ValueError: a number is none that a run can have. Trainer would say so only after the
        data is read, or never."""
        rows = ("global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size")
        check_range(self, *rows, "gradient_accumulation_steps", "cpu_threads", least=1)
        check_range(self, "learning_rate", "weight_decay", "decoupled_weight_decay")
        check_range(self, "max_grad_norm", "adam_epsilon", "dataloader_num_workers")
        check_range(self, "logging_steps", "eval_steps", "save_steps", "warmup_steps")
        check_range(self, "lr_end", "adam_beta1", "adam_beta2", "label_smoothing_factor", below=1)
        check_range(self, "seed", below=2**32)
        # -1 is transformers' None.
        if self.max_steps != -1:
            check_range(self, "max_steps", least=1)
            self.check_warmup(self.max_steps)
        elif not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs must be a number above 0, got {self.num_train_epochs:g}"
            )

    def check_end(self):
        """ValueError: lr_end is not how the chosen schedule ends."""
        kind = SchedulerType(self.lr_scheduler_type).value
        if kind not in ("linear", "polynomial"):
            raise ValueError(
                f"lr_end {self.lr_end:g} is the end of a linear decay, and lr_scheduler_type is "
                f"{kind}: leave out --lr_end, or give --lr_scheduler_type linear"
            )
        if self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_end {self.lr_end:g} sets lr_scheduler_kwargs, and {self.lr_scheduler_kwargs} "
                "is given: leave out one of both"
            )

    def check_agreement(self):
        """ValueError: bf16 is native to the devices of some processes only."""
        choices = dict(gather_object([(self.bf16, self.why_bf16)]))
        if len(choices) > 1:
            raise ValueError(
                f"the processes' devices differ ({choices[True]}; {choices[False]}): give --bf16 "
                "true or --bf16 false"
            )

    def precision(self) -> str:
        """What is computed in, in words."""
        return "bf16 autocast" if self.bf16 else "fp16 autocast" if self.fp16 else "float32"

    def rows_per_step(self) -> int:
        """Rows that an optimizer step sees on all devices together."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def share_of_warmup(self) -> float:
        """The share of all steps; a warmup_steps below 1 is one too, as in transformers 5."""
        return self.warmup_steps if 0 < self.warmup_steps < 1 else self.warmup_ratio

    def check_warmup(self, steps: int):
        """ValueError: the warm-up is longer than the run, and would never reach its peak."""
        if self.warmup_steps > steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps:g}, more than the {steps} steps of the run: "
                "give fewer, or --warmup_ratio"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        self.check_warmup(num_training_steps)
        return int(self.warmup_steps) or round(self.share_of_warmup() * num_training_steps)


MUON = "muon"


@dataclass
class PretrainingArguments(RecipeArguments):
    """RecipeArguments with what train_mlm.py watches, and Muon."""

    optim: str = option(
        RecipeArguments.optim,
        "one of transformers'; or muon: for the matrices of the layers, beside that AdamW",
    )
    muon_learning_rate: float | None = option(
        None, "at its peak, of muon's matrices; None: learning_rate, whose steps are as large"
    )
    divergence: float = option(
        2.0, "nats that the loss between two logs may be above the lowest so far; more stops"
    )
    peak_tflops: float | None = option(
        None, "of a device in the dtype of training, for MFU; None: a known GPU's, dense bf16"
    )

    def __post_init__(self):
        check_range(self, "peak_tflops", "muon_learning_rate")
        # Infinity lets every loss rise.
        if not self.divergence >= 0:
            raise ValueError(f"divergence must be at least 0, got {self.divergence}")
        muon = self.optim == MUON
        if muon:
            self.check_muon()
            self.optim = RecipeArguments.optim
        elif self.muon_learning_rate is not None:
            raise ValueError("--muon_learning_rate needs --optim muon")
        super().__post_init__()
        if muon:
            # transformers knows no such name.
            self.optim = MUON
            if self.muon_learning_rate is None:
                self.muon_learning_rate = self.learning_rate

    def check_muon(self):
        """ValueError: torch has no Muon, or it would see parts of matrices."""
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"--optim muon needs torch 2.9 or newer, this is {torch.__version__}: update it, "
                "or leave out --optim"
            )
        for name in ("fsdp", "deepspeed"):
            launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"
            if launched or getattr(self, name):
                raise ValueError(
                    f"--optim muon needs whole matrices, which {name} cuts: leave out one of both"
                )

    def muon(self) -> dict:
        """Settings of Muon. At the peak a step decays its weights as AdamW's."""
        rate = self.muon_learning_rate
        decay = self.weight_decay * (self.learning_rate or 1) / (rate or 1)
        return {"lr": rate, "weight_decay": decay}

    def optimizer(self) -> str:
        """The optimizer and its peak learning rate, in words."""
        if self.optim != MUON:
            return f"{self.optim.value}, learning rate {self.learning_rate:g}"
        muon = self.muon()
        return (
            f"muon, learning rate {muon['lr']:g}, weight decay {muon['weight_decay']:g}, beside "
            f"{RecipeArguments.optim}, learning rate {self.learning_rate:g}"
        )


def split_batch(rows: int, devices: int, max_rows: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step), for each device.

    Args:
        rows: of an optimizer step, on all devices.
        max_rows: of a micro-batch.

    Raises:
        ValueError: rows cannot be shared equally, or only in micro-batches of less than half of
            what a device could take; it names the nearest numbers that can.
    """
    if found := try_split(rows, devices, max_rows):
        return found
    lower = next((n for n in range(rows, 0, -1) if try_split(n, devices, max_rows)), None)
    upper = next(n for n in itertools.count(rows) if try_split(n, devices, max_rows))
    raise ValueError(
        f"global_batch_size {rows} cannot be split over {devices} devices in micro-batches of at "
        f"most {max_rows} rows each (--per_device_train_batch_size): the nearest that can is "
        f"{' or '.join(str(n) for n in (lower, upper) if n)}"
    )


def try_split(rows: int, devices: int, max_rows: int) -> tuple[int, int] | None:
    """`split_batch`, or None where that raises."""
    share, rest = divmod(rows, devices)
    if rest or not share:
        return None
    micro = next(m for m in range(min(max_rows, share), 0, -1) if share % m == 0)
    return (micro, share // micro) if 2 * micro >= min(max_rows, share) else None


PRETRAINING = (ModelArguments, TokenizerArguments, DataArguments, PretrainingArguments)


@dataclass
class PrintingArguments:
    """What every command that takes a recipe can be told besides."""

    _argument_group_name = "recipe"

    print_recipe: bool = option(
        False, "write what the recipe and the flags say as a YAML recipe, and do nothing else"
    )


def parse(argv: list[str], groups: tuple[type, ...] = PRETRAINING):
    """The groups of arguments, from `[recipe.yaml] [--flag value ...]`; flags come last and win."""
    given = read_arguments(argv, groups)
    return tuple(group(**values) for group, values in zip(groups, given, strict=True))


def read_arguments(argv: list[str], groups: tuple[type, ...]) -> list[dict]:
    """For each group of arguments the values that recipe and flags give, by its fields' names."""
    with_printing = (*groups, PrintingArguments)
    if argv and argv[0].endswith((".yaml", ".yml")):
        path, *flags = argv
        known = {
            name.removeprefix("--")
            for group in groups
            for field in fields(group)
            for name in (field.name, *field.metadata.get("aliases", ()))
        }
        by_flags = {k: v for x in given_flags(with_printing, flags) for k, v in x.items()}
        argv = recipe_flags(path, known, by_flags) + flags
    *given, printing = given_flags(with_printing, argv)
    if printing.get("print_recipe"):
        say(as_recipe(given, groups))
        raise SystemExit
    return given


def as_recipe(given: list[dict], groups: tuple[type, ...]) -> str:
    """A YAML recipe of what differs from the defaults, and of what has no default of its own."""
    values = {}
    for of_group, group in zip(given, groups, strict=True):
        stated = getattr(group, "DEFAULT_DEPENDS", ())
        for field in fields(group):
            value = of_group.get(field.name, field.default)
            if value != field.default or field.name in of_group and field.name in stated:
                is_whole = isinstance(value, float) and value.is_integer() and value
                values[field.name] = int(value) if is_whole else value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def given_flags(groups: tuple[type, ...], argv: list[str]) -> list[dict]:
    """For each group of arguments the values that are given, by its fields' names.

    Raises:
        ValueError: a word is of no group, or what is None by default is given as "".
    """
    names = [[field.name for field in fields(group) if field.init] for group in groups]
    left_out = object()
    # argparse puts no default where there is a value already.
    found = argparse.Namespace(**dict.fromkeys(itertools.chain(*names), left_out))
    _, unknown = HfArgumentParser(groups).parse_known_args(argv, found)
    if unknown:
        raise ValueError(f"not used by this command: {' '.join(unknown)}; --help lists what is")
    values = vars(found)
    defaults = {field.name: field.default for group in groups for field in fields(group)}
    for name, value in values.items():
        # As of a shell's variable that is not set. A prompt may be none.
        words = value if isinstance(value, list) else [value]
        if "" in words and defaults[name] is None and not name.endswith("_prompt"):
            raise ValueError(f"--{name} is empty: give a value, or leave it out")
    return [{x: values[x] for x in of_group if values[x] is not left_out} for of_group in names]


class Recipe(yaml.SafeLoader):
    """YAML in which no key is given twice; of two the last would win."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: str) -> dict:
    """What a YAML recipe says. ValueError: it cannot be read, or is no list of keys."""
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Recipe)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(found, dict | None):
        raise ValueError(f"{path} holds {found!r:.60}, expected lines of 'key: value'")
    return found or {}


def recipe_flags(path: str, known: set[str], given: dict) -> list[str]:
    """A YAML recipe, of ours or of mosaicml/examples, as command-line flags, so that the same rules
    read both.

    Args:
        known: names of flags.
        given: values of flags that come after it.
    """
    recipe, flags = read_recipe(path), []
    if is_composers(recipe):
        translation = translate(path, recipe, known, given)
        recipe = translation.values
        say("".join(f"{line}\n" for line in translation.lines(path)), sys.stderr)
    for key, value in recipe.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known) or ["--help, which lists them all"]
            raise ValueError(f"{path}: unknown key {key!r}; see {' or '.join(near)}")
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values if v is not None]
        flags += [f"--{key}", *words] if words else []
    return flags
