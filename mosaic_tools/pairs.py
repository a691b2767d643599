# SPDX-License-Identifier: Apache-2.0
"""Texts to train embeddings on: pairs, pairs with hard negatives, and scored pairs, from files and
from the Hub. Without data, text that Python carries.

Everything that a row can lack is found here, before any training, and named with its row.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from mosaic_tools.corpus import first_rows, matching_files, split
from mosaic_tools.embedded_text import embedded_pairs
from mosaic_tools.family import say
from mosaic_tools.labelled_data import check_texts, read_rows
from mosaic_tools.recipe import SourceOfText, check_range, option

# Usual names of columns, in lower case.
FIRST = {"anchor", "query", "question", "sentence1", "sentence_1", "sentence_a", "text1", "text_1"}
SECOND = {
    *("positive", "answer", "document", "passage", "response"),
    *("sentence2", "sentence_2", "sentence_b", "text2", "text_2"),
}
SCORE = {"score", "scores", "label", "labels", "similarity"}
# The columns of every source, which losses read in this order.
PAIR = ("anchor", "positive")
SCORED = ("sentence1", "sentence2", "score")


@dataclass
class PairArguments(SourceOfText):
    """Pairs of texts that belong together; several sources, each batch from one of them."""

    _argument_group_name = "data"

    train_file: list[str] | None = option(
        None, "files or glob patterns: .csv, .json(l), .parquet; each word is a source of its own"
    )
    validation_file: list[str] | None = option(None, "as train_file")
    dataset_name: str | None = option(None, "Hub dataset, in place of train_file")
    dataset_config_name: str | None = None
    validation_split: float = option(5.0, "per cent held out if the data has no validation part")
    max_eval_pairs: int = option(2000, "pairs of a source that an evaluation reads at most")
    max_seq_length: int = option(512, "tokens of a text; the rest is cut off")
    query_prompt: str | None = option(
        None,
        "put before each anchor, as 'query: ', and saved with the model; None: as the model has it",
    )
    document_prompt: str | None = option(
        None, "put before each positive and negative, and saved; None: as the model has it"
    )
    mine_hard_negatives: int = option(
        0, "texts of other pairs, the nearest to the anchor, that each pair gets as negatives"
    )

    def __post_init__(self):
        self.check_source()
        check_range(self, "max_seq_length", least=3)
        check_range(self, "max_eval_pairs", least=2)
        if self.mine_hard_negatives < 0:
            raise ValueError(f"mine_hard_negatives is {self.mine_hard_negatives}: give 1 or more")

    def source(self) -> str:
        """Where the pairs come from, in words."""
        return self.named_source() or "text that CPython carries"

    def prompts(self) -> dict[str, str]:
        """Those given, by the names that sentence-transformers knows."""
        given = {"query": self.query_prompt, "document": self.document_prompt}
        return {name: text for name, text in given.items() if text is not None}


def is_scored(rows: datasets.Dataset) -> bool:
    return "score" in rows.column_names


def load_pairs(args: PairArguments) -> tuple[dict, dict]:
    """(training, held-out) rows of each source, by its name. The columns are anchor, positive and
    negative_1, negative_2, ..., or sentence1, sentence2 and score.

    Raises:
        ValueError: data is missing or cannot be used; it says which and why.
    """
    if args.train_file:
        train, held_out = load_sources(args.train_file), {}
    elif args.dataset_name:
        parts = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        if "train" not in parts:
            raise ValueError(f"{args.dataset_name} has {', '.join(parts)}, but no train part")
        read = {
            x: as_pairs(f"{args.dataset_name}, {x}", parts[x])
            for x in ("train", "validation")
            if x in parts
        }
        train = {"hub": read.pop("train")}
        held_out = read
    else:
        pairs = (dict(zip(PAIR, zip(*x, strict=True), strict=True)) for x in embedded_pairs())
        train, held_out = ({"python": datasets.Dataset.from_dict(x)} for x in pairs)
    if args.validation_file:
        held_out = load_sources(args.validation_file)
    if not held_out:
        percent, whole = args.validation_split, train
        # By the first text, so that no anchor is on both sides.
        parts = {name: split(x, x.column_names[0], percent) for name, x in whole.items()}
        train = {name: kept for name, (kept, _) in parts.items()}
        held_out = {name: x for name, (_, x) in parts.items() if len(x)}
    for name, rows in train.items():
        check_training(name, rows)
    if not sum(map(len, held_out.values())) > 1:
        raise ValueError(
            "fewer than two pairs are held out, which leaves nothing to rank: give a "
            f"--validation_file, or a --validation_split above {args.validation_split:g}"
        )
    return train, {name: first_rows(x, args.max_eval_pairs) for name, x in held_out.items()}


def load_sources(patterns: list[str]) -> dict[str, datasets.Dataset]:
    """The rows of each pattern's files together, by a name made of the pattern."""
    sources = {}
    for pattern in patterns:
        files = matching_files(pattern)
        parts = [as_pairs(file, read_rows(Path(file))) for file in files]
        kinds = {tuple(x.column_names) for x in parts}
        if len(kinds) > 1:
            found = "; ".join(", ".join(x) for x in sorted(kinds))
            raise ValueError(f"{pattern}: its files differ in kind ({found}): give them one by one")
        # Losses are modules of these names, which may be no attribute's, as "train", nor have dots.
        name = f"{len(sources) + 1}_" + re.sub(r"\W+", "_", Path(pattern).stem)
        sources[name] = datasets.concatenate_datasets(parts)
    return sources


