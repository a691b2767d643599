# SPDX-License-Identifier: Apache-2.0
"""Turns a published or self-trained checkpoint into a folder that loads anywhere and can be pushed
to the Hub.

    python convert_weights.py mosaicml/mosaic-bert-base mosaic-bert --tokenizer bert-base-uncased
    python convert_weights.py zhihan1996/DNABERT-2-117M dnabert-2
    python convert_weights.py ep0-ba70000-rank0.pt my-bert --config config.json --tokenizer FOLDER

SOURCE is a Hub id, a folder (model*.safetensors or pytorch_model*.bin) or a Composer training
checkpoint (.pt, with --config). The folder gets model.safetensors, config.json, the model's .py
files, the tokenizer and a model card. Every tensor of the source must find its place and no place
may stay empty. Pickled code is never executed.
"""

import argparse
import json
import os
import pickle
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from publishing import load_tokenizer, make_tokenizer_portable, write_card

HERE = Path(__file__).resolve().parent

# Layouts in the wild: prefixes of names there, and here. From right to left it is the way back.
LAYOUTS = {
    "MosaicBERT": {"bert.": "bert.", "cls.": "cls.", "classifier.": "classifier."},
    "Composer": {"model.bert.": "bert.", "model.cls.": "cls.", "model.classifier.": "classifier."},
    "encoder only": {
        "embeddings.": "bert.embeddings.",
        "encoder.": "bert.encoder.",
        "pooler.": "bert.pooler.",
    },
}
# What a head's tensors are loaded as; the first that the source holds, or the bare encoder.
HEADS = {
    "cls.": "AutoModelForMaskedLM",
    "classifier.": "AutoModelForSequenceClassification",
    "": "AutoModel",
}
PARTS = {"bert.pooler.": "pooler", "cls.": "MLM head", "classifier.": "classifier"}
# What a source's config says of its own code, and what means nothing here.
FOREIGN = {"architectures", "auto_map", "model_type", "transformers_version", "tie_word_embeddings"}
FOREIGN |= {"attn_implementation", "dtype", "torch_dtype"}
FOREIGN |= {"gradient_checkpointing", "output_past", "position_embedding_type", "use_cache"}
# Names that belong to a kin, and why it is refused.
KIN = {
    "layer_norm_q": "a BERT with QK norm (jina-embeddings-v2-base-code), another architecture",
    "attention.self.query": "separate query, key and value (jina-embeddings-v2 or a stock BERT), "
    "which this version does not read",
}
DECODER, EMBEDDINGS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def main(argv=None):
    args = parse_args(argv)
    with new_folder(args.output_dir, args.overwrite) as folder:
        convert(args.source, folder, args.config, args.tokenizer, args.dtype, args.output_dir.name)
    print(f"Wrote {args.output_dir}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="Hub id, folder, or Composer checkpoint (.pt)")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--config", type=Path, help="config.json, where the source has none")
    parser.add_argument(
        "--tokenizer", help="Hub id, folder or vocab.txt; the source's own if it has one"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="the source's if not given"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model and the tokenizer that output_dir holds",
    )
    return parser.parse_args(argv)


def convert(
    source: str,
    folder: Path,
    config_file: Path | None = None,
    tokenizer_name: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
):
    """Writes `folder` from `source`, for a model called `name`; the others are the command line's.

    Raises:
        ValueError: the source cannot be read, or its tensors and its config do not fit each other.
    """
    path = fetch(source)
    layout, tensors = to_ours(read_tensors(path))
    tokenizer_name = tokenizer_name or find_tokenizer(path)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
    config = make_config(read_config(config_file or path), tensors, tokenizer)
    auto_class = next(x for prefix, x in HEADS.items() if has(tensors, prefix))
    model = make_model(auto_class, config, tensors)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))

    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder, config.alibi_starting_size)
    absent = ", ".join(part for prefix, part in PARTS.items() if not has(tensors, prefix))
    facts = {
        "converted from": f"{Path(source).name if Path(source).exists() else source} ({layout})",
        "not in the source": absent,
        "layers, hidden size, heads": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}",
        "vocabulary": config.vocab_size,
        "prepared for": f"{config.alibi_starting_size} tokens; longer input works",
    }
    summary = "A MosaicBERT encoder: BERT with ALiBi, gated MLPs and no padding inside."
    base_model = None if Path(source).exists() else source
    name = name or Path(source).name
    write_card(folder, name, auto_class, summary, facts, base_model, tokenizer is not None)
    print(f"{source}: {layout} layout, {len(tensors)} tensors, loads with {auto_class}")
    print(f"Not in the source: {absent}")


