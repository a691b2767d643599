# SPDX-License-Identifier: Apache-2.0
"""From documents to rows of token ids, cut or packed."""

import bisect
import copy
import functools
import json
import re

import datasets
import numpy as np

from mosaic_tools.corpus import column_names, is_stream, parallel
from mosaic_tools.recipe import DataArguments
from mosaic_tools.tokenization import largest_id

# Documents that are tokenized, and packed, together: a worker that reads a stream delivers nothing
# while it tokenizes them.
DOCUMENTS, OF_STREAM = 1000, 250
# Texts that the library tokenizes at a time: what it keeps of more falls out of the cache.
TEXTS = 64
# Where a text may be cut in parts that are tokenized by themselves: before white space and, in
# Chinese and Japanese, behind punctuation.
BOUNDARY = re.compile(r"(?<=\S)(?=[ \n\t\r])|(?<=[，、。；！？])(?=[ぁ-ゖァ-ヺ一-鿿])")
# What a tokenizer is made of that allows it: a part that never joins what is on both sides, and
# what may have changed characters before. ByteLevel makes tokens of white space, whose runs grow
# where what stands between them is stripped.
FORMS = {"Lowercase", "NFC", "NFD", "NFKC", "NFKD"}
STRIPPING = FORMS | {"BertNormalizer", "StripAccents"}
SPLITTING = {"BertPreTokenizer": STRIPPING, "Whitespace": STRIPPING, "ByteLevel": FORMS}
# Characters that are taken for a token at first, less than English has (4.6); then as many as the
# text had so far, times MORE; and to spare.
CHARACTERS, MORE, SPARE = 4, 1.1, 15
# Of the ids and rows that are made of a text. Another one makes cached and prepared rows anew.
VERSION = 1


def encode(documents, args: DataArguments, tokenizer):
    """Documents as rows: `input_ids`, and with `pack` the `lengths` of the documents in them.

    Rows have at most max_seq_length tokens, and are in the order of the documents.
    """
    function = functools.partial(
        encode_batch, encoder=Encoder(tokenizer, args), column=args.text_column
    )
    options = {"batched": True, "remove_columns": column_names(documents)}
    options["features"] = features(tokenizer, args)
    if is_stream(documents):
        return documents.map(function, batch_size=OF_STREAM, **options)
    options |= parallel(documents, args.preprocessing_num_workers)
    rows = documents.map(function, batch_size=DOCUMENTS, desc="Tokenizing", **options)
    check_not_empty(rows, args)
    return rows


def check_not_empty(rows, args: DataArguments):
    if not len(rows):
        raise ValueError(
            f"{args.source()}: no text is left for training or for evaluation; give more of it, a "
            f"--validation_file, or another --validation_split than {args.validation_split:g}"
        )


def features(tokenizer, args: DataArguments) -> datasets.Features:
    """The columns of `encode`'s rows: two bytes a token, where the vocabulary allows."""
    id_type = datasets.Value(id_dtype(tokenizer).__name__)
    columns = {"input_ids": id_type} | ({"lengths": datasets.Value("int32")} if args.pack else {})
    return datasets.Features({name: datasets.Sequence(x) for name, x in columns.items()})


def id_dtype(tokenizer) -> type:
    return np.uint16 if largest_id(tokenizer) < 2**16 else np.int32


def encode_batch(batch: dict, encoder: "Encoder", column: str) -> dict[str, list[np.ndarray]]:
    """Columns of `encode`'s rows. Packed, documents longer than a row go on in another."""
    pieces = encoder(batch[column])
    if not encoder.packs:
        return {"input_ids": pieces}
    rows = pack(pieces, encoder.capacity)
    return {
        "input_ids": [np.concatenate(row) for row in rows],
        "lengths": [np.array([len(piece) for piece in row], np.int32) for row in rows],
    }


