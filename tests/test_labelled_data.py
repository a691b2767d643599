# SPDX-License-Identifier: Apache-2.0
"""labelled_data.py: what is read of rows and labels, and whatever they can lack."""

import datasets
import pytest
from finetuning import write_glue, write_rows

from mosaic_tools import labelled_data
from mosaic_tools.glue_tasks import TASKS
from mosaic_tools.tokenization import load_tokenizer

pytest_plugins = ["finetuning"]


def test_the_second_text_of_a_pair_has_token_type_1(vocab, tmp_path):
    """transformers 5.0 leaves token types out unless asked."""
    (tmp_path / "tokenizer").mkdir()
    load_tokenizer(vocab).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    task, parts, _ = labelled_data.load_task(
        "rte", labelled_data.LabelledDataArguments(task=["rte"], data_dir=str(write_glue(tmp_path)))
    )
    ids = {"entailment": 0, "not_entailment": 1}
    rows = labelled_data.encode(parts["train"], task, ids, tokenizer, 12, True)
    # [CLS] the old man reads [SEP] the old man reads a [SEP]
    assert rows[0]["token_type_ids"] == [0] * 6 + [1] * 6
    assert rows["labels"][:3] == [0, 1, 0]
    rows = labelled_data.encode(parts["train"], task, ids, tokenizer, 12, False)
    assert "token_type_ids" not in rows.column_names


def test_class_ids_are_labels_by_their_names(tmp_path):
    """Each file counts its own: training's anger was validation's joy."""
    texts = ["a", "b", "c", "d"]
    files = {"train_file": ["anger", "joy", "sad", "joy"], "validation_file": ["joy", "sad"] * 2}
    for name, labels in files.items():
        rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
        rows.class_encode_column("label").to_parquet(tmp_path / f"{name}.parquet")
    paths = {name: str(tmp_path / f"{name}.parquet") for name in files}
    args = labelled_data.LabelledDataArguments(**paths)
    task, parts, _ = labelled_data.load_task(args.names()[0], args)
    assert task.labels == ("anger", "joy", "sad")
    assert [part.labels for part in parts.values()] == list(files.values())
    hidden = datasets.Dataset.from_dict(
        {"text": texts, "label": [0, 1, -1, 0]},
        datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(2)}),
    )
    hidden.to_parquet(tmp_path / "validation_file.parquet")
    with pytest.raises(ValueError, match="row 3 of 4: the label is None"):
        labelled_data.load_task(args.names()[0], args)


def own_files(tmp_path, train: str, validation: str | None = None, suffix="csv") -> dict:
    """Files with this text, validation as training unless given."""
    files = [tmp_path / f"{split}.{suffix}" for split in ("train", "dev")]
    for file, text in zip(files, (train, validation or train), strict=True):
        file.write_text(text)
    return {"train_file": str(files[0]), "validation_file": str(files[1])}


GOOD = "text,label\na man,x\na woman,y\n"


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("", {}, r"train.csv is empty"),
        ("text,label\n", {}, r"train.csv cannot be read as csv, or has no rows"),
        ("text,class\na man,x\n", {}, r"no column label, only text, class: .*--label_column"),
        (GOOD, {"text_columns": ["body"]}, r"no column body, only text, label"),
        ("a,b,c,label\np,q,r,x\n", {}, r"3 columns of text \(a, b, c\): .*--text_columns"),
        ("id,label\n1,x\n", {}, r"0 columns of text"),
        ("text,label\na man,x\na woman,\n", {}, r"row 2 of 2: the label is ''; fill it in"),
        ("text,label\na man,0.5\na woman,nan\n", {}, r"row 2 of 2: the label is '?nan'?; fill"),
        ("text,label\na man,x\na woman,x\n", {}, r"has the label x only"),
        ("text,label\na man,x\n", {"problem": "regression"}, r"row 1: the label is 'x'"),
        ("text,label\na man,inf\n", {"problem": "regression"}, r"row 1: the label is inf"),
        ('{"text": null, "label": 1}\n{"text": "a", "label": 0}', {}, r"row 1: text is None"),
        ("text,label\na man,x\n ,y\n", {}, r"row 2: text is ' ', expected text"),
        ('{"text": "a man", "label": [1, 2]}', {}, r"the label is \[1, 2\], expected one"),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}',
            {},
            r"row 2: the label is 1, expected one|cannot be read as json",
        ),
        ('{"text": "a man", "label": null}', {}, r"row 1 of 1: the label is None"),
        ('{"text": "a man", "label": NaN}', {}, r"row 1 of 1: the label is nan"),
        ('{"text": ', {}, r"cannot be read as json"),
    ],
)
def test_rows_that_lack_something_are_named(tmp_path, text, values, message):
    suffix = "jsonl" if text.startswith("{") else "csv"
    files = own_files(tmp_path, text, suffix=suffix)
    args = labelled_data.LabelledDataArguments(**files, **values)
    with pytest.raises(ValueError, match=message):
        labelled_data.load_task("own", args)


