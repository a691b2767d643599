# SPDX-License-Identifier: Apache-2.0
"""Turns a published or self-trained checkpoint into a folder that loads anywhere, or that serving
engines read, and uploads it to the Hub if asked.

    python convert_weights.py mosaicml/mosaic-bert-base mosaic-bert --tokenizer bert-base-uncased
    python convert_weights.py zhihan1996/DNABERT-2-117M dnabert-2
    python convert_weights.py jinaai/jina-embeddings-v2-base-en jina --push_to_hub ORG/NAME
    python convert_weights.py ep0-ba70000-rank0.pt my-bert --config config.json --tokenizer FOLDER
    python convert_weights.py my-bert my-bert-served --layout jina

SOURCE is a Hub id, a folder (model*.safetensors or pytorch_model*.bin) or a Composer training
checkpoint (.pt, with --config). The folder gets weights, config.json, the model's .py files (or, in
Jina's layout, the pooling that servers look for), the tokenizer and a model card. Every tensor of
the source must find its place and no place may stay empty. A decoder with a weight of its own is
kept where the source's config says tie_word_embeddings false; Jina's layout has no place for it.
Pickled code is never executed.
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
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mosaic_tools.family import (
    BUFFERS,
    DECODER,
    EMBEDDINGS,
    PARTS,
    as_ours,
    check_fit,
    differs,
    listed,
    model_class,
    our_config,
)
from publishing import (
    POOLING_FILES,
    SUMMARY,
    about_weights,
    check_repo_id,
    inside,
    listed_shards,
    load_tokenizer,
    make_tokenizer_portable,
    publish,
    read_json,
    stated,
    write_card,
    write_pooling,
)

# Layouts in the wild: prefixes of names there, and here. From right to left it is the way back.
WITH_PREFIX = {"bert.": "bert.", "cls.": "cls.", "classifier.": "classifier."}
WITHOUT_PREFIX = {
    "embeddings.": "bert.embeddings.",
    "encoder.": "bert.encoder.",
    "pooler.": "bert.pooler.",
}
LAYOUTS = {
    "MosaicBERT": WITH_PREFIX,
    "encoder only": WITHOUT_PREFIX,
    "Composer": {f"model.{name}": name for name in WITH_PREFIX},
    "Jina": WITH_PREFIX,
    "Jina, encoder only": WITHOUT_PREFIX,
}
# Parts of our names, and what Jina has there: several tensors, ours are these one after the other.
JINA_NAMES = {
    ".attention.self.Wqkv.": [f".attention.self.{x}." for x in ("query", "key", "value")],
    "cls.predictions.decoder.bias": ["cls.predictions.bias"],
}
# What the first BERT called them, as transformers 5.0 still does in what it loaded and saves.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# The layout to write, and what the model's own names lack of ours.
JINA_LAYOUTS = {"AutoModelForMaskedLM": ("Jina", ""), "AutoModel": ("Jina, encoder only", "bert.")}
# What servers know the layout by: TEI by _name_or_path or auto_map, llama.cpp and vLLM by
# architectures.
JINA_CODE = "jinaai/jina-bert-implementation"
JINA_CONFIG = {
    "_name_or_path": JINA_CODE,
    "architectures": ["JinaBertModel"],
    "auto_map": {
        "AutoConfig": f"{JINA_CODE}--configuration_bert.JinaBertConfig",
        "AutoModel": f"{JINA_CODE}--modeling_bert.JinaBertModel",
        "AutoModelForMaskedLM": f"{JINA_CODE}--modeling_bert.JinaBertForMaskedLM",
    },
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "emb_pooler": "mean",
}
# Fields that mean the same there and here.
SHARED_FIELDS = (
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
# What a head's tensors are loaded as; the first that the source holds, or the bare encoder.
HEADS = {
    "cls.": "AutoModelForMaskedLM",
    "classifier.": "AutoModelForSequenceClassification",
    "": "AutoModel",
}
# What a source's config says of its own code, and what means nothing here.
FOREIGN = {"architectures", "auto_map", "transformers_version"}
FOREIGN |= {"attn_implementation", "dtype", "torch_dtype"}
FOREIGN |= {"gradient_checkpointing", "output_past", "position_embedding_type", "use_cache"}
FOREIGN |= {"emb_pooler", "feed_forward_type", "model_max_length"}


def main(argv=None):
    args = parse_args(argv)
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    name = args.push_to_hub or args.output_dir.name
    given = about_weights(args.license, args.language)
    with new_folder(args.output_dir, args.overwrite) as folder:
        convert(
            args.source, folder, args.config, args.tokenizer, args.dtype, name, args.layout, given
        )
    print(f"Wrote {args.output_dir}")
    if args.push_to_hub:
        url = publish(args.output_dir, args.push_to_hub, args.private, args.revision)
        print(f"Uploaded to {url}")


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
        "--layout",
        choices=("mosaic", "jina"),
        default="mosaic",
        help="jina: for llama.cpp, TEI, vLLM and candle, which read no other; it needs a tokenizer",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model and the tokenizer that output_dir holds",
    )
    parser.add_argument(
        "--license", help="of the weights, for the card: apache-2.0, mit, ...; the source card's"
    )
    parser.add_argument(
        "--language", nargs="+", help="of the text, for the card: en, zh, ...; the source card's"
    )
    hub = parser.add_argument_group("Hub", "as whom you are logged in: `hf auth login` or HF_TOKEN")
    hub.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload the folder, in one commit")
    hub.add_argument("--private", action="store_true", help="only to a private repository")
    hub.add_argument("--revision", help="branch to upload to, made if it is not there")
    args = parser.parse_args(argv)
    if (args.private or args.revision) and not args.push_to_hub:
        parser.error("--private and --revision need --push_to_hub")
    return args


def convert(
    source: str,
    folder: Path,
    config_file: Path | None = None,
    tokenizer_name: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    layout: str = "mosaic",
    given: dict | None = None,
):
    """Writes `folder` from `source`, for a model called `name`; the others are the command line's.

    Args:
        given: licence and language, as the card takes them, in place of those of the source's card.

    Raises:
        ValueError: the source cannot be read, its tensors and its config do not fit each other, or
            the layout has no place for them.
    """
    path = fetch(source)
    found, tensors = to_ours(read_tensors(path))
    tokenizer_name = tokenizer_name or find_tokenizer(path)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
    config = make_config(read_config(config_file or path), tensors, tokenizer)
    auto_class = next(x for prefix, x in HEADS.items() if has(tensors, prefix))
    model = make_model(auto_class, config, tensors)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))

    if layout == "jina":
        save_jina(model, auto_class, folder, tokenizer)
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder, config.alibi_starting_size)
    absent = ", ".join(part for prefix, part in PARTS.items() if not has(tensors, prefix))
    is_local = Path(source).exists()
    facts = {
        "converted from": f"{Path(source).name if is_local else source} ({found})",
        "not in the source": absent,
        "layers, hidden size, heads": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}",
        "vocabulary": config.vocab_size,
        "prepared for": f"{config.alibi_starting_size} tokens; longer input works",
        "training data, recipe, evaluation": "see the source"
        if is_local
        else f"see [{source}](https://huggingface.co/{source})",
    }
    about = stated(path)
    if "license" in (given or {}):
        # With its name and link.
        about = {name: x for name, x in about.items() if not name.startswith("license")}
    write_card(
        folder,
        name or Path(source).name,
        SUMMARY,
        facts,
        base_model=None if is_local else source,
        **about | (given or {}),
    )
    print(f"{source}: {found} layout, {len(tensors)} tensors, loads with {auto_class}")
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
        wanted = ["*.json", "*.txt", "README.md", "model*.safetensors", "pytorch_model*.bin"]
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
    """The folder's checkpoint, safetensors first, whole or in shards as its index lists them.

    Raises:
        ValueError: there is none, a shard is missing, or a name or a link leads out of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [inside(folder, name)]
        if (folder / f"{name}.index.json").exists():
            return listed_shards(inside(folder, f"{name}.index.json"))
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
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    return read_json(file)


