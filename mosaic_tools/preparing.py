# SPDX-License-Identifier: Apache-2.0
"""What prepare_data.py does: shards of rows, made on all cores, those that are there already left
as they are."""

import dataclasses
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from mosaic_tools.corpus import digest_of_files, is_stream, load_documents
from mosaic_tools.devices import usable_cores
from mosaic_tools.encoding import (
    DOCUMENTS,
    VERSION,
    Encoder,
    check_not_empty,
    encode,
    encode_batch,
    features,
)
from mosaic_tools.prepared import (
    begin,
    check_begun,
    counts_of,
    facts_of,
    fault_of,
    shard_files,
    tokens_of,
    what_is_torn,
    write_shard,
)
from mosaic_tools.recipe import DataArguments, TokenizerArguments, option
from mosaic_tools.tokenization import choose_tokenizer, has_vocabulary_of, load_tokenizer

# Of small data so many shards, so that all cores have some, but none of fewer documents than that;
# of large data shards of so many documents.
SHARDS, FEWEST, MOST = 64, 1000, 100_000
# Tokens that are written at a time, at least.
TOKENS = 2**24


@dataclass
class PreparingArguments:
    """What prepare_data.py alone is told."""

    _argument_group_name = "preparing"

    shard: str = option("1/1", "i/n: make the part of the i-th of n machines")

    def __post_init__(self):
        words = self.shard.split("/")
        self.part = [int(x) for x in words if x.isdecimal()]
        if len(words) != 2 or len(self.part) != 2 or not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"shard must be i/n with i from 1 to n, as 2/8, got {self.shard}")


def prepare(args: DataArguments, tokenizer_args: TokenizerArguments, name, part=(1, 1)) -> dict:
    """Makes the shards of `args.prepared_data` that are not there yet.

    Args:
        name: of the tokenizer, None to train one.
        part: (i, n), to make those of the i-th of n machines.

    Returns:
        What the folder has, in words.

    Raises:
        ValueError: the folder has something else; no text is left; machines would each train a
            tokenizer.
        OSError, RuntimeError: a shard cannot be made. What is whole stays.
    """
    folder, facts = Path(args.prepared_data), made_of(args, tokenizer_args, name)
    # Before the text is read.
    check_begun(folder, facts)
    if part[1] > 1 and not (name or facts_of(folder)):
        raise ValueError(
            "machines that share the work need one tokenizer: give --tokenizer_name; to train one, "
            "prepare a part of the text without --shard, and name that folder"
        )
    train, validation = read_documents(args)
    tokenizer = choose(folder, name, tokenizer_args, train, args)
    facts |= {"documents": None if is_stream(train) else len(train)}
    facts = begin(
        folder, tokenizer, facts | {"shards": number_of_shards(train)}, args.max_seq_length
    )
    # As others read it, who may have begun the folder meanwhile.
    tokenizer = load_tokenizer(folder)
    schema = features(tokenizer, args).arrow_schema
    files, (held_out,) = (
        shard_files(folder, *x) for x in (("train", facts["shards"]), ("validation", 1))
    )
    own = range(part[0] - 1, len(files), part[1])
    # Before one is written.
    lacks_held_out = fault_of(held_out, facts) is not None
    todo = [i for i in own if fault_of(files[i], facts)]
    if part[0] == 1 and lacks_held_out:
        rows = encode(validation, args, tokenizer).with_format("arrow")
        write_shard(held_out, facts, schema, rows.iter(DOCUMENTS))
    make = Maker(train, Encoder(tokenizer, args), args.text_column, schema, files, facts)
    make_all(make, todo, len(own), args.preprocessing_num_workers or usable_cores())
    return report(files, held_out, args)


def made_of(args: DataArguments, tokenizer_args: TokenizerArguments, name) -> dict:
    """What of the arguments rows depend on; of a tokenizer with a name, its digest will tell."""
    lengths = ("max_seq_length", "pack", "text_column", "validation_split", "max_eval_documents")
    facts = {x: getattr(args, x) for x in lengths}
    facts |= {"source": args.text_source(), "files": digest_of_files(args), "encoding": VERSION}
    if not name:
        trained = ("train_tokenizer", "vocab_size", "lowercase")
        facts |= {x: getattr(tokenizer_args, x) for x in trained}
    return facts


def read_documents(args: DataArguments):
    """(training, held-out) documents. The first are a stream if that is asked for, and if it has
    files enough to share them out. ValueError: there are none."""
    train, validation = load_documents(args)
    if is_stream(train) and train.num_shards < SHARDS:
        train, validation = load_documents(dataclasses.replace(args, streaming=False))
    for documents in (train, validation):
        if not is_stream(documents):
            check_not_empty(documents, args)
    return train, validation


