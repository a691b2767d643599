# SPDX-License-Identifier: Apache-2.0
"""masking.py: what is masked, how batches look, and streams that go on where they stopped."""

import copy
import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from training import DOCUMENTS, trained_tokenizer

from mosaic_tools import tokenization
from mosaic_tools.corpus import load_documents
from mosaic_tools.encoding import encode
from mosaic_tools.masking import EndlessStream, MaskingCollator
from mosaic_tools.recipe import DataArguments

VOCAB, MASK, PAD, CLS, SEP = 1000, 4, 0, 2, 3


class Tokenizer:
    """The ids that MaskingCollator asks for."""

    mask_token_id, pad_token_id, unk_token_id = MASK, PAD, 1
    all_special_ids = [PAD, 1, CLS, SEP, MASK]

    def __len__(self):
        return VOCAB


def rows_of(count, length, **values):
    generator = np.random.default_rng(0)
    words = generator.integers(5, VOCAB, size=(count, length - 2))
    return [{"input_ids": [CLS, *row, SEP]} | values for row in words.tolist()]


def test_a_third_is_masked_of_which_a_tenth_is_random_and_a_tenth_stays():
    rows = rows_of(400, 128)
    batch = MaskingCollator(Tokenizer(), 0.3, seed=1)(rows)
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels, inputs = batch["labels"], batch["input_ids"]
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
    assert not (chosen & (ids < 5)).any()

    def share(part, whole, expected):
        # Within 4 standard deviations of the binomial distribution.
        n = int(whole.sum())
        assert abs(int(part.sum()) / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5

    share(chosen, ids >= 5, 0.3)
    masked = chosen & (inputs == MASK)
    kept = chosen & (inputs == ids)
    # One random token in 1000 is the mask, and one the token itself.
    share(masked, chosen, 0.8 + 0.1 / VOCAB)
    share(kept, chosen, 0.1 + 0.1 / VOCAB)
    replaced = inputs[chosen & ~masked & ~kept]
    assert len(replaced.unique()) > 600 and replaced.min() >= 0 and replaced.max() < VOCAB


def test_masks_depend_on_seed_epoch_and_tokens_and_not_on_the_batch():
    rows, collator = rows_of(8, 40), MaskingCollator(Tokenizer(), 0.3, seed=1)
    whole = collator(rows)
    again = [collator([row]) for row in reversed(rows)][::-1]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([x[name] for x in again]))
    collator.epoch.fill_(1)
    other_epoch, other_seed = collator(rows), MaskingCollator(Tokenizer(), 0.3, seed=2)(rows)
    for other in (other_epoch, other_seed, collator(rows_of(8, 40, epoch=2))):
        assert not torch.equal(other["labels"], whole["labels"])
    assert torch.equal(collator(rows_of(8, 40, epoch=0))["labels"], whole["labels"])


