# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint of the family in this folder's code, whatever code it brings: published ones, with
or without a prefix, head or `model_type`, and those written here.

    config = read_config("zhihan1996/DNABERT-2-117M")
    model = load(model_class("AutoModelForMaskedLM"), "zhihan1996/DNABERT-2-117M", config)

transformers draws at random what a checkpoint lacks and drops what it has too much, with a report
at most. Here every tensor must find its place and no place may stay empty, or the checkpoint is
refused by the tensors' names; only a head may be new or left over, where a command says so. Jina's
layout and Composer's checkpoints are for convert_weights.py to read.
"""

import contextlib
import copy
import os
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from mosaic_tools.weights import fetch, read_tensors

HERE = str(Path(__file__).resolve().parents[1])
PARTS = {"bert.pooler.": "pooler", "cls.": "MLM head", "classifier.": "classifier"}
# Counters that old transformers saved among the weights.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Names that belong to a kin, and what it is.
KIN = {
    "layer_norm_q": "a BERT with QK norm (jina-bert-v2-qk-post-norm, the architecture of "
    "jina-embeddings-v2-base-code), another architecture",
    ".intermediate.dense": "a stock BERT, without ALiBi and gate, from which no MosaicBERT starts",
}
JINA = {
    ".attention.self.query": "Jina's layout: python convert_weights.py SOURCE FOLDER, and take "
    "FOLDER"
}
DECODER, EMBEDDINGS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def listed(names, max_names: int = 8) -> str:
    """The names, or the first of them and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - max_names} more" if names[max_names:] else ""
    return ", ".join(names[:max_names]) + rest


def say(text: str, stream=None):
    """What every process of a run has to say, said once: to the standard output, or to stream."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end="", file=stream)


# ---- this folder's code ----


def our_config():
    """The configuration beside the model's files."""
    return AutoConfig.from_pretrained(HERE, trust_remote_code=True)


def model_class(auto_class: str):
    """This folder's class for an Auto class's name; what it saves has the model's code."""
    found = get_class_from_dynamic_module(our_config().auto_map[auto_class], HERE)
    found.register_for_auto_class(auto_class)
    return found


def is_ours(config) -> bool:
    """Whether this folder's code runs the model."""
    # Not by model_type: on transformers 4.57 an instance keeps its file's, "bert" in published
    # checkpoints, and ablations have their own.
    return type(config).__name__ == "MosaicBertConfig"


# ---- configurations ----


def config_values(source: str) -> dict:
    """What the config.json of a folder or Hub id says. ValueError: there is none."""
    try:
        return PretrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        raise ValueError(f"{source!r} is no folder of a model and no Hub id") from error


def is_of_family(values: dict) -> bool:
    """Whether a config.json describes a MosaicBERT, or what `as_ours` refuses by name."""
    return "alibi_starting_size" in values or values.get("position_embedding_type") == "alibi"


def read_config(source: str):
    """The configuration of a checkpoint. ValueError: there is none, or as `as_ours`."""
    return as_ours(config_values(source), source)


def as_ours(values: dict, source: str):
    """This folder's configuration with the values of the source's.

    Raises:
        ValueError: the source is in Jina's layout, its model_type is that of an ablation, or the
            values describe no MosaicBERT.
    """
    ours = our_config()
    expected, found = type(ours).model_type, str(values.get("model_type", ""))
    if values.get("position_embedding_type") == "alibi":
        raise ValueError(
            f"{source} is in Jina's layout: python convert_weights.py {source} FOLDER, and take "
            "FOLDER"
        )
    if found.startswith("mosaic_bert") and found != expected:
        raise ValueError(
            f"{source} has model_type {found!r}, expected {expected!r}: ablations are read by "
            "python benchmarks/learning/ablations.py NAME SCRIPT, and nothing else is"
        )
    try:
        return type(ours).from_dict(values | {"model_type": expected, "auto_map": ours.auto_map})
    except Exception as error:
        raise ValueError(f"{source}: its config is not MosaicBERT's: {error}") from error


# ---- weights ----


