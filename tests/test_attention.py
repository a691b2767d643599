# SPDX-License-Identifier: Apache-2.0
"""bert_layers: slopes, biases, the attention backends and how one is chosen."""

import pytest
import torch
from conftest import needs_triton, on_every_backend, to
from models import close, make, make_batch
from reference import alibi_attention, assert_as_close, slopes

from mosaic_bert import bert_layers
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertModel,
    alibi_slopes,
    choose_backend,
)
from mosaic_bert.bert_padding import PackedBatch


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
    assert all(bias.untyped_storage().nbytes() == 4 * 1023 * 4 for bias in biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 1e4], ids=str)
@pytest.mark.parametrize("lengths", [[700], [129, 700, 700]], ids=str)
def test_keys_out_of_reach_weigh_nothing(lengths, size, dtype, monkeypatch):
    """Small queries reach a few keys, large ones all; keys far from 0, as trained ones are, are
    still seen to lie close to each other."""
    monkeypatch.setattr(bert_layers, "LONG", 512)
    monkeypatch.setattr(bert_layers, "QUERIES", 64)
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *x: (
            seen.append(x[0].shape[0] * x[0][0, ..., 0].numel() * x[1].shape[2]) or attend(*x)
        ),
    )
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 12, 16, generator=generator)
    qkv[:, 0] *= size
    qkv[:, 1] += 5 * torch.randn(12, 16, generator=generator)
    qkv, cu_seqlens = qkv.to(dtype), torch.tensor([0, *lengths]).cumsum(0)
    all_slopes = torch.tensor(alibi_slopes(12), dtype=torch.promote_types(dtype, torch.float32))
    found = bert_layers.sdpa_varlen(qkv, cu_seqlens, all_slopes, None, 0.0)
    scores, seen[:] = sum(seen), []
    plain = bert_layers.sdpa_varlen(qkv.requires_grad_(), cu_seqlens, all_slopes, None, 0.0)
    oracle, _ = alibi_attention(qkv.detach().double(), cu_seqlens, slopes(12), None)
    # What is left out weighs half an eps.
    assert_as_close(found, plain.detach(), oracle, factor=2)
    left = scores / sum(seen)
    assert (
        left < 0.8
        if size == 0.1
        else left < 1
        if size == 1
        else left <= 1
        if size == 3
        else left == 1
    )


def test_queries_read_the_keys_within_reach_of_any_of_them(monkeypatch):
    """Without scores or slopes each context is the mean of the values that were read."""
    monkeypatch.setattr(bert_layers, "QUERIES", 16)
    monkeypatch.setattr(bert_layers, "alibi_reach", lambda *x: [3, 45])
    place = torch.arange(50.0)
    value = place.view(1, 1, 50, 1).expand(1, 2, 50, 8)
    zeros = torch.zeros(1, 2, 50, 8)
    bias = torch.zeros(1, 2, 50, 50)
    found = bert_layers.attention_within_reach(zeros, zeros, value.flip(2), bias, torch.ones(2))
    read = [range(0, 19), range(13, 35), range(29, 50), range(45, 50)]
    means = [sum(read[i // 16]) / len(read[i // 16]) for i in range(50)]
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor(means))
    torch.testing.assert_close(found[0, 1], torch.full((50, 8), 24.5))


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_reach_is_a_bound_of_keys_that_ally_against_it(scale):
    """The mass beyond it, by its definition: far keys lie along the queries, near ones against
    them."""
    generator = torch.Generator().manual_seed(1)
    query = scale * torch.randn(1, 8, 1, 8, generator=generator).repeat(1, 1, 400, 1)
    sign = torch.where(torch.arange(400) < 40, -1.0, 1.0)[:, None]
    key = sign * query / query.norm(dim=-1, keepdim=True) * scale
    all_slopes = torch.tensor(alibi_slopes(8))
    reach = torch.tensor(bert_layers.alibi_reach(query, key, all_slopes))
    assert (reach.diff() >= 0).all() and reach[0] < 400
    place = torch.arange(400)
    distance = (place[:, None] - place).abs()
    scores = (query.double() @ key.double().mT) * 8**-0.5
    weight = (scores - all_slopes.double()[:, None, None] * distance).exp()
    beyond = (weight * (distance >= reach[:, None, None])).sum(-1)
    own = weight.diagonal(dim1=-2, dim2=-1)
    assert (beyond <= 2**-24 * own).all() and (beyond > 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nothing_is_left_out_where_norms_have_no_bound(value):
    query = torch.ones(1, 4, 50, 8)
    key = query.clone()
    key[0, :, 7] = value
    assert bert_layers.alibi_reach(query, key, torch.tensor(alibi_slopes(4))) == [50] * 4


def test_the_bias_is_alibis_against_reversed_keys():
    window = bert_layers.alibi_window(torch.tensor(alibi_slopes(12)), 65_536)
    bias = bert_layers.bias_for_reversed_keys(window, 65_536)
    assert bias.shape == (1, 12, 65_536, 65_536)
    assert bias.untyped_storage().nbytes() == 12 * 131_071 * 4
    # Against reversed keys, column 65,535 is key 0.
    assert bias[0, 0, 100, 65_535] == -100 * alibi_slopes(12)[0]


@needs_triton
def test_triton_shares_one_tile_map_among_layers(monkeypatch):
    """Under the interpreter, here, which is also where a CPU tensor may reach the kernel."""
    maps, build = [], bert_layers.build_tile_map
    monkeypatch.setattr(bert_layers, "build_tile_map", lambda *x: maps.append(build(*x)) or maps[0])
    batch = make_batch(5, 140)
    with torch.no_grad():
        ours = make(BertModel, "triton")(**batch)[0]
        close(ours, make(BertModel, "eager")(**batch)[0])
    assert len(maps) == 1


@needs_triton
def test_triton_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' cannot run: it needs CUDA tensors, got cpu"):
        make(BertModel, "triton")(**make_batch(3))


@needs_triton
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
    assert seen["cu_seqlens"] == [0, 5, 8] and seen["max_seqlen"] == 64
    assert torch.equal(seen["slopes"], torch.tensor(alibi_slopes(4)))
    batch["attention_mask"][0, 2] = 0
    with pytest.raises(ValueError, match="by index, but this batch has gaps"):
        model(**batch)


def test_an_unknown_backend_is_refused_at_load():
    with pytest.raises(
        ValueError, match="'flex' is not available; choose one of auto, eager, sdpa"
    ):
        make(BertModel, "flex")


def test_set_attn_implementation_takes_effect():
    """transformers ignores it, with a warning, for classes it takes for older ones."""
    model = make(BertForMaskedLM)
    model.set_attn_implementation("eager")
    assert model.bert.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="'nope' is not available"):
        model.set_attn_implementation("nope")
