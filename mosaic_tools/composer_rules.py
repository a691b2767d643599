# SPDX-License-Identifier: Apache-2.0
"""What values of Composer's recipes become in ours: a rule takes a value and the whole file, and
returns values of our flags by their names.

Composer's times mean here: `ba` steps; `sp` rows, of which a step takes global_train_batch_size;
`tok` positions of rows that are all as long as max_seq_len, since the published code pads them to
it; `ep` epochs; `dur` a share of the run. A part of a step counts as one, since a run ends with the
step in which its last sample or token is.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

# A rule that returns this, or is this: the key has no meaning here.
NOTHING = None


class Refusal(ValueError):
    """Something cannot be had, unless one of these flags is given in its place."""

    def __init__(self, reason: str, *flags: str):
        super().__init__(reason)
        self.flags = flags


@dataclass
class File:
    """What the rules see of a file.

    Args:
        keys: values by dotted path, or groups of them where the table has a row for the group.
        given: values that flags override it with, by our names.
        remarks: collects what is to be said.
    """

    keys: dict
    given: dict
    remarks: list[str] = field(default_factory=list)

    def has_flag(self, *names: str) -> bool:
        return any(name in self.given for name in names)

    def remark(self, line: str):
        if line not in self.remarks:
            self.remarks.append(line)

    def number(self, key: str, flag: str) -> int:
        """A whole number above 0; a flag comes first. ValueError: there is none."""
        value = self.given.get(flag, self.keys.get(key))
        if value is None:
            raise Refusal(f"{key} is needed to count steps, and not given", flag)
        return whole(value, key)

    def steps(self, time: "Time") -> int:
        """Steps of a time in ba, sp or tok."""
        of_a_step = 1
        if time.unit in ("sp", "tok"):
            of_a_step = self.number("global_train_batch_size", "global_batch_size")
        if time.unit == "tok":
            of_a_step *= self.number("train_loader.dataset.max_seq_len", "max_seq_length")
        return math.ceil(time.amount / of_a_step)


# ---- numbers and times ----


def whole(value, name: str) -> int:
    number = float(value)
    if number < 1 or number != int(number):
        raise ValueError(f"{name} must be a whole number above 0")
    return int(number)


@dataclass
class Time:
    """Of training, as Composer writes it; a bare number is of epochs."""

    amount: Fraction
    unit: str

    @classmethod
    def read(cls, value) -> "Time":
        match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)(ep|ba|sp|tok|dur)?", str(value).lower())
        if not match:
            raise ValueError(f"{value} is no time in ep, ba, sp, tok or dur, as 10ep or 0.06dur")
        amount, unit = Fraction(match[1]), match[2] or "ep"
        if unit != "dur" and amount.denominator != 1:
            raise ValueError(f"{value}: {unit} are counted in whole numbers")
        return cls(amount, unit)


def duration(value, file: File) -> dict:
    if file.has_flag("max_steps", "num_train_epochs"):
        return {}
    time = Time.read(value)
    if time.unit == "dur" or not time.amount:
        raise ValueError(f"a run is some ep, ba, sp or tok long, not {value}")
    if time.unit == "ep":
        return {"num_train_epochs": int(time.amount)}
    return {"max_steps": file.steps(time)}


def run_length(file: File) -> Time:
    """Of the whole run, in steps or epochs."""
    ours = file.given
    if not file.has_flag("max_steps", "num_train_epochs"):
        if "max_duration" not in file.keys:
            raise Refusal("max_duration is needed to count steps, and not given", "max_steps")
        ours = duration(file.keys["max_duration"], file)
    if "max_steps" in ours:
        return Time(Fraction(ours["max_steps"]), "ba")
    return Time(Fraction(ours["num_train_epochs"]), "ep")


def warm_up(value, file: File) -> dict:
    if file.has_flag("warmup_steps", "warmup_ratio"):
        return {}
    time = Time.read(value)
    if time.unit == "ep" and time.amount:
        run = run_length(file)
        if run.unit != "ep":
            raise Refusal("give it in ba or dur, as the run is not in ep", "warmup_steps")
        time = Time(time.amount / run.amount, "dur")
    if time.unit == "dur" or not time.amount:
        return {"warmup_ratio": float(time.amount)}
    return {"warmup_steps": file.steps(time)}


def interval(what: str) -> Callable:
    """A rule for how often to do what Trainer has WHAT_strategy and WHAT_steps for."""

    def rule(value, file: File) -> dict:
        strategy, steps = f"{what}_strategy", f"{what}_steps"
        if file.has_flag(strategy):
            return {}
        if file.has_flag(steps):
            return {strategy: "steps"}
        time = Time.read(value)
        # Both are done at the end too.
        if not time.amount or time.unit == "dur" and time.amount >= 1:
            return {strategy: "no"}
        if time.unit == "ep":
            if time.amount != 1:
                raise Refusal("an interval in epochs is 1ep; give others in ba or dur", steps)
            return {strategy: "epoch"}
        if time.unit == "dur":
            run = run_length(file)
            share = time.amount if run.unit == "ep" else math.ceil(time.amount * run.amount)
            return {strategy: "steps", steps: float(share) if run.unit == "ep" else share}
        return {strategy: "steps", steps: file.steps(time)}

    return rule


# ---- rules: what a value becomes, by the names of our flags ----


def group(value) -> dict:
    """The value. ValueError: it is no group of keys."""
    if not isinstance(value, dict):
        raise ValueError("expected keys with values")
    return value


def refused(reason: str, *flags: str) -> Callable:
    def rule(value, file: File):
        raise Refusal(reason, *flags)

    return rule


def only(expected, reason: str, *flags: str) -> Callable:
    """A rule for what is the case here anyway."""

    def rule(value, file: File) -> dict:
        if value != expected:
            raise Refusal(f"{reason}, so it can only be {expected}", *flags)
        return {}

    return rule


def agreed(ours: str, *keys: str) -> Callable:
    """A rule for what all of these keys say, of which one is needed here."""

    def rule(value, file: File) -> dict:
        for key in keys:
            if (other := file.keys.get(key, value)) != value:
                raise Refusal(f"{key} is {other}, and here they are one: --{ours} chooses", ours)
        return {ours: value}

    return rule


def of_checkpoint(flag: str) -> Callable:
    """A rule for a checkpoint to start from, which is a folder, or Composer's and converted."""

    def rule(value, file: File) -> dict:
        if file.has_flag(flag):
            return {}
        if not re.search(r"\.pt$|://", str(value)):
            return {flag: value}
        if file.keys.get("model.name") == "hf_bert":
            raise Refusal(f"of a BERT: save it by transformers, and give --{flag} FOLDER", flag)
        tokenizer = file.keys.get("model.tokenizer_name", "TOKENIZER")
        copy, file_here = "", value.replace("{rank}", "0")
        if "://" in value:
            copy, file_here = "copy it to this machine; ", Path(file_here).name
        raise Refusal(
            f"{copy}convert its weights, without the state of the optimizer: python "
            f"convert_weights.py {file_here} FOLDER --config config.json --tokenizer {tokenizer}; "
            f"then give --{flag} FOLDER",
            flag,
        )

    return rule


