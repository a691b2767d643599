# SPDX-License-Identifier: Apache-2.0
"""From a folder to the Hub: what is sent, and the upload. One that failed is repeated by

python -c "from mosaic_tools.publishing import publish; publish('FOLDER', 'ORG/NAME')"
"""

import glob
import json
import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import RevisionNotFoundError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file

from mosaic_tools import aot
from mosaic_tools.files import inside, listed_shards, read_json

# What sentence-transformers puts before texts.
PROMPTS = "config_sentence_transformers.json"
OF_PROMPTS = ("prompts", "default_prompt_name", "similarity_fn_name")
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
# ONNX, where optimum, sentence-transformers and transformers.js look for it, with its data.
EXPORTS = (
    *("*.onnx", "*.onnx_data*", "*.onnx.data"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", "onnx/*.onnx.data", "onnx/*config.json"),
    *("openvino/*.xml", "openvino/*config.json"),
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
# Which transformers puts on a model that has them beside it.
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
# What is uploaded of a model's folder, and nothing else: a training folder also holds states, logs
# and pickles.
UPLOADED = (
    *("README.md", "LICENSE*", "config.json", "generation_config.json"),
    *("model*.safetensors", "model.safetensors.index*.json"),
    # A tokenizer, old or new.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spm.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja"),
    *ADAPTERS,
    # sentence-transformers.
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    "router_config.json",
    *EXPORTS,
)
# And of the folder of a sentence-transformers module.
OF_MODULES = ("*_config.json", "idf.json", "*.safetensors")


# ---- sentence-transformers' modules ----


def settings_of(source: str, name: str, kind: type = dict):
    """What a JSON file of a folder or Hub id holds, empty if there is none."""
    if Path(source).exists():
        return read_json(inside(Path(source), name), kind) if Path(source).is_dir() else kind()
    file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return read_json(Path(file), kind) if file else kind()


def pools(source: str | Path) -> bool:
    """Whether it is a SentenceTransformer; a CrossEncoder lists its modules too."""
    modules = settings_of(source, "modules.json", list)
    return any(isinstance(x, dict) and str(x.get("type")).endswith("Pooling") for x in modules)


def check_modules(source: str) -> list[str]:
    """The kinds of a SentenceTransformer's modules, none if the source lists none.

    Args:
        source: a folder or Hub id.

    Raises:
        ValueError: it is more than an encoder under the mean of texts as they are, and would lose
            the rest.
    """
    kinds = []
    for module in settings_of(source, "modules.json", list):
        if not (isinstance(module, dict) and {"path", "type"} <= set(module)):
            raise ValueError(f"{source}/modules.json lists {module!r}, no module by path and type")
        kinds.append(str(module["type"]).rsplit(".", 1)[-1])
        if kinds[-1] == "Pooling":
            known = takes_the_mean(settings_of(source, f"{module['path']}/config.json"))
        else:
            known = kinds[-1] in ("Transformer", "Normalize")
        if not known:
            raise ValueError(
                f"{source} has a module {kinds[-1]} that is not the mean over all tokens, and "
                "would lose it: take sentence-transformers itself, or give the encoder alone"
            )
    if settings_of(source, "sentence_bert_config.json").get("do_lower_case"):
        raise ValueError(
            f"{source} makes texts lower case before its tokenizer (do_lower_case in "
            "sentence_bert_config.json), which would be lost: have the tokenizer do it, and set "
            "that to false"
        )
    return kinds


def takes_the_mean(pooling: dict) -> bool:
    """Whether a Pooling module's settings say the mean over all tokens, and nothing beside it."""
    modes = {name for name, x in pooling.items() if name.startswith("pooling_mode_") and x is True}
    # As older and newer versions write them.
    old, new = modes == {"pooling_mode_mean_tokens"}, pooling.get("pooling_mode") == "mean"
    return (old or new and not modes) and pooling.get("include_prompt", True) is True


def carry_pooling(source: str, folder: Path, dim: int, max_length: int) -> int:
    """Makes an encoder's folder the SentenceTransformer that its source is: the mean, length 1 or
    not, prompts, and where texts are cut, at `max_length` tokens if the source says nothing.
    Returns that length.

    Raises:
        ValueError: as `check_modules`.
    """
    normalize = "Normalize" in check_modules(source)
    length = settings_of(source, "sentence_bert_config.json").get("max_seq_length") or max_length
    write_pooling(folder, dim, length, normalize)
    found = settings_of(source, PROMPTS)
    if settings := {name: found[name] for name in OF_PROMPTS if name in found}:
        (folder / PROMPTS).write_text(json.dumps(settings, indent=2) + "\n")
    return length


def write_pooling(folder: str | Path, dim: int, max_length: int, normalize: bool = False):
    """Writes what tells sentence-transformers and servers to take the mean over all tokens.

    Args:
        dim: the model's hidden size.
        max_length: where text is cut, in tokens.
        normalize: embeddings have length 1 then.
    """
    places = {"": "Transformer", "1_Pooling": "Pooling"}
    places |= {"2_Normalize": "Normalize"} if normalize else {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(places.items())
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


def remove_derived(folder: str | Path, kept: set[Path] = frozenset()):
    """Deletes what was made of weights that are replaced, and would be loaded instead of the new
    ones, or with them, all but `kept`: exports, what is compiled, adapters, the list of modules."""
    derived = (*EXPORTS, "openvino/openvino_*", *ADAPTERS, *POOLING_FILES, "router_config.json")
    derived += (aot.FILE, aot.LOADER)
    for pattern in (*derived, PROMPTS):
        for file in Path(folder).glob(pattern):
            if file not in kept:
                file.unlink()


# ---- the Hub ----


def publish(
    folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None
) -> str:
    """Uploads a folder that a command of this package wrote, in one commit.

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
        ValueError: `repo_id` or `revision` is no name, the folder is incomplete or leads out of
            itself, the repository is public and `private` is True, or it has a model for PyTorch
            and the folder a graph alone.
        OSError: the upload failed. The folder is as it was.
    """
    check_repo_id(repo_id, revision)
    files = files_to_upload(Path(folder))
    api, refused = HfApi(), None
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            refused = "exists and is public: nothing was uploaded"
        there = set() if refused else files_on_the_hub(api, repo_id, revision)
        if is_graph(Path(folder)) and any(fnmatch(x, y) for x in there for y in WEIGHTS):
            refused = (
                "has a model for PyTorch, which this folder's config.json would turn into a stock "
                "BERT: nothing was uploaded; choose another repository"
            )
        if not refused:
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
            f'    python -c "from mosaic_tools.publishing import publish; '
            f'publish({str(folder)!r}, {repo_id!r}, {private}, {revision!r})"'
        ) from None
    if refused:
        raise ValueError(f"{repo_id} {refused}")
    of_weights = (*EXPORTS, *ADAPTERS, *POOLING_FILES, *WEIGHTS)
    left = [x for x in sorted(there - set(files)) if any(fnmatch(x, y) for y in of_weights)]
    if left and any(fnmatch(x, y) for x in files for y in WEIGHTS):
        print(
            f"{repo_id} still has {', '.join(left)} of an earlier upload, which may be of other "
            "weights: delete them there, or upload them anew"
        )
    return commit.commit_url


def files_on_the_hub(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Names of a branch's files; of one that is not there those of the main one, as it will have
    them."""
    try:
        return set(api.list_repo_files(repo_id, revision=revision))
    except RevisionNotFoundError:
        return set(api.list_repo_files(repo_id))


def check_repo_id(repo_id: str, revision: str | None = None):
    """ValueError unless these can be the names of a repository and of a branch."""
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no ORG/NAME")
    validate_repo_id(repo_id)
    # As git has it, of characters that need no quoting.
    if revision is not None and (
        not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII)
        or re.search(r"\.\.|//|/\.|\.lock$|[./]$", revision)
    ):
        raise ValueError(
            f"revision {revision!r} is no name of a branch: give letters, digits, and . _ - / "
            "between them"
        )


def files_to_upload(folder: Path) -> list[str]:
    """Names of the folder's files that make up a model. ValueError: it lacks some, or one, or a
    name that one of them gives, leads out of the folder."""
    places = model_folders(folder)
    found = {x for place in places for name in UPLOADED for x in place.glob(name)}
    found |= {x for place in places[1:] for name in OF_MODULES for x in place.glob(name)}
    # OpenVINO's weights, which are no pickles.
    exports = [x for x in found if x.parent.name == "openvino"]
    found |= {x.with_suffix(".bin") for x in exports if x.suffix == ".xml"}
    found |= {place / x for place in places for x in own_code(place)}
    found = {x for x in found if x.is_file()}
    files = {x.relative_to(folder).as_posix() for x in found}
    files |= pictures(folder) if "README.md" in files else set()

    # A router's models are in folders of their own.
    routes = (folder / "router_config.json").is_file()
    models = [x for x in places[1:] if (x / "sentence_bert_config.json").is_file()]
    needed = [folder / "README.md"]
    for place in models if routes else [folder]:
        needed += [place / x for x in ("config.json", *own_code(place))]
        if (index := place / "model.safetensors.index.json").is_file():
            needed += listed_shards(index)
        elif not (list(place.glob("model*.safetensors")) or is_graph(place)):
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
    """Names of the Python files beside a model that config.json and modules.json name, and of those
    that these import. ValueError: auto_map names no classes."""
    file, named = place / "config.json", []
    auto_map = read_json(file).get("auto_map") or {}
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        named += value if isinstance(value, list) else [value]
    # Of two tokenizers one may be null.
    named = [x for x in named if x is not None]
    for x in named:
        if not (isinstance(x, str) and re.fullmatch(r"(.+--)?\w+\.\w+", x)):
            raise ValueError(f"{file}: auto_map names {x!r}, expected MODULE.CLASS")
    # "org/name--module.Class" is code of another repository.
    names = {f"{x.split('.')[0]}.py" for x in named if "--" not in x}
    custom = {f"{x.split('.')[0]}.py" for x in named_modules(place).values()}
    names |= {x for x in custom if (place / x).is_file()}
    there = [place / x for x in names if (place / x).is_file()]
    return names | {Path(y).name for x in there for y in get_relative_import_files(x)}


def is_graph(place: Path) -> bool:
    """Whether a model is an ONNX file alone, which needs no weights beside it."""
    return (place / "onnx" / "model.onnx").is_file() and not own_code(place)


def pictures(folder: Path) -> set[str]:
    """Names of the folder's images that its README.md shows."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|jpe?g|gif|svg|webp))\)", text)
    return {x for x in names if ".." not in x and x[0] != "/" and (folder / x).is_file()}


def hub_id(name: str | None) -> str | None:
    """The name, unless it is None or a folder of this machine."""
    return None if name is None or Path(name).exists() else name