def choose(folder: Path, name, tokenizer_args: TokenizerArguments, documents, args: DataArguments):
    """The tokenizer of a folder that is begun, or a new one. ValueError: both, and they differ."""
    if facts_of(folder) is None:
        return choose_tokenizer(name, tokenizer_args, documents, args.text_column)
    tokenizer = load_tokenizer(folder)
    if name and not has_vocabulary_of(name, tokenizer, bool(tokenizer_args.tokenizer_name)):
        raise ValueError(
            f"{folder} was begun with another tokenizer than {name}: leave it out, or choose "
            "another --prepared_data"
        )
    return tokenizer


def number_of_shards(documents) -> int:
    """A function of the data alone: another machine goes on with the same ones."""
    if is_stream(documents):
        return documents.num_shards
    small = min(SHARDS, len(documents) // FEWEST)
    return max(1, small, -(-len(documents) // MOST))


@dataclass
class Maker:
    """Makes shards, in a process of its own: `documents` in as many parts as there are files."""

    documents: object
    encoder: Encoder
    column: str
    schema: pa.Schema
    files: list[Path]
    facts: dict

    def __call__(self, number: int, tell: Callable[[int, int], None]):
        """Makes a shard; `tell` is told of documents and tokens that are done."""
        part = self.documents.shard(num_shards=len(self.files), index=number)
        write_shard(self.files[number], self.facts, self.schema, self.tables(part, tell))

    def tables(self, documents, tell: Callable[[int, int], None]) -> Iterator[pa.Table]:
        """Tables of at least TOKENS tokens, but the last."""
        tables, tokens = [], 0
        for batch in documents.select_columns([self.column]).iter(DOCUMENTS):
            columns = encode_batch(batch, self.encoder, self.column)
            tables.append(pa.table({x: list_array(y) for x, y in columns.items()}, self.schema))
            made = tokens_of(tables[-1])
            tell(len(batch[self.column]), made)
            tokens += made
            if tokens >= TOKENS:
                yield pa.concat_tables(tables).combine_chunks()
                tables, tokens = [], 0
        if tables:
            yield pa.concat_tables(tables).combine_chunks()


def list_array(arrays: list) -> pa.ListArray:
    """A column of rows, each a numpy array."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))


# ---- processes ----


def make_all(make: Maker, numbers: list[int], of: int, processes: int):
    """Makes these shards, at most so many at a time, and shows how far it is.

    Args:
        of: the shards that there will be then, the others of which are there.

    Raises:
        OSError, RuntimeError: one could not be made.
    """
    if not numbers:
        return
    documents, tokens = counters = multiprocessing.Value("q"), multiprocessing.Value("q")
    processes = min(processes, len(numbers))
    pool = ProcessPoolExecutor(processes, None, set_up, (make, counters))
    try:
        with tqdm(desc="Preparing", unit="shard", total=of, initial=of - len(numbers)) as bar:
            began, todo = time.monotonic(), iter(numbers)
            # No more than are worked on: those that wait in the pool would be begun after an error.
            running = {pool.submit(make_one, x) for x in itertools.islice(todo, processes)}
            whole = of - len(numbers)
            while running:
                done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for finished in done:
                    finished.result()
                    running |= {pool.submit(make_one, x) for x in itertools.islice(todo, 1)}
                whole += len(done)
                if per_shard := (make.facts["documents"] or 0) / len(make.files):
                    n = of - len(numbers) + documents.value / per_shard
                    bar.n = round(min(n, whole + len(running)), 2)
                else:
                    bar.n = whole
                rate = tokens.value / (time.monotonic() - began) / 1e6
                bar.set_postfix_str(f"{rate:.2f} M tokens/s")
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that makes shards died, perhaps for want of memory: what is whole stays; "
            "repeat the command, with fewer --preprocessing_num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def set_up(make: Maker, counters: tuple):
    """Of a process of the pool."""
    global _make, _counters
    _make, _counters = make, counters
    # There is a process for each core, which the library would give threads of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A process of the pool would outlive one that is killed."""
    wait_for_sentinel([multiprocessing.parent_process().sentinel])
    os._exit(1)


def make_one(number: int):
    _make(number, count)


def count(documents: int, tokens: int):
    for counter, more in zip(_counters, (documents, tokens), strict=True):
        with counter.get_lock():
            counter.value += more


# ---- result ----


def report(files: list[Path], held_out: Path, args: DataArguments) -> dict:
    """What the folder has, in words. ValueError: no text was left."""
    counts = {file: counts_of(file) for file in (*files, held_out)}
    whole = [file for file in files if not what_is_torn(file, counts[file])]
    train, validation = (
        {key: sum(counts[x].get(key, 0) for x in part) for key in ("rows", "tokens", "bytes")}
        for part in (whole, [held_out])
    )
    if len(whole) < len(files):
        return {"shards": f"{len(whole):,} of {len(files):,}"}
    check_not_empty(range(train["rows"]), args)
    return {
        "source": args.text_source(),
        "max_seq_length": args.max_seq_length,
        "pack": args.pack,
        "train": f"{train['rows']:,} rows, {train['tokens']:,} tokens",
        "validation": f"{validation['rows']:,} rows, {validation['tokens']:,} tokens",
        "bytes a token": round(train["bytes"] / train["tokens"], 2),
        "shards": len(files),
    }