def data(loader: str, ours: str) -> Callable:
    """A rule for the shards that a loader reads. Text that flags name replaces those of both."""

    def rule(value, file: File) -> dict:
        if file.has_flag("train_file", "dataset_name"):
            return {}
        dataset = f"{loader}.dataset."
        place, split = "remote", file.keys.get(f"{dataset}split", "")
        if (folder := file.keys.get(f"{dataset}remote")) is None:
            place, folder = "local", file.keys.get(f"{dataset}local")
        if folder is None:
            raise Refusal("neither local nor remote names a folder", "train_file")
        if "://" in folder:
            raise Refusal(
                f"{place} {folder} is not on this machine: copy its splits here, and give "
                "--train_file FOLDER --validation_file FOLDER",
                "train_file",
            )
        streams = {}
        if ours == "train_file" and run_length(file).unit == "ba":
            streams["streaming"] = True
        return {ours: [str(Path(folder, split))]} | streams

    return rule


def last_rows(value, file: File) -> dict | None:
    if value and run_length(file).unit == "ep":
        file.remark(
            "train_loader.drop_last: the last rows of an epoch are trained on too, in a smaller "
            "step"
        )
        return {}
    return NOTHING


def some_batches(value, file: File) -> dict:
    if value == -1:
        return {}
    rows = file.keys.get("global_eval_batch_size")
    rows = whole(rows or file.number("global_train_batch_size", "global_batch_size"), "rows")
    return {"max_eval_documents": whole(value, "eval_subset_num_batches") * rows}


def micro_batch(value, file: File) -> dict | None:
    return NOTHING if value == "auto" else {"per_device_train_batch_size": value}


def precision(value, file: File) -> dict:
    choices = {
        "bf16": {"bf16": True},
        "fp16": {"bf16": False, "fp16": True},
        "fp32": {"bf16": False},
    }
    name = str(value).removeprefix("amp_")
    if name not in choices:
        raise Refusal(f"it is one of amp_{', amp_'.join(choices)}", "bf16", "fp16")
    return choices[name]


