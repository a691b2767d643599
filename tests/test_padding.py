# SPDX-License-Identifier: Apache-2.0
"""bert_padding: integers, so exact."""

from collections import namedtuple

import pytest
import torch

from mosaic_bert.bert_padding import (
    PackedBatch,
    pack_batch,
    pack_flattened,
    packed_before,
    pad_input,
    unpad_input,
)

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "left": [[0, 0, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 0, 1], [0, 1, 0, 1]],
    "full": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "an empty row": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "nothing": [[0, 0, 0, 0], [0, 0, 0, 0]],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_unpadding_keeps_real_tokens_and_padding_puts_zeros_around_them(mask, dtype):
    mask = torch.tensor(mask).to(dtype)
    x = torch.arange(1, 17).view(2, 4, 2)
    batch = pack_batch(x, mask)
    assert torch.equal(unpad_input(x, batch), x[mask.bool()])
    assert torch.equal(pad_input(unpad_input(x, batch), batch), x * mask.bool()[..., None])


@pytest.mark.parametrize(
    "mask, cu_seqlens, positions",
    [
        ([[1, 1, 1, 0], [1, 0, 0, 0]], [0, 3, 4], None),
        ([[0, 0, 1, 1], [0, 0, 0, 1]], [0, 2, 3], None),
        ([[1, 0, 0, 1], [0, 1, 0, 1]], [0, 2, 4], [0, 3, 0, 2]),
        ([[0, 0, 0, 0], [1, 1, 0, 0]], [0, 2], None),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [0], None),
    ],
)
def test_sequences_and_distances_come_from_the_mask(mask, cu_seqlens, positions):
    batch = pack_batch(torch.zeros(2, 4), torch.tensor(mask))
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist() == cu_seqlens
    assert (batch.positions is None) == (positions is None)
    assert positions is None or batch.positions.tolist() == positions


@pytest.mark.parametrize(
    "longest, max_seqlen",
    [(0, 0), (1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (1024, 1024), (1025, 2048)],
)
def test_the_longest_sequence_is_rounded_up_so_that_compiled_graphs_serve_more(longest, max_seqlen):
    mask = torch.arange(1100) < torch.tensor([longest, longest // 2])[:, None]
    assert pack_batch(torch.zeros(2, 1100), mask).max_seqlen == max_seqlen


def test_no_mask_means_full_rows():
    batch = pack_batch(torch.zeros(3, 5))
    assert batch.indices is None and batch.positions is None
    assert batch.cu_seqlens.tolist() == [0, 5, 10, 15] and batch.max_seqlen == 5


@pytest.mark.parametrize(
    "position_ids, cu_seqlens, positions",
    [
        ([[0, 1, 2, 3]], [0, 4, 8], None),
        ([[0, 1, 2, 0], [0, 0, 1, 2]], [0, 3, 4, 5, 8], None),
        ([[5, 6, 7, 8], [0, 1, 0, 1]], [0, 4, 6, 8], None),
        ([[0, 2, 4, 6], [1, 2, 4, 8]], [0, 4, 8], [0, 2, 4, 6, 0, 1, 3, 7]),
    ],
)
def test_a_position_of_0_begins_a_sequence(position_ids, cu_seqlens, positions):
    batch = pack_batch(torch.zeros(2, 4), position_ids=torch.tensor(position_ids))
    assert batch.cu_seqlens.tolist() == cu_seqlens
    assert (batch.positions is None) == (positions is None)
    assert positions is None or batch.positions.tolist() == positions


def test_a_masked_0_begins_a_sequence_too():
    """Looked for among real tokens only, it merged two sequences in silence."""
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])
    position_ids = torch.tensor([[0, 0, 1, 2], [0, 1, 0, 1]])
    assert pack_batch(mask, mask, position_ids).cu_seqlens.tolist() == [0, 1, 3, 5, 6]


def test_zeros_at_padding_add_no_sequence():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    position_ids = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0]])
    assert pack_batch(mask, mask, position_ids).cu_seqlens.tolist() == [0, 2, 4]


