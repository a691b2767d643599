# SPDX-License-Identifier: Apache-2.0
"""bert_layers: what every model class promises.

Faults of the published code are named where their tests stand.
"""

import collections
import datetime
import importlib
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, on_every_backend, run_python, to
from models import HEADS, IDS, VOCAB, close, collate, make, make_batch, make_labels
from reference import Oracle, alibi_attention, assert_as_close, slopes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from mosaic_bert import bert_layers, bert_padding
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Dropout,
    alibi_slopes,
    choose_backend,
)
from mosaic_bert.bert_padding import PackedBatch, pack_batch
from mosaic_bert.configuration_bert import MosaicBertConfig

# ---- attention ----


@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_slopes_are_those_of_the_paper(heads):
    assert alibi_slopes(heads) == pytest.approx(slopes(heads).tolist(), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gaps", [False, True], ids=["no gaps", "gaps"])
@pytest.mark.parametrize("lengths", [[1], [63, 1, 128, 128, 129]], ids=str)
@pytest.mark.parametrize("heads", [8, 12])
def test_sdpa_is_as_close_to_float64_as_eager_is(heads, lengths, gaps, dtype):
    """Forward and gradient, one bias view for each length, runs of equal lengths in one call."""
    total, head_dim = sum(lengths), 16
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = None
    if gaps:
        positions = torch.cat([torch.arange(n).square().int() for n in lengths])
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(total, *x, heads, head_dim, generator=generator) for x in ([3], [])]
    qkv, upstream = (x.to(dtype) for x in draw)

    def run(attend, x):
        x = x.detach().requires_grad_()
        out = attend(x)
        (gradient,) = torch.autograd.grad(out, x, upstream.to(out.dtype))
        return out.detach(), gradient

    # A row per sequence: eager pads, so it needs to know the places.
    seqlen = max(lengths)
    indices = torch.cat([torch.arange(n) + i * seqlen for i, n in enumerate(lengths)])
    batch = PackedBatch(len(lengths), seqlen, indices, cu_seqlens, seqlen, positions)
    all_slopes = torch.tensor(alibi_slopes(heads))
    plain = run(lambda x: bert_layers.eager_attention(x, all_slopes, batch, 0.0)[0], qkv)
    candidate = run(lambda x: bert_layers.sdpa_attention(x, all_slopes, batch, 0.0)[0], qkv)
    oracle = run(
        lambda x: alibi_attention(x, cu_seqlens, slopes(heads), positions)[0], qkv.double()
    )
    for factor, *outputs in zip((2, 3), candidate, plain, oracle, strict=True):
        assert_as_close(*outputs, factor=factor)


def test_sdpa_is_given_a_bias_of_linear_memory(monkeypatch):
    biases, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *x: biases.append(x[3]) or attend(*x),
    )
    make(BertModel, "sdpa")(**make_batch(300, 200))
    assert [bias.shape for bias in biases[:2]] == [(1, 4, 300, 300), (1, 4, 200, 200)]
    assert all(bias.untyped_storage().nbytes() == 4 * 599 * 4 for bias in biases)


def test_the_bias_is_alibis_against_reversed_keys():
    window = bert_layers.alibi_window(torch.tensor(alibi_slopes(12)), 65_536)
    bias = bert_layers.bias_for_reversed_keys(window, 65_536)
    assert bias.shape == (1, 12, 65_536, 65_536)
    assert bias.untyped_storage().nbytes() == 12 * 131_071 * 4
    # Against reversed keys, column 65,535 is key 0.
    assert bias[0, 0, 100, 65_535] == -100 * alibi_slopes(12)[0]


def test_triton_shares_one_tile_map_among_layers(monkeypatch):
    """Under the interpreter, here, which is also where a CPU tensor may reach the kernel."""
    maps, build = [], bert_layers.build_tile_map
    monkeypatch.setattr(bert_layers, "build_tile_map", lambda *x: maps.append(build(*x)) or maps[0])
    batch = make_batch(5, 140)
    with torch.no_grad():
        ours = make(BertModel, "triton")(**batch)[0]
        close(ours, make(BertModel, "eager")(**batch)[0])
    assert len(maps) == 1


