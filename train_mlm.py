# SPDX-License-Identifier: Apache-2.0
"""Pre-trains MosaicBERT by masked language modelling, from scratch or from a checkpoint.

    accelerate launch train_mlm.py recipes/demo.yaml                   # minutes on a CPU, no data
    accelerate launch train_mlm.py recipes/demo.yaml --max_steps 100   # flags override the YAML
    accelerate launch train_mlm.py --train_file text.txt --output_dir out
    accelerate launch train_mlm.py --train_file 'c4/*.parquet' --streaming --max_steps 70000 \
        --tokenizer_name bert-base-uncased --output_dir out
    ... the same command again with --resume_from_checkpoint last, after an interruption

Defaults are MosaicBERT's recipe at sequence length 128, on whatever devices there are; the size of
the run (batch, steps) is yours to give. The output folder is a complete Hub repository: weights,
config, code, tokenizer and a model card. Without data it reads English text that Python carries.
"""

import difflib
import glob
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available

from embedded_text import embedded_passages, held_out
from publishing import SPECIAL_TOKENS, load_tokenizer, make_tokenizer_portable, write_card

HERE = str(Path(__file__).resolve().parent)
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# A tokenizer learns from at most so many documents, and a stream is shuffled within so many.
TOKENIZER_DOCUMENTS, SHUFFLED_DOCUMENTS = 200_000, 10_000
# Every evaluation masks the same tokens, whatever the training seed.
EVALUATION_SEED = 17


# ---- arguments ----


def option(default, help):
    return HfArg(default=default, help=help)


@dataclass
class ModelArguments:
    """A checkpoint, or a new model described by config.json and the sizes given here."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(None, "checkpoint to continue from")
    hidden_size: int | None = option(None, "of a new model; None, here and below: config.json's")
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    hidden_dropout_prob: float | None = option(
        None, "None: the configuration's, a checkpoint's own"
    )
    attention_probs_dropout_prob: float | None = None
    alibi_starting_size: int | None = option(None, "length to prepare for; None: max_seq_length")
    low_precision_layernorm: bool = option(True, "LayerNorm in autocast's dtype, not in float32")
    attn_implementation: str | None = option(None, "None: the best that the device has")

    def shape(self) -> dict:
        """What describes a new model, as far as it is given."""
        return self.given(
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        )

    def dropout(self) -> dict:
        """Rates that replace the configuration's."""
        return self.given("hidden_dropout_prob", "attention_probs_dropout_prob")

    def given(self, *names: str) -> dict:
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TokenizerArguments:
    """An existing tokenizer, or a WordPiece tokenizer trained on the training text."""

    _argument_group_name = "tokenizer"

    tokenizer_name: str | None = option(
        None, "Hub id, folder or BERT's vocab.txt; None: the checkpoint's, or a new one"
    )
    vocab_size: int = option(30522, "most entries of a new tokenizer")
    lowercase: bool | None = option(None, "None: as a vocab.txt's entries are; a new one does")