def test_labelled_tokens_are_found_among_the_real_ones():
    labels = torch.tensor([[-100, 0, -100, 7], [3, -100, 9, 9]])
    batch = pack_batch(labels, torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]]), labels=labels)
    assert batch.labelled_indices.tolist() == [1, 2, 3]


def test_a_packed_batch_moves_to_a_device_with_its_numbers():
    """As accelerate moves what a loader yields."""
    send_to_device = pytest.importorskip("accelerate.utils").send_to_device
    packed = pack_batch(torch.zeros(2, 4), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    for moved in (send_to_device(packed, "meta"), send_to_device(packed._asdict(), "meta")):
        moved = packed_before(moved, torch.zeros(2, 4), None, None)
        assert moved[:2] == (2, 4) and moved.max_seqlen == 64 and moved.labelled_indices is None
        assert moved.indices.device.type == moved.cu_seqlens.device.type == "meta"


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "attention_mask",
            torch.ones(2, 5),
            r"attention_mask has shape \(2, 5\), expected \(2, 4\)",
        ),
        ("attention_mask", torch.ones(2, 1, 1, 4), "attention_mask has shape"),
        ("attention_mask", torch.full((2, 4), -1e4), "attention_mask holds -10000"),
        ("attention_mask", torch.tensor([[1, 1, 2, 2]] * 2), "attention_mask holds 2, expected 1"),
        ("position_ids", torch.zeros(4), r"position_ids has shape \(4,\), expected \(2, 4\) or"),
        ("position_ids", torch.tensor([[0, 1, 1, 2]]), "position_ids must increase"),
        ("tokens", torch.zeros(2, 0), r"no tokens: its shape is \(2, 0\)"),
        ("labels", torch.zeros(8), r"labels has shape \(8,\)"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(name, value, message):
    with pytest.raises(ValueError, match=message):
        pack_batch(**{"tokens": torch.zeros(2, 4), name: value})


def test_bounds_take_labels_of_their_row_only():
    """A flat row's first label would be taken for all."""
    ids, bounds = torch.zeros(1, 4), torch.tensor([0, 3, 4])
    labels = torch.tensor([[-100, 5, -100, 0]])
    assert pack_flattened(ids, bounds, labels=labels).labelled_indices.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"labels has shape \(4,\), expected \(1, 4\)"):
        pack_flattened(ids, bounds, labels=labels[0])


def test_a_batch_of_a_former_copy_of_this_module_is_read_as_todays():
    """It had fewer fields, and some by other names."""
    ids = torch.zeros(2, 3)
    batch = pack_batch(ids, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    former = namedtuple("PackedBatch", "batch seqlen indices cu_seqlens max_seqlen")(*batch[:5])
    again = packed_before(former, ids, None, None)
    assert type(again) is PackedBatch and again[:2] == (2, 3) and again.rows is None
    assert again.cu_seqlens.tolist() == [0, 2, 3] and again.labelled_indices is None


def test_names_that_fields_had_before_are_read():
    """Collators of then feed models of now."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    labels = torch.tensor([[-100, 1, -100], [2, -100, -100]])
    batch = pack_batch(ids, labels=labels)
    old = batch._asdict()
    old |= {"batch": old.pop("batch_size"), "labelled": old.pop("labelled_indices")}
    again = packed_before(old, ids, None, None)
    assert again.batch_size == 2 and torch.equal(again.labelled_indices, batch.labelled_indices)


def test_a_mapping_of_other_fields_is_refused():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    fields = pack_batch(ids)._asdict()
    lacking = {name: x for name, x in fields.items() if name != "seqlen"}
    for wrong in (fields | {"seqlens": 3}, lacking):
        with pytest.raises(ValueError, match="batch has the fields batch_size, .*, expected those"):
            packed_before(wrong, ids, None, None)
