# SPDX-License-Identifier: Apache-2.0
"""Texts, or pairs of texts, with labels: GLUE from the Hub or a folder, and files of one's own.

Everything that a row can lack is found here, before any training, and named with its row.
"""

import glob
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import datasets

from mosaic_tools.corpus import FORMATS, parallel
from mosaic_tools.glue_tasks import GLUE, TASKS, Task
from mosaic_tools.recipe import check_range, option

ROW_FORMATS = {suffix: kind for suffix, kind in FORMATS.items() if kind != "text"}
# The task of files, and of the folder that its results are in.
OWN = "own"


@dataclass
class LabelledDataArguments:
    """GLUE tasks, or files."""

    _argument_group_name = "data"

    task: list[str] | None = option(None, f"all, or some of {', '.join(TASKS)}")
    data_dir: str | None = option(
        None, "folder with TASK/train.jsonl and TASK/dev.jsonl; None: the Hub's " + GLUE
    )
    train_file: str | None = option(None, ".csv, .json(l) or .parquet, in place of a task")
    validation_file: str | None = option(None, "as train_file")
    text_columns: list[str] | None = option(None, "one or two; None: those that hold text")
    label_column: str = "label"
    problem: Literal["classification", "regression"] | None = option(
        None, "of files; None: regression if the labels are floats"
    )
    max_seq_length: int = option(256, "tokens of a text or pair together; the rest is cut off")

    def __post_init__(self):
        if bool(self.task) == bool(self.train_file):
            raise ValueError(f"give either --task (all, {', '.join(TASKS)}) or --train_file")
        if bool(self.train_file) != bool(self.validation_file):
            raise ValueError("give both --train_file and --validation_file")
        if unknown := sorted(set(self.task or []) - {"all", *TASKS}):
            raise ValueError(f"unknown --task {', '.join(unknown)}: all, or {', '.join(TASKS)}")
        of_files = (
            *(("text_columns", self.text_columns), ("problem", self.problem)),
            ("label_column", self.label_column != "label"),
        )
        if self.task and (given := [f"--{name}" for name, value in of_files if value]):
            raise ValueError(
                f"leave out {', '.join(given)}, or give --train_file: a task has its own columns"
            )
        if self.train_file and self.data_dir:
            raise ValueError(
                f"leave out --data_dir {self.data_dir}, or give --task: --train_file is a path"
            )
        columns = self.text_columns or []
        if len(columns) > 2:
            raise ValueError(f"--text_columns are one or two, got {', '.join(columns)}")
        # A text twice tells no more than once, and a label as text tells the label.
        if len({*columns, self.label_column}) <= len(columns):
            raise ValueError(
                f"--text_columns {' '.join(columns)} and --label_column {self.label_column} must "
                "all differ"
            )
        check_range(self, "max_seq_length", least=3)

    def names(self) -> list[str]:
        """Tasks in the order of TASKS, MNLI first, since others start from its model."""
        if self.train_file:
            return [OWN]
        return [name for name in TASKS if name in self.task or "all" in self.task]


@dataclass
class Part:
    """Rows of a split, and their labels: names, or floats for regression."""

    rows: datasets.Dataset
    labels: list[str] | list[float]


def load_task(name: str, args: LabelledDataArguments) -> tuple[Task, dict[str, Part], str]:
    """(task, its parts, what tells this data from other data).

    The parts are "train" and those named in the task's `validation`.

    Raises:
        ValueError: a file or a column is not there, a part has no rows, a text or a label is
            missing, there is one label only, or training has none of a label of validation.
    """
    if name in TASKS:
        task, label_column = TASKS[name], "label"
        files = glue_files(name, task, args.data_dir)
    else:
        task, label_column = Task(Path(args.train_file).stem), args.label_column
        files = {"train": Path(args.train_file), "validation": Path(args.validation_file)}
    if files:
        read = {split: (str(file), read_rows(file)) for split, file in files.items()}
        source = fingerprint(files.values())
    else:
        source = f"{GLUE} {name}"
        found = hub_rows(name)
        read = {x: (f"{source}, {x}", found[x]) for x in ("train", *task.validation.values())}
    if name not in TASKS:
        task = own_task(task, *read["train"], args)
    parts = {}
    for split, (where, rows) in read.items():
        check_columns(where, rows, (*task.columns, label_column))
        check_texts(where, rows, task.columns, blank=name in TASKS)
        values = known_values(where, rows, label_column)
        if name in TASKS and task.labels:
            names = dict(enumerate(task.labels))
            values = [names.get(value, value) for value in values]
        parts[split] = Part(rows, as_labels(where, values, task))
        if split == "train" and len(found := set(parts[split].labels)) == 1:
            raise ValueError(
                f"{where} has the label {found.pop()} only: there is nothing to tell apart"
            )
    return task, parts, source


def describe(task: Task, parts: dict[str, Part]) -> str:
    """What is read of which rows."""
    kind = f"labels {', '.join(task.labels)}" if task.labels else "scores"
    sizes = (f"{len(part.rows):,} rows for {split}" for split, part in parts.items())
    return f"{task.title}: {' with '.join(task.columns)}; {kind}; {', '.join(sizes)}"


