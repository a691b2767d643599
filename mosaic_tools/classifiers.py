# SPDX-License-Identifier: Apache-2.0
"""The model that finetune.py trains: any checkpoint's encoder under a classifier for the task.

A MosaicBERT runs this folder's code, whatever it brings; other models are transformers' own, or
need --trust_remote_code.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import cached_file

from mosaic_tools import family
from mosaic_tools.glue_tasks import Task
from mosaic_tools.labelled_data import fingerprint
from mosaic_tools.recipe import DROPOUT, check_range, option
from mosaic_tools.tokenization import largest_id, load_tokenizer


@dataclass
class ClassifierArguments:
    """A pre-trained model, of this family or any that transformers classifies sequences with."""

    _argument_group_name = "model"

    model: str = option(
        "", "Hub id or folder", aliases=["--model_name_or_path", "--model-name-or-path"]
    )
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

    def __post_init__(self):
        check_range(self, *DROPOUT, below=1)

    def dropout(self) -> dict[str, float]:
        """Rates that are given."""
        return {name: x for name in DROPOUT if (x := getattr(self, name)) is not None}

    def version(self) -> str:
        """Tells these weights from others of the same name."""
        folder = Path(self.model)
        if not folder.is_dir():
            # The Hub's cache has a folder for each commit.
            return Path(cached_file(self.model, "config.json")).parent.name
        weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
        return fingerprint([folder / "config.json", *sorted(weights)])


def read_config(name: str, trust_remote_code: bool = False):
    """The configuration of a model; one of this family becomes this folder's, whatever it brings.

    Raises:
        ValueError: there is no such model, or as `family.as_ours`.
    """
    try:
        values = family.config_values(name)
    except ValueError as error:
        raise ValueError(f"--model {error}") from error
    if family.is_of_family(values):
        return family.as_ours(values, name)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


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


def build_classifier(args: ClassifierArguments, start: str, task: Task, tokenizer, max_length: int):
    """The weights of `start` under a classifier for the task, new unless trained on it already.

    Other layers outside the encoder, as ModernBERT's prediction head, stay as pre-trained.

    Args:
        max_length: of a row, in tokens.

    Raises:
        ValueError: as `family.load`; a new classifier, and a new pooler under it, may be missing.
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
    if family.is_ours(config):
        config.attention_probs_dropout_prob = 0.0
        config.low_precision_layernorm = args.low_precision_layernorm
        config.pad_token_id = tokenizer.pad_token_id
        length = max(config.alibi_starting_size, max_length)
        config.alibi_starting_size = config.max_position_embeddings = length
        model_class, options = family.model_class("AutoModelForSequenceClassification"), {}
    config.update(args.dropout())
    model, new = family.load(
        model_class,
        start,
        config,
        other_head=is_new,
        flag="--new_classifier true",
        attn_implementation=args.attn_implementation,
        **options,
    )
    if is_new:
        draw_classifier(model, new)
    return model


@torch.no_grad()
def draw_classifier(model, new: set[str]):
    """Draws anew what gives the logits, of which a checkpoint may have had one of the same shape,
    for other labels.

    Args:
        new: names of tensors that are new already.
    """
    config = copy.deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"):
        more = dict(type(model)(config).named_parameters())
    for name, x in model.named_parameters():
        # No other layer's shape depends on the number of labels.
        if x.shape != more[name].shape and name not in new:
            if x.dim() > 1:
                x.normal_(std=getattr(config, "initializer_range", 0.02))
            else:
                x.zero_()
