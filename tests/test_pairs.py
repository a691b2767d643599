# SPDX-License-Identifier: Apache-2.0
"""pairs.py: which columns are read, what is held out, and what is refused before any training."""

import json

import datasets
import pytest

from mosaic_tools import embedded_text
from mosaic_tools.pairs import (
    PairArguments,
    as_pairs,
    load_pairs,
    load_sources,
    seen_in_training,
)

PAIRS = [{"anchor": f"anchor {i}", "positive": f"positive {i}"} for i in range(20)]


def rows_of(**columns):
    return datasets.Dataset.from_dict(columns)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ("anchor positive", "anchor positive"),
        ("id answer question", "question answer"),
        ("positive Query negative", "Query positive negative"),
        ("negative_1 negative_2 passage query", "query passage negative_1 negative_2"),
        # By order.
        ("title text", "title text"),
    ],
)
def test_columns_are_known_by_name_or_else_by_order(columns, read):
    rows = rows_of(**{name: [f"{name} {i}" for i in range(2)] for name in columns.split()})
    found, read = as_pairs("data", rows), read.split()
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(1, len(read) - 1))]
    # Losses read them in this order.
    assert found.column_names == names
    assert found[1] == dict(zip(names, (f"{name} 1" for name in read), strict=True))


@pytest.mark.parametrize("columns", ["sentence1 sentence2 score", "label left right"])
def test_scored_pairs_have_two_texts_and_a_number(columns):
    columns = columns.split()
    values = {x: ["0.5", "1"] if x in ("score", "label") else [f"{x} 0", f"{x} 1"] for x in columns}
    found = as_pairs("data", rows_of(**values))
    assert found.column_names == ["sentence1", "sentence2", "score"]
    assert found["score"][:] == [0.5, 1.0]
    assert found["sentence1"][1] == "sentence1 1" or found["sentence1"][1] == "left 1"


@pytest.mark.parametrize(
    "columns",
    [
        "text",
        "query question answer",
        "anchor text",
        "a b number",
        "anchor negative",
        "id title text",
    ],
)
def test_columns_that_cannot_be_told_apart_are_refused(columns):
    names = columns.split()
    rows = rows_of(**{x: [1, 2] if x == "number" else ["some", "text"] for x in names})
    with pytest.raises(ValueError, match=f"{', '.join(names)}, which cannot be told apart: call"):
        as_pairs("data", rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": " "}, "train.jsonl, row 4: positive is ' ', expected text"),
        ({"anchor": None}, "train.jsonl, row 4: anchor is None, expected text"),
        ({"negative": "positive 3"}, "row 4: negative_1 is the positive, 'positive 3': leave"),
        ({"negative": "anchor 3"}, "row 4: negative_1 is the anchor, 'anchor 3': leave"),
        ({"score": 4.5}, "row 4: the score is 4.5, expected a number between -1 and 1.*divide"),
        ({"score": None}, "row 4: the score is None, expected a number"),
    ],
)
def test_a_row_that_lacks_something_is_named(change, message, tmp_path):
    rest = {} if "score" in change else {"negative": "another"}
    rest |= {"score": 0.5} if "score" in change else {}
    rows = [x | rest | (change if i == 3 else {}) for i, x in enumerate(PAIRS)]
    file = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_pairs(PairArguments(train_file=[file], validation_split=30))


def test_classes_are_no_scores():
    """Entailment, class 0 of two, was the least alike."""
    rows = rows_of(sentence1=["a", "b"], sentence2=["c", "d"], label=[0, 1])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["entailment", "other"]))
    with pytest.raises(ValueError, match="label has the classes entailment, other, which are no"):
        as_pairs("data", rows)


def test_what_columns_are_taken_for_is_printed(capsys):
    as_pairs("data", rows_of(title=["a", "b"], text=["c", "d"]))
    assert capsys.readouterr().out == "data: anchor is 'title', positive is 'text'\n"
    as_pairs("data", rows_of(anchor=["a", "b"], positive=["c", "d"]))
    assert capsys.readouterr().out == ""


def test_a_hub_datasets_other_parts_are_not_read(monkeypatch):
    parts = {
        "train": rows_of(query=["a", "b"], answer=["c", "d"]),
        "test": rows_of(query=["", "x"]),
    }
    parts["validation"] = rows_of(query=["e", "f"], answer=["g", "d"])
    monkeypatch.setattr("datasets.load_dataset", lambda *_: parts)
    train, held_out = load_pairs(PairArguments(dataset_name="org/name"))
    assert train["hub"]["anchor"][:] == ["a", "b"] and held_out["validation"]["positive"][0] == "g"
    # Of e, f, g and d.
    assert seen_in_training(train, held_out) == (1, 4)
    del parts["train"]
    with pytest.raises(ValueError, match="org/name has test, validation, but no train part"):
        load_pairs(PairArguments(dataset_name="org/name"))