@contextlib.contextmanager
def without_report():
    """Keeps transformers from reporting what it loads, since `check_loaded` does, and knows what is
    tied or may be new."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load(model_class, source: str, config, other_head: bool = False, flag: str = "", **options):
    """The weights of a folder or Hub id in a model of the class, in float32.

    Args:
        other_head: the source may have another head than the model, or none.
        flag: of the command, that says so.
        options: of from_pretrained.

    Returns:
        The model, and the names of its tensors that are new.

    Raises:
        ValueError: as `check_size`, `check_loaded` and `check_finite`, or a decoder is stored that
            differs from the embeddings, and the config ties them.
    """
    if is_ours(config):
        check_size(source, model_class, config)
    # Tied below: where both are stored, 4.57 drops the decoder, and 5.0 leaves it untied.
    ties = is_ours(config) and config.tie_word_embeddings
    if ties:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    with without_report():
        model, loaded = model_class.from_pretrained(
            source,
            config=config,
            # What AdamW updates; transformers 5 would take the checkpoint's.
            dtype=torch.float32,
            # Told apart below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    is_stored = DECODER not in loaded["missing_keys"]
    if ties:
        loaded["missing_keys"] = set(loaded["missing_keys"]) - {DECODER}
    new = check_loaded(source, model, loaded, other_head, flag)
    if ties:
        decoder, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if decoder is not None and is_stored and not torch.equal(decoder.weight, embeddings.weight):
            raise ValueError(differs(source))
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if is_ours(config):
        # By it 5.0 would save LayerNorm's weights as gamma and beta, which others do not know.
        vars(model).pop("_weight_conversions", None)
    check_finite(source, model.state_dict())
    return model, new


def check_size(source: str, model_class, config):
    """ValueError: the files cannot be read, or the config describes an encoder of far more weights
    than they hold. transformers would take the memory for it, and compare then."""
    with torch.device("meta"):
        encoder = model_class(config).base_model
    described = sum(x.numel() for name, x in encoder.named_parameters() if "pooler" not in name)
    stored = sum(x.numel() for x in read_tensors(fetch(source)).values())
    # 500 MB of float32 are harmless, and `check_loaded` can name the tensors.
    if described > 2 * stored + 125 * 10**6:
        raise ValueError(
            f"{source} does not fit {model_class.__name__}: its config describes an encoder of "
            f"{described:,} weights, and its files hold {stored:,}; correct the sizes in its "
            "config.json, or take the checkpoint that it is of"
        )


def check_loaded(source, model, loaded: dict, other_head: bool = False, flag: str = "") -> set[str]:
    """Names of the model's tensors that are new, of its head, having said so. A pooler that the
    model does not have may be left over.

    Args:
        loaded: what from_pretrained gives with output_loading_info.
        The others are as in `load`.

    Raises:
        ValueError: tensors are missing, left over or of another shape, other than a head's if
            `other_head`.
    """
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    # transformers 5 gives shapes with the names.
    reshaped = {x if isinstance(x, str) else x[0] for x in loaded["mismatched_keys"]}
    missing = [x for x in shapes if x in loaded["missing_keys"] and x not in reshaped]
    left_over = sorted(x for x in loaded["unexpected_keys"] if not x.endswith(BUFFERS))

    def may_differ(name: str) -> bool:
        return other_head and is_of_head(name, model)

    new = {x for x in (*missing, *reshaped) if may_differ(x)}
    dropped = [x for x in left_over if may_differ(x) or "pooler" in x.split(".")]
    check_fit(
        str(source),
        type(model).__name__,
        [x for x in left_over if x not in dropped],
        [x for x in missing if x not in new],
        [f"{x}, expected {shapes[x]}" for x in shapes if x in reshaped and x not in new],
        kin=KIN | JINA if is_ours(model.config) else {},
        flag=flag,
    )
    if new or dropped:
        sets = {"new, not in the checkpoint": sorted(new), "not taken from it": dropped}
        said = "; ".join(f"{x}: {listed(y)}" for x, y in sets.items() if y)
        say(f"{source}: {said}\n")
    return new


def is_of_head(name: str, model) -> bool:
    """Whether a tensor of the model or of its checkpoint is of a head, or of the pooler under it,
    and not of the encoder. A checkpoint of an encoder alone has its names without a prefix."""
    prefix = f"{model.base_model_prefix}."
    part = name.removeprefix(prefix).split(".")[0]
    parts = dict(model.base_model.named_children())
    return part == "pooler" or not (name.startswith(prefix) or part in parts)


def differs(source) -> str:
    """What is wrong with a checkpoint whose decoder differs from the embeddings it is tied to."""
    return (
        f"{DECODER} of {source} differs from {EMBEDDINGS}, but its config ties them: write "
        '"tie_word_embeddings": false into its config.json'
    )


def check_finite(source, tensors: dict):
    """ValueError: a tensor holds nan or infinity, with which a model knows nothing."""
    # torch has no isfinite for dtypes of 8 bits.
    wide = ((name, x.float() if x.itemsize == 1 else x) for name, x in tensors.items())
    if wrong := [name for name, x in wide if not torch.isfinite(x).all()]:
        raise ValueError(
            f"{source} holds nan or infinity in {listed(wrong)}: its file is damaged, or its "
            "training diverged; take an earlier checkpoint"
        )


def check_fit(source, kind: str, left_over, missing, reshaped, kin=KIN, flag: str = ""):
    """Refuses a checkpoint that does not fit a model.

    Args:
        kind: the model's class.
        left_over, missing, reshaped: names, with shapes or without.
        kin: names that tell what else it is, and what that is.
        flag: of the command, that allows another head.

    Raises:
        ValueError: there are any such tensors.
    """
    problems = {
        "no place for": left_over,
        "missing": missing,
        "config and source differ in shape": reshaped,
    }
    if not any(problems.values()):
        return
    found = "; ".join(f"{x}: {listed(names)}" for x, names in problems.items() if names)
    for mark, what in kin.items():
        if any(mark in name for name in left_over):
            raise ValueError(f"{source} is no MosaicBERT: its names tell of {what} ({found})")
    prefixes = tuple(PARTS)
    lacks = [y for x, y in PARTS.items() if any(name.startswith(x) for name in missing)]
    if flag and lacks and all(x.startswith(prefixes) for x in (*missing, *left_over, *reshaped)):
        found += f". It lacks the {' and the '.join(lacks)}: {flag} trains a new one"
    raise ValueError(f"{source} does not fit {kind}: {found}")