def test_triton_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' cannot run: it needs CUDA tensors, got cpu"):
        make(BertModel, "triton")(**make_batch(3))


@pytest.mark.parametrize(
    "dtype, head_dim, reason",
    [
        (torch.float64, 64, "it takes torch.float16, torch.bfloat16, torch.float32, got torch.f"),
        (torch.bfloat16, 20, "a multiple of 8 up to 128, got 20"),
        (torch.bfloat16, 136, "a multiple of 8 up to 128, got 136"),
    ],
)
def test_on_cuda_auto_falls_back_where_triton_cannot(monkeypatch, dtype, head_dim, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    warnings = []
    monkeypatch.setattr(bert_layers.logger, "warning_once", warnings.append)
    device = torch.device("cuda")
    assert choose_backend("auto", device, torch.bfloat16, 64) == "triton" and not warnings
    assert choose_backend("auto", device, dtype, head_dim) == "sdpa"
    assert reason in warnings[0]


def test_on_rocm_auto_takes_sdpa(monkeypatch):
    """A GPU is called CUDA there, with a capability, and Triton lacks the kernel's precision."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    queries = (torch.device("cuda"), torch.bfloat16, 64)
    assert choose_backend("auto", *queries) == "sdpa"
    with pytest.raises(ValueError, match="NVIDIA's GPUs, not for ROCm's. Use 'sdpa'"):
        choose_backend("triton", *queries)


def test_a_default_dtype_of_half_precision_changes_no_float32_model():
    model, batch = make(BertModel), make_batch(8, 5)
    expected = model(**batch).last_hidden_state
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model(**batch).last_hidden_state, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@on_every_backend
def test_attention_dropout_is_for_training_only(backend, device):
    model = make(BertModel, backend, attention_probs_dropout_prob=0.5).to(device)
    batch = to(device, make_batch(32, 7))
    with torch.no_grad():
        still = model(**batch).last_hidden_state
        model.train()
        first, second = model(**batch).last_hidden_state, model(**batch).last_hidden_state
    assert not torch.equal(first, second)
    assert not torch.equal(first, still)


@pytest.mark.parametrize(
    "requested, output_attentions, expected",
    [
        ("auto", False, "sdpa"),
        ("auto", True, "eager"),
        ("sdpa", False, "sdpa"),
        ("eager", True, "eager"),
    ],
)
def test_backend_on_a_cpu(requested, output_attentions, expected):
    queries = (torch.device("cpu"), torch.float32, 64)
    assert choose_backend(requested, *queries, output_attentions) == expected


def test_a_backend_that_returns_no_attentions_says_so():
    with pytest.raises(
        ValueError, match="output_attentions=True needs attn_implementation='eager'"
    ):
        make(BertModel, "sdpa")(**make_batch(3), output_attentions=True)


def test_flash_attention_2_is_refused_where_it_cannot_run(monkeypatch):
    """The published code chose its kernel by dropout, and crashed where the device had none."""
    with pytest.raises(ValueError, match="'flash_attention_2' is not available.*flash_attn.*sdpa"):
        make(BertModel, "flash_attention_2")
    monkeypatch.setattr(bert_layers, "flash_attn_2_varlen_attention", object())
    model = make(BertModel, "flash_attention_2")
    with pytest.raises(ValueError, match="cannot run: it needs CUDA tensors, got cpu. Use 'sdpa'"):
        model(**make_batch(3))


def test_flash_attention_2_gets_slopes_and_refuses_gaps(monkeypatch):
    """Its ALiBi counts index distances; elsewhere it would be silently wrong."""
    seen = {}

    def kernel(qkv, cu_seqlens, max_seqlen, dropout_p, alibi_slopes):
        seen.update(cu_seqlens=cu_seqlens.tolist(), max_seqlen=max_seqlen, slopes=alibi_slopes)
        return alibi_attention(qkv, cu_seqlens, alibi_slopes)[0].to(qkv.dtype)

    monkeypatch.setattr(bert_layers, "flash_attn_2_varlen_attention", kernel)
    monkeypatch.setattr(bert_layers, "unsupported_reason", lambda *queries: None)
    model, batch = make(BertModel, "flash_attention_2"), make_batch(5, 3)
    with torch.no_grad():
        close(model(**batch).last_hidden_state, make(BertModel)(**batch).last_hidden_state)
    assert seen["cu_seqlens"] == [0, 5, 8] and seen["max_seqlen"] == 5
    assert torch.equal(seen["slopes"], torch.tensor(alibi_slopes(4)))
    batch["attention_mask"][0, 2] = 0
    with pytest.raises(ValueError, match="by index, but this batch has gaps"):
        model(**batch)


def test_an_unknown_backend_is_refused_at_load():
    with pytest.raises(
        ValueError, match="'flex' is not available; choose one of auto, eager, sdpa, triton"
    ):
        make(BertModel, "flex")


def test_set_attn_implementation_takes_effect():
    """transformers ignores it, with a warning, for classes it takes for older ones."""
    model = make(BertForMaskedLM)
    model.set_attn_implementation("eager")
    assert model.bert.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="'nope' is not available"):
        model.set_attn_implementation("nope")


# ---- padding, positions, masks ----


@on_every_backend
def test_padding_does_not_change_real_tokens(backend, device):
    model = make(BertModel, backend).to(device)
    lengths = [1, 63, 128, 129]
    batch = to(device, make_batch(*lengths, seqlen=140))
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for row, n in enumerate(lengths):
            close(together[row, :n], model(batch["input_ids"][row : row + 1, :n])[0][0])
            assert (together[row, n:] == 0).all()


@on_every_backend
def test_the_side_of_the_padding_does_not_matter(backend, device):
    model = make(BertModel, backend).to(device)
    right = to(device, make_batch(5, 9))
    left = {name: x.clone() for name, x in right.items()}
    left["input_ids"][0] = right["input_ids"][0].roll(4)
    left["attention_mask"][0] = right["attention_mask"][0].roll(4)
    with torch.no_grad():
        close(model(**left)[0][0, 4:], model(**right)[0][0, :5])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_ids_of_padding_are_never_looked_up(backend):
    model, batch = make(BertModel, backend), make_batch(3, 5)
    expected = model(**batch)[0]
    batch["input_ids"][0, 3:] = -1
    assert torch.equal(model(**batch)[0], expected)


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_rows_and_batches_without_tokens_give_numbers(cls):
    model = make(cls)
    batch = make_batch(4, 0)
    for rows in (slice(None), slice(1, 2)):
        outputs = model(**{name: x[rows] for name, x in batch.items()}, output_hidden_states=True)
        for x in (outputs[0], *outputs.hidden_states):
            assert x.isfinite().all()
        assert (outputs.hidden_states[-1][-1] == 0).all()


def test_masks_of_every_dtype_are_the_same_mask():
    model, batch = make(BertModel), make_batch(3, 5)
    expected = model(**batch)[0]
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = batch["attention_mask"].to(dtype)
        assert torch.equal(model(batch["input_ids"], mask)[0], expected)


def test_no_mask_equals_a_mask_of_ones():
    model, batch = make(BertForMaskedLM), make_batch(7, 7)
    assert torch.equal(model(batch["input_ids"])[0], model(**batch)[0])


@on_every_backend
def test_packed_sequences_do_not_see_each_other(backend, device):
    """What DataCollatorWithFlattening makes: one row, position_ids that restart, no mask."""
    model, batch = make(BertModel, backend).to(device), to(device, make_batch(6, 1, 9))
    lengths = batch["attention_mask"].sum(1).tolist()
    flat = {
        "input_ids": batch["input_ids"][batch["attention_mask"].bool()][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
    }
    with torch.no_grad():
        packed, padded = model(**flat)[0][0], model(**batch)[0]
    close(packed, padded[batch["attention_mask"].bool()])


@on_every_backend
def test_distances_come_from_position_ids(backend, device):
    """Doubled positions are doubled slopes."""
    batch = {"input_ids": make_batch(12, 12)["input_ids"].to(device)}
    model = make(BertModel, backend).to(device)
    positions = torch.arange(12, device=device)[None]
    with torch.no_grad():
        plain = model(**batch)[0]
        close(model(**batch, position_ids=positions)[0], plain)
        close(model(**batch, position_ids=positions + 5)[0], plain)
        stretched = model(**batch, position_ids=2 * positions)[0]
        assert (stretched - plain).abs().max() > 0.01
    original = bert_layers.alibi_slopes
    bert_layers.alibi_slopes = lambda heads: [2 * x for x in original(heads)]
    try:
        with torch.no_grad():
            close(model(**batch)[0], stretched)
    finally:
        bert_layers.alibi_slopes = original


def test_runs_on_meta_for_shapes_alone():
    model = make(BertForMaskedLM, "eager").to("meta")
    assert model(torch.zeros(2, 5, dtype=int, device="meta")).logits.shape == (2, 5, VOCAB)


def test_longer_inputs_than_prepared_for_just_work():
    model = make(BertModel, alibi_starting_size=8)
    longer = make(BertModel, alibi_starting_size=512)
    ids = make_batch(50)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids)[0], longer(ids)[0])


# ---- outputs ----


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_hidden_states_attentions_and_tuples(cls):
    """The published code ignored all three arguments, and its AutoModel returned a bare tuple."""
    model, batch = make(cls), make_batch(3, 6)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in outputs.hidden_states] == [(2, 6, 64)] * 3
    assert [x.shape for x in outputs.attentions] == [(2, 4, 6, 6)] * 2
    for probs in outputs.attentions:
        # Real queries attend to real keys with weight 1 in all, padding attends to nothing.
        close(probs.sum(-1), batch["attention_mask"][:, None].expand(2, 4, 6).float())
        assert (probs[0, :, :, 3:] == 0).all()
    as_tuple = model(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs.to_tuple())
    assert torch.equal(as_tuple[0], outputs[0])


@pytest.mark.parametrize("setting", ["output_hidden_states", "return_dict"])
def test_the_config_decides_what_arguments_leave_open(setting):
    model, batch = make(BertForMaskedLM), make_batch(3, 6)
    setattr(model.config, setting, not getattr(model.config, setting))
    outputs = model(**batch)
    if setting == "return_dict":
        assert isinstance(outputs, tuple)
    else:
        assert len(outputs.hidden_states) == 3


def test_positional_order_is_transformers_own():
    """Published, the second argument was token_type_ids: silent nonsense."""
    model, batch = make(BertForMaskedLM), make_batch(3, 6)
    types = torch.ones_like(batch["input_ids"])
    by_name = model(**batch, token_type_ids=types)[0]
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"], types)[0], by_name)
    assert not torch.equal(model(**batch)[0], by_name)


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_inputs_embeds_equal_ids(cls):
    """Raised in the published code."""
    model, batch = make(cls), make_batch(3, 6)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
    assert torch.equal(by_embeds, model(**batch)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_half_precision_runs_and_is_near_float32(backend, dtype):
    """A dtype error on the published code's PyTorch path."""
    batch = make_batch(9, 30)
    labels = make_labels(batch)
    exact = make(BertForMaskedLM, backend)(**batch, labels=labels)
    half = make(BertForMaskedLM, backend).to(dtype)
    outputs = half(**batch, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and outputs.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in half.parameters())
    # Rounding once per layer and weight: a few dozen eps of the largest logit.
    error = (outputs.logits.float() - exact.logits).abs().max()
    assert error <= 32 * torch.finfo(dtype).eps * exact.logits.abs().max()


def test_low_precision_layernorm_stays_in_autocasts_dtype():
    """Stock autocast upcasts LayerNorm to float32."""
    batch = make_batch(5, 9)
    seen = {}
    for low in (False, True):
        model = make(BertModel, low_precision_layernorm=low)
        norm = model.encoder.layer[0].mlp.layernorm
        norm.register_forward_hook(lambda m, x, out, low=low: seen.__setitem__(low, out.dtype))
        full = model(**batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**batch)[0].float()
        assert (half - full).abs().max() <= 32 * torch.finfo(torch.bfloat16).eps * full.abs().max()
    assert seen[True] == torch.bfloat16 and seen[False] == torch.float32
    close(model(**batch)[0], make(BertModel)(**batch)[0])


# ---- masked language modelling ----


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


# ---- the other heads ----


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


# ---- bad input ----


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


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="got 64 and 5"):
        MosaicBertConfig(hidden_size=64, num_attention_heads=5)
    for name in ("alibi_starting_size", "vocab_size", "hidden_size", "type_vocab_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MosaicBertConfig(**{name: 0})
    with pytest.raises(ValueError, match="is_decoder must be False"):
        MosaicBertConfig(is_decoder=True)


def test_a_config_changed_after_it_was_made_is_checked_by_the_model():
    config = MosaicBertConfig(alibi_starting_size=128)
    assert config.max_position_embeddings == 128
    config.alibi_starting_size = 2048
    with torch.device("meta"):
        assert BertModel(config).config.max_position_embeddings == 2048
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="got 768 and 5"):
        BertModel(config)


