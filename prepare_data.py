# SPDX-License-Identifier: Apache-2.0
"""From documents to rows of token ids: reading, splitting, training a tokenizer, encoding, packing.

train_mlm.py does all of it by itself. To do it once, on all cores, and train from the result:

    python prepare_data.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128
    accelerate launch train_mlm.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128

Recipes and flags are train_mlm.py's. The folder holds the rows (Arrow, read by memory map), the
tokenizer, and prepared.json, which says how they were made.
"""

import bisect
import functools
import glob
import itertools
import json
import os
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from embedded_text import embedded_passages, held_out
from publishing import SPECIAL_TOKENS, inside, load_tokenizer, make_tokenizer_portable
from recipe import DataArguments, TokenizerArguments, parse

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# A tokenizer learns from at most so many documents, and a stream is shuffled in blocks of so many.
TOKENIZER_DOCUMENTS, BLOCK = 200_000, 10_000


# ---- documents ----


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
    files = []
    for pattern in patterns:
        if not (found := sorted(glob.glob(pattern, recursive=True))):
            raise ValueError(f"there is no file {pattern}")
        files += found
    if empty := [file for file in files if not os.path.getsize(file)]:
        raise ValueError(f"empty, leave it out or fill it: {', '.join(empty)}")
    # Any suffix counts, so that text.txt.xz, which `datasets` unpacks, is text.
    kinds = {next((FORMATS[s] for s in Path(f).suffixes if s in FORMATS), None) for f in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(f"{', '.join(files)}: give files of one format of {', '.join(FORMATS)}")
    return datasets.load_dataset(*kinds, data_files=files, split="train", streaming=streaming)


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

    def has_text(texts):
        return [isinstance(text, str) and text.strip() != "" for text in texts]

    return documents.filter(has_text, batched=True, input_columns=column, **parallel(documents))


def split(documents, column: str, percent: float):
    """(training, held-out) documents; equal ones land on the same side, also in a stream."""

    def part(wanted):
        def choose(texts):
            return [held_out(text, percent) == wanted for text in texts]

        return documents.filter(choose, batched=True, input_columns=column, **parallel(documents))

    return part(False), part(True)


def first_rows(documents, count: int):
    """At most so many rows; those of a stream are read now."""
    if is_stream(documents):
        return datasets.Dataset.from_list(list(documents.take(count)))
    return documents.select(range(min(count, len(documents))))


def is_stream(documents) -> bool:
    return isinstance(documents, datasets.IterableDataset)


# ---- tokenizer ----


def choose_tokenizer(name: str | None, args: TokenizerArguments, documents, column: str):
    """The tokenizer of that name, or one trained on the first documents."""
    if name and not args.train_tokenizer:
        return existing_tokenizer(name, args.lowercase)
    rows = itertools.islice(documents, TOKENIZER_DOCUMENTS)
    return train_tokenizer((row[column] for row in rows), args)


def existing_tokenizer(name: str, lowercase: bool | None):
    """A Hub id's, a folder's or a BERT vocab.txt's tokenizer. ValueError: it cannot mask or pad."""
    tokenizer = load_tokenizer(name, lowercase)
    for role in ("mask_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise ValueError(
                f"the tokenizer {name} has no {role}, which masked language modelling needs: "
                "choose another --tokenizer_name, or --train_tokenizer"
            )
    return tokenizer


def train_tokenizer(texts, args: TokenizerArguments):
    """A tokenizer trained on these texts by the main process and sent to the others.

    Sent, since WordPiece training has no fixed order: no two runs give the same ids.
    """
    state = [None]
    if PartialState().is_main_process:
        make = byte_pairs if args.train_tokenizer == "bpe" else wordpiece
        tokenizer, trainer = make(args)
        tokenizer.train_from_iterator(texts, trainer)
        state = [tokenizer.to_str()]
    return as_transformers(Tokenizer.from_str(broadcast_object_list(state)[0]))


def wordpiece(args: TokenizerArguments):
    """(tokenizer, trainer) of WordPiece with BERT's text processing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=args.lowercase is not False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=args.vocab_size, special_tokens=SPECIAL_TOKENS
    )


def byte_pairs(args: TokenizerArguments):
    """(tokenizer, trainer) of byte-level BPE: no text is unknown, words may be of any length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase() if args.lowercase else normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with BERT's template, [CLS] text [SEP] pair [SEP], and special tokens."""
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def largest_id(tokenizer) -> int:
    return max(tokenizer.get_vocab().values())


# ---- rows ----


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


def parallel(documents, workers: int | None = None) -> dict:
    """`num_proc` for a pass over documents: all cores, or so many. A stream takes none, and a
    process takes longer to start than it takes for a thousand documents."""
    processes = 1 if is_stream(documents) else len(documents) // 1000
    processes = min(workers or usable_cores(), processes)
    return {"num_proc": processes} if processes > 1 else {}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- prepared folders ----


def save_prepared(folder: Path, train, validation, tokenizer, args: DataArguments):
    """Writes rows, tokenizer and prepared.json; the folder has its name only once it is complete.

    Raises:
        ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"prepared_data {folder} is there already: choose another name")
    partial = folder.with_name(folder.name + ".partial")
    datasets.DatasetDict(train=train, validation=validation).save_to_disk(partial)
    tokenizer.save_pretrained(partial)
    make_tokenizer_portable(partial, args.max_seq_length)
    facts = {
        "source": args.source(),
        "max_seq_length": args.max_seq_length,
        "pack": args.pack,
        "train": size(train),
        "validation": size(validation),
    }
    Path(partial, "prepared.json").write_text(json.dumps(facts, indent=2) + "\n")
    partial.rename(folder)
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


def size(rows) -> str:
    """Rows and tokens, in words."""
    if is_stream(rows):
        return "streamed"
    batches = rows.with_format("arrow").iter(10_000)
    tokens = sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)
    return f"{len(rows):,} rows, {tokens:,} tokens"


def main():
    model_args, tokenizer_args, args, recipe = parse(sys.argv[1:])
    if args.prepared_data is None:
        raise ValueError("give --prepared_data, the folder that the rows are written to")
    # What is prepared is read whole, also by recipes that stream.
    args.streaming = False
    train, validation = load_documents(args)
    name = tokenizer_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = choose_tokenizer(name, tokenizer_args, train, args.text_column)
    train, validation = (encode(x, args, tokenizer, recipe.seed) for x in (train, validation))
    facts = save_prepared(Path(args.prepared_data), train, validation, tokenizer, args)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
