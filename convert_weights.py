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
# What a source's config says of its own code.
FOREIGN = {"architectures", "auto_map", "model_type", "transformers_version"}
FOREIGN |= {"attn_implementation", "dtype", "torch_dtype"}
DECODER, EMBEDDINGS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def main(argv=None):
    args = parse_args(argv)
    with new_folder(args.output_dir, args.overwrite) as folder:
        convert(args.source, folder, args.config, args.tokenizer, args.dtype)
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
        "--overwrite", action="store_true", help="replace files of the same name in output_dir"
    )
    return parser.parse_args(argv)


def convert(
    source: str, folder: Path, config_file=None, tokenizer_name=None, dtype: str | None = None
):
    """Writes `folder` from `source`; the arguments are the command line's.

    Raises:
        ValueError: the source cannot be read, or its tensors and its config do not fit each other.
    """
    path = fetch(source)
    layout, tensors = to_ours(read_tensors(path))
    tokenizer_name = tokenizer_name or find_tokenizer(path)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
    config = make_config(read_config(config_file or path), tensors, tokenizer)
    auto_class = next(name for prefix, name in HEADS.items() if has(tensors, prefix))
    model = make_model(auto_class, config, tensors)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))

    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder)
    absent = ", ".join(part for prefix, part in PARTS.items() if not has(tensors, prefix))
    facts = {
        "converted from": f"{source} ({layout} layout)",
        "not in the source": absent,
        "layers, hidden size, heads": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}",
        "vocabulary": config.vocab_size,
        "prepared for": f"{config.alibi_starting_size} tokens; longer input works",
    }
    summary = "A MosaicBERT encoder: BERT with ALiBi, gated MLPs and no padding inside."
    base_model = None if Path(source).exists() else source
    name = Path(source).name
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
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.bin"])
        )
    except Exception as error:
        raise ValueError(
            f"{source} is neither a file or folder here nor can it be had from the Hub: {error}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file or of a folder's checkpoint files, by the names they have
    there."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{path} holds neither model*.safetensors nor pytorch_model*.bin")
    tensors = {}
    for file in files:
        try:
            tensors.update(load_file(file) if file.suffix == ".safetensors" else read_pickle(file))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} is not loaded: it is damaged, or unpickling it would run code. {error}"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{file} cannot be read, is it complete? {error}") from error
    return tensors


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
    if file.suffix != ".json" or not file.exists():
        raise ValueError(
            f"{path} has no config.json: pass one with --config (the one beside this script "
            "describes MosaicBERT-Base)"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


# ---- converting ----


def to_ours(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The source's layout, and its tensors by our names. ValueError: a name that no layout has."""
    layout = max(LAYOUTS, key=lambda x: sum(name.startswith(tuple(LAYOUTS[x])) for name in tensors))
    if strange := [name for name in tensors if not name.startswith(tuple(LAYOUTS[layout]))]:
        raise ValueError(
            f"no place for these tensors of the source ({layout} layout): {', '.join(strange)}"
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
    # The only published config without it is DNABERT-2's, whose tokenizer has [PAD] there.
    values.setdefault("pad_token_id", 3)
    if "classifier.weight" in tensors and len(values.get("id2label", ())) != len(
        tensors["classifier.weight"]
    ):
        values["num_labels"] = len(tensors["classifier.weight"])
    config = type(ours)(**values, auto_map=ours.auto_map)
    config.name_or_path = ours.name_or_path
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}"
        )
    return config


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
    if any(problems.values()):
        found = "; ".join(
            f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names
        )
        raise ValueError(f"the source does not fit {type(model).__name__}: {found}")
    model.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors.items()}, assign=True
    )
    model.tie_weights()
    return model


# ---- files ----


def find_tokenizer(path: Path) -> Path | None:
    """The source's folder, if it holds a tokenizer."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
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
        for file in Path(temporary).iterdir():
            os.replace(file, path / file.name)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