def test_weights_start_as_the_recipe_says():
    """Normal with initializer_range, biases 0, LayerNorm 1 and 0."""
    model = make(BertForMaskedLM, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() > 1000:
            # Four standard errors of a standard deviation.
            assert abs(parameter.std() / 0.05 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


def test_the_mlm_heads_layernorm_has_an_eps_of_its_own():
    model = make(BertForMaskedLM, layer_norm_eps=1e-3)
    norms = {n: m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms.pop("cls.predictions.transform.LayerNorm") == 1e-12
    assert len(norms) == 5 and set(norms.values()) == {1e-3}


def test_dropout_is_where_the_published_model_has_it():
    """After the embeddings, the attention's projection and the gate; before a classifier."""
    model = make(BertForTokenClassification, dropout=0.5).train()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.append((name, tuple(x[0].shape), (y == 0).any()))
            )
    model(**make_batch(5, 3))
    layers = [
        (f"bert.encoder.layer.{i}.{part}", (8, width), True)
        for i in range(2)
        for part, width in (("attention.output.dropout", 64), ("mlp.dropout", 96))
    ]
    # Where hooks look at the embeddings, those of padding are made too.
    ends = [("bert.embeddings.dropout", (2, 5, 64), True)], [("dropout", (2, 5, 64), True)]
    assert seen == [*ends[0], *layers, *ends[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_dropout_drops_each_element_with_probability_p_and_scales_the_rest(p, dtype):
    """Elements share random words, four in each: shares are taken for each place, and for pairs."""
    torch.manual_seed(0)
    x = torch.ones(2**20 + 3, dtype=dtype, requires_grad=True)
    y = Dropout(p).train()(x)
    dropped = (y == 0).double()
    for share, expected, count in (
        *((dropped[i::4].mean(), p, 2**18) for i in range(4)),
        *((dropped[:-i].mul(dropped[i:]).mean(), p * p, 2**20) for i in (1, 2, 3, 4)),
    ):
        # Five standard deviations, and the rounding of p.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5 + 2**-17
    scale = torch.tensor(1 / (1 - round(p * 2**16) / 2**16), dtype=dtype)
    assert y.dtype == dtype and (y[y != 0] == scale).all()
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y)


def test_dropout_is_a_function_of_the_seed_and_does_nothing_in_evaluation():
    x, dropout = torch.ones(5, 7), Dropout(0.5).train()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(dropout(x))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x) and not Dropout(1.0).train()(x).any()
    assert Dropout(0.5).train()(x[:0]).shape == (0, 7)


# ---- training machinery ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_each_layer_once_more_and_changes_no_gradient(reentrant):
    """Raised in the published code. Layers are transformers' GradientCheckpointingLayer, which
    tools look for that switch it layer by layer."""
    batch = make_batch(5, 9)
    grads, runs = [], collections.Counter()
    for checkpointing in (False, True):
        model = make(BertForMaskedLM).train()
        # As reentrant checkpointing needs; it also shows the embeddings' padding to its hook.
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for i, layer in enumerate(model.bert.encoder.layer):
            assert isinstance(layer, GradientCheckpointingLayer)
            key = checkpointing, i
            layer.mlp.register_forward_pre_hook(lambda *_, key=key: runs.update([key]))
        model(**batch, labels=make_labels(batch)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert runs == {(False, 0): 1, (False, 1): 1, (True, 0): 2, (True, 1): 2}
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_can_be_switched_layer_by_layer():
    model, runs = make(BertForMaskedLM).train(), collections.Counter()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.bert.encoder.layer[0].gradient_checkpointing = False
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    batch = make_batch(5, 9)
    model(**batch, labels=make_labels(batch)).loss.backward()
    assert runs == {0: 1, 1: 2}


TRAIN_TWO_STEPS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_modeling import train_two_steps
train_two_steps(sys.argv[2], rank=int(sys.argv[3]), world=2)
"""


def train_two_steps(folder, rank=0, world=1):
    """Saves losses and parameters. With world > 1, process `rank` holds a share of the parameters
    and takes its share of each batch's rows."""
    model = make(BertForMaskedLM).train()
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            # Or one process would wait half an hour for another that failed.
            timeout=datetime.timedelta(seconds=60),
        )
        for module in (*model.bert.encoder.layer, model):
            torch.distributed.fsdp.fully_shard(module)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for lengths in ((9, 5, 12, 3), (4, 12, 2, 8)):
        batch = make_batch(*lengths)
        batch["labels"] = make_labels(batch)
        # Gradients are averaged over processes.
        count = (batch["labels"] != -100).sum() / world
        rows = {name: x.chunk(world)[rank] for name, x in batch.items()}
        loss = model(**rows, num_items_in_batch=count).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    state = model.state_dict()
    if world > 1:
        torch.distributed.all_reduce(losses)
        losses /= world
        state = {name: x.full_tensor() for name, x in state.items()}
        torch.distributed.destroy_process_group()
    if rank == 0:
        torch.save({"losses": losses, **state}, f"{folder}/{world}.pt")


def test_fully_shard_trains_as_one_process_does(tmp_path):
    """Two processes; the decoder stays tied, and its loss gets whole weights."""
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(run_python, TRAIN_TWO_STEPS, ROOT / "tests", tmp_path, i) for i in (0, 1)
        ]
        for rank in ranks:
            rank.result()
    train_two_steps(tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys() and one["losses"].shape == (2,)
    for name, x in one.items():
        close(two[name], x)


def compiled_graphs(model, batches, backend="aot_eager", **options):
    """Compiles model, compares it on each batch, gradients too where it trains, and explains."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, **options)
    for batch in batches:
        expected, outputs = model(**batch), compiled(**batch)
        close(outputs[0], expected[0])
        if outputs.get("loss") is not None:
            gradients = [
                torch.autograd.grad(x.loss, list(model.parameters())) for x in (expected, outputs)
            ]
            for a, b in zip(*gradients, strict=True):
                close(b, a)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_without_a_mask_is_one_graph_for_all_shapes(cls):
    batches = [
        {"input_ids": make_batch(*[n] * b)["input_ids"]} for b, n in ((2, 16), (3, 24), (4, 7))
    ]
    assert compiled_graphs(make(cls), batches, fullgraph=True, dynamic=True) == 1


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_with_a_mask_breaks_once_and_never_recompiles(cls):
    """One graph behind the unpadding, and for a classifier one more behind the encoder's end."""
    lengths = ((16, 3), (9, 9), (16, 16), (5, 16), (2, 7))
    batches = [make_batch(*x, seqlen=16) for x in lengths]
    assert compiled_graphs(make(cls), batches) <= 2


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_with_a_mask_makes_its_graphs_once_more_when_the_padded_shape_changes(cls):
    """By then torch knows that shapes vary; later ones cost nothing."""
    batches = [make_batch(*x) for x in ((16, 3), (9, 9, 2), (30, 7, 3, 4), (8, 5), (12, 11, 10))]
    graphs = [compiled_graphs(make(cls), batches[:n]) for n in (3, 5)]
    assert graphs[0] == graphs[1] <= 8


# Another copy of bert_padding has a class of its own.
FOREIGN = collections.namedtuple("PackedBatch", PackedBatch._fields)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "handed_over", [lambda x: x, lambda x: x._asdict(), lambda x: FOREIGN(*x)],
    ids=["PackedBatch", "dict", "foreign"],
)  # fmt: skip
def test_a_batch_packed_before_gives_what_a_mask_gives(handed_over, training):
    model = make(BertForMaskedLM).train(training)
    expected = model(**make_batch(3, 9, 5), labels=collate(3, 9, 5)["labels"])
    inputs = collate(3, 9, 5)
    outputs = model(**{**inputs, "batch": handed_over(inputs["batch"])})
    assert torch.equal(outputs.loss, expected.loss)
    assert training or torch.equal(outputs.logits, expected.logits)


def test_trainer_takes_a_batch_packed_before_as_a_dict(tmp_path):
    """It rebuilds every tuple from one iterable, which a NamedTuple refuses."""
    losses = []
    for packed in (True, False):

        def collator(rows, packed=packed):
            inputs = collate(*rows)
            if packed:
                return inputs | {"batch": inputs["batch"]._asdict()}
            return make_batch(*rows) | {"labels": inputs["labels"]}

        trainer = Trainer(
            make(BertForMaskedLM),
            TrainingArguments(
                tmp_path,
                max_steps=3,
                per_device_train_batch_size=2,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
            ),
            train_dataset=[3, 9, 12, 5, 8, 7],
            eval_dataset=[11, 4],
            data_collator=collator,
        )
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("handed_over", [tuple, dict])
def test_compile_with_a_batch_packed_before_is_one_graph(handed_over):
    """From ids to gradients, whatever the shape and the numbers of tokens, sequences and labels.

    A graph cannot wait for the device, nor make a tensor whose size only the data knows.
    """
    lengths = ((16, 3), (9, 9, 2), (5, 16, 4, 4), (12, 7), (30, 7, 9), (6, 5, 4, 3, 2))
    batches = [collate(*x) for x in lengths]
    if handed_over is dict:
        batches = [{**x, "batch": x["batch"]._asdict()} for x in batches]
    assert len({(x["labels"] != -100).sum().item() for x in batches}) > 3
    model = make(BertForMaskedLM).train()
    assert compiled_graphs(model, batches, fullgraph=True, dynamic=True) == 1
    assert compiled_graphs(model, batches, fullgraph=True) <= 3


class OneDevice(TorchDispatchMode):
    """Fails on operators that mix devices, as a copy from the CPU does, which a GPU waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, outputs))
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        # A single number on the CPU is handed to the kernel, unless it is copied.
        devices = {x.device for x in tensors if x.dim() or "copy" in func.name()}
        assert len(devices) <= 1, f"{func.name()} mixes {devices}"
        return outputs


NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel wants CUDA tensors"
)


@NEEDS_INTERPRETER
@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)], ids=str)
def test_a_step_with_a_batch_packed_before_never_waits_for_the_device(monkeypatch, count):
    """On tensors without data, so that looking at any raises."""
    # Which raises for meta.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = make(BertForMaskedLM, "triton").to("meta").train()
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(to_meta, collate(5, 140))
    # Builds its tensor on the CPU, unseen by OneDevice.
    monkeypatch.setattr(torch, "tensor", lambda *x, **y: pytest.fail("copies from the CPU"))
    with OneDevice():
        model(**inputs, num_items_in_batch=count).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    # What is done for a mask would have raised.
    mask = torch.ones(2, 140, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        bert_padding._find_sequences(inputs["input_ids"], mask, None, None, False)


@pytest.mark.gpu
def test_a_step_with_a_batch_packed_before_never_waits_for_a_gpu():
    model = make(BertForMaskedLM, "triton").to("cuda").train()
    to_gpu = lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(to_gpu, collate(5, 140))
    model(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "device, backend",
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_compile_in_training_never_recompiles_as_tokens_and_labels_change(device, backend):
    lengths = ((16, 3), (9, 9), (16, 16), (5, 16), (12, 7))
    batches = [make_batch(*x, seqlen=16) for x in lengths]
    batches = [{**x, "labels": make_labels(x)} for x in batches]
    assert all((x["labels"] != -100).sum() > 1 for x in batches)
    model, batches = make(BertForMaskedLM).to(device).train(), [to(device, x) for x in batches]
    assert compiled_graphs(model, batches, backend) == 1


def test_the_compiled_attention_operator_is_sound():
    torch.manual_seed(0)
    qkv = torch.randn(12, 3, 2, 8, requires_grad=True)
    batch = pack_batch(torch.zeros(2, 8), torch.tensor([[1] * 8, [1] * 4 + [0] * 4]))
    for positions in (None, torch.arange(12, dtype=torch.int32).square()):
        for dropout_p in (0.0, 0.5):
            options = (batch.cu_seqlens, torch.tensor([0.5, 0.25]), positions, dropout_p)
            arguments = (qkv, *options, torch.tensor([7]))
            torch.library.opcheck(bert_layers.sdpa_varlen_op, arguments)


def test_the_operator_leaves_other_random_numbers_alone():
    qkv, cu_seqlens = torch.randn(4, 3, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    bert_layers.sdpa_varlen_op(qkv, cu_seqlens, torch.ones(1), None, 0.5, torch.tensor([7]))
    assert torch.equal(torch.rand(3), expected)


def test_the_operator_refuses_to_drop_where_it_could_not_repeat_it():
    drawn = bert_layers.drawn_from(torch.tensor([7]), torch.device("xpu"))
    with pytest.raises(ValueError, match="repeat attention dropout on xpu: use .*'eager'"), drawn:
        pass


def test_the_operators_gradient_drops_what_its_forward_dropped():
    torch.manual_seed(0)
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    batch = pack_batch(torch.zeros(2, 4), torch.tensor([[1] * 4, [1] * 3 + [0]]))

    def attend(qkv):
        slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
        seed = torch.tensor([7])
        return bert_layers.sdpa_varlen_op(qkv, batch.cu_seqlens, slopes, None, 0.5, seed)

    assert torch.equal(attend(qkv), attend(qkv))
    assert torch.autograd.gradcheck(attend, qkv)


def test_compile_with_attention_dropout_is_one_graph():
    """Every published MosaicBERT config has a rate of 0.1."""
    model = make(BertForMaskedLM, attention_probs_dropout_prob=0.1).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ((16, 3), (9, 9), (16, 16), (5, 16), (12, 7), (13, 7), (8, 8)):
        batch = make_batch(*lengths, seqlen=16)
        compiled(**batch, labels=make_labels(batch)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_two_copies_of_the_code_work_side_by_side():
    """One process may load two repositories; an operator's name belongs to one definition only."""
    copy = types.ModuleType("another_repository")
    copy.__path__ = [str(ROOT)]
    sys.modules["another_repository"] = copy
    other = importlib.import_module("another_repository.bert_layers")
    assert other is not bert_layers
    batch = make_batch(5, 3)
    for module in (bert_layers, other, bert_layers):
        model = make(module.BertModel)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(**batch)[0], model(**batch)[0])


def test_every_public_name_has_a_docstring():
    missing = [
        name
        for name, x in vars(bert_layers).items()
        if getattr(x, "__module__", None) == bert_layers.__name__
        and (isinstance(x, type) or callable(x))
        and not (x.__doc__ or "").strip()
        and not name.startswith("_")
    ]
    assert not missing
