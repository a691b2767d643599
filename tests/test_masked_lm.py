# SPDX-License-Identifier: Apache-2.0
"""bert_layers: the MLM head, its loss with and without logits, labels, tied embeddings.

Faults of the published code are named where their tests stand.
"""

import pytest
import torch
from conftest import on_every_backend, to
from models import VOCAB, close, make, make_batch, make_labels
from reference import Oracle, assert_as_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_bert import bert_layers
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForTokenClassification,
)


@on_every_backend
def test_sparse_prediction_changes_neither_loss_nor_gradients(backend, device):
    batch = make_batch(1, 63, 30)
    labels = make_labels(batch).to(device)
    batch = to(device, batch)
    results = []
    for sparse in (True, False):
        model = make(BertForMaskedLM, backend, sparse_prediction=sparse).to(device).train()
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        results.append((outputs, {n: p.grad for n, p in model.named_parameters()}))
    (sparse, sparse_grads), (dense, dense_grads) = results
    assert "logits" not in sparse and dense.logits.shape == (*labels.shape, VOCAB)
    close(sparse.loss, dense.loss)
    for name, gradient in dense_grads.items():
        close(sparse_grads[name], gradient)


# Chunks of 7 labels, the last one shorter, and one chunk.
CHUNKS = pytest.mark.parametrize("loss_bytes", [7 * 4 * VOCAB, 2**29], ids=["chunks", "one chunk"])


@CHUNKS
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_the_loss_without_logits_is_as_close_to_float64_as_through_them(
    monkeypatch, loss_bytes, autocast
):
    monkeypatch.setattr(bert_layers, "LOSS_BYTES", loss_bytes)
    batch = make_batch(1, 63, 30)
    labels = make_labels(batch)
    types = torch.zeros_like(labels)
    results = []
    for sparse in (True, False):
        model = make(BertForMaskedLM, sparse_prediction=sparse).train()
        nn.init.normal_(model.cls.predictions.decoder.bias)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (plain_loss, plain_grads) = results
    oracle = Oracle(model.state_dict(), model.config.to_dict())
    expected = oracle(**batch, token_type_ids=types, labels=labels)["loss"]
    expected.backward()
    assert_as_close(loss, plain_loss, expected)
    for name, gradient in grads.items():
        assert_as_close(gradient, plain_grads[name], oracle.weights[name].grad, factor=3)


@CHUNKS
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_loss_operator_is_sound(monkeypatch, loss_bytes, weight_grad, dtype):
    monkeypatch.setattr(bert_layers, "LOSS_BYTES", loss_bytes)
    torch.manual_seed(0)
    hidden_states = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, 8, requires_grad=weight_grad)
    bias, labels = torch.randn(VOCAB, requires_grad=True), torch.randint(0, VOCAB, (9,))
    arguments = (hidden_states, weight, bias, labels, weight_grad)
    torch.library.opcheck(bert_layers.linear_cross_entropy_op, arguments)


def test_many_labels_of_one_id_stay_within_the_range_of_fp16():
    """Each adds 4 - 4 / vocab to the gradient of the id's row."""
    count, vocab = 20_000, 16
    hidden_states = torch.full((count, 8), 4.0, dtype=torch.float16)
    weight, labels = torch.zeros(vocab, 8), torch.ones(count, dtype=torch.int64)
    found = bert_layers.linear_cross_entropy(
        hidden_states, weight, torch.zeros(vocab), labels, True
    )
    # Sums of a chunk are rounded to fp16.
    expected = torch.full((8,), -count * 4 * (1 - 1 / vocab))
    torch.testing.assert_close(found[2][1], expected, rtol=2**-10, atol=0)


class Shapes(TorchDispatchMode):
    """Records every operator's output, those inside the loss's operator too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().endswith("::linear_cross_entropy"):
            with self:
                outputs = bert_layers.linear_cross_entropy(*args)
        else:
            outputs = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(outputs)
        self.seen += [x.shape for x in leaves if isinstance(x, torch.Tensor)]
        return outputs


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("sparse", [True, False])
def test_logits_of_all_labels_are_never_held(monkeypatch, sparse, autocast):
    """In no dtype. Through logits they are, or the test would see nothing."""
    vocab = VOCAB + 1  # no other axis is as long
    monkeypatch.setattr(bert_layers, "LOSS_BYTES", 7 * 4 * vocab)
    batch = make_batch(30, 63)
    labels = make_labels(batch)
    model = make(BertForMaskedLM, sparse_prediction=sparse, vocab_size=vocab).train()
    with Shapes() as shapes:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, labels=labels).loss
        loss.backward()
    decoder = model.cls.predictions.decoder.weight.T.shape
    rows = [x[0] for x in shapes.seen if len(x) == 2 and x[1] == vocab and x != decoder]
    assert max(rows) == (7 if sparse else 2 * 63)


class Wrapped(nn.Module):
    """What an adapter makes of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x) + 1