def test_columns_are_found_or_named_in_any_format(tmp_path):
    rows = {"id": [1, 2], "body": ["a man", "a woman"], "kind": ["x", "y"], "label": ["p", "q"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "rows.parquet"))
    args = labelled_data.LabelledDataArguments(**files, label_column="kind", text_columns=["body"])
    task, parts, _ = labelled_data.load_task("own", args)
    assert task.columns == ("body",) and parts["train"].labels == ["x", "y"]
    # A pair, as far as can be told: the line says so before anything is trained.
    task, parts, _ = labelled_data.load_task("own", labelled_data.LabelledDataArguments(**files))
    said = "rows: body with kind; labels p, q; 2 rows for train, 2 rows for validation"
    assert labelled_data.describe(task, parts) == said


def test_a_label_that_training_has_not_is_named(tmp_path):
    files = own_files(tmp_path, GOOD, GOOD + "a child,z\n")
    with pytest.raises(ValueError, match=r"dev.csv has labels .* not know: z; known are x, y"):
        labelled_data.load_task("own", labelled_data.LabelledDataArguments(**files))


def test_words_that_look_like_missing_values_are_text(tmp_path):
    files = own_files(tmp_path, "text,label\nnull,NA\nNA,None\n")
    args = labelled_data.LabelledDataArguments(**files)
    task, parts, _ = labelled_data.load_task("own", args)
    assert task.labels == ("NA", "None") and list(parts["train"].rows["text"]) == ["null", "NA"]


def test_numbers_are_classes_in_their_order(tmp_path):
    rows = "".join(f"w{i},{i}\n" for i in (10, 9, 2))
    args = labelled_data.LabelledDataArguments(**own_files(tmp_path, "text,label\n" + rows))
    assert labelled_data.load_task("own", args)[0].labels == ("2", "9", "10")


def test_hidden_labels_of_glue_are_refused(tmp_path):
    """The test sets' labels are -1."""
    file = write_glue(tmp_path) / "cola" / "dev.jsonl"
    write_rows(file, [{"sentence": "a man", "label": -1}])
    args = labelled_data.LabelledDataArguments(task=["cola"], data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"not know: -1; known are unacceptable, acceptable"):
        labelled_data.load_task("cola", args)


def test_a_column_that_a_task_needs_is_named(tmp_path):
    write_rows(write_glue(tmp_path) / "rte" / "dev.jsonl", [{"sentence1": "a man", "label": 0}])
    args = labelled_data.LabelledDataArguments(task=["rte"], data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"dev.jsonl has no column sentence2, only sentence1"):
        labelled_data.load_task("rte", args)


def test_a_text_beside_the_rows_of_a_task_is_passed_over(tmp_path):
    (write_glue(tmp_path) / "cola" / "train.txt").write_text("a man\n")
    args = labelled_data.LabelledDataArguments(task=["cola"], data_dir=str(tmp_path))
    assert len(labelled_data.load_task("cola", args)[1]["train"].rows) == 12


def test_a_task_that_is_not_in_the_folder_is_named(tmp_path):
    args = labelled_data.LabelledDataArguments(task=["all"], data_dir=str(write_glue(tmp_path)))
    assert args.names() == list(TASKS)
    with pytest.raises(ValueError, match=r"qqp has no dev.jsonl|qqp has no train.jsonl"):
        labelled_data.load_task("qqp", args)


def test_glue_without_a_network_asks_for_a_folder():
    args = labelled_data.LabelledDataArguments(task=["rte"])
    with pytest.raises(ValueError, match=r"nyu-mll/glue rte cannot be had .*give --data_dir"):
        labelled_data.load_task("rte", args)