def own_task(task: Task, where: str, rows, args: LabelledDataArguments) -> Task:
    """What files ask for, from the training rows."""
    check_columns(where, rows, (args.label_column, *(args.text_columns or [])))
    columns = args.text_columns or [
        name
        for name, feature in rows.features.items()
        if name != args.label_column and getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if len(columns) not in (1, 2):
        raise ValueError(
            f"{where} has {len(columns)} columns of text ({', '.join(columns)}): name one or two "
            "by --text_columns"
        )
    values = known_values(where, rows, args.label_column)
    kind = str if isinstance(values[0], str) else (int, float)
    for number, value in enumerate(values, 1):
        if not isinstance(value, kind):
            raise ValueError(
                f"{where}, row {number}: the label is {value!r}, expected one name a row, or one "
                "number, all of a kind"
            )
    problem = args.problem
    if problem is None:
        problem = "regression" if isinstance(values[0], float) else "classification"
    if problem == "regression":
        return replace(task, columns=tuple(columns), labels=None, score=("spearman",))
    labels = tuple(map(str, sorted(set(values))))
    return replace(task, columns=tuple(columns), labels=labels)


# ---- reading ----


def hub_rows(name: str):
    try:
        return datasets.load_dataset(GLUE, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{GLUE} {name} cannot be had from the Hub ({error}): give --data_dir, a folder "
            f"with {name}/train.jsonl and {name}/dev.jsonl"
        ) from error


def glue_files(name: str, task: Task, data_dir: str | None) -> dict[str, Path]:
    """Files of the splits, which may also be called dev instead of validation; none without a
    folder."""
    if data_dir is None:
        return {}
    files = {}
    for split in ("train", *task.validation.values()):
        stems = (split, split.replace("validation", "dev"))
        paths = [Path(data_dir, name, stem + suffix) for stem in stems for suffix in ROW_FORMATS]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise ValueError(
                f"{Path(data_dir, name)} has no {stems[-1]}.jsonl: choose another --data_dir or "
                "--task"
            )
        files[split] = found[0]
    return files


def read_rows(file: Path) -> datasets.Dataset:
    kind = ROW_FORMATS.get(file.suffix)
    if kind is None:
        raise ValueError(f"{file}: give a .csv, .json, .jsonl or .parquet file")
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty")
    # "null" and "NA" are words.
    options = {"keep_default_na": False} if kind == "csv" else {}
    try:
        # datasets takes names for patterns.
        name = glob.escape(str(file))
        return datasets.load_dataset(kind, data_files=name, split="train", **options)
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"{file} cannot be read as {kind}, or has no rows: {reason}") from error


def fingerprint(files: Iterable[Path]) -> str:
    """Of the files' contents."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


# ---- checks ----


def check_columns(where: str, rows, columns: tuple[str, ...]):
    if not len(rows):
        raise ValueError(f"{where} has no rows")
    if missing := [name for name in columns if name not in rows.column_names]:
        raise ValueError(
            f"{where} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}: "
            "--text_columns and --label_column name those of files"
        )


def check_texts(where: str, rows, columns: tuple[str, ...], blank: bool):
    """ValueError: something is no text, or is blank and may not be, as some of QQP's questions."""
    for name in columns:
        for number, text in enumerate(rows[name], 1):
            if not isinstance(text, str) or not (blank or text.strip()):
                raise ValueError(f"{where}, row {number}: {name} is {text!r}, expected text")


def known_values(where: str, rows: datasets.Dataset, column: str) -> list:
    """The labels of a column, names where it has class ids, which count anew in each file.
    ValueError: one is missing."""
    values, feature = list(rows[column]), rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        # -1 is a label that is not told.
        values = [None if x in (None, -1) else feature.int2str(x) for x in values]
    for number, value in enumerate(values, 1):
        # NaN differs from itself; a CSV's empty cell is "", and its NaN may be text.
        if value is None or value != value or str(value).strip().lower() in ("", "nan"):
            raise ValueError(
                f"{where}, row {number} of {len(values)}: the label is {value!r}; fill it in or "
                "leave the row out"
            )
    return values


def as_labels(where: str, values: list, task: Task) -> list:
    """Names that the task knows, or finite floats."""
    if task.labels is None:
        for number, value in enumerate(values, 1):
            try:
                finite = math.isfinite(float(value))
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise ValueError(
                    f"{where}, row {number}: the label is {value!r}, regression needs a number; or "
                    "is it --problem classification?"
                )
        return [float(value) for value in values]
    names = [str(value) for value in values]
    if unknown := sorted(set(names) - set(task.labels)):
        raise ValueError(
            f"{where} has labels that training does not know: {', '.join(unknown)}; known are "
            f"{', '.join(task.labels)}"
        )
    return names


# ---- encoding ----


def encode(
    part: Part, task: Task, ids: dict[str, int] | None, tokenizer, max_length: int, types: bool
):
    """Rows with `input_ids`, `attention_mask`, `token_type_ids` and `labels`.

    Args:
        ids: of the labels, None for regression.
        max_length: of a row, in tokens; the rest is cut off.
        types: whether the model has token types, which not every tokenizer hands out unasked.
    """

    def tokenize(batch):
        texts = (batch[name] for name in task.columns)
        return tokenizer(
            *texts, truncation=True, max_length=max_length, return_token_type_ids=types
        )

    rows = part.rows.map(
        tokenize, batched=True, remove_columns=part.rows.column_names, **parallel(part.rows)
    )
    labels = [ids[name] for name in part.labels] if ids else part.labels
    return rows.add_column("labels", labels)