# ---- columns ----


def as_pairs(where: str, rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the columns of PAIR and negatives, or of SCORED, checked one by one."""
    found = columns_of(where, rows)
    if any(x != y for x, y in found.items()):
        say(f"{where}: {', '.join(f'{y} is {x!r}' for x, y in found.items())}\n")
    rows = rows.select_columns(list(found)).rename_columns(found)
    texts = [name for name in rows.column_names if name != "score"]
    check_texts(where, rows, tuple(texts), blank=False)
    for name in texts:
        # Parquet has two kinds of text, which cannot be put together.
        if rows.features[name] != datasets.Value("string"):
            rows = rows.cast_column(name, datasets.Value("string"))
    if is_scored(rows):
        scores = [as_score(where, number, x) for number, x in enumerate(rows["score"], 1)]
        rows = rows.remove_columns("score").add_column("score", scores)
    for name in texts[2:]:
        for other in PAIR:
            for number, (x, y) in enumerate(zip(rows[name], rows[other], strict=True), 1):
                if x == y:
                    raise ValueError(
                        f"{where}, row {number}: {name} is the {other}, {x[:60]!r}: leave the row "
                        "out, or give it another negative"
                    )
    return rows


def seen_in_training(train: dict, held_out: dict) -> tuple[int, int]:
    """(held-out texts that training has too, held-out texts), of all sources together."""

    def texts(sources):
        return {
            text
            for rows in sources.values()
            for name in rows.column_names
            if name != "score"
            for text in rows[name]
        }

    ours = texts(held_out)
    return len(ours & texts(train)), len(ours)


def columns_of(where: str, rows: datasets.Dataset) -> dict[str, str]:
    """What each column that is read is called here, by usual names or else by order."""
    if not len(rows):
        raise ValueError(f"{where} has no rows")
    names = rows.column_names
    first = [x for x in names if x.lower() in FIRST]
    second = [x for x in names if x.lower() in SECOND]
    negatives = [x for x in names if x.lower().startswith("negative")]
    scores = [x for x in names if x.lower() in SCORE]
    if not (first or second or negatives):
        # By order, where nothing but two texts and maybe a score is there.
        others = [x for x in names if x not in scores]
        kinds = [getattr(rows.features[x], "dtype", "") for x in others]
        if len(others) == 2 and all(kind in ("string", "large_string") for kind in kinds):
            first, second = others[:1], others[1:]
    if (len(first), len(second)) != (1, 1) or len(scores) > 1 or (scores and negatives):
        raise ValueError(
            f"{where} has the columns {', '.join(names)}, which cannot be told apart: call them "
            "anchor, positive, negative_1, negative_2, ..., or sentence1, sentence2, score"
        )
    for x in scores:
        if isinstance(rows.features[x], datasets.ClassLabel):
            raise ValueError(
                f"{where}: {x} has the classes {', '.join(rows.features[x].names)}, which are no "
                "similarity: give a score between -1 and 1, or leave the column out"
            )
    if scores:
        return dict(zip((*first, *second, *scores), SCORED, strict=True))
    called = {x: f"negative_{i}" for i, x in enumerate(negatives, 1)}
    return {first[0]: "anchor", second[0]: "positive"} | called


def as_score(where: str, number: int, value) -> float:
    """A row's score. ValueError: it is none."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if not -1 <= score <= 1:
        raise ValueError(
            f"{where}, row {number}: the score is {value!r}, expected a number between -1 and 1, "
            "as a cosine: divide scores of 0 to 5 by 5, and leave out labels that are no scores"
        )
    return score


def check_training(where: str, rows: datasets.Dataset):
    """ValueError: nothing can be learnt from these rows."""
    if len(rows) < 2:
        raise ValueError(
            f"{where} has {len(rows)} pair to train on: at least two are needed, since each has "
            "the others for comparison"
        )
    column = rows.column_names[-1] if is_scored(rows) else "positive"
    if len(set(rows[column])) == 1:
        raise ValueError(
            f"{where}: {column} is {rows[0][column]!r} in every row: nothing tells them apart"
        )
