# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives, torch.func, and every operator of the package under gradcheck: right,
or refused by an error that names the way that has them."""

import pytest
import torch
from conftest import needs_compile, needs_triton
from models import VOCAB, close, make, make_batch, make_labels
from torch.autograd import forward_ad
from torch.func import functional_call

from mosaic_bert import bert_layers
from mosaic_bert.bert_layers import BertForMaskedLM, BertModel
from mosaic_bert.bert_padding import pack_batch

BATCH = make_batch(3, 9, 7)
LABELS = make_labels(BATCH)
CURES = "attn_implementation='eager' and config.sparse_prediction=False"


def double(**values):
    return make(BertForMaskedLM, "eager", **values).double().train()


def penalised_bias_gradient(model, batch):
    """Gradient of the decoder's bias of a loss with a penalty on its gradient in the embeddings."""
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=LABELS).loss
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    (loss + gradient.square().sum()).backward()
    return model.cls.predictions.decoder.bias.grad


def test_a_gradient_penalty_is_right_through_logits():
    """Against the same by central differences."""
    model = double(sparse_prediction=False)
    found = penalised_bias_gradient(model, BATCH)

    def penalised():
        embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
        loss = model(
            inputs_embeds=embeds, attention_mask=BATCH["attention_mask"], labels=LABELS
        ).loss
        return loss.detach() + torch.autograd.grad(loss, embeds)[0].square().sum()

    bias, step = model.cls.predictions.decoder.bias, 1e-5
    for i in (0, VOCAB // 2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[i] += sign * step
            values.append(penalised().item())
            with torch.no_grad():
                bias[i] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        # Central differences are off by about step ** 2 and rounding / step.
        assert found[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_gradient_penalty_without_logits_names_the_cure():
    """The gradients of gradients were thrown away: a norm of 0.35 in place of 60.8."""
    with pytest.raises(NotImplementedError, match=CURES):
        penalised_bias_gradient(double(), BATCH)


def test_a_penalty_alone_names_the_cure():
    model = double()
    embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=LABELS).loss
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    with pytest.raises(NotImplementedError, match=CURES):
        gradient.square().sum().backward()


def test_create_graph_alone_changes_no_gradient():
    gradients = []
    for create_graph in (False, True):
        model = double()
        loss = model(**BATCH, labels=LABELS).loss
        gradients.append(
            torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
        )
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# ---- torch.func ----


def loss_of(model):
    """A function of the parameters, for torch.func, and the parameters."""

    def loss(parameters):
        return functional_call(model, parameters, kwargs={**BATCH, "labels": LABELS}).loss

    return loss, dict(model.named_parameters())


@pytest.mark.parametrize("sparse", [True, False])
def test_func_grad_is_autograds(sparse):
    """An obscure RuntimeError with sparse prediction."""
    model = double(sparse_prediction=sparse)
    loss, parameters = loss_of(model)
    model(**BATCH, labels=LABELS).loss.backward()
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@pytest.mark.parametrize("sparse", [True, False])
def test_forward_mode_equals_backward_mode(sparse):
    """It was 0 with sparse prediction, without a word."""
    model = double(sparse_prediction=sparse)
    loss, parameters = loss_of(model)
    tangents = {name: torch.randn_like(x) for name, x in parameters.items()}
    _, found = torch.func.jvp(loss, (parameters,), (tangents,))
    gradients = torch.func.grad(loss)(parameters)
    expected = sum((gradients[name] * x).sum() for name, x in tangents.items())
    torch.testing.assert_close(found, expected)


def test_forward_mode_without_torch_func():
    model = double()
    bias = model.cls.predictions.decoder.bias
    tangent = torch.ones_like(bias)
    model(**BATCH, labels=LABELS).loss.backward()
    expected = bias.grad.sum()
    with forward_ad.dual_level():
        dual = {"cls.predictions.decoder.bias": forward_ad.make_dual(bias.detach(), tangent)}
        loss = functional_call(model, dual, kwargs={**BATCH, "labels": LABELS}).loss
        found = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["embeddings", "a weight of the encoder"])
def test_torch_func_by_what_is_not_of_the_head(by):
    """The decoder is plain then: forward mode gave 0, backward mode an obscure error."""
    name, found = "bert.encoder.layer.0.mlp.wo.weight", []
    for sparse in (True, False):
        model = double(sparse_prediction=sparse)

        def by_embeddings(x, model=model):
            mask = BATCH["attention_mask"]
            return model(inputs_embeds=x, attention_mask=mask, labels=LABELS).loss

        def by_weight(x, model=model):
            return functional_call(model, {name: x}, kwargs={**BATCH, "labels": LABELS}).loss

        if by == "embeddings":
            loss, x = by_embeddings, model.get_input_embeddings()(BATCH["input_ids"]).detach()
        else:
            loss, x = by_weight, model.get_parameter(name).detach()
        tangent = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
        found.append([torch.func.jvp(loss, (x,), (tangent,))[1], torch.func.grad(loss)(x)])
    for sparse, dense in zip(*found, strict=True):
        assert dense.abs().max() > 0
        torch.testing.assert_close(sparse, dense)