def precision_of_tasks(value, file: File) -> dict:
    """STS-B is in float32, also in the published scripts."""
    ours = precision(value, file)
    if ours.get("bf16"):
        file.remark(
            "precision: bf16 where the device computes it natively, and float32 in STS-B: --bf16 "
            "true or false chooses for all"
        )
        return {}
    if ours.get("fp16") and {"stsb", "all"} & set(file.given.get("task", file.keys["tasks"])):
        raise Refusal(
            "stsb is in float32: train it by itself, --task stsb --bf16 false, and the others by "
            "--task",
            "bf16",
        )
    return ours


def schedule(value, file: File) -> dict:
    """Of the scheduler's name and alpha_f; the script gives a constant rate none."""
    name = file.keys.get("scheduler.name")
    end = float(file.keys.get("scheduler.alpha_f", 0))
    if name == "linear_decay_with_warmup":
        return {"lr_end": end}
    if name == "constant_with_warmup":
        if "scheduler.alpha_f" in file.keys:
            file.remark("scheduler.alpha_f: a constant rate has no other end")
        return {"lr_scheduler_type": "constant_with_warmup"}
    if name == "cosine_with_warmup":
        if not end:
            return {"lr_scheduler_type": "cosine"}
        kwargs = {"min_lr_rate": end}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    raise Refusal(
        f"{name} is none of linear_decay_with_warmup, constant_with_warmup, cosine_with_warmup",
        "lr_scheduler_type",
    )


def end_of_schedule(value, file: File) -> dict:
    if value == file.keys.get("max_duration") or Time.read(value) == Time(Fraction(1), "dur"):
        return {}
    raise Refusal("the schedule is as long as the run: leave it out", "lr_scheduler_type")


def optimizer(value, file: File) -> dict:
    if value != "decoupled_adamw":
        raise Refusal("it is decoupled_adamw; --optim chooses one of transformers'", "optim")
    return {}


def betas(value, file: File) -> dict:
    first, second = value
    return {"adam_beta1": first, "adam_beta2": second}


def algorithms(value, file: File) -> dict:
    ours = {}
    of_mosaic = file.keys.get("model.name") == "mosaic_bert"
    for name, options in group(value).items():
        if name in ("fused_layernorm", "low_precision_layernorm") and of_mosaic:
            ours["low_precision_layernorm"] = True
            file.remark(f"algorithms.{name}: LayerNorm in autocast's dtype")
        elif name in ("alibi", "gated_linear_units") and of_mosaic:
            file.remark(f"algorithms.{name}: the model has it anyway")
        elif name == "gradient_clipping":
            options = options or {}
            if options.get("clipping_type") != "norm":
                raise Refusal("of gradients only the norm is clipped", "max_grad_norm")
            ours["max_grad_norm"] = options["clipping_threshold"]
        else:
            model = file.keys.get("model.name")
            raise ValueError(f"{name} cannot be had in a {model}: leave it out")
    return ours


def loggers(value, file: File) -> dict:
    if other := [name for name in group(value) if name != "wandb"]:
        raise Refusal(f"{other[0]} is not wandb: --report_to chooses another", "report_to")
    if not value:
        return {}
    if any(x is not None for x in (value["wandb"] or {}).values()):
        file.remark(
            "loggers.wandb: its options are read from the environment, as WANDB_PROJECT and "
            "WANDB_ENTITY"
        )
    return {"report_to": "wandb"}


def output(*folders: str) -> Callable:
    """A rule for the folder of the model: one of these keys, or named by the run.

    Args:
        folders: the folder's key, and that of the run's name.
    """

    def rule(value, file: File) -> dict:
        if file.has_flag("output_dir"):
            return {}
        folder, name = (file.keys.get(key) for key in folders)
        folder = str(folder or Path("runs", name)).replace("{run_name}", name or "run")
        if "://" in folder or "{" in folder:
            raise Refusal(f"{folder} is no folder on this machine: give --output_dir", "output_dir")
        return {"output_dir": os.path.normpath(folder)}

    return rule


def saving(value, file: File) -> dict | None:
    """Of the interval, the number of checkpoints, and whether there is a folder for them."""
    if "save_folder" not in file.keys:
        return NOTHING
    keep = int(file.keys.get("save_num_checkpoints_to_keep", -1))
    if keep == 0:
        return {"save_strategy": "no"}
    ours = interval("save")(file.keys.get("save_interval", "1000ba"), file)
    if keep > 0:
        ours["save_total_limit"] = max(keep, 2)
    if keep == 1:
        file.remark("save_num_checkpoints_to_keep: 2, the older one until the newer is complete")
    return ours


