# SPDX-License-Identifier: Apache-2.0
"""What callers hand to a forward pass besides ids and masks: bounds and positions of flattening
collators, arguments of transformers' BERT without a meaning here, and mistakes."""

import peft
import pytest
import torch
import transformers
from models import HEADS, close, make, make_batch, make_labels

from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertModel,
)

LENGTHS = (3, 9, 1, 5)
ROWS = [{"input_ids": list(range(5, 5 + n)), "labels": [i % 2 for i in range(n)]} for n in LENGTHS]
CLASSES = [BertModel, *HEADS]


def flattened(**options):
    return transformers.DataCollatorWithFlattening(**options)(ROWS)


def flattens(**options):
    """Whether this transformers' collator has these options."""
    try:
        flattened(**options)
    except TypeError:
        return False
    return True


def alone(model):
    """The first output of each row by itself, one after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row["input_ids"]]))[0][0] for row in ROWS])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"position_ids_start": 2},
        {"position_ids_start": 2, "return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_what_a_flattening_collator_hands_over_is_what_rows_alone_give(options):
    """A TypeError before, or (from position 2 on) all sequences in one, without a word."""
    if not flattens(**options):
        pytest.skip("this transformers' collator has no such option")
    model, batch = make(BertForTokenClassification), flattened(**options)
    with torch.no_grad():
        outputs = model(**batch)
    close(outputs.logits[0], alone(model))
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("sparse", [True, False])
def test_bounds_train_as_positions_do(sparse):
    results = []
    for options in ({}, {"return_flash_attn_kwargs": True}):
        model = make(BertForMaskedLM, sparse_prediction=sparse).train()
        loss = model(**flattened(**options)).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("start", [1, 2, 40])
def test_positions_may_begin_anywhere(start):
    """The position of a row's first token begins a sequence wherever it recurs, as 0 does."""
    model, ids = make(BertModel), make_batch(9)["input_ids"]
    from_zero = torch.tensor([[0, 1, 2, 0, 1, 5, 0, 1, 2]])
    expected = model(ids, position_ids=from_zero).last_hidden_state
    found = model(ids, position_ids=from_zero + start).last_hidden_state
    assert torch.equal(found, expected)


MEANINGLESS = {
    "use_cache": True,
    "special_tokens_mask": torch.zeros(1, 4),
    "offset_mapping": torch.zeros(1, 4, 2),
    "head_mask": None,
    "past_key_values": None,
    "encoder_hidden_states": None,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_without_a_meaning_change_nothing(cls):
    """As in transformers 5's BERT; they were a TypeError."""
    model, ids = make(cls), make_batch(4)["input_ids"]
    assert torch.equal(model(ids, **MEANINGLESS)[0], model(ids)[0])


@pytest.mark.parametrize("cls", [*CLASSES, BertForMultipleChoice])
def test_an_argument_that_would_change_the_result_is_refused(cls):
    ids = make_batch(4)["input_ids"]
    ids = ids[None] if cls is BertForMultipleChoice else ids
    for name in ("head_mask", "past_key_values", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"{name} must be None: "):
            make(cls)(ids, **{name: torch.ones(1)})


@pytest.mark.parametrize("cls", [*CLASSES, BertForMultipleChoice])
def test_a_misspelt_argument_is_a_type_error(cls):
    ids = make_batch(4)["input_ids"]
    ids = ids[None] if cls is BertForMultipleChoice else ids
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        make(cls)(ids, attention_masks=torch.ones_like(ids))


def test_logits_that_training_does_not_make_name_the_cure():
    """For distillation, which met an AttributeError on None."""
    batch = make_batch(3, 9)
    model = make(BertForMaskedLM).train()
    outputs = model(**batch, labels=make_labels(batch))
    assert "logits" not in outputs and len(outputs.to_tuple()) == 1
    with pytest.raises(AttributeError, match="model.config.sparse_prediction = False"):
        outputs.logits.log_softmax(-1)
    with pytest.raises(AttributeError, match="has no attribute 'logit'"):
        _ = outputs.logit
    model.config.sparse_prediction = False
    assert model(**batch, labels=make_labels(batch)).logits.shape == (2, 9, 64)


def test_prefix_tuning_is_refused_and_prompt_tuning_works():
    batch = make_batch(3, 9)
    options = {"task_type": "TOKEN_CLS", "num_virtual_tokens": 2}
    prefix = peft.get_peft_model(
        make(BertForTokenClassification), peft.PrefixTuningConfig(**options)
    )
    with pytest.raises(ValueError, match="does not support past key values"):
        prefix(**batch)
    prompt = peft.get_peft_model(
        make(BertForTokenClassification), peft.PromptTuningConfig(**options)
    )
    prompt(**batch).logits.square().sum().backward()
    assert prompt.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
