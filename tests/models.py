# SPDX-License-Identifier: Apache-2.0
"""What the tests of the model share: tiny models, batches, labels, and what counts as equal."""

import torch

from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from mosaic_bert.bert_padding import pack_batch
from mosaic_bert.configuration_bert import MosaicBertConfig

HEADS = [
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
]
VOCAB = 64
IDS = torch.tensor([[1, 1]])


def make(cls, backend=None, *, dropout=0.0, seed=0, **values):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": VOCAB, "initializer_range": 0.2}
    config = MosaicBertConfig(**{**sizes, "hidden_dropout_prob": dropout, **values})
    config._attn_implementation = backend
    return cls(config).eval()


def make_batch(*lengths, seqlen=None, seed=0):
    """ids and mask (batch, seqlen) of right-padded rows."""
    generator = torch.Generator().manual_seed(seed)
    seqlen = seqlen or max(lengths)
    ids = torch.randint(0, VOCAB, (len(lengths), seqlen), generator=generator)
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def make_labels(batch, share=0.4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labelled = torch.rand(batch["input_ids"].shape, generator=generator) < share
    return torch.where(labelled & batch["attention_mask"].bool(), batch["input_ids"], -100)


def collate(*lengths, seqlen=None):
    """What a collator may hand over: ids, labels and the packed batch, but no mask."""
    batch = make_batch(*lengths, seqlen=seqlen)
    ids, labels = batch["input_ids"], make_labels(batch)
    return {
        "input_ids": ids,
        "labels": labels,
        "batch": pack_batch(ids, batch["attention_mask"], labels=labels),
    }


def close(a, b, factor=64):
    """Equal to float32 rounding: sums of up to a few thousand terms in another order."""
    assert a.shape == b.shape and a.numel() and a.isfinite().all()
    eps = torch.finfo(torch.float32).eps
    assert (a - b).abs().max() <= factor * eps * b.abs().max().clamp(min=1)
