# SPDX-License-Identifier: Apache-2.0
"""bert_layers and configuration_bert: what is refused, and that the message has the numbers."""

import pytest
import torch
from models import IDS, VOCAB, make, make_batch

from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from mosaic_bert.bert_padding import pack_batch


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of input_ids and inputs_embeds, got none"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 2, 64)}, "got both"),
        ({"input_ids": IDS[0]}, r"input_ids must have 2 axes, got shape \(2,\)"),
        ({"inputs_embeds": torch.zeros(2, 64)}, "inputs_embeds must have 3 axes"),
        ({"input_ids": IDS + VOCAB}, "input_ids holds 65, but the model has only 0..63"),
        ({"input_ids": IDS - 5}, "input_ids holds -4"),
        ({"input_ids": IDS, "token_type_ids": IDS + 1}, "token_type_ids holds 2"),
        ({"input_ids": IDS, "token_type_ids": IDS[0]}, r"token_type_ids has shape \(2,\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_bad_input_is_refused_with_the_numbers(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(cls)(**arguments)


@pytest.mark.parametrize(
    "cls, labels",
    [
        (BertForMaskedLM, {"labels": torch.zeros(2, 7, dtype=int)}),
        (BertForMaskedLM, {"labels": torch.zeros(16, dtype=int)}),
        (BertForSequenceClassification, {"labels": torch.zeros(3, dtype=int)}),
        (BertForSequenceClassification, {"labels": torch.zeros(2, 3)}),
        (BertForTokenClassification, {"labels": torch.zeros(2, dtype=int)}),
        (
            BertForQuestionAnswering,
            {
                "start_positions": torch.zeros(3, dtype=int),
                "end_positions": torch.zeros(2, dtype=int),
            },
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_labels_of_the_wrong_shape_are_refused(cls, labels, training):
    with pytest.raises(ValueError, match=r"has shape \(.*expected \("):
        make(cls).train(training)(**make_batch(4, 8), **labels)


@pytest.mark.parametrize("training", [False, True])
def test_labels_beyond_the_vocabulary_are_refused(training):
    model = make(BertForMaskedLM).train(training)
    with pytest.raises(ValueError, match="labels holds 64, but the model has only 0..63"):
        model(**make_batch(4), labels=torch.tensor([[-100, 1, 64, 2]]))


def test_labels_that_a_classifier_does_not_know_are_refused():
    model = make(BertForSequenceClassification, num_labels=2)
    with pytest.raises(ValueError, match="labels holds 2.* has only 0..1: load .* num_labels="):
        model(**make_batch(4), labels=torch.tensor([2]))


def test_hidden_states_of_a_batch_that_names_labelled_tokens_are_refused():
    packed = pack_batch(IDS, labels=IDS)
    with pytest.raises(ValueError, match="output_hidden_states needs a batch .* without labels"):
        make(BertModel)(IDS, batch=packed, output_hidden_states=True)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_a_packed_batch_and_a_mask_are_refused_together(cls):
    batch = make_batch(4, 2)
    packed = pack_batch(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(
        ValueError, match="give batch, or attention_mask and position_ids, not both"
    ):
        make(cls)(**batch, batch=packed)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_a_batch_packed_from_another_shape_is_refused(cls):
    packed = pack_batch(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"from shape \(3, 5\), but the inputs are \(1, 2\)"):
        make(cls)(IDS, batch=packed)


def test_half_a_span_is_refused():
    with pytest.raises(ValueError, match="both start_positions and end_positions"):
        make(BertForQuestionAnswering)(**make_batch(4), start_positions=torch.tensor([1]))


def test_flat_multiple_choice_input_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, choices, seqlen\), .*got \(2, 8\)"):
        make(BertForMultipleChoice)(**make_batch(4, 8))
    with pytest.raises(ValueError, match=r"choices, seqlen, dim\), got \(2, 3, 64\)"):
        make(BertForMultipleChoice)(inputs_embeds=torch.zeros(2, 3, 64))
