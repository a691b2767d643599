# SPDX-License-Identifier: Apache-2.0
"""masking.py: what is masked, how batches look, and streams that go on where they stopped."""

import numpy as np
import torch

from mosaic_tools.masking import MaskingCollator

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
    assert batch["batch"]["max_seqlen"] == 64
    labelled = batch["labels"].flatten()[batch["batch"]["indices"]] != -100
    assert batch["batch"]["labelled_indices"].tolist() == labelled.nonzero().flatten().tolist()
