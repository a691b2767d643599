# SPDX-License-Identifier: Apache-2.0
"""prepare_data.py: documents of every kind, tokenizers, rows, and prepared folders."""

import contextlib
import itertools
import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from training import DOCUMENTS, trained_tokenizer, write_vocab
from transformers import PreTrainedTokenizerFast

import prepare_data
from mosaic_tools import corpus, embedded_text, encoding, prepared, preparing, tokenization
from mosaic_tools.recipe import DataArguments, TokenizerArguments
from mosaic_tools.rows import load_rows, main_process_first, size


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_documents(folder: Path, suffix: str):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS, "label": list(range(len(DOCUMENTS)))})
    path = str(folder / f"rows{suffix}")
    if suffix == ".txt":
        Path(path).write_text("\n".join(DOCUMENTS))
    else:
        writers = {".csv": rows.to_csv, ".parquet": rows.to_parquet}
        writers.get(suffix, rows.to_json)(path)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, suffix, streaming):
    path = write_documents(tmp_path, suffix)
    data = DataArguments(train_file=[path], streaming=streaming, validation_split=20)
    train, validation = ([row["text"] for row in part] for part in corpus.load_documents(data))
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert len(validation) > 5 and not set(train) & set(validation)


def test_files_come_by_pattern_and_validation_from_its_own_file(tmp_path):
    for name in ("a.txt", "b.txt", "c[1].txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "held.csv").write_text("text\nheld out\n")
    files = [f"{tmp_path}/?.txt", f"{tmp_path}/c[1].txt"]
    data = DataArguments(train_file=files, validation_file=[f"{tmp_path}/held.csv"])
    train, validation = corpus.load_documents(data)
    assert train["text"][:] == ["text of a.txt", "text of b.txt", "text of c[1].txt"]
    assert validation["text"][:] == ["held out"]


def test_a_dataset_keeps_its_own_validation_part(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"text": part}) + "\n")
    data = DataArguments(dataset_name=str(tmp_path))
    assert [part["text"][:] for part in corpus.load_documents(data)] == [
        ["train"],
        ["validation"],
    ]


def test_the_embedded_text_shares_nothing_between_training_and_evaluation():
    train, validation = embedded_text.embedded_passages()
    assert len(train) > 3000 and len(validation) > 100
    assert not set(train) & set(validation)


def test_documents_are_cut_and_blank_ones_left_out():
    data = DataArguments(max_seq_length=4)
    rows = datasets.Dataset.from_dict({"text": ["", "the old man reads", None, " ", "a"]})
    encoded = encoding.encode(corpus.with_text(rows, "text"), data, trained_tokenizer())
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 3]


def test_a_new_tokenizer_is_berts_kind():
    tokenizer = trained_tokenizer()
    assert tokenizer.all_special_ids == [tokenizer.vocab[t] for t in tokenizer.all_special_tokens]
    assert [tokenizer.convert_tokens_to_ids(t) for t in tokenization.SPECIAL_TOKENS] == [
        0,
        1,
        2,
        3,
        4,
    ]
    pair = tokenizer("The man", "a Book")
    assert tokenizer.decode(pair["input_ids"]) == "[CLS] the man [SEP] a book [SEP]"


def test_berts_vocabulary_file_is_a_tokenizer(tmp_path):
    write_vocab(tmp_path / "vocab.txt", "the", "man", "##s")
    tokenizer = tokenization.existing_tokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
    assert tokenizer("The mans")["input_ids"] == [2, 5, 6, 7, 3]


def test_byte_pairs_know_every_text_and_write_it_back(tmp_path):
    """DNA is one word of any length, which WordPiece does not know; some scripts have no spaces."""
    args = TokenizerArguments(train_tokenizer="bpe", vocab_size=300)
    texts = ["ACGTTGCAACGT" * 40, "สวัสดีชาวโลก", "the man reads"]
    tokenizer = tokenization.train_tokenizer(iter(texts), args)
    assert len(tokenizer) <= 300 and tokenizer.mask_token_id == 4
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) < len(text.encode()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_is_trained_or_named_not_both():
    with pytest.raises(ValueError, match="--tokenizer_name a or --train_tokenizer bpe, not both"):
        TokenizerArguments(tokenizer_name="a", train_tokenizer="bpe")


@given(st.lists(st.integers(1, 16), max_size=60))
def test_packing_loses_nothing_and_overfills_nothing(lengths):
    pieces = [[i] * length for i, length in enumerate(lengths)]
    rows = encoding.pack(pieces, 16)
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)
    filled = [sum(map(len, row)) for row in rows]
    assert all(0 < tokens <= 16 for tokens in filled)
    # No two rows could be one: best fit leaves at most one row that is half empty or less.
    assert sum(tokens <= 8 for tokens in filled) <= 1