def test_a_learnt_weight_of_the_loss_is_no_constant_in_its_second_derivative():
    """Its share was dropped: 5.06 in place of 474.6."""
    model = double()
    embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = model(inputs_embeds=embeds, labels=LABELS).loss * weight
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    with pytest.raises(NotImplementedError, match=CURES):
        torch.autograd.grad(gradient.square().sum() + loss, weight)


def test_vmap_over_rows_without_a_mask_is_a_batch():
    model, ids = make(BertForMaskedLM), BATCH["input_ids"]
    close(torch.vmap(lambda row: model(row[None]).logits[0])(ids), model(ids).logits)


def test_gradients_of_each_row():
    model, ids = double(), BATCH["input_ids"]
    parameters = dict(model.named_parameters())

    def score(parameters, row):
        return functional_call(model, parameters, (row[None],)).logits.square().sum()

    found = torch.vmap(torch.func.grad(score), (None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        for name, expected in torch.func.grad(score)(parameters, row).items():
            torch.testing.assert_close(found[name][i], expected)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_vmap_over_rows_whose_tokens_are_found_by_value_is_refused(name):
    model, values = make(BertModel), {**BATCH, "position_ids": torch.arange(9).repeat(3, 1)}

    def encode(row, other):
        return model(row[None], **{name: other[None]}).last_hidden_state

    with pytest.raises(ValueError, match="vmap cannot go over rows with attention_mask"):
        torch.vmap(encode)(BATCH["input_ids"], values[name])


# ---- operators ----


def test_the_loss_operator_under_gradcheck():
    torch.manual_seed(0)
    hidden_states = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 1])

    def loss(*tensors):
        return bert_layers.linear_cross_entropy_op(*tensors, labels, True)[0]

    tensors = (hidden_states, weight, bias)
    assert loss(*tensors).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, tensors)
    with pytest.raises(NotImplementedError, match=CURES):
        torch.autograd.gradgradcheck(loss, tensors)


def attention_inputs():
    torch.manual_seed(0)
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1] * 4, [1] * 3 + [0]])
    batch = pack_batch(torch.zeros(2, 4), mask)
    return qkv, torch.tensor([0.5, 0.25], dtype=torch.float64), batch


@needs_compile
def test_the_compiled_attention_operator_under_gradcheck():
    qkv, slopes, batch = attention_inputs()

    def attend(qkv):
        seed = torch.tensor([7])
        return bert_layers.sdpa_varlen_op(qkv, batch.cu_seqlens, slopes, None, 0.0, seed)

    assert torch.autograd.gradcheck(attend, qkv)
    with pytest.raises(NotImplementedError, match=CURES):
        torch.autograd.gradgradcheck(attend, qkv)


def test_eager_attention_has_second_derivatives():
    qkv, slopes, batch = attention_inputs()

    def attend(qkv):
        return bert_layers.eager_attention(qkv, slopes, batch, 0.0)[0]

    assert torch.autograd.gradcheck(attend, qkv)
    assert torch.autograd.gradgradcheck(attend, qkv)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes Triton's interpreter")
def test_the_triton_operator_has_no_second_derivative_and_says_so():
    qkv, slopes, batch = attention_inputs()
    qkv = torch.randn(7, 3, 2, 16, requires_grad=True)
    out, _ = bert_layers.triton_attention(qkv, slopes.float(), batch, 0.0)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="use attn_implementation='eager'"):
        gradient.square().sum().backward()


def test_float64_models_compute_in_float64():
    """Softmax and losses went through float32."""
    model = double().eval()
    with torch.no_grad():
        found = model(**BATCH, labels=LABELS)
        plain = model.float()(**BATCH, labels=LABELS)
        rounded = make(BertForMaskedLM, "eager").double()
    assert found.loss.dtype == torch.float64
    # Two runs in float64, padded and not, differ by its rounding, not by float32's.
    row = {name: x[1:2] for name, x in BATCH.items()}
    with torch.no_grad():
        alone, among = rounded(**row).logits, rounded(**BATCH).logits[1:2]
    assert (alone - among).abs().max() < 1e-12 * alone.abs().max()
    assert (found.loss - plain.loss).abs() < 1e-5
