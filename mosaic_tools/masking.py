# SPDX-License-Identifier: Apache-2.0
"""From rows of token ids to masked batches.

Legend: rows are what encoding.encode makes; batch, seqlen are the padded shape of a batch.
"""

import zlib

import numpy as np
import torch

from bert_padding import pack_batch


class MaskingCollator:
    """Masks tokens as BERT does and pads the rows to the longest.

    Which tokens are masked is a function of seed, epoch and the row's tokens alone: how rows are
    spread over batches, loader workers and processes makes no difference, nor does resuming.

    Args:
        tokenizer: names the mask and padding ids, and the special ones, which are never masked.
        mlm_probability: share of the other tokens that become labels. Of those 80 % are replaced by
            the mask, 10 % by any token of the vocabulary, and 10 % stay.
        seed: of the masks.
        unpads: also make the model's `batch`, so that it need not ask the device where tokens are.
    """

    def __init__(self, tokenizer, mlm_probability: float, seed: int, unpads: bool = False):
        self.mlm_probability, self.seed, self.unpads = mlm_probability, seed, unpads
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.vocab = len(tokenizer)
        # Text may hold unknown tokens; the others that are special are the template's.
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self.special = np.array(sorted(special))[:, None]
        # In shared memory, so that workers that are running see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, rows: list[dict]) -> dict:
        """
        Args:
            rows: with `input_ids`; packed ones also with the `lengths` of the documents in them;
                those of a stream with the `epoch` that they belong to.

        Returns:
            input_ids, attention_mask and labels (-100 where nothing is masked), (batch, seqlen)
            int64; for packed rows position_ids (batch, seqlen) int64, 0 where a document begins.
            With `unpads`, in place of mask and positions, batch: a PackedBatch's fields, as a dict.
        """
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": np.full(shape, self.pad_id),
            "attention_mask": np.zeros(shape, np.int64),
            "labels": np.full(shape, -100),
        }
        packed = "lengths" in rows[0]
        if packed:
            batch["position_ids"] = np.tile(np.arange(shape[1]), (shape[0], 1))
        for i, row in enumerate(rows):
            ids = np.asarray(row["input_ids"], dtype=np.int64)
            columns = slice(len(ids))
            batch["input_ids"][i, columns], batch["labels"][i, columns] = self.mask(
                ids, int(row.get("epoch", self.epoch))
            )
            batch["attention_mask"][i, columns] = 1
            if packed:
                batch["position_ids"][i, columns] = np.concatenate(
                    [np.arange(length) for length in row["lengths"]]
                )
        batch = {name: torch.from_numpy(values) for name, values in batch.items()}
        if self.unpads:
            mask, positions = batch.pop("attention_mask"), batch.pop("position_ids", None)
            packed = pack_batch(batch["input_ids"], mask, positions, batch["labels"])
            batch["batch"] = packed._asdict()
        return batch

    def mask(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(masked ids, labels) of one row, (tokens,) int64 as ids are."""
        generator = np.random.default_rng([self.seed, epoch, zlib.crc32(ids.tobytes())])
        draw = generator.random(len(ids)) / self.mlm_probability
        draw[(ids == self.special).any(0)] = 1
        masked = np.where(draw < 0.8, self.mask_id, ids)
        is_random = (draw >= 0.8) & (draw < 0.9)
        masked[is_random] = generator.integers(self.vocab, size=is_random.sum())
        return masked, np.where(draw < 1, ids, -100)