def has(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether some name begins with the prefix."""
    return any(name.startswith(prefix) for name in tensors)


# ---- reading ----


def fetch(source: str) -> Path:
    """Path of a local source, or of the Hub's copy of it."""
    if Path(source).exists():
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/")) or source.endswith(".pt"):
        raise ValueError(f"{source} does not exist")
    try:
        wanted = ["*.json", "*.txt", "model*.safetensors", "pytorch_model*.bin"]
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:
        raise ValueError(
            f"{source} is neither a file or folder here nor can it be had from the Hub: {error}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file or of a folder's checkpoint files, by the names they have
    there."""
    files = checkpoint_files(path) if path.is_dir() else [path]
    tensors = {}
    for file in files:
        try:
            tensors.update(load_file(file) if file.suffix == ".safetensors" else read_pickle(file))
        except pickle.UnpicklingError as error:
            # torch's own text goes on to recommend the unsafe way.
            found = re.search(r"Unsupported (global: GLOBAL|class|operand) \S+", str(error))
            if found:
                raise ValueError(
                    f"{file} is not loaded, since unpickling can run code: {found[0]}"
                ) from None
            raise ValueError(f"{file} cannot be read, is it complete?") from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{file} cannot be read, is it complete? {error}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The folder's checkpoint, safetensors first, whole or in shards as its index lists them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map")
            return [folder / x for x in sorted(set(weight_map.values()))]
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint; of Composer's, those under state.model."""
    # Composer stores numpy's random state, by the names that its numpy had.
    reconstruct = np.zeros(1).__reduce__()[0]
    numpy_state = [
        (reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ]
    numpy_state += [
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "fd"},
    ]
    with torch.serialization.safe_globals(numpy_state):
        state = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(
            f"{file} is no checkpoint: expected tensors by name, or what Composer saves"
        )
    return state


def read_config(path: Path) -> dict:
    """config.json as a dict, from the file itself or the folder that holds it."""
    file = path / "config.json" if path.is_dir() else path
    if file.suffix != ".json":
        raise ValueError(
            f"{path} has no config.json: pass one with --config (the one beside this script "
            "describes MosaicBERT-Base)"
        )
    return read_json(file)


def read_json(file: Path) -> dict:
    """A JSON object. ValueError: the file is missing or holds something else."""
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


# ---- converting ----


def to_ours(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The source's layout, and its tensors by our names. ValueError: a name that no layout has."""
    layout = max(LAYOUTS, key=lambda x: sum(name.startswith(tuple(LAYOUTS[x])) for name in tensors))
    if strange := [name for name in tensors if not name.startswith(tuple(LAYOUTS[layout]))]:
        raise ValueError(
            f"no place for these tensors of the source ({layout} layout): {listed(strange)}"
        )
    return layout, rename(tensors, LAYOUTS[layout])


def from_ours(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    return rename(tensors, {ours: theirs for theirs, ours in LAYOUTS[layout].items()})


def rename(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next(x for x in prefixes if name.startswith(x))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def make_config(source: dict, tensors: dict[str, Tensor], tokenizer):
    """Our configuration with the source's values; `auto_map` names every class that we have."""
    ours = AutoConfig.from_pretrained(HERE, trust_remote_code=True)
    values = {k: v for k, v in source.items() if k not in FOREIGN and not k.startswith("_")}
    # sentence-transformers and others cut text here.
    values["max_position_embeddings"] = values.setdefault(
        "alibi_starting_size", ours.alibi_starting_size
    )
    if tokenizer is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    # DNABERT-2's config names neither; its tokenizer has [PAD] there.
    values.setdefault("pad_token_id", 0 if "model_type" in source else 3)
    if "classifier.weight" in tensors:
        num_labels, names = len(tensors["classifier.weight"]), values.get("id2label")
        if names is not None and len(names) != num_labels:
            raise ValueError(
                f"the config names {len(names)} labels, the classifier has {num_labels}"
            )
        values["num_labels"] = num_labels
    try:
        config = type(ours)(**values, auto_map=ours.auto_map)
    except Exception as error:
        raise ValueError(f"the source's config is not MosaicBERT's: {error}") from error
    # Where from_config finds the code.
    config.name_or_path = ours.name_or_path
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}"
        )
    return config


def listed(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def make_model(auto_class: str, config, tensors: dict[str, Tensor]):
    """The model that holds `tensors`, in their dtype. ValueError: one is left over, missing or of
    another shape."""
    options = {}
    if auto_class == "AutoModel":
        options["add_pooling_layer"] = "bert.pooler.dense.weight" in tensors
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(
            config, trust_remote_code=True, **options
        )
    prefix = "bert." if auto_class == "AutoModel" else ""
    expected = {prefix + name: x.shape for name, x in model.state_dict().items()}

    if DECODER in expected and EMBEDDINGS in tensors:
        if not torch.equal(tensors.get(DECODER, tensors[EMBEDDINGS]), tensors[EMBEDDINGS]):
            raise ValueError(f"{DECODER} differs from {EMBEDDINGS}, but MosaicBERT ties them")
        tensors = {**tensors, DECODER: tensors[EMBEDDINGS]}
    problems = {
        "no place for": [x for x in tensors if x not in expected],
        "missing": [x for x in expected if x not in tensors],
        "config and source differ in shape": [
            f"{x} {tuple(expected[x])} and {tuple(y.shape)}"
            for x, y in tensors.items()
            if x in expected and expected[x] != y.shape
        ],
    }
    for mark, reason in KIN.items():
        if any(mark in name for name in problems["no place for"]):
            raise ValueError(f"the source is no MosaicBERT: its names tell of {reason}")
    if any(problems.values()):
        found = "; ".join(f"{x}: {listed(names)}" for x, names in problems.items() if names)
        raise ValueError(f"the source does not fit {type(model).__name__}: {found}")
    model.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors.items()}, assign=True
    )
    model.tie_weights()
    return model


# ---- files ----


def find_tokenizer(path: Path) -> Path | None:
    """The source's folder, if it holds a tokenizer."""
    files = ("tokenizer.json", "vocab.txt")
    return path if path.is_dir() and any((path / name).exists() for name in files) else None


@contextmanager
def new_folder(path: Path, overwrite: bool):
    """A temporary folder; its files move to `path` once the block has ended well, so nothing is
    left half-written.

    Raises:
        ValueError: `path` is a file, or holds something and `overwrite` is False.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder to write to")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty: choose another folder, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        yield Path(temporary)
        path.mkdir(exist_ok=True)
        # What a former conversion left would be loaded beside the new files, or instead of them.
        for pattern in ("*.safetensors*", "pytorch_model*", "*token*.json", "vocab.txt"):
            for stale in path.glob(pattern):
                stale.unlink()
        for file in Path(temporary).iterdir():
            os.replace(file, path / file.name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
