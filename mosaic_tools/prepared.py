# SPDX-License-Identifier: Apache-2.0
"""Prepared folders: rows in shards, each of which has the size that it had when it was whole.

    prepared.json                what the rows were made of, and how many shards there are
    tokenizer.json, ...          the tokenizer
    train-00012-of-01024.arrow   rows, an Arrow stream that is read by memory map
    train-00012-of-01024.json    its rows, tokens and bytes, and a copy of prepared.json; it is
                                 written last: a shard that has it is whole
    validation-00000-of-00001.*  the held-out rows

Shards that several machines made are copied into one folder. `datasets` reads them too:
load_dataset("arrow", data_files="FOLDER/train-*.arrow").
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa

from mosaic_tools.family import listed
from mosaic_tools.files import check_folder, read_json, write_json, writing
from mosaic_tools.recipe import DataArguments
from mosaic_tools.tokenization import load_tokenizer, make_tokenizer_portable

FACTS = "prepared.json"
REPEAT = "repeat the command that prepared it, which makes what is missing"


def facts_of(folder: Path) -> dict | None:
    """What a folder was made of, None if there is no prepared.json.

    Raises:
        ValueError: it was written before there were shards.
    """
    if not (folder / FACTS).is_file():
        return None
    facts = read_json(folder / FACTS)
    if "shards" not in facts:
        raise ValueError(f"{folder} was prepared by an earlier version: prepare it again")
    return facts


def check_begun(folder: Path, facts: dict):
    """ValueError: the folder has files that are no rows, or rows that were made of something
    else."""
    check_folder(folder)
    begun = facts_of(folder)
    if begun is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"prepared_data {folder} is there already: choose another name")
    for name, value in facts.items():
        if begun and begun.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {begun.get(name)}, not {value}: choose another "
                "--prepared_data, or go on with the command that began it"
            )


def begin(folder: Path, tokenizer, facts: dict, max_seq_length: int) -> dict:
    """Makes a folder to write shards to, unless it is begun.

    Args:
        tokenizer: the folder's own where it is begun.
        facts: what rows depend on, as JSON has it, and `shards`, how many there are to train on.

    Returns:
        The facts, and of the tokenizer a digest.

    Raises:
        ValueError: as `check_begun`.
        OSError: the folder cannot be written.
    """
    check_begun(folder, facts)
    if facts_of(folder) is None:
        # In one step, in which a machine that shares the disk may be faster.
        partial = partial_of(folder)
        try:
            with writing(f"prepared_data {folder}"):
                tokenizer.save_pretrained(partial)
                make_tokenizer_portable(partial, max_seq_length)
                write_json(partial / FACTS, facts | {"tokenizer": digest(partial)})
                if facts_of(folder) is None:
                    partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        check_begun(folder, facts)
    return facts_of(folder)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def shard_files(folder: Path, part: str, shards: int) -> list[Path]:
    """Where the shards of a part are, train or validation."""
    return [folder / f"{part}-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]


def write_shard(file: Path, facts: dict, schema: pa.Schema, tables: Iterable[pa.Table]):
    """Writes tables of rows to a shard, which has its name only once it is whole.

    Raises:
        OSError: it cannot be written; what the folder has stays.
    """
    rows, tokens, partial = 0, 0, partial_of(file)
    remove_left_over(file)
    advice = "What is whole stays. Make room, or mend what is named, then repeat the command"
    writing_it = functools.partial(writing, str(file), advice=lambda: advice)
    with contextlib.ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        # Reading documents, which may fail too, is no part of it.
        with writing_it():
            # A lock tells others that it is not left over.
            fcntl.flock(stack.enter_context(open(partial, "wb")), fcntl.LOCK_EX)
            sink = pa.OSFile(str(partial), "wb")
            writer = pa.ipc.new_stream(sink, schema)
        for table in tables:
            with writing_it():
                writer.write_table(table)
            rows, tokens = rows + len(table), tokens + tokens_of(table)
        with writing_it():
            writer.close()
            sink.close()
            partial.replace(file)
            counts = {"rows": rows, "tokens": tokens, "bytes": file.stat().st_size}
            write_json(file.with_suffix(".json"), counts | {"made_of": facts})


def partial_of(path: Path) -> Path:
    """Where this process writes it, until it is whole. Others may write the same at once."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")


def remove_left_over(file: Path):
    """Removes what processes began to write that are gone: with them went the lock."""
    for partial in file.parent.glob(f"{file.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(partial, "rb") as sink:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)


def tokens_of(table: pa.Table) -> int:
    """Without reading them: a batch of rows knows where its last one ends."""
    return sum(len(batch.flatten()) for batch in table["input_ids"].chunks)


def counts_of(file: Path) -> dict:
    """What was written beside a shard when it was whole, empty if it was not."""
    return read_json(file.with_suffix(".json"))


def fault_of(file: Path, facts: dict) -> str | None:
    """Why a shard is not whole, None if it is. ValueError: it was made of something else."""
    counts = counts_of(file)
    check_origin(file, counts, facts)
    return what_is_torn(file, counts)


def what_is_torn(file: Path, counts: dict) -> str | None:
    """Why a shard with these `counts_of` it is not whole, None if it is."""
    if not file.is_file() or not counts:
        return f"{file.name} is missing" if not file.is_file() else f"{file.name} is not finished"
    if file.stat().st_size != counts["bytes"]:
        return f"{file.name} has {file.stat().st_size:,} bytes of {counts['bytes']:,}"
    return None


def check_origin(file: Path, counts: dict, facts: dict):
    """ValueError: the shard, if it is there, was made of something else."""
    made_of = counts.get("made_of", facts)
    if different := [name for name, value in facts.items() if made_of.get(name) != value]:
        theirs = ", ".join(f"{name} {made_of.get(name)}, not {facts[name]}" for name in different)
        raise ValueError(f"{file} was made with {theirs}: move it away, then {REPEAT}")


def load_prepared(args: DataArguments):
    """(training rows, held-out rows, tokenizer) of a folder that prepare_data.py wrote.

    Raises:
        ValueError: it is not such a folder, or its rows are not what the arguments ask for; a shard
            is missing, torn, or was made of something else.
    """
    folder = Path(args.prepared_data)
    if not (facts := facts_of(folder)):
        raise ValueError(f"{folder} has no {FACTS}: write it with prepare_data.py")
    for name in ("max_seq_length", "pack"):
        if facts[name] != getattr(args, name):
            raise ValueError(
                f"{folder} was prepared with {name} {facts[name]}, not {getattr(args, name)}: "
                f"train with --{name} {facts[name]} or prepare again"
            )
    if digest(folder) != facts["tokenizer"]:
        raise ValueError(
            f"{folder}/tokenizer.json is not the one that the rows were made with: put that back, "
            "or prepare again"
        )
    parts = [shard_files(folder, *x) for x in (("train", facts["shards"]), ("validation", 1))]
    if torn := [fault for file in sum(parts, []) if (fault := fault_of(file, facts))]:
        raise ValueError(f"{folder} is not complete: {listed(torn)}; {REPEAT}")
    return *map(read_part, parts), load_tokenizer(folder)


def read_part(files: list[Path]) -> datasets.Dataset:
    parts = []
    for file in files:
        try:
            parts.append(datasets.Dataset.from_file(str(file)))
        except pa.ArrowException as error:
            raise ValueError(
                f"{file} is no Arrow stream: {error}; delete it, then {REPEAT}"
            ) from error
    return datasets.concatenate_datasets(parts)