# ---- rules of pre-training ----

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Their sizes are config.json's too.
BASES = {f"{org}bert-base-{case}" for org in ("", "google-bert/") for case in ("cased", "uncased")}


def new_model(value, file: File) -> dict:
    if value == "mosaic_bert":
        return {"model_type": "mosaic_bert"}
    if value == "hf_bert":
        positions = file.keys.get("model.model_config.max_position_embeddings", 512)
        return {"model_type": "bert", "alibi_starting_size": positions}
    raise Refusal("it is mosaic_bert or hf_bert", "model_type")


def base_of_sizes(value, file: File) -> dict:
    """The model whose sizes are those that model_config does not say."""
    if file.has_flag("model_name_or_path") or value in BASES:
        return {}
    missing = [
        name
        for name in SIZES
        if f"model.model_config.{name}" not in file.keys and not file.has_flag(name)
    ]
    if missing:
        raise Refusal(
            f"{missing[0]} is not in model_config, and only BERT-Base's is known here: give "
            f"{' '.join('--' + name for name in missing)}"
        )
    return {}


def size(name: str) -> Callable:
    """A rule for a new model; a checkpoint has its own."""

    def rule(value, file: File) -> dict | None:
        has_own = file.has_flag("model_name_or_path") or any(x in file.keys for x in CHECKPOINTS)
        return NOTHING if has_own else {name: value}

    return rule


CHECKPOINTS = ("load_path", "model.pretrained_checkpoint")


def positions(value, file: File) -> dict | None:
    """Those of a hf_bert come with its name."""
    return {} if file.keys.get("model.name") == "hf_bert" else NOTHING


def pretrained(value, file: File) -> dict | None:
    if file.keys.get("model.name") != "hf_bert":
        return NOTHING
    if value:
        raise Refusal("only a MosaicBERT is continued from: leave it out for a new BERT")
    return {}


# ---- rules of fine-tuning ----


def start(value, file: File) -> dict:
    """The weights of a hf_bert are those of its name if asked for, unless there is a checkpoint."""
    if not value or "load_path" in file.keys or file.keys.get("model.name") != "hf_bert":
        return {}
    return {"model": file.keys.get("model.pretrained_model_name", "bert-base-uncased")}


def tasks(value, file: File) -> dict:
    """Of each task the seeds, and what its trainer is told."""
    # For whom pre-trains, scikit-learn would be loaded for nothing.
    from mosaic_tools.glue_tasks import SEEDS, TASKS

    if unknown := [name for name in group(value) if name not in TASKS]:
        raise ValueError(f"{unknown[0]} is none of {', '.join(TASKS)}")
    named = file.given.get("task", list(value))
    named = [name for name in TASKS if name in named or "all" in named]
    ours = {"task": ["all"] if named == list(TASKS) else named}
    default, seeds, told = [file.keys.get("default_seed")], {}, {}
    for name in named:
        options = group(value.get(name) or {})
        if odd := [x for x in options if x not in ("seeds", "trainer_kwargs")]:
            raise ValueError(f"{name}.{odd[0]} is neither seeds nor trainer_kwargs")
        seeds[name] = options.get("seeds", default)
        told[name] = of_trainer(group(options.get("trainer_kwargs") or {}), file)
    if any(x != list(SEEDS[: TASKS[name].seeds]) for name, x in seeds.items()):
        ours["seeds"] = same("seeds", seeds, file)
    for name in sorted({name for x in told.values() for name in x}):
        ours[name] = same(name, {task: x.get(name) for task, x in told.items()}, file)
    return ours


def same(name: str, by_task: dict, file: File):
    """What is said of all tasks. Refusal: it differs, or is said of some only."""
    first, *others = by_task.values()
    if any(x != first for x in others):
        said = "; ".join(f"{task} {x}" for task, x in by_task.items())
        raise Refusal(
            f"{name} is not the same for all tasks ({said}): train them one by one, first with "
            f"--task {next(iter(by_task))}",
            name,
        )
    return first


def of_trainer(options: dict, file: File) -> dict:
    ours = {}
    for name, value in options.items():
        if name == "max_duration":
            ours |= duration(value, file)
        elif name in TRAINER:
            ours |= {TRAINER[name]: value} if TRAINER[name] else {}
        else:
            raise ValueError(f"trainer_kwargs.{name} cannot be had: leave it out")
    return ours


TRAINER = {
    "batch_size": "global_batch_size",
    "max_sequence_length": "max_seq_length",
    # The model of the first seed is kept; the figures are those of the end.
    "save_num_checkpoints_to_keep": None,
    "eval_interval": None,
}