@dataclass
class DataArguments:
    """Documents, each cut at max_seq_length tokens."""

    _argument_group_name = "data"

    train_file: list[str] | None = option(
        None, "files or glob patterns: .txt (a document a line), .json(l), .csv, .parquet"
    )
    validation_file: list[str] | None = option(None, "as train_file")
    dataset_name: str | None = option(None, "Hub dataset, in place of train_file")
    dataset_config_name: str | None = None
    streaming: bool = option(False, "read while training; needs max_steps")
    text_column: str = "text"
    validation_split: float = option(5.0, "per cent held out if the data has no validation part")
    max_eval_documents: int = option(10_000, "documents that an evaluation reads at most")
    max_seq_length: int = 128
    mlm_probability: float = option(0.3, "share of tokens masked in training")
    eval_mlm_probability: float = option(0.15, "share of tokens masked in evaluation")

    def __post_init__(self):
        if self.max_seq_length < 3:
            raise ValueError(
                f"max_seq_length is {self.max_seq_length}: [CLS], a token and [SEP] need at least 3"
            )
        if self.train_file and self.dataset_name:
            raise ValueError(f"give train_file or dataset_name ({self.dataset_name}), not both")
        if self.validation_file and not (self.train_file or self.dataset_name):
            raise ValueError(f"validation_file {self.validation_file} needs a train_file")
        if not 0 < self.validation_split < 100:
            raise ValueError(f"validation_split is a percentage, got {self.validation_split}")

    def source(self) -> str:
        """Where the documents come from, in words."""
        name = " ".join(filter(None, (self.dataset_name, self.dataset_config_name)))
        files = [Path(file).name for file in self.train_file or []]
        return name or ", ".join(files or ["English text that CPython carries"])


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with MosaicBERT's recipe as defaults."""

    output_dir: str | None = option(None, "where the model goes: new, or empty")
    overwrite: bool = option(False, "write into output_dir although it holds files")
    resume_from_checkpoint: str | None = option(None, "a checkpoint's folder, or 'last'")
    learning_rate: float = 5e-4
    warmup_share: float = option(0.06, "of all steps, unless warmup_steps is above 0")
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    weight_decay: float = option(0.02, "of torch's AdamW: the recipe's 1e-5 over its rate of 5e-4")
    max_grad_norm: float = option(0.0, "clips gradients; the recipe does not (0)")
    bf16: bool | None = option(None, "bfloat16 autocast; None: where the device has it")
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    cpu_threads: int | None = option(None, "of each process on the CPU; None: all, shared equally")
    logging_steps: float = 50
    report_to: str = "none"
    # The collator needs special_tokens_mask, which is no argument of the model.
    remove_unused_columns: bool = False

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("give --output_dir, the folder that the model is written to")
        if getattr(self, "warmup_ratio", None):
            raise ValueError(f"give --warmup_share {self.warmup_ratio} instead of --warmup_ratio")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (self.use_cpu or is_torch_bf16_gpu_available())
        # Each process reads its part of a stream: one cannot send others batches of unequal length.
        self.accelerator_config = self.accelerator_config or {"dispatch_batches": False}
        super().__post_init__()

    def share_of_warmup(self) -> float:
        """The share of all steps; a warmup_steps below 1 is one too, as in transformers 5."""
        return self.warmup_steps if 0 < self.warmup_steps < 1 else self.warmup_share

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return int(self.warmup_steps) or round(self.share_of_warmup() * num_training_steps)


def parse(argv: list[str]):
    """The groups of arguments, from `[recipe.yaml] [--flag value ...]`; flags come last and win."""
    groups = (ModelArguments, TokenizerArguments, DataArguments, RecipeArguments)
    if argv and argv[0].endswith((".yaml", ".yml")):
        known = {field.name for group in groups for field in fields(group)}
        argv = recipe_flags(argv[0], known) + argv[1:]
    return HfArgumentParser(groups).parse_args_into_dataclasses(argv, look_for_args_file=False)


def recipe_flags(path: str, known: set[str]) -> list[str]:
    """A YAML recipe as command-line flags, so that the same rules read both."""
    flags = []
    for key, value in (yaml.safe_load(Path(path).read_text()) or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known) or ["--help, which lists them all"]
            raise ValueError(f"{path}: unknown key {key!r}; see {' or '.join(near)}")
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values if v is not None]
        flags += [f"--{key}", *words] if words else []
    return flags


def checkpoint_to_resume(args: RecipeArguments) -> str | None:
    """The checkpoint asked for. ValueError: it is not there, or files would be overwritten."""
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted is None:
        if folder.exists() and any(folder.iterdir()) and not args.overwrite:
            raise ValueError(
                f"output_dir {folder} is not empty: choose another, continue with "
                "--resume_from_checkpoint last, or write into it with --overwrite"
            )
        return None
    checkpoint = wanted
    if wanted == "last":
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint {wanted}: no such checkpoint; looked in {folder}")
    return checkpoint


# ---- data ----


