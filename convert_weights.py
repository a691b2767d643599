# SPDX-License-Identifier: Apache-2.0
"""Turns a published or self-trained checkpoint into a folder that loads anywhere, or that serving
engines read, and uploads it to the Hub if asked.

    python convert_weights.py mosaicml/mosaic-bert-base mosaic-bert --tokenizer bert-base-uncased
    python convert_weights.py zhihan1996/DNABERT-2-117M dnabert-2
    python convert_weights.py jinaai/jina-embeddings-v2-base-en jina --push_to_hub ORG/NAME
    python convert_weights.py ep0-ba70000-rank0.pt my-bert --config config.json --tokenizer FOLDER
    python convert_weights.py my-bert my-bert-served --layout jina
    python convert_weights.py my-bert my-bert-onnx --onnx --int8
    python convert_weights.py my-bert my-bert-compiled --aot

SOURCE is a Hub id, a folder (model*.safetensors or pytorch_model*.bin) or a Composer training
checkpoint (.pt, with --config). The folder gets weights, config.json, the model's .py files (or, in
Jina's layout, the pooling that servers look for), the tokenizer and a model card. With --onnx it
gets ONNX files in place of weights and code, see mosaic_tools/onnx_export.py; with --aot, model.pt2
as well, which is compiled for full rows, see mosaic_tools/aot.py. Every tensor of
the source must find its place and no place may stay empty. A decoder with a weight of its own is
kept where the source's config says tie_word_embeddings false; Jina's layout has no place for it.
Pickled code is never executed.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.hf_argparser import string_to_bool

from mosaic_tools.aot import check_compiler, save_aot
from mosaic_tools.cards import OF_ONNX, SUMMARY, about_weights, stated, write_card
from mosaic_tools.family import (
    DECODER,
    EMBEDDINGS,
    HERE,
    PARTS,
    as_ours,
    check_finite,
    check_fit,
    differs,
    model_class,
    our_config,
)
from mosaic_tools.files import check_folder, writing
from mosaic_tools.layouts import from_ours, to_ours
from mosaic_tools.onnx_export import OTHER_HEADS, TASKS, check_packages, for_task, save_onnx
from mosaic_tools.publishing import (
    ADAPTERS,
    carry_pooling,
    check_modules,
    check_repo_id,
    pools,
    publish,
    remove_derived,
)
from mosaic_tools.tokenization import load_tokenizer, make_tokenizer_portable
from mosaic_tools.weights import fetch, read_config, read_tensors

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
# What would be loaded beside a new model or instead of it: weights, code, tokenizer.
FORMER = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
FORMER += ("pytorch_model*.bin", "pytorch_model.bin.index.json", "vocab.txt")
FORMER += ("configuration_bert.py", "bert_layers.py", "bert_padding.py", "flash_attn_triton.py")
FORMER += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FORMER += ("added_tokens.json",)
# What a source's config says of its own code, and what means nothing here.
FOREIGN = {"architectures", "auto_map", "transformers_version"}
FOREIGN |= {"attn_implementation", "dtype", "torch_dtype"}
FOREIGN |= {"gradient_checkpointing", "output_past", "position_embedding_type", "use_cache"}
FOREIGN |= {"emb_pooler", "feed_forward_type", "model_max_length"}
# What the training commands take alone, or with true or false, as here.
SWITCHES = ("--private", "--overwrite", "--onnx", "--int8", "--aot")
SWITCH = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}


def main(argv=None):
    args = parse_args(argv)
    if args.push_to_hub is not None:
        check_repo_id(args.push_to_hub, args.revision)
    source = Path(args.source).resolve()
    # What is not there is a Hub id, whose name a folder may have.
    holding = (source, source.parent if source.is_file() else source) if source.exists() else ()
    if args.output_dir.resolve() in holding:
        raise ValueError(f"{args.output_dir} holds the source, which would be lost: choose another")
    if args.output_dir.resolve() == Path(HERE):
        raise ValueError(f"{args.output_dir} holds this code, which would be lost: choose another")
    name = args.push_to_hub or args.output_dir.name
    given = about_weights(args.license, args.language)
    if args.layout == "onnx":
        check_packages()
    if args.aot:
        check_compiler()
    with new_folder(args.output_dir, args.overwrite) as folder:
        convert(
            args.source,
            folder,
            args.config,
            args.tokenizer,
            args.dtype,
            name,
            args.layout,
            given,
            task=args.task,
            int8=args.int8,
            aot=args.aot,
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
        help="jina: for llama.cpp, TEI, vLLM and candle, which read no other; it needs a tokenizer",
    )
    parser.add_argument(
        "--overwrite",
        **SWITCH,
        help="replace the model and the tokenizer that output_dir holds",
    )
    parser.add_argument(
        "--license", help="of the weights, for the card: apache-2.0, mit, ...; the source card's"
    )
    parser.add_argument(
        "--language", nargs="+", help="of the text, for the card: en, zh, ...; the source card's"
    )
    onnx = parser.add_argument_group("ONNX")
    onnx.add_argument(
        "--onnx",
        **SWITCH,
        help="for ONNX Runtime, sentence-transformers' backend, fastembed and transformers.js; "
        "in float32, with the tokenizer",
    )
    onnx.add_argument("--int8", **SWITCH, help="onnx/model_quantized.onnx too, of 8-bit weights")
    parser.add_argument(
        "--aot",
        **SWITCH,
        help="model.pt2 too, compiled for full rows on CPUs like this one, under this torch",
    )
    parser.add_argument(
        "--task",
        choices=list(TASKS),
        help="of --onnx and --aot; that of the source's head if not given",
    )
    hub = parser.add_argument_group("Hub", "as whom you are logged in: `hf auth login` or HF_TOKEN")
    hub.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload the folder, in one commit")
    hub.add_argument("--private", **SWITCH, help="only to a private repository")
    hub.add_argument("--revision", help="branch to upload to, made if it is not there")
    args = parser.parse_args(with_values(sys.argv[1:] if argv is None else argv))
    if (args.private or args.revision) and not args.push_to_hub:
        parser.error("--private and --revision need --push_to_hub")
    if args.int8 and not args.onnx:
        parser.error("--int8 needs --onnx")
    if args.task and not (args.onnx or args.aot):
        parser.error("--task needs --onnx or --aot")
    if args.aot and (args.onnx or args.layout == "jina"):
        parser.error("--aot compiles what the mosaic layout holds: give it without --onnx and jina")
    if args.aot and args.push_to_hub:
        parser.error("--aot is for this machine, and nothing of it is uploaded: push without it")
    if args.onnx and args.layout:
        parser.error(f"--onnx is a layout of its own: leave out --layout {args.layout}")
    if args.onnx and args.dtype not in (None, "float32"):
        parser.error(f"--onnx writes float32, not {args.dtype}: leave out --dtype; see --int8")
    args.layout = "onnx" if args.onnx else args.layout or "mosaic"
    return args


def with_values(argv: list[str]) -> list[str]:
    """--private true as --private=true, and --private alone too, so that SOURCE may follow it."""
    words = []
    for word in argv:
        if words and words[-1] in SWITCHES and word.lower() in ("true", "false"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return [f"{word}=true" if word in SWITCHES else word for word in words]


def convert(
    source: str,
    folder: Path,
    config_file: Path | None = None,
    tokenizer_name: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    layout: str = "mosaic",
    given: dict | None = None,
    task: str | None = None,
    int8: bool = False,
    aot: bool = False,
):
    """Writes `folder` from `source`, for a model called `name`; the others are the command line's.

    Args:
        layout: "mosaic", "jina", or "onnx", which alone reads `int8`.
        task: of "onnx" and `aot`; of `aot` the head's own, or "feature-extraction".
        given: licence and language, as the card takes them, in place of those of the source's card.

    Raises:
        ValueError: the source cannot be read, holds nan or infinity, its tensors and its config do
            not fit each other, or the layout has no place for them.
        OSError: as `writing`.
    """
    path = fetch(source)
    if (path / ADAPTERS[0]).is_file():
        raise ValueError(
            f"{source} has an adapter beside its weights, which would be lost: merge it first, by "
            "peft's merge_and_unload() and save_pretrained, or delete it if it is merged already"
        )
    found, tensors = to_ours(read_tensors(path))
    check_finite(source, tensors)
    tokenizer_name = tokenizer_name or find_tokenizer(path)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
    values = read_config(config_file or path)
    config = make_config(values, tensors, tokenizer)
    auto_class = next(x for prefix, x in HEADS.items() if has(tensors, prefix))
    architecture = (values.get("architectures") or [""])[0]
    other = next((x for x in OTHER_HEADS if architecture.endswith(x)), None)
    if other and layout != "onnx":
        # Whose tensors may be named as a text classifier's are.
        auto_class = f"AutoModel{other}"
    absent = ", ".join(part for prefix, part in PARTS.items() if not has(tensors, prefix))
    if layout == "onnx":
        if tokenizer is None:
            raise ValueError("clients need a tokenizer, and the source has none: pass --tokenizer")
        task, auto_class, tensors = for_task(source, architecture, auto_class, tensors, task)
        dtype = "float32"
    embeds = {"jina": True, "onnx": task == "feature-extraction", "mosaic": pools(path)}[layout]
    if embeds:
        check_modules(source)
    model = make_model(auto_class, config, tensors)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))

    of_encoder = auto_class == "AutoModel" or task == "feature-extraction"
    if aot and not of_encoder and task and TASKS[task][0] != auto_class:
        raise ValueError(
            f"{source} has no head for --task {task}: leave it out, or give feature-extraction"
        )
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
    about |= {"base_model": None if is_local else source} | (given or {})
    name = name or Path(source).name
    with writing(name):
        if layout == "jina":
            save_jina(model, auto_class, folder, tokenizer)
        elif layout == "onnx":
            save_onnx(model, task, folder, int8)
        else:
            model.save_pretrained(folder)
        length = config.alibi_starting_size
        if embeds:
            length = carry_pooling(source, folder, config.hidden_size, length)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            make_tokenizer_portable(folder, length)
        if aot and of_encoder:
            save_aot(model.base_model, "last_hidden_state", folder)
        elif aot:
            save_aot(model, "logits", folder)
        summary = OF_ONNX if layout == "onnx" else SUMMARY
        write_card(folder, name, summary, facts, **about)
    use = f"exported for {task}" if layout == "onnx" else f"loads with {auto_class}"
    print(f"{source}: {found} layout, {len(tensors)} tensors, {use}")
    print(f"Not in the source: {absent}")


def has(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether some name begins with the prefix."""
    return any(name.startswith(prefix) for name in tensors)


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
    """Weights and config.json in Jina's layout, for servers.

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
    check_folder(path)
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty: choose another folder, or pass --overwrite")
    # On the same disk; the folders on the way are made at the end only.
    place = next(x for x in path.absolute().parents if x.exists())
    if path.exists() and path.stat().st_dev != place.stat().st_dev:
        place = path
    with tempfile.TemporaryDirectory(dir=place, prefix=".converting-") as temporary:
        yield Path(temporary)
        path.mkdir(parents=True, exist_ok=True)
        written = set()
        for file in (x for x in Path(temporary).rglob("*") if x.is_file()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            written.add(target)
        # Nothing of the former model is deleted before the new one is there.
        remove_derived(path, kept=written)
        for file in (x for pattern in FORMER for x in path.glob(pattern)):
            if file not in written and file.is_file():
                file.unlink()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_weights.py: {error}") from None