class Encoder:
    """Ids of texts, to the bit those of `tokenizer(texts, truncation=True, max_length=capacity)`,
    for packed rows with `return_overflowing_tokens=True`.

    Where rows are cut, it tokenizes of a text no more than it takes to fill one: a beginning, and
    what is missing then. Texts without a BOUNDARY, and those of other tokenizers than `can_be_cut`
    knows, are tokenized whole.

    Args:
        tokenizer: a fast one.
        args: max_seq_length, the capacity of a row in tokens, and pack.
    """

    def __init__(self, tokenizer, args: DataArguments):
        self.capacity, self.packs, self.version = args.max_seq_length, args.pack, VERSION
        self.dtype = id_dtype(tokenizer)
        # A copy: the library keeps in a tokenizer how it last cut and padded.
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_padding()
        self.backend.no_truncation()
        frame = frame_of(self.backend)
        self.cuts = frame is not None and not self.packs and can_be_cut(self.backend)
        if self.cuts:
            self.before, self.behind = (np.array(ids, self.dtype) for ids in frame)
            self.room = self.capacity - len(self.before) - len(self.behind)
            self.cuts = self.room > 0 and tokenizer.truncation_side == "right"
        self.backend.enable_truncation(self.capacity, direction=tokenizer.truncation_side)
        self.splits_special_tokens = tokenizer.split_special_tokens

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """(tokens,) for each text, or for each piece of it where rows are packed."""
        # Lost where a tokenizer is copied, or sent to another process.
        self.backend.encode_special_tokens = self.splits_special_tokens
        encode = self.beginnings if self.cuts else self.pieces
        return [ids for i in range(0, len(texts), TEXTS) for ids in encode(texts[i : i + TEXTS])]

    def pieces(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.backend.encode_batch_fast(texts)
        pieces = ((x, *x.overflowing) if self.packs else (x,) for x in encoded)
        return [np.array(x.ids, self.dtype) for of_text in pieces for x in of_text]

    def beginnings(self, texts: list[str]) -> list[np.ndarray]:
        ids = [np.empty(0, self.dtype)] * len(texts)
        read, todo = [0] * len(texts), range(len(texts))
        while todo:
            parts = []
            for i in todo:
                each = MORE * read[i] / len(ids[i]) if len(ids[i]) else CHARACTERS
                wanted = read[i] + SPARE + int(each * (self.room - len(ids[i])))
                boundary = BOUNDARY.search(texts[i], wanted)
                end = boundary.start() if boundary else len(texts[i])
                parts.append(texts[i][read[i] : end])
                read[i] = end
            encoded = self.backend.encode_batch_fast(parts, add_special_tokens=False)
            for i, part in zip(todo, encoded, strict=True):
                ids[i] = np.concatenate([ids[i], np.array(part.ids, self.dtype)])
            todo = [i for i in todo if len(ids[i]) < self.room and read[i] < len(texts[i])]
        return [np.concatenate([self.before, x[: self.room], self.behind]) for x in ids]


def frame_of(backend) -> tuple[list[int], list[int]] | None:
    """Ids before and behind those of a text, as [CLS] and [SEP]; None: the template is another."""
    (framed, text), (two_framed, two) = (
        [backend.encode(x, add_special_tokens=special).ids for special in (True, False)]
        for x in ("a", "a a")
    )
    n = next((i for i in range(len(framed)) if framed[i : i + len(text)] == text), 0)
    before, behind = framed[:n], framed[n + len(text) :]
    return (before, behind) if text and two_framed == before + two + behind else None


def can_be_cut(backend) -> bool:
    """Whether a text has the ids of its parts, cut at a BOUNDARY."""
    of = json.loads(backend.to_str())
    splits, changes = of["pre_tokenizer"] or {"type": None}, of["normalizer"]
    changes = [] if changes is None else changes.get("normalizers", [changes])
    return (
        splits["type"] in SPLITTING
        and all(x["type"] in SPLITTING[splits["type"]] for x in changes)
        and splits.get("use_regex", True)
        and not splits.get("add_prefix_space")
        # Tokens that are found before a text is split may reach over white space, by themselves or
        # once they are normalized.
        and not any(
            x["rstrip"] or x["normalized"] or BOUNDARY.search(x["content"])
            for x in of["added_tokens"]
        )
    )


def pack(pieces: list[np.ndarray], capacity: int) -> list[list[np.ndarray]]:
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
