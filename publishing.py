# SPDX-License-Identifier: Apache-2.0
"""What a folder for the Hub needs beside weights and code, and the way there: a tokenizer that
loads on every supported transformers, a model card, and the upload.

A folder may come from anyone: names that its files give, and its links, are not followed out of it.

convert_weights.py, train_mlm.py and finetune.py use it. An upload that failed is repeated by

    python -c "from publishing import publish; publish('FOLDER', 'ORG/NAME')"
"""

import glob
import json
import re
from pathlib import Path, PureWindowsPath

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token, metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, BertTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# What an architecture's name ends in, and its task as the Hub calls it; all others give embeddings.
TASKS = {"ForMaskedLM": "fill-mask", "ForSequenceClassification": "text-classification"}
PAPER = "2312.17482"

SUMMARY = "A MosaicBERT encoder: BERT with ALiBi, gated MLPs and no padding inside."
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")

# What is uploaded of a model's folder, and nothing else: a training folder also holds states, logs
# and pickles.
UPLOADED = (
    *("README.md", "LICENSE*", "config.json", "generation_config.json"),
    *("model*.safetensors", "model.safetensors.index*.json"),
    # A tokenizer, old or new.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spm.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja"),
    # Adapters, which transformers puts on a model that has them beside it.
    *("adapter_config.json", "adapter_model.safetensors"),
    # sentence-transformers.
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    "router_config.json",
    # ONNX, where optimum, sentence-transformers and transformers.js look for it, with its data.
    *("*.onnx", "*.onnx_data*", "*.onnx.data"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", "onnx/*.onnx.data", "onnx/*config.json"),
    *("openvino/*.xml", "openvino/*config.json"),
)
# And of the folder of a sentence-transformers module.
OF_MODULES = ("*_config.json", "idf.json", "*.safetensors")

CARD = """\
---
{metadata}
---

# {name}

{summary}

{examples}

| | |
|---|---|
{table}

## Intended use

{use}

## Limits and bias

A model repeats what its training text says, prejudices about people included: an output is what was
likely in that text, and no statement of what is true or right. Bias was not measured. In languages
and fields that it was not trained on it is worse, and on text longer than in training. Measure it
on texts like yours before you rely on it.
{of_the_family}"""

EXAMPLE = """\
```python
from transformers import pipeline

# This folder, or its name on the Hub.
pipe = pipeline("{task}", model=".", trust_remote_code=True)
print(pipe({text}))
```"""

EXAMPLE_INPUTS = {
    "fill-mask": 'f"A {pipe.tokenizer.mask_token} sentence."',
    "text-classification": '"A sentence."',
}

EXAMPLE_OF_EMBEDDINGS = """\
An embedding is the mean over a text's tokens, without padding:

```python
import torch
from transformers import AutoModel, AutoTokenizer

# This folder, or its name on the Hub.
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModel.from_pretrained(".", trust_remote_code=True, add_pooling_layer=False)
inputs = tokenizer(["A sentence.", "And a longer one."], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = (hidden * mask).sum(1) / mask.sum(1)
print(embeddings.shape)
```"""

EXAMPLE_WITHOUT_TOKENIZER = """\
```python
import torch
from transformers import {auto_class}

# This folder, or its name on the Hub. The tokenizer is the one that the weights were trained with.
model = {auto_class}.from_pretrained(".", trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]]))[0].shape)
```"""

EXAMPLE_SERVED = """\
The weights are in the layout of jina-embeddings-v2, which servers read; an embedding is the mean
over all tokens. With llama.cpp's converter and llama-cpp-python, in this folder:

```bash
python convert_hf_to_gguf.py . --outtype f32 --outfile model.gguf
```

```python
from llama_cpp import Llama

print(Llama("model.gguf", embedding=True).embed("A sentence."))
```"""

USES = {
    "fill-mask": """\
To guess masked tokens, and above all to be fine-tuned: to classify texts or tokens, to answer
questions from a text, to embed. Until then its embeddings compare texts only roughly. It cannot
write text.""",
    "text-classification": """\
To label or score texts like those that it was trained on; `id2label` in config.json names its
labels. Not to decide about people unless a person checks it.""",
    "feature-extraction": """\
To embed texts, for search, clustering and comparison as far as its training allows, or to be
fine-tuned. It cannot write text.""",
}

FINE_TUNING = """
## LoRA

PEFT finds the matrices of the layers by `target_modules=["Wqkv", "dense", "gated_layers", "wo"]`.
"""

CITATION = """
## Citation

The architecture is MosaicBERT's ([arXiv:{paper}](https://arxiv.org/abs/{paper})){source}:

```bibtex
@inproceedings{{portes2023mosaicbert,
  title     = {{MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining}},
  author    = {{Jacob Portes and Alexander R. Trott and Sam Havens and Daniel King and
               Abhinav Venigalla and Moin Nadeem and Nikhil Sardana and Daya Khudia and
               Jonathan Frankle}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2023}},
  url       = {{https://arxiv.org/abs/{paper}}}
}}
```
"""


def load_tokenizer(name: str | Path, lowercase: bool | None = None):
    """A tokenizer from the Hub, a folder, or BERT's vocab.txt (or a folder with nothing else).

    Args:
        name: Hub id, folder or file.
        lowercase: for a vocab.txt; None: unless one of its entries has a capital.

    Raises:
        ValueError: there is none, or it brings code of its own; a vocab.txt lacks one of BERT's
            special tokens.
    """
    path = Path(name)
    vocab = path / "vocab.txt" if path.is_dir() else path
    has_more = (path / "tokenizer_config.json").exists() or (path / "tokenizer.json").exists()
    if has_more or not vocab.is_file():
        try:
            # Never the source's own code, which nobody was asked to trust.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise ValueError(f"no tokenizer can be loaded from {name}: {error}") from error
        # What transformers 5.0 makes of a folder that holds none.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"no tokenizer can be loaded from {name}: it has no vocabulary")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{name} is a {type(tokenizer).__name__}, which writes no tokenizer.json: "
                "give a fast tokenizer"
            )
        return tokenizer
    entries = vocab.read_text(encoding="utf-8").splitlines()
    if missing := [token for token in SPECIAL_TOKENS if token not in entries]:
        raise ValueError(f"{vocab} lacks {', '.join(missing)}: give a BERT vocabulary")
    if lowercase is None:
        lowercase = all(x == x.lower() for x in entries if x not in SPECIAL_TOKENS)
    return BertTokenizerFast(str(vocab), do_lower_case=lowercase)


def make_tokenizer_portable(folder: str | Path, max_length: int, token_types: bool = True):
    """Lets transformers 4 and 5 load a saved tokenizer alike.

    transformers 5 writes a class that 4 does not have, and 5.0 omits token types unless asked.

    Args:
        max_length: where `truncation=True` cuts, in tokens.
        token_types: whether the model takes token_type_ids.
    """
    file = Path(folder, "tokenizer_config.json")
    settings = json.loads(file.read_text())
    is_bert = settings["tokenizer_class"].startswith("BertTokenizer")
    settings["tokenizer_class"] = "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_length
    types = ["token_type_ids"] if token_types else []
    settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n")


def write_pooling(folder: str | Path, dim: int, max_length: int):
    """Writes what tells sentence-transformers and servers to take the mean over all tokens.

    Args:
        dim: the model's hidden size.
        max_length: where text is cut, in tokens.
    """
    transformer, pooling = "Transformer", "Pooling"
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([("", transformer), ("1_Pooling", pooling)])
    ]
    contents = (
        modules,
        {"max_seq_length": max_length, "do_lower_case": False},
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    for name, content in zip(POOLING_FILES, contents, strict=True):
        file = Path(folder, name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")


# ---- the card ----


def stated(folder: str | Path) -> dict:
    """Licence and language that a folder's README.md states for the Hub, as far as it does."""
    card = Path(folder, "README.md")
    try:
        found = (metadata_load(card) or {}) if card.is_file() else {}
    except (ValueError, yaml.YAMLError):
        # A card that the Hub could not read either.
        return {}
    names = ("license", "license_name", "license_link", "language")
    return {name: found[name] for name in names if found.get(name)}


def about_weights(license: str | None, language: list[str] | None) -> dict:
    """What --license and --language say, as a card's metadata.

    Raises:
        ValueError: one is not as the Hub abbreviates it.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license is {license!r}: give it as the Hub abbreviates it, such as apache-2.0, mit "
            "or cc-by-4.0"
        )
    for code in language or []:
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", code):
            raise ValueError(
                f"language is {code!r}: give codes of two or three letters, such as en or zh, or "
                "multilingual, or code"
            )
    return {k: x for k, x in {"license": license, "language": language}.items() if x}


def write_card(
    folder: str | Path,
    name: str,
    summary: str,
    facts: dict[str, object],
    example_input: str | None = None,
    **metadata,
):
    """Writes README.md: what the model is, examples that run in the folder, a table of facts, what
    it is for, its limits, how to cite it.

    config.json says what kind of model it is; it must be there, and the tokenizer if there is one.

    Args:
        facts: of the training data, the recipe, the evaluation, and what else is known.
        example_input: Python for what a pipeline is asked; None: a sentence.
        metadata: for the Hub, as ModelCardData takes it: license, language, base_model, datasets,
            eval_results.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture = config["architectures"][0]
    ending = next((x for x in TASKS if architecture.endswith(x)), "")
    task = TASKS.get(ending, "feature-extraction")
    served = architecture == "JinaBertModel"
    of_the_family = served or config["model_type"] == "mosaic_bert"
    tags = ["mosaic-bert", "alibi", "custom_code", f"arxiv:{PAPER}"] if of_the_family else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=tags,
        model_name=name if metadata.get("eval_results") else None,
        **metadata,
    )
    if served:
        examples = [EXAMPLE_SERVED]
    elif not (folder / "tokenizer_config.json").is_file():
        examples = [EXAMPLE_WITHOUT_TOKENIZER.format(auto_class=f"AutoModel{ending}")]
    else:
        text = example_input or EXAMPLE_INPUTS.get(task)
        examples = [EXAMPLE.format(task=task, text=text)] if text else []
        examples += [EXAMPLE_OF_EMBEDDINGS] if task != "text-classification" else []
    languages = [data.language] if isinstance(data.language, str) else data.language
    facts = facts | {
        "language": ", ".join(map(str, languages or ["not stated"])),
        "licence of the weights": data.license or "not stated",
    }
    source = f"; for the weights cite [their source](https://huggingface.co/{data.base_model})"
    citation = CITATION.format(paper=PAPER, source=source if data.base_model else "")
    card = CARD.format(
        metadata=data.to_yaml(),
        name=name,
        summary=summary,
        examples="\n\n".join(examples),
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        use=USES[task],
        of_the_family=("" if served else FINE_TUNING) + citation if of_the_family else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---- the Hub ----


def publish(
    folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a folder that convert_weights.py, train_mlm.py or finetune.py wrote, in one commit.

    The token is the one that huggingface_hub finds (`hf auth login`, HF_TOKEN).

    Args:
        folder: weights, config.json, model code, tokenizer, card, pooling and other modules of
            sentence-transformers, and exports in onnx/ and openvino/ are sent, nothing else.
        repo_id: ORG/NAME; made if it is not there.
        private: make the repository private, and refuse one that is public.
        revision: branch to write to, made if it is not there; the main one if None.

    Returns:
        Address of the commit.

    Raises:
        ValueError: `repo_id` is no name, the folder is incomplete or leads out of itself, or the
            repository is public and `private` is True.
        OSError: the upload failed. The folder is as it was.
    """
    check_repo_id(repo_id)
    files = files_to_upload(Path(folder))
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repo_id).private
        if not is_public:
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                revision=revision,
                allow_patterns=[glob.escape(x) for x in files],
                commit_message="Upload weights, configuration, code, tokenizer and card",
            )
    except Exception as error:
        # The message may quote a request; no token leaves with it, nor with its cause.
        reason = f"{type(error).__name__}: {error}".replace(get_token() or "\0", "[token]")
        raise OSError(
            f"{folder} was not uploaded to {repo_id}, and is as it was ({reason}). If you are "
            "not logged in, `hf auth login`; then try again:\n"
            f'    python -c "from publishing import publish; '
            f'publish({str(folder)!r}, {repo_id!r}, {private}, {revision!r})"'
        ) from None
    if is_public:
        raise ValueError(f"{repo_id} exists and is public: nothing was uploaded")
    return commit.commit_url


def check_repo_id(repo_id: str):
    """ValueError unless this can be a repository's name."""
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no ORG/NAME")
    validate_repo_id(repo_id)


def files_to_upload(folder: Path) -> list[str]:
    """Names of the folder's files that make up a model. ValueError: it lacks some, or one, or a
    name that one of them gives, leads out of the folder."""
    places = model_folders(folder)
    found = {x for place in places for name in UPLOADED for x in place.glob(name)}
    found |= {x for place in places[1:] for name in OF_MODULES for x in place.glob(name)}
    # OpenVINO's weights, which are no pickles.
    exports = [x for x in found if x.parent.name == "openvino"]
    found |= {x.with_suffix(".bin") for x in exports if x.suffix == ".xml"}
    found |= {x for place in places if own_code(place) for x in place.glob("*.py")}
    found = {x for x in found if x.is_file()}
    files = {x.relative_to(folder).as_posix() for x in found}
    files |= pictures(folder) if "README.md" in files else set()

    # A router's models are in folders of their own.
    routes = (folder / "router_config.json").is_file()
    models = [x for x in places[1:] if (x / "sentence_bert_config.json").is_file()]
    needed = [folder / "README.md"]
    for place in models if routes else [folder]:
        needed += [place / x for x in ("config.json", *(f"{x}.py" for x in own_code(place)))]
        if (index := place / "model.safetensors.index.json").is_file():
            needed += listed_shards(index)
        elif not list(place.glob("model*.safetensors")):
            needed.append(place / "model.safetensors")
    # What would be left behind of others, as pickles.
    for place in places[1:]:
        if (place / "pytorch_model.bin").is_file():
            needed.append(place / "model.safetensors")
    adapters = [x for x in found if x.name == "adapter_config.json"]
    needed += [x.with_name("adapter_model.safetensors") for x in adapters]
    needed = [x.relative_to(folder).as_posix() for x in needed]
    if missing := [x for x in dict.fromkeys(needed) if x not in files]:
        raise ValueError(f"{folder} is no model to publish: it lacks {', '.join(missing)}")
    for name in files:
        inside(folder, name)
    return sorted(files)


def model_folders(folder: Path) -> list[Path]:
    """The folder, and those in it that modules.json and routers of sentence-transformers name.

    Raises:
        ValueError: one is not there or not in the folder, or such a file is no list of modules.
    """
    found, waiting = {}, [folder]
    while waiting:
        place = waiting.pop(0)
        # The first module's folder is the model's own.
        if place.resolve() in found:
            continue
        found[place.resolve()] = place
        for name, kind in named_modules(place).items():
            module = inside(place, name)
            if module.is_dir():
                waiting.append(module)
            # It has no files, and git keeps no empty folder.
            elif not kind.endswith("Normalize"):
                raise ValueError(f"{folder} is no model to publish: it lacks {name}")
    return list(found.values())


def named_modules(place: Path) -> dict[str, str]:
    """Folders of a model's modules, and their classes, by the files that list them."""
    file = place / "modules.json"
    modules, router = read_json(file, list), {}
    # An older router's is called config.json, as a model's.
    for name in ("config.json", "router_config.json"):
        found = read_json(place / name)
        router |= found.get("types", {}) if "structure" in found else {}
    try:
        kinds = {x["path"]: x["type"] for x in modules} | router
    except (TypeError, KeyError):
        raise ValueError(f"{file} lists no modules by path and type") from None
    return {path: str(kind) for path, kind in kinds.items()}


def own_code(place: Path) -> set[str]:
    """Names of the Python modules beside a model that config.json and modules.json name."""
    named = []
    for value in (read_json(place / "config.json").get("auto_map") or {}).values():
        named += value if isinstance(value, list) else [value]
    # "org/name--module.Class" is code of another repository; of two tokenizers one may be null.
    modules = {x.split(".")[0] for x in named if x and "--" not in x}
    custom = {x.split(".")[0] for x in named_modules(place).values()}
    return modules | {x for x in custom if (place / f"{x}.py").is_file()}


def pictures(folder: Path) -> set[str]:
    """Names of the folder's images that its README.md shows."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|jpe?g|gif|svg|webp))\)", text)
    return {x for x in names if ".." not in x and x[0] != "/" and (folder / x).is_file()}


# ---- names that files give ----


def inside(folder: Path, name: str) -> Path:
    """The file or folder of that name in `folder`.

    Raises:
        ValueError: the name is not relative, or it or a link leads out. In the Hub's cache links
            lead from snapshots/REVISION to blobs, which are the same repository's.
    """
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parents[1] / "blobs")
    # A Windows path knows both separators, and drives.
    path = PureWindowsPath(name) if isinstance(name, str) else None
    if path is not None and not path.anchor and ".." not in path.parts:
        target = (folder / name).resolve()
        if any(target.is_relative_to(home) for home in homes):
            return folder / name
    raise ValueError(
        f"{name!r} leads out of {folder}: copy what it names into the folder, and name it there"
    )


def listed_shards(index: Path) -> list[Path]:
    """The files beside an index of weights that it lists.

    Raises:
        ValueError: it lists none, one is not there, or one is not a file's name in that folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name in weight_map.values():
        plain = isinstance(name, str) and PureWindowsPath(name).name == name
        if not plain or name in ("", ".."):
            raise ValueError(f"{index} lists {name!r}, which is no name of a file beside it")
    files = [inside(index.parent, name) for name in sorted(set(weight_map.values()))]
    if missing := [x.name for x in files if not x.is_file()]:
        raise ValueError(f"{index} lists files that are not there: {', '.join(missing)}")
    return files


def read_json(file: Path, kind: type[dict] | type[list] = dict):
    """What a JSON file holds, empty if there is no file. ValueError: it holds something else."""
    if not file.exists():
        return kind()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{file} holds a {type(found).__name__}, expected {expected}")
    return found
