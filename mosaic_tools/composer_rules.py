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

    def refuse(self, reason: str, *flags: str):
        """ValueError, unless one of these flags is given in place of what cannot be had."""
        if not self.has_flag(*flags):
            raise ValueError(reason)

    def rows(self) -> int:
        """Of a step."""
        return self.number("rows of a step", "global_batch_size", ROWS)

    def number(self, what: str, flag: str, keys: tuple[str, ...]) -> int:
        """A whole number above 0 that one of these keys has; a flag comes first. ValueError: there
        is none."""
        values = [self.given.get(flag), *map(self.keys.get, keys)]
        value = next((x for x in values if x is not None), None)
        if value is None:
            raise ValueError(f"to count steps, the {what} are needed: give --{flag}")
        return whole(value, what)

    def steps(self, time: "Time") -> int:
        """Steps of a time in ba, sp or tok."""
        of_a_step = self.rows() if time.unit in ("sp", "tok") else 1
        if time.unit == "tok":
            of_a_step *= self.number("tokens of a row", "max_seq_length", TOKENS)
        return math.ceil(time.amount / of_a_step)


# Of a whole file, or of one task of GLUE.
ROWS = ("global_train_batch_size", "batch_size")
TOKENS = ("train_loader.dataset.max_seq_len", "train_loader.max_seq_len", "max_sequence_length")


# ---- numbers and times ----


def whole(value, name: str) -> int:
    number = float(value)
    if number < 1 or number != int(number):
        raise ValueError(f"{name} must be a whole number above 0")
    return int(number)


def as_number(value):
    """The number that a text is: to PyYAML 1e-12 is one, and only 1.0e-12 a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


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
            raise ValueError(
                "to count steps, the length of the run is needed: give --max_steps or "
                "--num_train_epochs"
            )
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
            raise ValueError(
                "give it in ba or dur, as the run is not in ep, or give --warmup_steps"
            )
        time = Time(time.amount / run.amount, "dur")
    if time.unit == "dur" or not time.amount:
        return {"warmup_ratio": float(time.amount)}
    return {"warmup_steps": file.steps(time)}


def interval(what: str) -> Callable:
    """A rule for how often to do what Trainer has WHAT_strategy and WHAT_steps for."""

    def rule(value, file: File) -> dict:
        strategy, steps = f"{what}_strategy", f"{what}_steps"
        if file.given.get(strategy, "steps") != "steps":
            return {}
        if file.has_flag(steps):
            return {strategy: "steps"}
        time = Time.read(value)
        # Both are done at the end too.
        if not time.amount or time.unit == "dur" and time.amount >= 1:
            return {strategy: "no"}
        if time.unit == "ep":
            if time.amount != 1:
                raise ValueError(
                    f"an interval in epochs is 1ep: give others in ba or dur, or --{steps}"
                )
            if is_streamed(file) and not file.has_flag("prepared_data"):
                raise ValueError(f"a stream ends no epoch: give it in ba or dur, or give --{steps}")
            return {strategy: "epoch"}
        if time.unit == "dur":
            run = run_length(file)
            share = time.amount if run.unit == "ep" else math.ceil(time.amount * run.amount)
            return {strategy: "steps", steps: float(share) if run.unit == "ep" else share}
        return {strategy: "steps", steps: file.steps(time)}

    return rule


# ---- rules: what a value becomes, by the names of our flags ----


def is_streamed(file: File) -> bool:
    """Whether text is read while training. A stream is as long as the run's steps."""
    if file.has_flag("streaming", "train_file", "dataset_name"):
        return bool(file.given.get("streaming"))
    of_shards = any(key.startswith("train_loader.dataset.") for key in file.keys)
    return of_shards and run_length(file).unit == "ba"


def group(value) -> dict:
    """The value. ValueError: it is no group of keys."""
    if not isinstance(value, dict):
        raise ValueError("expected keys with values")
    return value


def refused(reason: str, *flags: str) -> Callable:
    def rule(value, file: File) -> dict:
        file.refuse(reason, *flags)
        return {}

    return rule


def only(expected, reason: str, *flags: str) -> Callable:
    """A rule for what is the case here anyway."""

    def rule(value, file: File) -> dict:
        if as_number(value) != expected:
            file.refuse(f"{reason}, so it can only be {expected}", *flags)
        return {}

    return rule


def agreed(ours: str, *keys: str) -> Callable:
    """A rule for what all of these keys say, of which one is needed here."""

    def rule(value, file: File) -> dict:
        for key in keys:
            if (other := file.keys.get(key, value)) != value:
                file.refuse(f"{key} is {other}, and here they are one: --{ours} chooses", ours)
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
            raise ValueError(f"of a BERT: save it by transformers, and give --{flag} FOLDER")
        tokenizer = file.keys.get("model.tokenizer_name", "TOKENIZER")
        copy, file_here = "", value.replace("{rank}", "0")
        if "://" in value:
            copy, file_here = "copy it to this machine; ", Path(file_here).name
        raise ValueError(
            f"{copy}convert its weights, without the state of the optimizer: python "
            f"convert_weights.py {file_here} FOLDER --config config.json --tokenizer {tokenizer}; "
            f"then give --{flag} FOLDER"
        )

    return rule