def test_files_of_both_kinds_of_text_and_with_brackets_are_read(tmp_path):
    kinds = {"a": "string", "b": "large_string"}
    for name, kind in kinds.items():
        features = datasets.Features({x: datasets.Value(kind) for x in ("anchor", "positive")})
        datasets.Dataset.from_list(PAIRS, features=features).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    rows = load_sources([str(tmp_path / "*.parquet")])
    assert len(rows["1__"]) == 40
    file = write(tmp_path / "train[1].jsonl", PAIRS)
    assert len(load_sources([file])["1_train_1_"]) == 20


def test_data_that_teaches_nothing_is_refused(tmp_path):
    held_out = [write(tmp_path / "held_out.jsonl", PAIRS)]

    def load(rows):
        files = [write(tmp_path / "train.jsonl", rows)]
        return load_pairs(PairArguments(train_file=files, validation_file=held_out))

    with pytest.raises(ValueError, match="1_train has 1 pair to train on: at least two are needed"):
        load(PAIRS[:1])
    with pytest.raises(ValueError, match="1_train: positive is 'same' in every row"):
        load([x | {"positive": "same"} for x in PAIRS])
    with pytest.raises(ValueError, match="1_train: score is 1.0 in every row"):
        load([x | {"score": 1} for x in PAIRS])
    with pytest.raises(ValueError, match="there is no file"):
        load_pairs(PairArguments(train_file=[str(tmp_path / "*.csv")]))
    with pytest.raises(ValueError, match="fewer than two pairs are held out"):
        load_pairs(PairArguments(train_file=held_out, validation_split=0.01))


def test_each_pattern_is_a_source(tmp_path):
    for i in range(2):
        write(tmp_path / f"part-{i}.jsonl", [x | {"id": i} for x in PAIRS])
    datasets.Dataset.from_list(PAIRS).to_parquet(tmp_path / "own.parquet")
    datasets.Dataset.from_list(PAIRS[:10]).to_csv(tmp_path / "null.csv")
    files = [str(tmp_path / x) for x in ("part-?.jsonl", "own.parquet", "null.csv")]
    train, held_out = load_pairs(PairArguments(train_file=files, validation_file=files[:1]))
    assert [len(x) for x in train.values()] == [40, 20, 10]
    assert [len(x) for x in held_out.values()] == [40]
    assert list(train) == ["1_part_", "2_own", "3_null"]
    write(tmp_path / "part-1.jsonl", [x | {"score": 1} for x in PAIRS])
    with pytest.raises(ValueError, match="its files differ in kind"):
        load_pairs(PairArguments(train_file=files))


def test_no_anchor_is_held_out_and_trained_on(tmp_path):
    rows = [x | {"positive": f"{x['positive']} {i}"} for x in PAIRS * 3 for i in range(2)]
    file = write(tmp_path / "train.jsonl", rows)
    train, held_out = load_pairs(PairArguments(train_file=[file], validation_split=30))
    sides = set(train["1_train"]["anchor"]), set(held_out["1_train"]["anchor"])
    assert len(sides[0]) > 2 and len(sides[1]) > 2 and sides[0].isdisjoint(sides[1])
    few = PairArguments(train_file=[file], validation_split=30, max_eval_pairs=2)
    assert len(load_pairs(few)[1]["1_train"]) == 2


def test_docstrings_are_pairs_of_summary_and_body(monkeypatch):
    body = "Eight words make a body, shorter is none."
    docs = [f"One line here.\n\n{body}\n", f"Two\nlines here.\n\n{body} Or more.", "Short.\n\nToo."]
    files = {"json/decoder.py": [*docs, docs[0]]}
    monkeypatch.setattr(embedded_text, "documents", lambda: files)
    monkeypatch.setattr(embedded_text, "sentences_in_context", lambda text: [])
    assert embedded_text.embedded_pairs() == ([("One line here.", body)], [])


def test_sentences_are_pairs_with_the_words_around_them():
    text = "One two. Three four? Not e.g. this one! Five."
    assert embedded_text.sentences_in_context(text, length=4) == [
        ("One two.", "Three four?"),
        ("Three four?", "One two. Not e.g."),
        ("Not e.g. this one!", "Three four? Five."),
        ("Five.", "this one!"),
    ]


def test_no_held_out_text_is_a_part_of_training():
    """A sentence, or the words around one, held a summary that a held-out file has too."""
    train, held_out = load_pairs(PairArguments())
    train, held_out = train["python"], held_out["python"]
    assert len(train) > 10_000 and len(held_out) > 50
    kept = [*held_out["anchor"], *held_out["positive"]]
    assert len(set(kept)) == len(kept)
    pairs = list(zip(train["anchor"], train["positive"], strict=True))
    assert len(set(pairs)) == len(pairs)
    everything = "\n".join(text for pair in pairs for text in pair)
    assert not [text for text in kept if text in everything]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_file": ["a"], "dataset_name": "b"}, "train_file or dataset_name .b., not both"),
        ({"validation_file": ["a"]}, "needs a train_file"),
        ({"validation_split": 0}, "validation_split is a percentage, got 0"),
        ({"max_seq_length": 2}, "max_seq_length must be at least 3, got 2"),
        ({"mine_hard_negatives": -1}, "mine_hard_negatives is -1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PairArguments(**values)
