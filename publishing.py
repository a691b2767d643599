# SPDX-License-Identifier: Apache-2.0
"""What a folder for the Hub needs beside weights and code, and the way there: a tokenizer that
loads on every supported transformers, a model card, and the upload.

convert_weights.py, train_mlm.py and finetune.py use it. An upload that failed is repeated by

    python -c "from publishing import publish; publish('FOLDER', 'ORG/NAME')"
"""

import json
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token, metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, BertTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
EXAMPLE_INPUTS = {"fill-mask": 'f"A {pipe.tokenizer.mask_token} sentence."'}

SUMMARY = "A MosaicBERT encoder: BERT with ALiBi, gated MLPs and no padding inside."
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
# What is uploaded, and nothing else: a training folder also holds states, logs and pickles.
UPLOADED = (
    "README.md",
    "training.png",
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    *POOLING_FILES,
)

CARD = """\
---
{metadata}
---

# {name}

{summary}

{example}

| | |
|---|---|
{table}
"""


EXAMPLE = """\
```python
from transformers import pipeline

# This folder, or its name on the Hub.
pipe = pipeline("{task}", model=".", trust_remote_code=True)
print(pipe({text}))
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


def stated_license(folder: str | Path) -> str | None:
    """The licence that a folder's README.md states for the Hub, or None."""
    card = Path(folder, "README.md")
    try:
        return (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        # A card that the Hub could not read either.
        return None


def write_card(
    folder: str | Path,
    name: str,
    auto_class: str,
    summary: str,
    facts: dict[str, object],
    base_model: str | None = None,
    has_tokenizer: bool = True,
    license: str | None = None,
    datasets: list[str] | None = None,
    served: bool = False,
    ours: bool = True,
    example_input: str | None = None,
):
    """Writes README.md: what the model is, an example that runs in the folder, a table of facts.

    Args:
        auto_class: how the model is loaded, one of TASKS.
        facts: of the training data, the recipe, the evaluation, and what else is known.
        base_model: Hub id that the weights come from.
        has_tokenizer: whether the folder holds one.
        license: of the weights, as the Hub abbreviates it ("apache-2.0").
        datasets: Hub ids of the training data.
        served: the folder is in Jina's layout.
        ours: it is a MosaicBERT, and not transformers' BERT.
        example_input: Python for what the example asks the model; None: a sentence.
    """
    task = "feature-extraction" if served else TASKS[auto_class]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["mosaic-bert", "alibi", "custom_code"] if ours else None,
        base_model=base_model,
        license=license,
        datasets=datasets,
    )
    example = EXAMPLE if has_tokenizer else EXAMPLE_WITHOUT_TOKENIZER
    facts = {**facts, "licence of the weights": license or "not stated"}
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        summary=summary,
        example=(EXAMPLE_SERVED if served else example).format(
            task=task,
            auto_class=auto_class,
            text=example_input or EXAMPLE_INPUTS.get(task, '"A sentence."'),
        ),
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    Path(folder, "README.md").write_text(card, encoding="utf-8")


# ---- the Hub ----


def publish(
    folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a folder that convert_weights.py, train_mlm.py or finetune.py wrote, in one commit.

    The token is the one that huggingface_hub finds (`hf auth login`, HF_TOKEN).

    Args:
        folder: weights, config.json, model code, tokenizer and card are sent, nothing else.
        repo_id: ORG/NAME; made if it is not there.
        private: make the repository private, and refuse one that is public.
        revision: branch to write to, made if it is not there; the main one if None.

    Returns:
        Address of the commit.

    Raises:
        ValueError: `repo_id` is no name, the folder is incomplete, or the repository is public and
            `private` is True.
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
                allow_patterns=files,
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
    """Names of the folder's files that make up a model. ValueError: it lacks some."""
    files = [x.relative_to(folder).as_posix() for name in UPLOADED for x in folder.glob(name)]
    needed = {"README.md": "README.md" in files, "config.json": "config.json" in files}
    needed["model.safetensors"] = any(x.endswith(".safetensors") for x in files)
    if needed["config.json"]:
        auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        # "org/name--module.Class" is code of another repository.
        modules = {x.split(".")[0] for x in auto_map.values() if "--" not in x}
        if modules:
            files += [x.name for x in folder.glob("*.py")]
        needed |= {f"{module}.py": f"{module}.py" in files for module in modules}
    if missing := [name for name, there in needed.items() if not there]:
        raise ValueError(f"{folder} is no model to publish: it lacks {', '.join(missing)}")
    return files