def data(loader: str, ours: str) -> Callable:
    """A rule for the shards that a loader reads. Where flags name the text, no loader is read."""

    def rule(value, file: File) -> dict:
        if file.has_flag("train_file", "dataset_name"):
            return {}
        dataset = f"{loader}.dataset."
        place, split = "remote", file.keys.get(f"{dataset}split", "")
        if (folder := file.keys.get(f"{dataset}remote")) is None:
            place, folder = "local", file.keys.get(f"{dataset}local")
        if folder is None:
            raise ValueError("neither local nor remote names a folder: give --train_file FOLDER")
        if "://" in str(folder):
            raise ValueError(
                f"{place} {folder} is not on this machine: copy its splits here, and give "
                "--train_file FOLDER --validation_file FOLDER"
            )
        streams = {"streaming": True} if ours == "train_file" and is_streamed(file) else {}
        return {ours: [str(Path(str(folder), str(split)))]} | streams

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
    rows = whole(rows, "global_eval_batch_size") if rows else file.rows()
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
        file.refuse(f"it is one of amp_{', amp_'.join(choices)}, or --bf16 chooses", "bf16", "fp16")
    return choices.get(name, {})


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
        file.refuse(
            "stsb is in float32: train it by itself, --task stsb --bf16 false, and the others by "
            "--task",
            "bf16",
        )
        return {}
    return ours


def schedule(value, file: File) -> dict:
    """Of the scheduler's name and alpha_f; the script gives a constant rate none."""
    if file.has_flag("lr_scheduler_type"):
        return {}
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
    raise ValueError(
        f"{name} is none of linear_decay_with_warmup, constant_with_warmup, cosine_with_warmup: "
        "--lr_scheduler_type chooses one of transformers'"
    )


def end_of_schedule(value, file: File) -> dict:
    if value != file.keys.get("max_duration") and Time.read(value) != Time(Fraction(1), "dur"):
        file.refuse("the schedule is as long as the run: leave it out", "lr_scheduler_type")
    return {}


def optimizer(value, file: File) -> dict:
    if value != "decoupled_adamw":
        file.refuse("it is decoupled_adamw; --optim chooses one of transformers'", "optim")
    return {}


def betas(value, file: File) -> dict:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("AdamW has two: give a list of two numbers")
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
            options = group(options or {})
            threshold = options.get("clipping_threshold")
            if options.get("clipping_type") != "norm" or threshold is None:
                file.refuse(
                    "of gradients only the norm is clipped: give clipping_type norm and a "
                    "clipping_threshold, or give --max_grad_norm",
                    "max_grad_norm",
                )
            ours["max_grad_norm"] = threshold
        else:
            model = file.keys.get("model.name")
            raise ValueError(f"{name} cannot be had in a {model}: leave it out")
    return ours


def loggers(value, file: File) -> dict:
    if other := [name for name in group(value) if name != "wandb"]:
        file.refuse(f"{other[0]} is not wandb: --report_to chooses another", "report_to")
    if "wandb" not in value:
        return {}
    if any(x is not None for x in group(value["wandb"] or {}).values()):
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
        folder = str(folder or Path("runs", str(name))).replace("{run_name}", str(name or "run"))
        if "://" in folder or "{" in folder:
            raise ValueError(f"{folder} is no folder on this machine: give --output_dir")
        return {"output_dir": os.path.normpath(folder)}

    return rule


def saving(value, file: File) -> dict | None:
    """Of the interval, the number of checkpoints, and whether there is a folder for them."""
    if "save_folder" not in file.keys:
        return NOTHING
    keep = int(file.keys.get("save_num_checkpoints_to_keep", -1))
    if keep == 0 and not file.has_flag("save_steps"):
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
    file.refuse("it is mosaic_bert or hf_bert: --model_type chooses", "model_type")
    return {}


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
        raise ValueError(
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


def begins_anew(value, file: File) -> dict | None:
    """Of load_path, and of load_weights_only where that is given."""
    if "load_path" not in file.keys:
        return NOTHING
    if not file.keys.get("load_weights_only"):
        file.remark(
            "load_path: weights only; step, optimizer and rate begin anew, as there with "
            "load_weights_only: true"
        )
    return {}


def positions(value, file: File) -> dict | None:
    """Those of a hf_bert come with its name."""
    return {} if file.keys.get("model.name") == "hf_bert" else NOTHING


def pretrained(value, file: File) -> dict | None:
    if file.keys.get("model.name") != "hf_bert":
        return NOTHING
    if value:
        raise ValueError("only a MosaicBERT is continued from: leave it out for a new BERT")
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
        options = group(options.get("trainer_kwargs") or {})
        told[name] = of_trainer(options, {"batch_size": TASKS[name].batch}, file)
    if any(x != list(SEEDS[: TASKS[name].seeds]) for name, x in seeds.items()):
        ours |= same("seeds", seeds, file)
    for name in sorted({name for x in told.values() for name in x}):
        ours |= same(name, {task: x.get(name) for task, x in told.items()}, file)
    return ours


def same(name: str, by_task: dict, file: File) -> dict:
    """What is said of all tasks. ValueError: it differs, or is said of some only, and no flag says
    it."""
    first, *others = by_task.values()
    if all(x == first for x in others):
        return {name: first}
    said = "; ".join(f"{task} {x}" for task, x in by_task.items())
    file.refuse(
        f"{name} is not the same for all tasks ({said}): train them one by one, first with "
        f"--task {next(iter(by_task))}",
        name,
    )
    return {}


def of_trainer(options: dict, defaults: dict, file: File) -> dict:
    ours, counting = {}, File(defaults | options, file.given)
    for name, value in options.items():
        if name == "max_duration":
            ours |= duration(value, counting)
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
