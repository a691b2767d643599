# SPDX-License-Identifier: Apache-2.0
"""From documents to rows of token ids, cut or packed, and the folders that prepare_data.py
writes."""

import bisect
import functools
import json
import shutil
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

from mosaic_tools.corpus import column_names, is_stream, load_documents, parallel
from mosaic_tools.files import check_folder, writing
from mosaic_tools.recipe import DataArguments, TokenizerArguments
from mosaic_tools.tokenization import (
    BLOCK,
    choose_tokenizer,
    has_vocabulary_of,
    largest_id,
    load_tokenizer,
    make_tokenizer_portable,
)


def load_rows(data: DataArguments, tokenizer_args: TokenizerArguments, name, args):
    """(training rows, held-out rows, tokenizer).

    Args:
        name: of the tokenizer, None to train one.

    Raises:
        ValueError: prepared rows were made with other entries than that tokenizer's.
    """
    # The main process fills the caches of data, the others read them.
    with args.main_process_first():
        if data.prepared_data:
            rows = load_prepared(data)
            if name and not has_vocabulary_of(name, rows[-1]):
                raise ValueError(
                    f"{data.prepared_data} was prepared with another tokenizer than {name}: leave "
                    "out --tokenizer_name, or prepare again"
                )
            return rows
        train, validation = load_documents(data)
    tokenizer = choose_tokenizer(name, tokenizer_args, train, data.text_column)
    with args.main_process_first():
        train, validation = (encode(x, data, tokenizer, args.seed) for x in (train, validation))
    return train, validation, tokenizer


def encode(documents, args: DataArguments, tokenizer, seed: int = 0):
    """Documents as rows: `input_ids`, and with `pack` the `lengths` of the documents in them.

    Rows have at most max_seq_length tokens. A stream's are shuffled in blocks of 10,000 documents;
    datasets that are no streams keep their order, as Trainer shuffles them.
    """
    id_type = datasets.Value("uint16" if largest_id(tokenizer) < 2**16 else "int32")
    columns = {"input_ids": id_type} | ({"lengths": datasets.Value("int32")} if args.pack else {})
    features = datasets.Features({name: datasets.Sequence(x) for name, x in columns.items()})
    function = functools.partial(
        encode_batch,
        tokenizer=tokenizer,
        column=args.text_column,
        capacity=args.max_seq_length,
        packed=args.pack,
        shuffle_seed=seed if is_stream(documents) else None,
    )
    options = {"batched": True, "remove_columns": column_names(documents), "features": features}
    if is_stream(documents):
        return documents.map(function, batch_size=BLOCK, **options)
    options |= parallel(documents, args.preprocessing_num_workers)
    rows = documents.map(function, desc="Tokenizing", **options)
    if not len(rows):
        raise ValueError(
            f"{args.source()}: no text is left for training or for evaluation; give more of it, a "
            f"--validation_file, or another --validation_split than {args.validation_split:g}"
        )
    return rows


def encode_batch(batch, tokenizer, column, capacity, packed, shuffle_seed):
    """Columns of `encode`'s rows. Packed, documents longer than a row go on in another."""
    texts = batch[column]
    pieces = tokenizer(
        texts,
        truncation=True,
        max_length=capacity,
        return_overflowing_tokens=packed,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    rows = pack(pieces, capacity) if packed else [[piece] for piece in pieces]
    if shuffle_seed is not None:
        # The same block is shuffled alike when a resumed run reads it again.
        generator = np.random.default_rng([shuffle_seed, zlib.crc32(texts[0].encode())])
        rows = [rows[i] for i in generator.permutation(len(rows))]
    columns = {"input_ids": [[token for piece in row for token in piece] for row in rows]}
    return columns | (
        {"lengths": [[len(piece) for piece in row] for row in rows]} if packed else {}
    )


def pack(pieces: list[list[int]], capacity: int) -> list[list[list[int]]]:
    """Pieces of at most `capacity` tokens in rows of at most as many, longest first, each where it
    leaves the least room (best fit decreasing)."""
    rows, rooms = [], []
    for piece in sorted(pieces, key=len, reverse=True):
        fit = bisect.bisect_left(rooms, (len(piece),))
        room, row = rooms.pop(fit) if fit < len(rooms) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - len(piece), row))
    return rows


def size(rows) -> str:
    """Rows and tokens, in words."""
    if is_stream(rows):
        return "streamed"
    batches = rows.with_format("arrow").iter(10_000)
    tokens = sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)
    return f"{len(rows):,} rows, {tokens:,} tokens"


# ---- prepared folders ----


def check_new(folder: Path):
    """ValueError: the folder is there already, or a file where it would have to be made."""
    check_folder(folder)
    if folder.exists():
        raise ValueError(f"prepared_data {folder} is there already: choose another name")


def save_prepared(folder: Path, train, validation, tokenizer, args: DataArguments):
    """Writes rows, tokenizer and prepared.json; the folder has its name only once it is complete.

    Raises:
        ValueError: as `check_new`.
        OSError: as `writing`.
    """
    check_new(folder)
    facts = {
        "source": args.source(),
        "max_seq_length": args.max_seq_length,
        "pack": args.pack,
        "train": size(train),
        "validation": size(validation),
    }
    partial = folder.with_name(f"{folder.name}.partial")
    # Of a command that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(f"prepared_data {folder}"):
            datasets.DatasetDict(train=train, validation=validation).save_to_disk(partial)
            tokenizer.save_pretrained(partial)
            make_tokenizer_portable(partial, args.max_seq_length)
            Path(partial, "prepared.json").write_text(json.dumps(facts, indent=2) + "\n")
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def load_prepared(args: DataArguments):
    """(training rows, held-out rows, tokenizer) of a folder that `save_prepared` wrote.

    Raises:
        ValueError: it is not such a folder, or its rows are not what the arguments ask for.
    """
    folder = Path(args.prepared_data)
    if not Path(folder, "prepared.json").is_file():
        raise ValueError(f"{folder} has no prepared.json: write it with prepare_data.py")
    facts = json.loads(Path(folder, "prepared.json").read_text())
    for name in ("max_seq_length", "pack"):
        if facts[name] != getattr(args, name):
            raise ValueError(
                f"{folder} was prepared with {name} {facts[name]}, not {getattr(args, name)}: "
                f"train with --{name} {facts[name]} or prepare again"
            )
    parts = datasets.load_from_disk(folder)
    return parts["train"], parts["validation"], load_tokenizer(folder)
