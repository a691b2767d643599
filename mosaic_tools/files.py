# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders: nothing read from a checkpoint's folder may lead out of it, and what
is written needs a folder, and room."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from safetensors import SafetensorError

NOTHING_LEFT = "Nothing is left of it. Make room, or mend what is named, then repeat the command"


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


def check_folder(path: str | Path):
    """ValueError: a file is where the folder, or one that it is in, would have to be made."""
    path = Path(path)
    if file := next((x for x in (path, *path.parents) if x.is_file()), None):
        raise ValueError(f"{file} is a file, expected a folder to write to: choose another")


@contextlib.contextmanager
def writing(what: str, where: str = "", advice: Callable[[], str] = lambda: NOTHING_LEFT):
    """OSError: writing fails, be it for a full disk. `advice` is asked then what to say of it; the
    default is that of what is written to a temporary folder."""
    try:
        yield
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise OSError(f"{what} could not be written{where}: {error}. {advice()}") from error


def is_of_writing(error: Exception) -> bool:
    """Whether libraries raise it where a file cannot be written. tokenizers has no class of its
    own."""
    return isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{file} holds a {type(found).__name__}, expected {expected}")
    return found


def write_json(file: Path, values: dict):
    """Writes in one step: the file is whole, or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(file)
