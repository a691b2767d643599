# SPDX-License-Identifier: Apache-2.0
"""Prepared folders: what is in one, how it is made by several processes, machines and attempts, and
what training refuses."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path

import datasets
import pytest
from training import DOCUMENTS, ROOT, command_of, wait_until, write_vocab

from mosaic_tools import corpus, encoding, prepared, preparing
from mosaic_tools.encoding import encode
from mosaic_tools.prepared import load_prepared, shard_files
from mosaic_tools.preparing import PreparingArguments, prepare
from mosaic_tools.recipe import DataArguments, TokenizerArguments
from mosaic_tools.rows import size

SHARDS = 5
TEXTS = [f"{text} {i}" for i in range(3) for text in DOCUMENTS]


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Arguments to prepare a text in five shards, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(TEXTS))
    write_vocab(Path("vocab.txt"), *{word for text in TEXTS for word in text.split()})
    Path("long.txt").write_text("\n".join(f"{' '.join(TEXTS[:20])} {i}" for i in range(2000)))
    monkeypatch.setattr(preparing, "FEWEST", 40)
    return DataArguments(
        train_file=["text.txt"], validation_split=15, max_seq_length=8, prepared_data="rows"
    )


def make(args, part=(1, 1), name="vocab.txt", **values):
    args = dataclasses.replace(args, **values)
    return prepare(args, TokenizerArguments(), name, part)


def load(args, **values):
    return load_prepared(dataclasses.replace(args, **values))


def files(folder="rows", kind="*"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob(f"*.{kind}"))}


@pytest.mark.parametrize("pack", [False, True], ids=["cut", "packed"])
def test_shards_hold_the_rows_of_all_documents_in_order(text, pack, monkeypatch):
    # Of each shard the rows are written in more than one piece.
    monkeypatch.setattr(preparing, "TOKENS", 100)
    monkeypatch.setattr(preparing, "DOCUMENTS", 10)
    said = make(text, pack=pack)
    rows, held_out, tokenizer = load(text, pack=pack)
    train, validation = (
        encode(x, dataclasses.replace(text, pack=pack), tokenizer)
        for x in corpus.load_documents(text)
    )
    assert held_out[:] == validation[:]
    # Packed in tens, the same documents are in other rows.
    ids = [sorted(sum(x["input_ids"], [])) if pack else x["input_ids"][:] for x in (rows, train)]
    assert ids[0] == ids[1]
    tokens = sum(map(len, rows["input_ids"]))
    assert said["train"] == f"{len(rows):,} rows, {tokens:,} tokens" == size(rows)
    assert said["shards"] == SHARDS and len(rows.data["input_ids"].chunks) > SHARDS
    assert rows.features == encoding.features(tokenizer, dataclasses.replace(text, pack=pack))


def test_a_token_takes_two_bytes(text):
    """Beside 4 for each row, and some 600 for each shard."""
    said = make(text, max_seq_length=128, train_file=["long.txt"])
    shards = {name: len(x) for name, x in files(kind="arrow").items() if "train" in name}
    tokens = int(said["train"].split()[2].replace(",", ""))
    assert said["bytes a token"] == round(sum(shards.values()) / tokens, 2)
    assert 2 + 4 / 128 < said["bytes a token"] < 2.2


def test_what_is_not_whole_is_made_again_and_the_rest_left(text):
    make(text)
    before, times = files(), {x: x.stat().st_mtime_ns for x in Path("rows").iterdir()}
    shards = shard_files(Path("rows"), "train", SHARDS)
    shards[0].unlink()
    shards[1].with_suffix(".json").unlink()
    with open(shards[3], "r+b") as file:
        file.truncate(100)
    # Of a process that is gone, and of one that still writes.
    left_over, kept = (Path(f"{shards[3]}.host.{pid}.partial") for pid in (123, 456))
    left_over.touch()
    with open(kept, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make(text)
    assert kept.exists() and not left_over.exists()
    kept.unlink()
    assert files() == before
    changed = {x for x, time in times.items() if x.stat().st_mtime_ns != time}
    assert changed == {y for i in (0, 1, 3) for y in (shards[i], shards[i].with_suffix(".json"))}
    make(text)
    assert changed == {x for x, time in times.items() if x.stat().st_mtime_ns != time}


def test_a_command_that_is_killed_goes_on(text, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "FEWEST", 1000)
    many = "\n".join(f"{text * 6} {i}" for i in range(250) for text in DOCUMENTS)
    Path("text.txt").write_text(many)
    args = DataArguments(train_file=["text.txt"], prepared_data="rows")
    words = ["--train_file", "text.txt", "--tokenizer_name", "vocab.txt", "--prepared_data", "rows"]
    command = command_of(tmp_path, ROOT / "prepare_data.py", *words)
    process = subprocess.Popen(**command, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(files(kind="json")) > 6, process)
    process.kill()
    process.wait()
    # Those of its pool have the same command line.
    pool, clock = f"prepare_data.py {' '.join(words)}", subprocess.Popen(["sleep", "60"])
    wait_until(lambda: not any(pool in x for x in running()), clock)
    clock.kill()
    clock.wait()
    whole = {x: Path("rows", x).stat().st_mtime_ns for x in files(kind="json")}
    assert 6 < len(whole) < 20
    make(args)
    assert whole == {x: Path("rows", x).stat().st_mtime_ns for x in whole}
    make(args, prepared_data="undisturbed")
    assert files() == files("undisturbed")


def running() -> list[str]:
    """Command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text().replace("\0", " "))
    return found


