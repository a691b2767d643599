# SPDX-License-Identifier: Apache-2.0
"""shuffling.py: how well rows are mixed, that none is lost, and streams that go on where they
stopped."""

import copy
import itertools
import pickle
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from training import DOCUMENTS, trained_tokenizer

from mosaic_tools import encoding, shuffling
from mosaic_tools.corpus import load_documents
from mosaic_tools.encoding import encode
from mosaic_tools.recipe import DataArguments
from mosaic_tools.shuffling import BLOCK, WINDOW, BlockShuffle, EndlessStream


def epoch(number=0):
    return torch.tensor(number)


# ---- any number of rows ----


@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, BLOCK + 1, WINDOW + 1, 3 * WINDOW - 7])
def test_each_row_comes_once_an_epoch(rows):
    order = np.fromiter(BlockShuffle(rows, 1, epoch()), dtype=np.int64)
    assert len(order) == rows == len(BlockShuffle(rows, 1, epoch()))
    assert np.array_equal(np.sort(order), np.arange(rows))


def test_the_order_is_that_of_seed_and_epoch():
    now = epoch()
    shuffle = BlockShuffle(5000, 1, now)
    first = list(shuffle)
    assert list(shuffle) == first == list(BlockShuffle(5000, 1, epoch()))
    now.fill_(1)
    others = [list(shuffle), list(BlockShuffle(5000, 2, epoch()))]
    assert all(sorted(x) == sorted(first) and x != first for x in others)