def load_documents(args: DataArguments):
    """(training, held-out) documents, map-style or streams; both have the text column."""
    validation = None
    if args.dataset_name:
        name, config = args.dataset_name, args.dataset_config_name
        parts = datasets.load_dataset(name, config, streaming=args.streaming)
        train, validation = parts["train"], parts.get("validation")
    elif args.train_file:
        train = load_files(args.train_file, args.streaming)
    else:
        train, validation = (datasets.Dataset.from_dict({"text": x}) for x in embedded_passages())
    if args.validation_file:
        validation = load_files(args.validation_file, args.streaming)
    train = with_text(train, args.text_column)
    if validation is None:
        train, validation = split(train, args.text_column, args.validation_split)
    validation = with_text(validation, args.text_column)
    return train, first_rows(validation, args.max_eval_documents)


def load_files(patterns: list[str], streaming: bool):
    """The rows of all files that match."""
    files = []
    for pattern in patterns:
        if not (found := sorted(glob.glob(pattern, recursive=True))):
            raise ValueError(f"there is no file {pattern}")
        files += found
    if empty := [file for file in files if not os.path.getsize(file)]:
        raise ValueError(f"empty, leave it out or fill it: {', '.join(empty)}")
    # Any suffix counts, so that text.txt.xz, which `datasets` unpacks, is text.
    kinds = {next((FORMATS[s] for s in Path(f).suffixes if s in FORMATS), None) for f in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(f"{', '.join(files)}: give files of one format of {', '.join(FORMATS)}")
    return datasets.load_dataset(*kinds, data_files=files, split="train", streaming=streaming)


def column_names(documents) -> list[str]:
    """Columns of a dataset; those of a stream may show in its first row only."""
    return documents.column_names or list(next(iter(documents), {}))


def with_text(documents, column: str):
    """The documents that are not blank. ValueError: there is no such column."""
    if column not in (columns := column_names(documents)):
        there = ", ".join(columns) or "none, it is empty"
        raise ValueError(f"--text_column {column} is not in the data; its columns: {there}")
    return documents.filter(
        lambda text: isinstance(text, str) and text.strip() != "", input_columns=column
    )


def split(documents, column: str, percent: float):
    """(training, held-out) documents; equal ones land on the same side, also in a stream."""

    def part(wanted):
        def choose(texts):
            return [held_out(text, percent) == wanted for text in texts]

        return documents.filter(choose, batched=True, input_columns=column)

    return part(False), part(True)


def first_rows(documents, count: int):
    if isinstance(documents, datasets.IterableDataset):
        return documents.take(count)
    return documents.select(range(min(count, len(documents))))


def shuffled(documents, seed: int):
    """Trainer shuffles what it can index; a stream is shuffled here, within a buffer."""
    if isinstance(documents, datasets.IterableDataset):
        return documents.shuffle(seed, buffer_size=SHUFFLED_DOCUMENTS)
    return documents


def tokenize(documents, args: DataArguments, tokenizer):
    """Documents as input_ids and special_tokens_mask."""

    def encode(batch):
        return tokenizer(
            batch[args.text_column],
            truncation=True,
            max_length=args.max_seq_length,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_special_tokens_mask=True,
        )

    encoded = documents.map(encode, batched=True, remove_columns=column_names(documents))
    if isinstance(encoded, datasets.Dataset) and not len(encoded):
        raise ValueError(
            f"{args.source()}: no text is left for training or for evaluation; give more of it, a "
            f"--validation_file, or another --validation_split than {args.validation_split:g}"
        )
    return encoded


# ---- tokenizer ----


def existing_tokenizer(name: str, lowercase: bool | None):
    """A Hub id's, a folder's or a BERT vocab.txt's tokenizer. ValueError: it cannot mask or pad."""
    tokenizer = load_tokenizer(name, lowercase)
    for role in ("mask_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise ValueError(
                f"the tokenizer {name} has no {role}, which masked language modelling needs: "
                "choose another --tokenizer_name, or none to train one"
            )
    return tokenizer


def train_tokenizer(texts, args: TokenizerArguments):
    """A tokenizer as BERT's, trained on these texts by the main process and sent to the others.

    Sent, since WordPiece training has no fixed order: no two runs give the same ids.
    """
    state = [None]
    if PartialState().is_main_process:
        lowercase = args.lowercase is not False
        tokenizer = wordpiece(models.WordPiece(unk_token="[UNK]"), lowercase)
        trainer = trainers.WordPieceTrainer(
            vocab_size=args.vocab_size, special_tokens=SPECIAL_TOKENS
        )
        tokenizer.train_from_iterator(texts, trainer)
        state = [tokenizer.to_str()]
    return as_transformers(Tokenizer.from_str(broadcast_object_list(state)[0]))


def wordpiece(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    """BERT's text processing around a WordPiece model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with BERT's template, [CLS] text [SEP] pair [SEP], and special tokens."""
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def largest_id(tokenizer) -> int:
    return max(tokenizer.get_vocab().values())


# ---- model ----


def build_model(args: ModelArguments, tokenizer, max_seq_length: int):
    """The model to train, by this folder's code."""
    if args.model_name_or_path:
        return continued_model(args, tokenizer, max_seq_length)
    length = args.alibi_starting_size or max_seq_length
    config = AutoConfig.from_pretrained(
        HERE,
        trust_remote_code=True,
        vocab_size=-(-(largest_id(tokenizer) + 1) // 64) * 64,
        pad_token_id=tokenizer.pad_token_id,
        alibi_starting_size=length,
        max_position_embeddings=length,
        low_precision_layernorm=args.low_precision_layernorm,
        **args.shape(),
        **args.dropout(),
    )
    return AutoModelForMaskedLM.from_config(
        config, trust_remote_code=True, attn_implementation=args.attn_implementation
    )


def continued_model(args: ModelArguments, tokenizer, max_seq_length: int):
    """The weights of a checkpoint, whatever code it brings, in this folder's model."""
    if args.shape():
        raise ValueError(f"{args.model_name_or_path} has its own shape: leave out {args.shape()}")
    ours = AutoConfig.from_pretrained(HERE, trust_remote_code=True)
    config = type(ours).from_pretrained(args.model_name_or_path)
    if largest_id(tokenizer) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest_id(tokenizer)}, {args.model_name_or_path} a "
            f"vocabulary of {config.vocab_size}: give the --tokenizer_name it was trained with"
        )
    length = args.alibi_starting_size or max(config.alibi_starting_size, max_seq_length)
    config.alibi_starting_size = config.max_position_embeddings = length
    config.low_precision_layernorm = args.low_precision_layernorm
    config.update(args.dropout())
    config.pad_token_id, config.auto_map = tokenizer.pad_token_id, ours.auto_map
    model_class = get_class_from_dynamic_module(ours.auto_map["AutoModelForMaskedLM"], HERE)
    model_class.register_for_auto_class("AutoModelForMaskedLM")
    return model_class.from_pretrained(
        args.model_name_or_path,
        config=config,
        attn_implementation=args.attn_implementation,
        # What AdamW updates; transformers 5 would take the checkpoint's.
        dtype=torch.float32,
    )


def attention_backend(model, args: RecipeArguments) -> str:
    """The backend that the model will choose on this device, in this dtype."""
    config = model.config
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    head_dim = config.hidden_size // config.num_attention_heads
    choose_backend = sys.modules[type(model).__module__].choose_backend
    return choose_backend(config._attn_implementation, args.device, dtype, head_dim)


# ---- training ----


class MlmTrainer(Trainer):
    """Trainer that masks the same tokens in every evaluation, decays all parameters, as published,
    and saves tokenizers that every transformers reads."""

    def __init__(self, *args, eval_mlm_probability: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_mlm_probability = eval_mlm_probability

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator = self.data_collator
        self.data_collator = DataCollatorForLanguageModeling(
            self.processing_class, mlm_probability=self.eval_mlm_probability, seed=EVALUATION_SEED
        )
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            make_tokenizer_portable(folder, self.model.config.alibi_starting_size)


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


def use_all_cores(args: RecipeArguments):
    """accelerate launch leaves a process one thread unless it is told otherwise."""
    if args.use_cpu:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(args.cpu_threads or max(1, usable_cores() // processes))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe(trainer: Trainer, data: DataArguments) -> dict[str, str]:
    """What is about to run, for the start of the log and for the model card."""
    args, config = trainer.args, trainer.model.config
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = (
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    steps = args.warmup_steps
    warmup = f"{steps:g} steps" if steps >= 1 else f"{args.share_of_warmup():.0%}"
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"
    return {
        "model": f"{config.num_hidden_layers} layers x {config.hidden_size}, vocabulary "
        f"{config.vocab_size}, {trainer.model.num_parameters():,} parameters",
        "data": f"{data.source()}: {size(trainer.train_dataset)}",
        "held out": size(trainer.eval_dataset),
        "run": f"{length} of {batch} documents, cut at {data.max_seq_length} tokens, "
        f"{data.mlm_probability:.0%} masked ({data.eval_mlm_probability:.0%} in evaluation)",
        "optimizer": f"{args.optim.value}, peak learning rate {args.learning_rate:g} after a "
        f"warm-up of {warmup}, {args.lr_scheduler_type.value}, weight decay {args.weight_decay:g}",
        "computed in": f"{precision}, attention {attention_backend(trainer.model, args)}, "
        f"{args.world_size} process(es) on {args.device.type}",
    }


def size(encoded) -> str:
    """Rows and tokens of a tokenized dataset, in words."""
    if isinstance(encoded, datasets.IterableDataset):
        return "streamed"
    tokens = sum(len(row) for row in encoded.with_format("numpy")["input_ids"])
    return f"{len(encoded):,} documents, {tokens:,} tokens"


def hub_id(name: str | None) -> str | None:
    """The name, unless it is None or a folder of this machine."""
    return None if name is None or Path(name).exists() else name


def figures(metrics: dict[str, float]) -> dict[str, str]:
    """The evaluation in words, for the model card."""
    return {
        "evaluation loss": f"{metrics['eval_loss']:.3f}",
        "masked accuracy": f"{metrics['eval_masked_accuracy']:.1%}",
        "always the commonest token": f"{metrics['eval_commonest_token_accuracy']:.1%}",
    }


def main():
    model_args, tokenizer_args, data_args, args = parse(sys.argv[1:])
    checkpoint = checkpoint_to_resume(args)
    use_all_cores(args)
    set_seed(args.seed)

    # The main process fills the caches of data and code, the others read them.
    with args.main_process_first():
        train, validation = load_documents(data_args)
    # A resumed run keeps its tokenizer: one trained again would have other ids.
    name = checkpoint or tokenizer_args.tokenizer_name or model_args.model_name_or_path
    if name:
        tokenizer = existing_tokenizer(name, tokenizer_args.lowercase)
    else:
        documents = first_rows(train, TOKENIZER_DOCUMENTS)
        texts = (row[data_args.text_column] for row in documents)
        tokenizer = train_tokenizer(texts, tokenizer_args)
    with args.main_process_first():
        train, validation = (tokenize(x, data_args, tokenizer) for x in (train, validation))
        model = build_model(model_args, tokenizer, data_args.max_seq_length)

    trainer = MlmTrainer(
        model,
        args,
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability),
        train_dataset=shuffled(train, args.seed),
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=most_likely_tokens,
        eval_mlm_probability=data_args.eval_mlm_probability,
    )
    facts = describe(trainer, data_args)
    for name, value in facts.items():
        trainer.accelerator.print(f"{name}: {value}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        write_card(
            args.output_dir,
            Path(args.output_dir).resolve().name,
            "AutoModelForMaskedLM",
            "A MosaicBERT encoder (ALiBi, gated MLPs, no padding inside), pre-trained by "
            "train_mlm.py and evaluated on documents that it had not seen.",
            facts | figures(metrics),
            base_model=hub_id(model_args.model_name_or_path),
        )


if __name__ == "__main__":
    main()