def test_machines_make_a_part_each_and_the_shards_are_put_together(text):
    make(text, prepared_data="alone")
    for i in (1, 2):
        said = make(text, part=(i, 2), prepared_data=f"of-{i}")
        assert said == {"shards": f"{4 - i} of 5"}
    with pytest.raises(ValueError, match="of-2 is not complete.*train-00000-of-00005.*missing"):
        load(text, prepared_data="of-2")
    for path in Path("of-2").glob("train-*"):
        path.rename(Path("of-1", path.name))
    assert files("of-1") == files("alone")
    for mine, expected in zip(
        load(text, prepared_data="of-1")[:2], load(text, prepared_data="alone")[:2], strict=True
    ):
        assert mine[:] == expected[:]


def test_machines_do_not_train_a_tokenizer_each(text):
    with pytest.raises(ValueError, match="need one tokenizer: give --tokenizer_name"):
        make(text, part=(2, 2), name=None)


def test_a_tokenizer_that_was_trained_is_kept(text):
    """No two trainings give the same ids."""
    make(text, name=None)
    before = files()
    (shard, *_) = shard_files(Path("rows"), "train", SHARDS)
    shard.unlink()
    make(text, name=None)
    assert files() == before
    write_vocab(Path("other.txt"), "the")
    with pytest.raises(ValueError, match="rows was begun with another tokenizer than other.txt"):
        make(text, name="other.txt")


def test_files_of_a_stream_are_its_shards(text, monkeypatch):
    """C4 has 1,024. Fewer files than could keep all cores busy are read whole first."""
    for i in range(4):
        Path(f"part-{i}.txt").write_text("\n".join(TEXTS[i::4]))
    values = {"train_file": ["part-?.txt"], "streaming": True}
    read_whole = make(text, **values)
    monkeypatch.setattr(preparing, "SHARDS", 4)
    streamed = make(text, **values, prepared_data="streamed")
    assert (read_whole["shards"], streamed["shards"]) == (SHARDS, 4)
    assert read_whole["train"] == streamed["train"]
    found = [load(text, prepared_data=x) for x in ("rows", "streamed")]
    for one, other in zip(*(x[:2] for x in found), strict=True):
        assert sorted(one["input_ids"]) == sorted(other["input_ids"])


def test_a_process_that_dies_is_told_and_what_is_whole_stays(text, monkeypatch):
    make(text)
    *others, last = shard_files(Path("rows"), "train", SHARDS)
    last.unlink()
    monkeypatch.setattr(preparing, "encode_batch", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="died.*whole stays.*fewer --preprocessing_num_workers"):
        make(text)
    assert all(x.is_file() for x in others) and not last.exists()


def test_a_text_that_cannot_be_read_is_not_called_a_full_disk(text, monkeypatch):
    def broken(*_):
        raise OSError("CRC check failed")

    monkeypatch.setattr(preparing, "encode_batch", broken)
    with pytest.raises(OSError) as e:
        make(text)
    assert "CRC check failed" in str(e.value) and "Make room" not in str(e.value)


def test_after_an_error_no_other_shard_is_begun(text, monkeypatch):
    begun = Path("begun").absolute()

    def broken(*_):
        with open(begun, "a") as file:
            file.write("x")
        raise ValueError("no")

    monkeypatch.setattr(preparing, "encode_batch", broken)
    with pytest.raises(ValueError, match="no"):
        make(text, preprocessing_num_workers=1)
    assert begun.read_text() == "x"