# ---- converting ----


def to_ours(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The source's layout, and its tensors by our names. ValueError: a name that no layout has."""
    tensors = {name: x for name, x in tensors.items() if not name.endswith(BUFFERS)}
    for theirs, ours in OLD_NAMES.items():
        tensors = {name.replace(theirs, ours): x for name, x in tensors.items()}
    is_jina = any(".attention.self.query." in name for name in tensors)
    layout = max(
        (x for x in LAYOUTS if x.startswith("Jina") == is_jina),
        key=lambda x: sum(name.startswith(tuple(LAYOUTS[x])) for name in tensors),
    )
    if strange := [name for name in tensors if not name.startswith(tuple(LAYOUTS[layout]))]:
        raise ValueError(
            f"no place for these tensors of the source ({layout} layout): {listed(strange)}"
        )
    tensors = rename(tensors, LAYOUTS[layout])
    return layout, join(tensors) if is_jina else tensors


def from_ours(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    if layout.startswith("Jina"):
        tensors = split(tensors)
    return rename(tensors, {ours: theirs for theirs, ours in LAYOUTS[layout].items()})


def join(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins what Jina keeps apart. ValueError: the joint is there too, and differs."""
    tensors = dict(tensors)
    for ours, parts in JINA_NAMES.items():
        for first in [name for name in tensors if parts[0] in name]:
            names = [first.replace(parts[0], part) for part in parts]
            shapes = [tensors[x].shape for x in names if x in tensors]
            # What is left apart has no place, and will be listed.
            if shapes == [shapes[0]] * len(names) and shapes[0]:
                joint = torch.cat([tensors.pop(x) for x in names])
                name = first.replace(parts[0], ours)
                if not torch.equal(tensors.setdefault(name, joint), joint):
                    raise ValueError(f"{name} differs from {', '.join(names)}")
    return tensors


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `join`."""
    apart = {}
    for name, tensor in tensors.items():
        ours = next((x for x in JINA_NAMES if x in name), None)
        parts = JINA_NAMES.get(ours, [ours])
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            apart[name.replace(ours, part) if ours else name] = piece
    return apart


def rename(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next(x for x in prefixes if name.startswith(x))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def make_config(source: dict, tensors: dict[str, Tensor], tokenizer):
    """Our configuration with the source's values; `auto_map` names every class that we have."""
    values = {k: v for k, v in source.items() if k not in FOREIGN and not k.startswith("_")}
    if source.get("feed_forward_type", "geglu") != "geglu":
        raise ValueError(
            f"feed_forward_type is {source['feed_forward_type']!r}: MosaicBERT's MLP is 'geglu'"
        )
    if source.get("position_embedding_type") == "alibi" and "max_position_embeddings" in source:
        # Jina's config says here what the checkpoint is prepared for.
        values.setdefault("alibi_starting_size", source["max_position_embeddings"])
    # sentence-transformers and others cut text here.
    values["max_position_embeddings"] = values.setdefault(
        "alibi_starting_size", our_config().alibi_starting_size
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
    config = as_ours(values, "the source")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}"
        )
    return config


def make_model(auto_class: str, config, tensors: dict[str, Tensor]):
    """The model that holds `tensors`, in their dtype.

    Raises:
        ValueError: one is left over, missing or of another shape, or the decoder differs from the
            embeddings that the config ties it to.
    """
    options = {}
    if auto_class == "AutoModel":
        options["add_pooling_layer"] = "bert.pooler.dense.weight" in tensors
    with torch.device("meta"):
        model = model_class(auto_class)(config, **options)
    prefix = "bert." if auto_class == "AutoModel" else ""
    expected = {prefix + name: x.shape for name, x in model.state_dict().items()}

    if config.tie_word_embeddings and DECODER in expected and EMBEDDINGS in tensors:
        if not torch.equal(tensors.get(DECODER, tensors[EMBEDDINGS]), tensors[EMBEDDINGS]):
            raise ValueError(differs("the source"))
        tensors = {**tensors, DECODER: tensors[EMBEDDINGS]}
    elif DECODER in tensors:
        # torch.load gives two that were one in memory the same, and saving would leave one out.
        tensors = {**tensors, DECODER: tensors[DECODER].clone()}
    check_fit(
        "the source",
        type(model).__name__,
        left_over=[x for x in tensors if x not in expected],
        missing=[x for x in expected if x not in tensors],
        reshaped=[
            f"{x} {tuple(expected[x])} and {tuple(y.shape)}"
            for x, y in tensors.items()
            if x in expected and expected[x] != y.shape
        ],
    )
    model.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors.items()}, assign=True
    )
    model.tie_weights()
    return model


def save_jina(model, auto_class: str, folder: Path, tokenizer):
    """Weights, config.json and pooling in Jina's layout, for servers.

    Raises:
        ValueError: a classifier, which servers do not read in this layout, a decoder of its own,
            which they would tie to the embeddings, or no tokenizer.
    """
    if auto_class not in JINA_LAYOUTS:
        raise ValueError(
            f"servers read no {type(model).__name__} in Jina's layout, only embedding models"
        )
    if auto_class == "AutoModelForMaskedLM" and not model.config.tie_word_embeddings:
        raise ValueError(
            f"Jina's layout has no place for {DECODER}, which is the source's own "
            "(tie_word_embeddings is false): save its encoder alone, which is all that servers "
            "read, by AutoModel.from_pretrained(SOURCE, trust_remote_code=True, "
            "add_pooling_layer=False).save_pretrained(ENCODER), and convert that"
        )
    if tokenizer is None:
        raise ValueError("servers need a tokenizer, and the source has none: pass --tokenizer")
    layout, prefix = JINA_LAYOUTS[auto_class]
    tensors = {prefix + name: x for name, x in model.state_dict().items() if name != DECODER}
    tensors = {name: x.contiguous() for name, x in from_ours(tensors, layout).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    config = {name: getattr(model.config, name) for name in SHARED_FIELDS} | JINA_CONFIG
    config["max_position_embeddings"] = model.config.alibi_starting_size
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_pooling(folder, model.config.hidden_size, model.config.alibi_starting_size)


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
        stale = ["*.safetensors*", "pytorch_model*", "*token*.json", "vocab.txt", *POOLING_FILES]
        stale += ["config_sentence_transformers.json", "onnx/*.onnx*", "openvino/openvino_*"]
        for pattern in stale:
            for file in path.glob(pattern):
                file.unlink()
        for file in (x for x in Path(temporary).rglob("*") if x.is_file()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
