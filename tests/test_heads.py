# SPDX-License-Identifier: Apache-2.0
"""bert_layers: classification of rows and tokens, question answering, multiple choice."""

import pytest
import torch
from models import close, make, make_batch
from torch import nn

from mosaic_bert.bert_layers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)


@pytest.mark.parametrize(
    "num_labels, problem_type, labels, loss",
    [
        (1, None, torch.tensor([0.5, -1.0]), nn.MSELoss()),
        (1, None, torch.tensor([[0.5], [-1.0]]), nn.MSELoss()),
        (1, "regression", torch.tensor([1, 2]), nn.MSELoss()),
        (3, "regression", torch.ones(2, 3), nn.MSELoss()),
        (3, None, torch.tensor([2, 0]), nn.CrossEntropyLoss()),
        (3, None, torch.tensor([2, 0], dtype=torch.int32), nn.CrossEntropyLoss()),
        (3, None, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), nn.BCEWithLogitsLoss()),
        (3, None, torch.tensor([[False, True, True]] * 2), nn.BCEWithLogitsLoss()),
        (3, "multi_label_classification", torch.ones(2, 3, dtype=int), nn.BCEWithLogitsLoss()),
    ],
)  # fmt: skip
def test_sequence_classification_follows_problem_type(num_labels, problem_type, labels, loss):
    """transformers' own models write problem_type to the config; the next batch then inherits
    it."""
    model = make(BertForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    outputs = model(**make_batch(4, 8), labels=labels)
    logits, target = outputs.logits, labels
    if isinstance(loss, nn.CrossEntropyLoss):
        target = labels.long()
    else:
        target = labels.float().reshape(logits.shape)
    close(outputs.loss, loss(logits, target))
    assert model.config.problem_type == problem_type


def test_unknown_problem_types_are_refused():
    """A misspelt one would train on another loss."""
    model = make(BertForSequenceClassification, num_labels=3)
    model.config.problem_type = "multi_labels"
    with pytest.raises(ValueError, match="problem_type is 'multi_labels', expected None or one of"):
        model(**make_batch(4, 8), labels=torch.ones(2, 3))


def test_classifier_dropout_overrides_hidden_dropout():
    assert make(BertForSequenceClassification, dropout=0.1).dropout.p == 0.1
    assert make(BertForSequenceClassification, classifier_dropout=0.3).dropout.p == 0.3


def test_token_classification_loss():
    model, batch = make(BertForTokenClassification, num_labels=5), make_batch(4, 8)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 5, -100)
    outputs = model(**batch, labels=labels)
    assert outputs.logits.shape == (2, 8, 5)
    expected = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    close(outputs.loss, expected)


def test_question_answering_ignores_answers_outside_the_row():
    model, batch = make(BertForQuestionAnswering), make_batch(4, 8)
    start, end = torch.tensor([1, 99]), torch.tensor([[2], [-1]])
    outputs = model(**batch, start_positions=start, end_positions=end)
    expected = [
        nn.functional.cross_entropy(logits[:1], torch.tensor([position]))
        for logits, position in ((outputs.start_logits, 1), (outputs.end_logits, 2))
    ]
    close(outputs.loss, sum(expected) / 2)


def test_multiple_choice_scores_each_choice_alone():
    model = make(BertForMultipleChoice)
    batch = make_batch(3, 6, 8, 2, 5, 1)
    choices = {name: x.view(2, 3, 8) for name, x in batch.items()}
    outputs = model(**choices, labels=torch.tensor([2, 0]))
    assert outputs.logits.shape == (2, 3)
    close(outputs.loss, nn.functional.cross_entropy(outputs.logits, torch.tensor([2, 0])))
    alone = model(**{name: x[1:, 1:2] for name, x in choices.items()})
    close(alone.logits, outputs.logits[1:, 1:2])