def test_a_folder_that_another_command_begins_meanwhile_has_its_tokenizer(text, monkeypatch):
    """Rows had the ids of the other one that this command trained."""
    choose_tokenizer = preparing.choose_tokenizer

    def slowly(*args):
        monkeypatch.setattr(preparing, "choose_tokenizer", choose_tokenizer)
        make(text, name=None)
        for file in shard_files(Path("rows"), "train", SHARDS):
            file.unlink()
        return choose_tokenizer(*args)

    monkeypatch.setattr(preparing, "choose_tokenizer", slowly)
    make(text, name=None)
    train, _, tokenizer = load(text)
    assert train[:] == encode(corpus.load_documents(text)[0], text, tokenizer)[:]


# ---- what training refuses ----


def change(file: str, **values):
    path = Path("rows", file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tear(file: str):
    path = Path("rows", file)
    path.write_bytes(path.read_bytes()[:-100])


def made_of(**values):
    facts = json.loads(Path("rows", prepared.FACTS).read_text())
    change("train-00002-of-00005.json", made_of=facts | values)


def overwrite(file: str):
    path = Path("rows", file)
    path.write_bytes(bytes(path.stat().st_size))


THIRD = "train-00002-of-00005"
FAULTS = {
    "missing in the middle": (
        lambda: Path("rows", f"{THIRD}.arrow").unlink(),
        f"rows is not complete: {THIRD}.arrow is missing; repeat the command that prepared it",
    ),
    "not finished": (
        lambda: Path("rows", f"{THIRD}.json").unlink(),
        f"{THIRD}.arrow is not finished; repeat the command",
    ),
    "torn": (lambda: tear(f"{THIRD}.arrow"), f"{THIRD}.arrow has .* bytes of .*; repeat"),
    "held out rows are missing": (
        lambda: Path("rows", "validation-00000-of-00001.arrow").unlink(),
        "validation-00000-of-00001.arrow is missing; repeat",
    ),
    "of another tokenizer": (
        lambda: made_of(tokenizer="abc"),
        f"{THIRD}.arrow was made with tokenizer abc, not [0-9a-f]*: move it away, then repeat",
    ),
    "of another length": (
        lambda: made_of(max_seq_length=512),
        f"{THIRD}.arrow was made with max_seq_length 512, not 8: move it away",
    ),
    "no Arrow": (
        lambda: overwrite(f"{THIRD}.arrow"),
        f"rows/{THIRD}.arrow is no Arrow stream: .*; delete it, then repeat the command",
    ),
    "another tokenizer beside them": (
        lambda: Path("rows", "tokenizer.json").write_text("{}"),
        "rows/tokenizer.json is not the one that the rows were made with",
    ),
    "from before there were shards": (
        lambda: Path("rows", prepared.FACTS).write_text('{"max_seq_length": 8, "pack": false}'),
        "rows was prepared by an earlier version: prepare it again",
    ),
    "no folder of rows": (
        lambda: Path("rows", prepared.FACTS).unlink(),
        "rows has no prepared.json: write it with prepare_data.py",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_training(text, fault):
    make(text)
    break_it, message = FAULTS[fault]
    break_it()
    with pytest.raises(ValueError, match=message):
        load(text)


@pytest.mark.parametrize("values", [{"max_seq_length": 16}, {"pack": True}])
def test_rows_of_another_shape_are_refused(text, values):
    make(text)
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"rows was prepared with {name} .*, not {value}: train"):
        load(text, **values)


def test_a_shard_of_something_else_is_not_overwritten(text):
    make(text)
    made_of(tokenizer="abc")
    before = files()
    with pytest.raises(ValueError, match=f"{THIRD}.arrow was made with tokenizer abc"):
        make(text)
    assert files() == before


@pytest.mark.parametrize(
    "values",
    [
        {"max_seq_length": 16},
        {"pack": True},
        {"validation_split": 5},
        {"train_file": ["other.txt"]},
        {"train_file": ["folder/text.txt"]},
        {"validation_file": ["other.txt"]},
        {"max_eval_documents": 3},
    ],
    ids=str,
)
def test_a_folder_is_gone_on_with_by_the_same_arguments_only(text, values):
    Path("folder").mkdir()
    for name in ("other.txt", "folder/text.txt"):
        Path(name).write_text("\n".join(x.upper() + "." for x in TEXTS))
    make(text)
    before = files()
    with pytest.raises(ValueError, match="rows was begun with .*, not .*: choose another"):
        make(text, **values)
    assert files() == before


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "1/2/3", "", "-1/2", "1/0"])
def test_a_part_is_i_of_n(shard):
    with pytest.raises(ValueError, match=f"shard must be i/n with i from 1 to n.*got {shard}"):
        PreparingArguments(shard=shard)
    assert PreparingArguments(shard="2/8").part == [2, 8]
