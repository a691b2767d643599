# SPDX-License-Identifier: Apache-2.0
"""The model that finetune.py trains: any checkpoint's encoder under a classifier for the task.

A MosaicBERT runs this folder's code, whatever it brings; other models are transformers' own, or
need --trust_remote_code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glue_tasks import Task
from labelled_data import fingerprint
from prepare_data import largest_id
from publishing import load_tokenizer
from recipe import option
from train_mlm import HERE


@dataclass
class ClassifierArguments:
    """A pre-trained model, of this family or any that transformers classifies sequences with."""

    _argument_group_name = "model"

    model: str = option("", "Hub id or folder")
    tokenizer_name: str | None = option(None, "Hub id, folder or vocab.txt; None: the model's")
    new_classifier: bool = option(False, "replace the classifier that the model was trained with")
    hidden_dropout_prob: float | None = option(None, "None: the model's own")
    attention_probs_dropout_prob: float | None = option(
        None, "None: 0 in a MosaicBERT, as published; in others the model's own"
    )
    low_precision_layernorm: bool = option(
        True, "of a MosaicBERT, as published: LayerNorm in autocast's dtype, not in float32"
    )
    attn_implementation: str | None = option(None, "None: the best that the device has")
    trust_remote_code: bool = option(
        False, "run the code that a model brings; a MosaicBERT always runs this folder's"
    )

    def dropout(self) -> dict[str, float]:
        """Rates that are given."""
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def version(self) -> str:
        """Tells these weights from others of the same name."""
        folder = Path(self.model)
        if not folder.is_dir():
            return str(PretrainedConfig.get_config_dict(self.model)[0].get("_commit_hash"))
        weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
        return fingerprint([folder / "config.json", *sorted(weights)])


def read_config(name: str, trust_remote_code: bool = False):
    """The configuration of a model; one of this family becomes this folder's, whatever it brings.

    Raises:
        ValueError: there is no such model, or it is in Jina's layout.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"--model {name!r} is no folder of a model and no Hub id") from error
    if values.get("position_embedding_type") == "alibi":
        raise ValueError(
            f"{name} is in Jina's layout: python convert_weights.py {name} FOLDER, then "
            "--model FOLDER"
        )
    if "alibi_starting_size" not in values:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    ours = AutoConfig.from_pretrained(HERE, trust_remote_code=True)
    values |= {"model_type": ours.model_type, "auto_map": ours.auto_map}
    return type(ours).from_dict(values)


def read_tokenizer(args: ClassifierArguments, config):
    """The model's tokenizer, or the one named. ValueError: there is none, it has ids that the model
    does not, or it cannot pad."""
    try:
        tokenizer = load_tokenizer(args.tokenizer_name or args.model)
    except ValueError as error:
        raise ValueError(f"{error}; name the model's own by --tokenizer_name") from error
    if largest_id(tokenizer) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest_id(tokenizer)}, {args.model} a vocabulary of "
            f"{config.vocab_size}: give the --tokenizer_name that it was trained with"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {args.tokenizer_name or args.model} has no padding token, which "
            "rows of several lengths need: give a --tokenizer_name that has one"
        )
    return tokenizer


def label_ids(config) -> dict[str, int]:
    """Ids of a classifier's labels by name; by number too where they have no names."""
    ids = {str(name): i for i, name in config.id2label.items()}
    return ids | {name.removeprefix("LABEL_"): i for name, i in ids.items()}


def is_trained_on(name: str, config, task: Task) -> bool:
    """Whether the model has a classifier already, trained on the task's labels.

    Raises:
        ValueError: it has one, for others.
    """
    if not any("ForSequenceClassification" in x for x in config.architectures or []):
        return False
    unknown = [x for x in task.labels or () if x not in label_ids(config)]
    if unknown or (config.num_labels == 1) != (task.labels is None):
        names = ", ".join(map(str, config.id2label.values()))
        knows = f"the labels {names}" if config.num_labels > 1 else "scores"
        has = f"labels {', '.join(unknown or task.labels)}" if task.labels else "scores"
        raise ValueError(
            f"{name} was trained on {knows}, the data has {has}: choose other data, or replace its "
            "classifier by --new_classifier true"
        )
    return True


def build_classifier(args: ClassifierArguments, start: str, task: Task, tokenizer, most: int):
    """The weights of `start` under a classifier for the task, new unless trained on it already.

    Other layers outside the encoder, as ModernBERT's prediction head, stay as pre-trained.

    Args:
        most: tokens that a row may have.

    Raises:
        ValueError: weights are missing, other than those of a new classifier or of the pooler under
            it.
    """
    config = read_config(start, args.trust_remote_code)
    is_new = args.new_classifier or start != args.model or not is_trained_on(start, config, task)
    if is_new:
        names = task.labels or ("LABEL_0",)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification" if task.labels else "regression"
    options = {"trust_remote_code": args.trust_remote_code}
    model_class = AutoModelForSequenceClassification
    if config.model_type == "mosaic_bert":
        config.attention_probs_dropout_prob = 0.0
        config.low_precision_layernorm = args.low_precision_layernorm
        config.pad_token_id = tokenizer.pad_token_id
        length = max(config.alibi_starting_size, most)
        config.alibi_starting_size = config.max_position_embeddings = length
        reference = config.auto_map["AutoModelForSequenceClassification"]
        model_class, options = get_class_from_dynamic_module(reference, HERE), {}
        model_class.register_for_auto_class("AutoModelForSequenceClassification")
    config.update(args.dropout())
    model, loaded = model_class.from_pretrained(
        start,
        config=config,
        attn_implementation=args.attn_implementation,
        # What AdamW updates; transformers 5 would take the checkpoint's.
        dtype=torch.float32,
        # Refused below, unless they are the classifier's.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    inside = set(map(id, model.base_model.parameters()))
    encoder = {name for name, x in model.named_parameters() if id(x) in inside}
    # transformers 5 gives shapes with the names.
    mismatched = {x if isinstance(x, str) else x[0] for x in loaded["mismatched_keys"]}
    absent = {*loaded["missing_keys"], *mismatched}
    needed = {name for name in encoder if "pooler" not in name} if is_new else absent
    if lost := sorted(absent & needed):
        raise ValueError(
            f"{start} lacks {len(lost)} weights of the shapes that its config asks for: {lost[0]}"
        )
    if is_new:
        # What the checkpoint lacks is new already, a classifier of the same shape was loaded.
        for name, module in model.named_modules():
            outside = isinstance(module, nn.Linear) and f"{name}.weight" not in encoder | absent
            if outside and module.out_features == config.num_labels:
                nn.init.normal_(module.weight, std=getattr(config, "initializer_range", 0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def longest(config, tokenizer, wanted: int) -> int:
    """Tokens of a row: what is wanted, or as many as a model with positions can read."""
    if config.model_type == "mosaic_bert":
        return wanted
    positions = getattr(config, "max_position_embeddings", wanted)
    return min(wanted, tokenizer.model_max_length, positions)


def has_token_types(config) -> bool:
    """Whether the model tells the texts of a pair apart by them."""
    return getattr(config, "type_vocab_size", 0) > 1
