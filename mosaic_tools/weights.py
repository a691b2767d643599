# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as files: a Hub id's, a folder's or Composer's. Nothing that is in them is run."""

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from mosaic_tools.files import inside, listed_shards, read_json


def fetch(source: str) -> Path:
    """Path of a local source, or of the Hub's copy of it."""
    if Path(source).exists():
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/")) or source.endswith(".pt"):
        raise ValueError(f"{source} does not exist")
    try:
        wanted = ["*.json", "*.txt", "README.md", "model*.safetensors"]
        folder = Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not any(folder.glob("model*.safetensors")):
            wanted.append("pytorch_model*.bin")
            snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"])
        return folder
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
        except ValueError:
            raise
        except Exception as error:
            # torch takes what is no checkpoint for its oldest format, and fails in any way.
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
    """The tensors of a torch checkpoint; of Composer's, those under state.model.

    Raises:
        ValueError: it holds something else, or unpacks to far more than it takes.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            unpacked = sum(x.file_size for x in parts.infolist())
            # torch itself compresses nothing.
            if unpacked > 2 * file.stat().st_size + 500 * 2**20:
                raise ValueError(
                    f"{file} would unpack to {unpacked:,} bytes: save it again by torch.save"
                )
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
    if file.suffix != ".json" or (path.is_dir() and not file.exists()):
        raise ValueError(
            f"{path} has no config.json: pass one with --config (the one beside this script "
            "describes MosaicBERT-Base)"
        )
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    return read_json(file)