def test_a_running_worker_sees_the_epoch_change():
    collator = MaskingCollator(Tokenizer(), 0.3, seed=1)
    loader = torch.utils.data.DataLoader(
        rows_of(4, 40), 2, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    first = [batch["labels"] for batch in loader]
    assert all(map(torch.equal, first, [batch["labels"] for batch in loader]))
    collator.epoch.fill_(1)
    assert not any(map(torch.equal, first, [batch["labels"] for batch in loader]))


def test_rows_are_padded_to_the_longest():
    rows = [{"input_ids": [CLS, 10, 11, SEP]}, {"input_ids": [CLS, SEP]}]
    batch = MaskingCollator(Tokenizer(), 0.3, seed=1)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [CLS, SEP, PAD, PAD]
    assert batch["labels"][1].tolist() == [-100] * 4
    assert {x.dtype for x in batch.values()} == {torch.int64}


def test_packed_rows_have_positions_that_begin_anew():
    row = {"input_ids": [CLS, 10, SEP, CLS, 11, 12, SEP], "lengths": [3, 4]}
    short = {"input_ids": [CLS, SEP], "lengths": [2]}
    batch = MaskingCollator(Tokenizer(), 0.3, seed=1)([row, short])
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3]
    batch = MaskingCollator(Tokenizer(), 0.3, seed=1, unpads=True)([row, short])
    assert set(batch) == {"input_ids", "labels", "batch"}
    assert batch["batch"]["cu_seqlens"].tolist() == [0, 3, 7, 9]
    assert batch["batch"]["max_seqlen"] == 4
    labelled = batch["labels"].flatten()[batch["batch"]["indices"]] != -100
    assert batch["batch"]["labelled_indices"].tolist() == labelled.nonzero().flatten().tolist()


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Makes a stream of two files of forty documents each."""
    for i, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.txt").write_text("\n".join(DOCUMENTS[i * 40 : i * 40 + 40]))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    tokenizer = trained_tokenizer()
    # The stream is shuffled in more than one block.
    monkeypatch.setattr(tokenization, "BLOCK", 30)

    def make(packed=False):
        documents = datasets.load_dataset("text", data_files=files, split="train", streaming=True)
        args = DataArguments(max_seq_length=16, pack=packed)
        return EndlessStream(encode(documents, args, tokenizer, seed=3))

    return make


def loader_of(stream, workers, batch_size=6):
    return StatefulDataLoader(
        stream, batch_size=batch_size, num_workers=workers, collate_fn=lambda rows: rows
    )


def test_a_stream_goes_to_workers_that_are_not_forked(tmp_path):
    """As on macOS, and from Python 3.14 on: "Can't pickle local object"."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    args = DataArguments(train_file=[str(tmp_path / "text.txt")], streaming=True)
    documents, _ = load_documents(args)
    stream = EndlessStream(encode(documents, args, trained_tokenizer()))
    sent = pickle.loads(pickle.dumps(stream))
    first, expected = (list(itertools.islice(rows, 5)) for rows in (sent, stream))
    assert first == expected and len(first) == 5


@pytest.mark.parametrize("packed", [False, True], ids=["cut", "packed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_saved(stream, workers, packed):
    loader, read, places = loader_of(stream(packed), workers), [], []
    for _, rows in zip(range(40), loader, strict=False):
        read.append(rows)
        # The loader goes on to change what it returns.
        places.append(copy.deepcopy(loader.state_dict()))
    # Again and again: 40 batches of 6 are three times the documents.
    assert rows[0]["epoch"] >= 1
    for place in (3, 13, 26):
        resumed = loader_of(stream(packed), workers)
        resumed.load_state_dict(places[place])
        rest = [rows for _, rows in zip(range(39 - place), resumed, strict=False)]
        assert rest == read[place + 1 :]


def test_a_stream_saved_at_the_end_of_an_epoch_goes_on_with_the_next(stream):
    """It was taken for one without rows."""
    loader, read, places = loader_of(stream(), 0, batch_size=20), [], []
    for _, rows in zip(range(8), loader, strict=False):
        read.append(rows)
        places.append(copy.deepcopy(loader.state_dict()))
    resumed = loader_of(stream(), 0, batch_size=20)
    resumed.load_state_dict(places[3])
    assert [rows for _, rows in zip(range(4), resumed, strict=False)] == read[4:]
    assert read[4][0]["epoch"] == 1


def test_a_stream_is_complete_and_shuffled_alike_each_time(stream):
    first, again = (
        [tuple(row["input_ids"]) for _, row in zip(range(80), stream(), strict=False)]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 80
    # In the files' order, the third token, an age, changes four times.
    assert sum(a[2] != b[2] for a, b in itertools.pairwise(first)) > 20


def test_an_empty_stream_is_refused_instead_of_read_for_ever():
    nothing = datasets.Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="the stream has no rows"):
        next(iter(EndlessStream(nothing.filter(lambda row: False))))