def test_neighbours_are_far_apart_and_a_batch_is_of_everywhere():
    """What the docstring says of it."""
    rows = 8 * WINDOW
    order = np.fromiter(BlockShuffle(rows, 3, epoch()), dtype=np.int64)
    place = np.empty(rows, np.int64)
    place[order] = np.arange(rows)
    apart = np.abs(np.diff(place))
    inside = np.diff(np.arange(rows) // BLOCK) == 0
    # The mean distance of two places drawn from a window is a third of it.
    assert np.mean(apart[inside]) == pytest.approx(WINDOW / 3, rel=0.01)
    # As often as by chance neighbours share a batch of 4,096, which is 1 / 256 of a window.
    together = np.diff(place // 4096) == 0
    assert np.mean(together[inside]) == pytest.approx(4096 / WINDOW, rel=0.05)
    # Of 4,096 blocks each has a row in the batch with probability 1 - (1 - 1 / 4096) ** 4096.
    blocks = [len(set(batch // BLOCK)) for batch in order.reshape(-1, 4096)[::500]]
    assert np.mean(blocks) == pytest.approx(4096 * (1 - 1 / np.e), rel=0.02)
    # Blocks themselves may come at any time of the epoch.
    windows = place[::BLOCK] // WINDOW
    assert np.corrcoef(np.arange(len(windows)), windows)[0, 1] == pytest.approx(0, abs=0.03)


def test_no_list_of_all_rows_is_made():
    """torch's RandomSampler took 40 bytes for each row, 12 GB for C4, in each process."""
    rows = 40 * WINDOW
    tracemalloc.start()
    try:
        next(iter(BlockShuffle(rows, 1, epoch())))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A window as indices, twice, and as ints; a number for each block.
    assert peak < WINDOW * (8 + 8 + 8 + 32) + 3 * 8 * rows / BLOCK


def test_processes_share_the_rows_and_a_resumed_run_skips_those_it_had():
    rows, batch = 2 * WINDOW + 100, 4096
    alone = list(BatchSampler(BlockShuffle(rows, 1, epoch()), batch, drop_last=False))
    shares = [
        list(
            BatchSamplerShard(
                BatchSampler(BlockShuffle(rows, 1, epoch()), batch, drop_last=False), 2, i
            )
        )
        for i in range(2)
    ]
    for mine, whole in ((shares[0], alone[::2]), (shares[1], alone[1::2])):
        # The last batch may be filled from the beginning.
        assert mine[:-1] == whole[: len(mine) - 1]
    loader = DataLoader(range(rows), batch, sampler=BlockShuffle(rows, 1, epoch()))
    resumed = skip_first_batches(Accelerator(cpu=True).prepare(loader), 400)
    assert next(iter(resumed)).tolist() == alone[400]


# ---- streams ----


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Makes a stream of two files of forty documents each."""
    for i, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.txt").write_text("\n".join(DOCUMENTS[i * 40 : i * 40 + 40]))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    tokenizer = trained_tokenizer()
    # Places are remembered more than once, in the middle of what is tokenized together too.
    monkeypatch.setattr(encoding, "OF_STREAM", 15)
    monkeypatch.setattr(shuffling, "STRIDE", 4)

    def make(packed=False, buffer=17):
        documents = datasets.load_dataset("text", data_files=files, split="train", streaming=True)
        args = DataArguments(max_seq_length=16, pack=packed)
        return EndlessStream(encode(documents, args, tokenizer), buffer, seed=3)

    return make


def same(one, other) -> bool:
    """Whether rows or batches of them are equal: their arrays have no single answer to that."""
    return pickle.dumps(as_lists(one)) == pickle.dumps(as_lists(other))


def as_lists(rows):
    if isinstance(rows, list):
        return [as_lists(row) for row in rows]
    return {name: np.asarray(value).tolist() for name, value in rows.items()}


def loader_of(stream, workers, batch_size=6):
    return StatefulDataLoader(
        stream, batch_size=batch_size, num_workers=workers, collate_fn=lambda rows: rows
    )


def test_a_stream_goes_to_workers_that_are_not_forked(tmp_path):
    """As on macOS, and from Python 3.14 on: "Can't pickle local object"."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    args = DataArguments(train_file=[str(tmp_path / "text.txt")], streaming=True)
    documents, _ = load_documents(args)
    stream = EndlessStream(encode(documents, args, trained_tokenizer()), 50, seed=3)
    sent = pickle.loads(pickle.dumps(stream))
    first, expected = (list(itertools.islice(rows, 5)) for rows in (sent, stream))
    assert same(first, expected) and len(first) == 5


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
        assert same(rest, read[place + 1 :])


def test_a_stream_saved_at_the_end_of_an_epoch_goes_on_with_the_next(stream):
    """It was taken for one without rows."""
    loader, read, places = loader_of(stream(), 0, batch_size=20), [], []
    for _, rows in zip(range(8), loader, strict=False):
        read.append(rows)
        places.append(copy.deepcopy(loader.state_dict()))
    resumed = loader_of(stream(), 0, batch_size=20)
    resumed.load_state_dict(places[3])
    assert same([rows for _, rows in zip(range(4), resumed, strict=False)], read[4:])
    assert read[4][0]["epoch"] == 1


def test_a_stream_is_complete_and_shuffled_alike_each_time(stream):
    first, again = (
        [tuple(row["input_ids"]) for _, row in zip(range(80), stream(buffer=60), strict=False)]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 80
    # In the files' order, the third token, an age, changes four times.
    assert sum(a[2] != b[2] for a, b in itertools.pairwise(first)) > 20


def test_an_empty_stream_is_refused_instead_of_read_for_ever():
    nothing = datasets.Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="the stream has no rows"):
        next(iter(EndlessStream(nothing.filter(lambda row: False), 10, seed=3)))


def test_a_row_is_put_off_by_less_than_the_buffer_and_as_many_are_read_as_returned(tmp_path):
    numbers = datasets.Dataset.from_dict({"number": range(5000)}).to_iterable_dataset()
    read = []

    class Counted:
        """The stream, which tells what was read of it."""

        def __iter__(self):
            for row in numbers:
                read.append(row["number"])
                yield row

        def state_dict(self):
            return {}

    found, behind = [], []
    for row in itertools.islice(EndlessStream(Counted(), 300, seed=5), 5000):
        found.append(row["number"])
        behind.append(len(read) - len(found))
    assert sorted(found) == list(range(5000))
    place = np.argsort(found)
    # Rows held are those read before: half of the buffer in the mean, and at most all of it.
    assert max(behind) < 300 and np.mean(behind[600:4400]) == pytest.approx(150, rel=0.1)
    assert np.mean(np.abs(np.diff(place))) == pytest.approx(100, rel=0.05)
    # Before the first row comes, not the whole buffer is read: some sqrt(300).
    assert behind[0] < 60


def test_a_buffer_of_one_keeps_the_order(stream):
    ages = [row["input_ids"][2] for row in itertools.islice(stream(buffer=1), 80)]
    assert sum(a != b for a, b in itertools.pairwise(ages)) == 4
