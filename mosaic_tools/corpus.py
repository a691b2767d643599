# SPDX-License-Identifier: Apache-2.0
"""Documents: read from files, the Hub or shards, without blank ones, split into training and held
out."""

import functools
import glob
import hashlib
import json
import os
import zlib
from pathlib import Path

import datasets

from mosaic_tools.devices import usable_cores
from mosaic_tools.embedded_text import embedded_passages, held_out
from mosaic_tools.family import listed
from mosaic_tools.files import inside
from mosaic_tools.recipe import DataArguments

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_documents(args: DataArguments):
    """(training, held-out) documents. The first are a stream if asked for, the second never."""
    validation = None
    if args.dataset_name:
        name, config = args.dataset_name, args.dataset_config_name
        parts = datasets.load_dataset(name, config, streaming=args.streaming)
        train, validation = parts["train"], parts.get("validation")
    elif args.train_file:
        train = load_files(args.train_file, args.streaming)
    else:
        train, validation = (datasets.Dataset.from_dict({"text": x}) for x in embedded_passages())
    if args.validation_file:
        validation = load_files(args.validation_file, args.streaming)
    train = with_text(train, args.text_column)
    if validation is None:
        train, validation = split(train, args.text_column, args.validation_split)
    validation = with_text(validation, args.text_column)
    return train, first_rows(validation, args.max_eval_documents)


def load_files(patterns: list[str], streaming: bool):
    """The rows of all files that match, or of a folder of StreamingDataset shards."""
    if any(Path(pattern, "index.json").is_file() for pattern in patterns):
        return load_shards(patterns, streaming)
    files = [file for pattern in patterns for file in matching_files(pattern)]
    if empty := [file for file in files if not os.path.getsize(file)]:
        raise ValueError(f"empty, leave it out or fill it: {', '.join(empty)}")
    # Any suffix counts, so that text.txt.xz, which `datasets` unpacks, is text.
    kinds = {next((FORMATS[s] for s in Path(f).suffixes if s in FORMATS), None) for f in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(f"{', '.join(files)}: give files of one format of {', '.join(FORMATS)}")
    # datasets takes names for patterns.
    names = [glob.escape(file) for file in files]
    try:
        return datasets.load_dataset(*kinds, data_files=names, split="train", streaming=streaming)
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{listed(files)} cannot be read as {kinds.pop()}, in UTF-8: {reason}"
        ) from error


def matching_files(pattern: str) -> list[str]:
    """The file of that name, be it with brackets, or those that match. ValueError: none does."""
    if Path(pattern).is_file():
        return [pattern]
    if not (files := sorted(glob.glob(pattern, recursive=True))):
        raise ValueError(f"there is no file {pattern}")
    return files


def digest_of_files(args: DataArguments) -> str | None:
    """Of names and sizes of the files that documents are read from, None if they are no files."""
    patterns = [*(args.train_file or []), *(args.validation_file or [])]
    indices = {x: Path(x, "index.json") for x in patterns}
    files = [
        Path(file)
        for pattern, index in indices.items()
        for file in ([index] if index.is_file() else matching_files(pattern))
    ]
    named = json.dumps([(file.name, file.stat().st_size) for file in files])
    return hashlib.sha256(named.encode()).hexdigest() if files else None


def load_shards(folders: list[str], streaming: bool):
    """The rows of MosaicML StreamingDataset folders on this machine.

    Raises:
        ValueError: an index names a file outside of its folder.
    """
    shards = []
    for folder in folders:
        index = Path(folder, "index.json").read_bytes()
        for part in (x for shard in json.loads(index)["shards"] for x in shard.values()):
            # A file's entry, which the library would follow anywhere.
            if isinstance(part, dict) and "basename" in part:
                inside(Path(folder), part["basename"])
        # `datasets` keeps what it made of the same arguments: the index tells new shards from old.
        digest = zlib.crc32(index)
        shards += [(folder, i, digest) for i in range(len(json.loads(index)["shards"]))]
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(read_shards, gen_kwargs={"shards": shards})


def read_shards(shards: list[tuple[str, int, int]]):
    """Rows of shards (folder, number, digest); compressed ones are unpacked beside themselves."""
    try:
        from streaming.base.stream import Stream
        from streaming.base.world import World
    except ImportError as error:
        raise ImportError(
            "shards of MosaicML's StreamingDataset need: pip install mosaicml-streaming"
        ) from error
    for folder, number, _ in shards:
        stream = Stream(local=folder, keep_zip=True)
        stream.apply_default(
            dict.fromkeys(("split", "validate_hash"))
            | {"download_retry": 0, "download_timeout": 60, "keep_zip": True}
        )
        shard = stream.get_shards(World.detect(), allow_unsafe_types=False)[number]
        stream.prepare_shard(shard)
        yield from (shard[row] for row in range(len(shard)))


def column_names(documents) -> list[str]:
    """Columns of a dataset; those of a stream may show in its first row only."""
    return documents.column_names or list(next(iter(documents), {}))


def with_text(documents, column: str):
    """The documents that are not blank. ValueError: there is no such column."""
    if column not in (columns := column_names(documents)):
        there = ", ".join(columns) or "none, it is empty"
        raise ValueError(f"--text_column {column} is not in the data; its columns: {there}")

    return documents.filter(has_text, batched=True, input_columns=column, **parallel(documents))


# Loader workers that are not forked get a stream's functions by name: none is a local one.
def has_text(texts) -> list[bool]:
    return [isinstance(text, str) and text.strip() != "" for text in texts]


def split(documents, column: str, percent: float):
    """(training, held-out) documents; equal ones land on the same side, also in a stream."""

    def part(wanted):
        choose = functools.partial(on_side, percent=percent, wanted=wanted)
        return documents.filter(choose, batched=True, input_columns=column, **parallel(documents))

    return part(False), part(True)


def on_side(texts, percent: float, wanted: bool) -> list[bool]:
    return [held_out(text, percent) == wanted for text in texts]


def first_rows(documents, count: int):
    """At most so many rows; those of a stream are read now."""
    if is_stream(documents):
        return datasets.Dataset.from_list(list(documents.take(count)))
    return documents.select(range(min(count, len(documents))))


def is_stream(documents) -> bool:
    return isinstance(documents, datasets.IterableDataset)


def parallel(documents, workers: int | None = None) -> dict:
    """`num_proc` for a pass over documents: all cores, or so many. A stream takes none, and a
    process takes longer to start than it takes for a thousand documents."""
    processes = 1 if is_stream(documents) else len(documents) // 1000
    processes = min(workers or usable_cores(), processes)
    return {"num_proc": processes} if processes > 1 else {}