def test_packed_rows_hold_whole_documents_and_long_ones_go_on():
    tokenizer = trained_tokenizer()
    texts = ["the old man reads a long book " * 3, "the man", "a book"]
    rows = datasets.Dataset.from_dict({"text": texts})
    encoded = encoding.encode(rows, DataArguments(max_seq_length=16, pack=True), tokenizer)
    pieces = []
    for row in encoded:
        assert len(row["input_ids"]) == sum(row["lengths"]) <= 16
        bounds = [sum(row["lengths"][:i]) for i in range(len(row["lengths"]) + 1)]
        pieces += [row["input_ids"][a:b] for a, b in itertools.pairwise(bounds)]
    assert all(piece[0] == tokenizer.cls_token_id for piece in pieces)
    assert all(piece[-1] == tokenizer.sep_token_id for piece in pieces)
    words = [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]
    assert "the man" in words and "a book" in words
    assert sum(word.count("reads") for word in words) == 3


@pytest.mark.parametrize("packed", [False, True], ids=["cut", "packed"])
def test_a_prepared_folder_holds_what_training_would_have_made(
    tmp_path, packed, monkeypatch, capsys
):
    path = write_documents(tmp_path, ".txt")
    words = ["--train_file", path, "--vocab_size", "100", "--max_seq_length", "16"]
    words += ["--prepared_data", str(tmp_path / "rows"), *(["--pack"] if packed else [])]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *words])
    prepare_data.main()
    said = json.loads(capsys.readouterr().out)
    args = DataArguments(max_seq_length=16, pack=packed, prepared_data=str(tmp_path / "rows"))
    train, validation, tokenizer = prepared.load_prepared(args)
    documents = corpus.load_documents(DataArguments(train_file=[path]))
    for rows, expected in zip((train, validation), documents, strict=True):
        assert len(rows)
        assert rows[:] == encoding.encode(expected, args, tokenizer)[:]
    tokens = sum(map(len, train["input_ids"]))
    assert said["train"] == f"{len(train)} rows, {tokens} tokens" == size(train)
    assert args.source() == said["source"] == "rows.txt"
    # Others cut and pad by it, whether rows were encoded just now or had been before.
    written = json.loads((tmp_path / "rows" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None


def test_training_refuses_another_tokenizer_than_its_rows_were_prepared_with(tmp_path):
    other, text = tmp_path / "other", write_documents(tmp_path, ".txt")
    trained_tokenizer(vocab_size=60).save_pretrained(other)
    args = DataArguments(train_file=[text], max_seq_length=16, prepared_data=str(tmp_path / "rows"))
    preparing.prepare(args, TokenizerArguments(vocab_size=100), None)
    whole = prepared.load_prepared(args)[0]
    for same in (None, args.prepared_data):
        assert load_rows(args, TokenizerArguments(), same, None)[0][:] == whole[:]
    with pytest.raises(ValueError, match="rows was prepared with another tokenizer than .*other"):
        load_rows(args, TokenizerArguments(), str(other), None)


def test_processes_do_not_wait_for_ever_for_one_that_tokenizes(monkeypatch):
    """They died after 30 minutes, of a timeout that named neither data nor remedy."""
    words = ["train_mlm.py", "recipe.yaml", "--train_file", "my text.txt"]
    monkeypatch.setattr(sys, "argv", words)
    process = SimpleNamespace(
        ddp_timeout=2, world_size=8, process_index=0, main_process_first=contextlib.nullcontext
    )
    before = signal.getsignal(signal.SIGALRM)
    message = "7 process.* waited 1 s.*--ddp_timeout 4"
    with pytest.raises(TimeoutError, match=message) as e, main_process_first(process):
        time.sleep(20)
    command = "python prepare_data.py recipe.yaml --train_file 'my text.txt' --prepared_data NEW"
    assert command in str(e.value)
    assert signal.getsignal(signal.SIGALRM) == before
    # What is ready in time goes on, and so do those who wait, and who has nobody waiting.
    for values in ({}, {"process_index": 1}, {"world_size": 1}):
        with main_process_first(SimpleNamespace(**vars(process) | values)):
            assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == (not values)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_shards_of_a_streaming_dataset_are_read_by_its_library(tmp_path, monkeypatch):
    """A stand-in for mosaicml-streaming, which does not install beside transformers 5."""

    class Stream:
        def __init__(self, local, keep_zip):
            self.local, self.prepared = local, []

        def apply_default(self, default):
            assert {"split", "validate_hash", "download_retry", "download_timeout"} <= set(default)

        def get_shards(self, world, allow_unsafe_types):
            assert world == "here" and not allow_unsafe_types
            name = Path(self.local).name
            return [[{"text": f"{name} {shard} {row}"} for row in range(2)] for shard in range(3)]

        def prepare_shard(self, shard):
            self.prepared.append(shard)

    modules = {
        "streaming.base.stream": SimpleNamespace(Stream=Stream),
        "streaming.base.world": SimpleNamespace(World=SimpleNamespace(detect=lambda: "here")),
    }
    for name in ("streaming", "streaming.base"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "index.json").write_text(json.dumps({"shards": [{}, {}, {}]}))
    expected = [f"{name} {shard} {row}" for name in "ab" for shard in range(3) for row in range(2)]
    for streaming in (False, True):
        rows = corpus.load_files([str(folder) for folder in folders], streaming)
        assert [row["text"] for row in rows] == expected


def test_a_recipe_that_streams_is_prepared_whole(tmp_path, monkeypatch):
    """Every published recipe streams."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    (tmp_path / "recipe.yaml").write_text("streaming: true\nvocab_size: 100\n")
    words = ["--train_file", "text.txt", "--validation_split", "20", "--prepared_data", "rows"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "recipe.yaml", *words])
    prepare_data.main()
    train, validation, _ = prepared.load_prepared(DataArguments(prepared_data="rows"))
    assert len(train) + len(validation) == len(DOCUMENTS)


def test_shards_written_again_are_read_again(tmp_path, monkeypatch):
    """`datasets` would return what it made of shards of the same names."""
    monkeypatch.setattr(corpus, "read_shards", rows_of_index)
    for count in (2, 3):
        (tmp_path / "index.json").write_text(json.dumps({"shards": [{}], "rows": count}))
        assert len(corpus.load_files([str(tmp_path)], streaming=False)) == count


def rows_of_index(shards):
    index = json.loads(Path(shards[0][0], "index.json").read_text())
    yield from ({"text": str(i)} for i in range(index["rows"]))


def test_shards_outside_their_folder_are_refused(tmp_path):
    for name in ("../shard.mds", "/shard.mds"):
        shard = {"format": "mds", "raw_data": {"basename": name}, "zip_data": None}
        (tmp_path / "index.json").write_text(json.dumps({"shards": [shard]}))
        with pytest.raises(ValueError, match=f"{name!r} leads out of"):
            corpus.load_files([str(tmp_path)], streaming=False)


def test_shards_without_their_library_name_it(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{}]}))
    with pytest.raises(Exception, match="pip install mosaicml-streaming"):
        list(corpus.load_files([str(tmp_path)], streaming=True))


# ---- bad input ----


def load_one(path, **values):
    data = DataArguments(train_file=[str(path)], **values)
    return encoding.encode(corpus.load_documents(data)[0], data, trained_tokenizer())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/none.txt"):
        load_one(tmp_path / "none.txt")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=f"empty.*{tmp_path}/empty.txt"):
        load_one(tmp_path / "empty.txt")


def test_a_file_of_blank_lines_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(ValueError, match="blank.txt: no text is left"):
        load_one(tmp_path / "blank.txt")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "text.docx").write_text("text")
    with pytest.raises(ValueError, match="text.docx: give files of one format of .txt, .json"):
        load_one(tmp_path / "text.docx")


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, streaming):
    path = write_documents(tmp_path, ".csv")
    with pytest.raises(ValueError, match="--text_column body is not in the data.*text, label"):
        load_one(path, text_column="body", streaming=streaming)


@pytest.mark.parametrize("lacking", ["mask_token", "pad_token"])
def test_a_tokenizer_that_cannot_mask_or_pad_is_refused(tmp_path, lacking):
    roles = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    del roles[lacking]
    vocabulary = {token: i for i, token in enumerate(tokenization.SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    folder = str(tmp_path / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match=f"{folder} has no {lacking}.*--tokenizer_name"):
        tokenization.existing_tokenizer(folder, lowercase=True)


def test_a_vocabulary_file_without_berts_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe")
    with pytest.raises(ValueError, match=r"vocab.txt lacks \[MASK\]"):
        tokenization.existing_tokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