def test_a_wrapped_decoder_is_asked_for_its_logits():
    """An adapter's share would be missing from a loss computed with the decoder's own weight."""
    model, batch = make(BertForMaskedLM), make_batch(4, 8)
    labels = make_labels(batch)
    predictions = model.cls.predictions
    predictions.decoder = Wrapped(predictions.decoder)
    expected = model(**batch, labels=labels)
    outputs = model.train()(**batch, labels=labels)
    close(outputs.logits, expected.logits[labels != -100])
    close(outputs.loss, expected.loss)


def test_a_frozen_decoder_gets_no_gradient():
    model, batch = make(BertForMaskedLM).train(), make_batch(4, 8)
    weight = model.get_input_embeddings().weight.requires_grad_(False)
    model(**batch, labels=make_labels(batch)).loss.backward()
    assert weight.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not weight)


def test_evaluation_logits_are_whole_even_with_labels():
    """Published, logits were zero except at labelled positions."""
    model, batch = make(BertForMaskedLM), make_batch(4, 8)
    labels = make_labels(batch)
    assert torch.equal(model(**batch, labels=labels).logits, model(**batch).logits)


def test_label_0_counts():
    """Published, only labels above 0 did; 0 is a real token of DNABERT-2's."""
    model, batch = make(BertForMaskedLM), make_batch(4, 8)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[1, 2] = 0
    expected = -model(**batch).logits[1, 2].log_softmax(-1)[0]
    for training in (False, True):
        close(model.train(training)(**batch, labels=labels).loss, expected)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("training", [False, True])
def test_no_label_at_all_gives_a_zero_loss_with_gradients(training, count):
    """NaN in the published code."""
    model, batch = make(BertForMaskedLM).train(training), make_batch(4, 8)
    labels = torch.full_like(batch["input_ids"], -100)
    loss = model(**batch, labels=labels, num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_labels_on_padding_are_ignored(training):
    """Crashed in the published code."""
    model, batch = make(BertForMaskedLM).train(training), make_batch(4, 8)
    labels = make_labels(batch)
    everywhere = torch.where(batch["attention_mask"].bool(), labels, 5)
    assert torch.equal(model(**batch, labels=everywhere).loss, model(**batch, labels=labels).loss)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_labels_may_be_of_narrower_integers(training, dtype):
    model, batch = make(BertForMaskedLM).train(training), make_batch(4, 8)
    labels = make_labels(batch)
    found = model(**batch, labels=labels.to(dtype)).loss
    assert torch.equal(found, model(**batch, labels=labels).loss)


@pytest.mark.parametrize("training", [False, True])
def test_num_items_in_batch_divides_the_sum(training):
    model, batch = make(BertForMaskedLM).train(training), make_batch(4, 8)
    labels = make_labels(batch)
    count = (labels != -100).sum()
    mean = model(**batch, labels=labels).loss
    close(model(**batch, labels=labels, num_items_in_batch=4 * count).loss, mean / 4)
    assert model.accepts_loss_kwargs and not BertForTokenClassification.accepts_loss_kwargs


def test_resizing_embeddings_keeps_tie_and_bias():
    """Published, the decoder's bias stayed at its old size."""
    model, batch = make(BertForMaskedLM), make_batch(4, 8)
    nn.init.normal_(model.cls.predictions.decoder.bias)
    before = model(**batch).logits
    model.resize_token_embeddings(VOCAB + 8)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias.shape == (VOCAB + 8,) and model.config.vocab_size == VOCAB + 8
    assert torch.equal(model(**batch).logits[..., :VOCAB], before)


def test_the_head_can_be_replaced_by_an_identity():
    """BiRNA-BERT's card does this, and reads embeddings from `.logits`."""
    model, batch = make(BertForMaskedLM), make_batch(4, 8)
    embeddings = model.bert(**batch).last_hidden_state
    model.cls = nn.Identity()
    assert torch.equal(model(**batch).logits, embeddings)
    labels = make_labels(batch)
    close(model.train()(**batch, labels=labels).logits, embeddings[labels != -100])
