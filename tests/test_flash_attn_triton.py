# SPDX-License-Identifier: Apache-2.0
"""The kernel against a float64 oracle: in Triton's interpreter on a CPU, compiled on a GPU.

    pytest tests/test_flash_attn_triton.py               # two and a half minutes on one core
    pytest tests/test_flash_attn_triton.py -m slow -s    # all kernels compiled, figures shown
    pytest tests/test_flash_attn_triton.py -m gpu        # what needs a GPU, in minutes
    pytest tests/test_flash_attn_triton.py -m "gpu and slow"    # other head_dims, and fp32
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \\
        python -m pytest tests/test_flash_attn_triton.py -m gpu -k "dropout and bfloat16"

The interpreter computes bf16 dot products wrongly and ignores tf32, so bf16 is tested on GPUs only.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import alibi_attention, assert_as_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mosaic_bert import flash_attn_triton as module
from mosaic_bert.flash_attn_triton import build_tile_map, flash_attn_varlen_qkvpacked_func

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (BLOCK_M, BLOCK_N): small tiles make short rows cross many of them. The first set has no tile
# shape twice.
TILES = {
    "mixed": dict(forward=(32, 16), dq=(16, 32), dkdv=(16, 64), block=(16, 16)),
    "square": dict(forward=(32, 32), dq=(32, 32), dkdv=(32, 32), block=(16, 16)),
    "block": dict(forward=(64, 64), dq=(64, 64), dkdv=(64, 64), block=(128, 128)),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh buffers with NaN, so that an element nobody writes fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def use_tiles(patch, name):
    tiles = TILES[name]
    if DEVICE == "cuda":
        # Compiled for fp32, scores of 128 by 128 do not fit in registers.
        tiles = tiles | dict(block=min(tiles["block"], (64, 64)))
    patch.setattr(module, "tile_shape", lambda qkv, direction: (*tiles[direction], 4, 1))


@pytest.fixture(params=["mixed", "block"])
def tiles(request, monkeypatch):
    """Two-pass backward and one-block backward."""
    use_tiles(monkeypatch, request.param)


def make_batch(lengths, heads, head_dim, dtype=torch.float32, seed=0):
    """qkv as a leaf, cu_seqlens, slopes of a kind, and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(total, 3, heads, head_dim, generator=generator).to(dtype)
    dout = torch.randn(total, heads, head_dim, generator=generator).to(dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return (
        qkv.to(DEVICE).requires_grad_(),
        cu_seqlens.to(DEVICE),
        slopes.to(DEVICE),
        dout.to(DEVICE),
    )


def make_holes(lengths, seed=0):
    """Positions of the tokens that a mask with holes keeps: rising, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(1, 4, (length,), generator=generator).cumsum(0) for length in lengths]
    return torch.cat(steps).to(torch.int32).to(DEVICE)


def oracle_of(qkv, dout, *args, dtype=torch.float64, **kwargs):
    """The reference's out, lse and dqkv, with arithmetic in `dtype`."""
    leaf = qkv.detach().to(dtype).requires_grad_()
    out, lse = alibi_attention(leaf, *args, dtype=dtype, **kwargs)
    out.backward(dout.to(dtype))
    return out.detach(), lse.detach(), leaf.grad


def kernel_of(qkv, dout, cu_seqlens, **kwargs):
    """The kernel's out, lse and dqkv."""
    leaf = qkv.detach().requires_grad_()
    max_seqlen = kwargs.pop("max_seqlen", int(cu_seqlens.diff().max()))
    out, lse = flash_attn_varlen_qkvpacked_func(
        leaf, cu_seqlens, max_seqlen, return_lse=True, **kwargs
    )
    out.backward(dout)
    assert not lse.requires_grad
    return out.detach(), lse, leaf.grad


def assert_matches(qkv, dout, cu_seqlens, slopes=None, position_ids=None, mask=None, **kwargs):
    """Forward, log-sum-exp and gradients, by the error rule."""
    kernel = kernel_of(
        qkv, dout, cu_seqlens, alibi_slopes=slopes, position_ids=position_ids, **kwargs
    )
    reference = dict(slopes=slopes, position_ids=position_ids, dropout_mask=mask)
    reference["softmax_scale"] = kwargs.get("softmax_scale")
    oracle = oracle_of(qkv, dout, cu_seqlens, **reference)
    plain = oracle_of(qkv, dout, cu_seqlens, dtype=qkv.dtype, **reference)
    assert kernel[1].dtype == torch.float32
    assert_as_close(kernel[0], plain[0], oracle[0], 2)
    assert_as_close(kernel[1].to(qkv.dtype), plain[1], oracle[1], 2)
    assert_as_close(kernel[2], plain[2], oracle[2], 3)
    return kernel


@pytest.mark.skipif(DEVICE != "cpu", reason="hours of compilation: -m gpu has others")
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 2, 15, 16, 17, 31, 63, 64, 65]), min_size=1, max_size=3
    ).filter(any),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 16, 24, 40, 64, 72, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    bias=st.sampled_from(["none", "alibi", "alibi", "holes"]),
    scale=st.sampled_from([None, 0.125]),
    tiles=st.sampled_from(sorted(TILES)),
    skip=st.booleans(),
)
def test_output_and_gradients_match_the_oracle(
    lengths, heads, head_dim, dtype, bias, scale, tiles, skip
):
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, heads, head_dim, dtype)
    slopes = None if bias == "none" else slopes
    position_ids = make_holes(lengths) if bias == "holes" else None
    options = dict(
        softmax_scale=scale,
        skip_far_tiles=skip,
        max_seqlen=max(lengths) if tiles == "block" else 200,
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, tiles)
        patch.setattr(module, "SKIP_ABOVE", 1)
        assert_matches(qkv, dout, cu_seqlens, slopes, position_ids, **options)


@pytest.mark.parametrize("lengths,heads", [([1, 63, 128], 8), ([129, 0, 1], 12)], ids=str)
def test_tiles_of_the_table_match_the_oracle(lengths, heads):
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, heads, 64, torch.float16)
    tile_map = build_tile_map(cu_seqlens, sum(lengths))
    assert_matches(qkv, dout, cu_seqlens, slopes, tile_map=tile_map)


@pytest.mark.parametrize("heads", [1, 3, 7])
def test_odd_numbers_of_heads_match_the_oracle(heads, tiles):
    qkv, cu_seqlens, slopes, dout = make_batch([20, 1], heads, 8)
    assert_matches(qkv, dout, cu_seqlens, slopes)


def test_fp32_gradients_hold_at_large_scores(tiles):
    """The one-block backward was 9 times as far off as PyTorch: its rows of p sum to 1 + e."""
    for seed in range(3):
        # Of one sequence PyTorch's error may be a third of the usual by chance, on some CPUs.
        qkv, cu_seqlens, slopes, dout = make_batch([40] * 8, 2, 16, seed=seed)
        assert_matches(qkv, dout, cu_seqlens, slopes, softmax_scale=2.0)


def test_distances_stay_exact_at_65536_tokens(monkeypatch):
    """With positions counted from 0 in fp32, neighbours at 65k would be off by 2**-8."""
    qkv, cu_seqlens, slopes, dout = make_batch([40], 2, 16)
    near = torch.arange(40, dtype=torch.int32, device=DEVICE)
    far = near + 2**24 + 1
    use_tiles(monkeypatch, "mixed")
    at_zero = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes, position_ids=near)
    at_far = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes, position_ids=far)
    for one, other in zip(at_zero, at_far, strict=True):
        assert torch.equal(one, other)


# Batches


@pytest.mark.parametrize("lengths,max_seqlen", [([0], 0), ([0], 128), ([0, 0, 0], 2048)], ids=str)
def test_a_batch_without_tokens(lengths, max_seqlen):
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, 2, 16)
    out, lse, dqkv = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes, max_seqlen=max_seqlen)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0) and dqkv.shape == (0, 3, 2, 16)


def test_a_sequence_does_not_see_its_batch(tiles):
    lengths = [20, 0, 65, 1]
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, 2, 16)
    out, lse, dqkv = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    begin, end = 20, 85
    alone = torch.tensor([0, 65], dtype=torch.int32, device=DEVICE)
    single = kernel_of(qkv[begin:end], dout[begin:end], alone, alibi_slopes=slopes)
    assert torch.equal(single[0], out[begin:end])
    assert torch.equal(single[1], lse[:, begin:end])
    assert torch.equal(single[2], dqkv[begin:end])


def test_tile_map_covers_every_row_once_longest_sequence_first():
    lengths = [5, 0, 300, 128, 129, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tiles = build_tile_map(cu_seqlens, sum(lengths)).tolist()
    real = [(sequence, start) for sequence, start in tiles if start < lengths[sequence]]
    expected = [(b, start) for b, n in enumerate(lengths) for start in range(0, n, 128)]
    assert sorted(real) == expected
    counts = [-(-lengths[sequence] // 128) for sequence, _ in real]
    assert counts == sorted(counts, reverse=True)
    assert len(tiles) == -(-sum(lengths) // 128) + len(lengths)


def test_any_strides_give_the_same_bits(tiles):
    qkv, cu_seqlens, slopes, dout = make_batch([30, 17], 2, 24)
    expected = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    # Head first in memory, with room between rows; a gradient expanded from one row.
    spread = torch.full((2, 3, 47, 40), float("nan"), device=DEVICE)
    spread[..., :24] = qkv.detach().permute(2, 1, 0, 3)
    view = spread[..., :24].permute(2, 1, 0, 3)
    actual = kernel_of(view, dout, cu_seqlens, alibi_slopes=slopes)
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    row = dout[:1].contiguous()
    expanded = kernel_of(qkv, row.expand_as(dout), cu_seqlens, alibi_slopes=slopes)
    repeated = kernel_of(qkv, row.repeat(47, 1, 1), cu_seqlens, alibi_slopes=slopes)
    assert torch.equal(expanded[2], repeated[2])


@pytest.mark.parametrize("axis", ["token", "part", "head"])
def test_more_than_two_to_the_31_elements(axis, tiles):
    """Memory is only reserved, not touched, so a view with large strides needs no 4 GB."""
    torch.use_deterministic_algorithms(False)
    sizes = {"token": (65, 3, 1), "part": (20, 3, 1), "head": (20, 3, 5)}[axis]
    strides = {
        "token": (2**25 + 16, 16, 48),
        "part": (16, 2**30 + 2**20, 16),
        "head": (48, 16, 2**29 + 2**10),
    }[axis]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    assert last > 2**31
    qkv, cu_seqlens, slopes, dout = make_batch([sizes[0]], sizes[2], 16, torch.float16)
    view = torch.empty(last + 16, dtype=torch.float16, device=DEVICE).as_strided(
        (*sizes, 16), (*strides, 1)
    )
    view.copy_(qkv.detach())
    expected = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    # No leaf of our own: the gradient would be laid out like the view, with all its gaps.
    inputs = (cu_seqlens, None, slopes, None, None, sizes[0], 0.0, 0.25, False)
    out, lse, norms = module._forward(view, *inputs)
    dqkv = module._backward(dout, view, out, lse, norms, *inputs)
    for one, other in zip(expected, (out, lse * module.LN2.value, dqkv), strict=True):
        assert torch.equal(one, other)


# Far tiles


def test_far_tiles_are_not_read(monkeypatch):
    """NaN far away reaches the result only where the tiles are visited."""
    use_tiles(monkeypatch, "block")
    monkeypatch.setattr(module, "SKIP_ABOVE", 1)
    qkv, cu_seqlens, _, dout = make_batch([256], 1, 16)
    slopes = torch.tensor([2.0], device=DEVICE)
    for forward in (True, False):
        poisoned, poisoned_dout = qkv.detach().clone(), dout.clone()
        (poisoned[:, 2] if forward else poisoned_dout)[192:] = float("nan")
        for skip in (True, False):
            out, _, dqkv = kernel_of(
                poisoned, poisoned_dout, cu_seqlens, alibi_slopes=slopes, skip_far_tiles=skip
            )
            touched = out if forward else dqkv[:, 1:]
            assert touched[:128].isfinite().all() if skip else touched[:128].isnan().all()


@pytest.mark.parametrize("holes", [False, True], ids=["dense", "holes"])
def test_skipping_long_rows_matches_the_oracle(monkeypatch, holes):
    use_tiles(monkeypatch, "block")
    monkeypatch.setattr(module, "SKIP_ABOVE", 256)
    lengths = [300, 3]
    qkv, cu_seqlens, _, dout = make_batch(lengths, 2, 16)
    slopes = torch.tensor([2.0, 0.5], device=DEVICE)
    position_ids = make_holes(lengths) if holes else None
    assert_matches(qkv, dout, cu_seqlens, slopes, position_ids)


def test_a_far_key_that_outweighs_its_distance_is_seen(monkeypatch):
    """With large norms the bound must keep what a fixed distance would leave out."""
    use_tiles(monkeypatch, "block")
    monkeypatch.setattr(module, "SKIP_ABOVE", 256)
    qkv, cu_seqlens, _, dout = make_batch([300], 2, 16, torch.float16)
    qkv = qkv.detach()
    qkv[5, 0] = 16 * qkv[5, 0].sign()
    qkv[290, 1] = qkv[5, 0]
    slopes = torch.tensor([1.0, 0.5], device=DEVICE)
    out, _, _ = assert_matches(qkv, dout, cu_seqlens, slopes)
    torch.testing.assert_close(out[5], qkv[290, 2])


def test_slopes_that_bound_nothing_skip_nothing(monkeypatch):
    use_tiles(monkeypatch, "square")
    monkeypatch.setattr(module, "SKIP_ABOVE", 1)
    qkv, cu_seqlens, _, dout = make_batch([100], 3, 16)
    slopes = torch.tensor([0.0, -0.01, 1e-30], device=DEVICE)
    assert_matches(qkv, dout, cu_seqlens, slopes)


# Dropout


def read_mask(lengths, heads, p, seed, tiles):
    """Every sequence's dropout mask (heads, seqlen, seqlen), read back through V = identity."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, tiles)
        total = sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
        qkv = torch.zeros(total, 3, heads, 128, device=DEVICE)
        for begin, length in zip(cu_seqlens.tolist(), lengths, strict=False):
            qkv[begin : begin + length, 2] = torch.eye(length, 128, device=DEVICE)[:, None]
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max(lengths), p, seed=seed)
        # All scores are 0, so every weight is 1 / seqlen and what is left is the mask.
        return [
            (part * len(part)).transpose(0, 1)[..., : len(part)]
            for part in out.split(lengths)
            if len(part)
        ]


def seed_of(value):
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def test_dropout_is_a_pure_function_of_the_seed():
    lengths, p = [100, 37], 0.3
    masks = read_mask(lengths, 2, p, seed_of(2**40 + 1), "mixed")
    for tiles in ("square", "block"):
        others = read_mask(lengths, 2, p, seed_of(2**40 + 1), tiles)
        assert all(torch.equal(a != 0, b != 0) for a, b in zip(masks, others, strict=True))
    for value in (1, 2**40, 2**41 + 1):
        others = read_mask(lengths, 2, p, seed_of(value), "block")
        assert not any(torch.equal(a != 0, b != 0) for a, b in zip(masks, others, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    masks = read_mask([128] * 4, 4, p, seed_of(7), "block")
    drawn = torch.stack(masks) == 0  # (batch, heads, seqlen, seqlen)
    kept = torch.stack(masks)[~drawn]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    count = drawn.numel()
    sigma = (p * (1 - p) / count) ** 0.5
    assert abs(drawn.double().mean().item() - p) < 4 * sigma


def test_dropout_masks_are_white_and_unlike_each_other():
    """No pair of weights is correlated, at any distance, within a head or between two of them.

    For a sum of n products of signs, a z beyond 6 has a chance of 2e-9; there are half a million.
    The hash without its third product comes to 7.5.
    """
    masks = torch.stack(read_mask([128] * 4, 8, 0.5, seed_of(7), "block")).flatten(0, 1)
    spectrum = torch.fft.fft2((masks == 0).double() * 2 - 1)  # (batch * heads, seqlen, seqlen)
    within = torch.fft.ifft2(spectrum.abs().square().mean(0)).real * len(masks) ** 0.5 / 128
    assert within[0, 0] > 700
    within[0, 0] = 0
    between = torch.fft.ifft2(spectrum * spectrum.roll(1, 0).conj()).real / 128
    assert within.abs().max() < 6 and between.abs().max() < 6


def test_dropout_gradients_match_the_oracle_with_the_same_mask(tiles):
    """The mask of the forward pass is what all backward kernels use."""
    lengths, p, seed = [65, 1, 40], 0.4, seed_of(123)
    mask = read_mask(lengths, 2, p, seed, "square")
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, 2, 16)
    assert_matches(qkv, dout, cu_seqlens, slopes, mask=mask, dropout_p=p, seed=seed)


def test_two_runs_agree_to_the_bit(monkeypatch, tiles):
    monkeypatch.setattr(module, "SKIP_ABOVE", 1)
    qkv, cu_seqlens, slopes, dout = make_batch([70, 40], 2, 16)
    options = dict(alibi_slopes=slopes, dropout_p=0.2, seed=seed_of(5))
    first, second = (kernel_of(qkv, dout, cu_seqlens, **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# PyTorch


@pytest.mark.parametrize("bias", ["none", "alibi", "everything"])
def test_operators_pass_opcheck(monkeypatch, bias):
    use_tiles(monkeypatch, "square")
    torch.use_deterministic_algorithms(False)
    qkv, cu_seqlens, slopes, dout = make_batch([40, 3], 1, 8)
    everything = bias == "everything"
    inputs = (
        cu_seqlens,
        build_tile_map(cu_seqlens, 43),
        None if bias == "none" else slopes,
        make_holes([40, 3]) if everything else None,
        seed_of(3) if everything else None,
        40,
        0.1 if everything else 0.0,
        8**-0.5,
        everything,
    )
    torch.library.opcheck(module._forward, (qkv, *inputs))
    saved = [tensor.detach() for tensor in module._forward(qkv, *inputs)]
    torch.library.opcheck(module._backward, (dout, qkv.detach(), *saved, *inputs))


def test_compiles_in_one_graph_for_any_total(monkeypatch):
    use_tiles(monkeypatch, "square")
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(qkv, cu_seqlens, slopes, seed):
        return flash_attn_varlen_qkvpacked_func(
            qkv * 2, cu_seqlens, 256, 0.1, alibi_slopes=slopes, seed=seed
        )

    for lengths in ([40, 3], [30, 20]):
        qkv, cu_seqlens, slopes, dout = make_batch(lengths, 1, 8)
        torch._dynamo.mark_dynamic(qkv, 0)
        out = attend(qkv, cu_seqlens, slopes, seed_of(1))
        out.backward(dout)
        eager = kernel_of(
            qkv.detach() * 2, dout, cu_seqlens, alibi_slopes=slopes, dropout_p=0.1,
            seed=seed_of(1), max_seqlen=256,
        )  # fmt: skip
        assert torch.equal(out, eager[0]) and torch.equal(qkv.grad, eager[2] * 2)
    assert counter.frame_count == 1


def test_checkpointing_repeats_the_dropout():
    qkv, cu_seqlens, slopes, dout = make_batch([50, 9], 2, 16)

    def attend(qkv):
        return flash_attn_varlen_qkvpacked_func(qkv * 1, cu_seqlens, 50, 0.3, alibi_slopes=slopes)

    def gradient(run, seed, *args, **kwargs):
        torch.manual_seed(seed)
        leaf = qkv.detach().requires_grad_()
        run(*args, leaf, **kwargs).backward(dout)
        return leaf.grad

    stored = gradient(attend, 11)
    again = gradient(torch.utils.checkpoint.checkpoint, 11, attend, use_reentrant=False)
    assert stored.isfinite().all() and torch.equal(stored, again)
    assert not torch.equal(stored, gradient(attend, 12))


def test_autocast_casts_fp32():
    qkv, cu_seqlens, slopes, _ = make_batch([20], 2, 16)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 20, alibi_slopes=slopes)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32 and qkv.grad.isfinite().all()


def test_meta_tensors_have_shapes_alone():
    """Asked about autocast on meta, PyTorch raises."""
    qkv = torch.empty(20, 3, 2, 16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(2, dtype=torch.int32, device="meta")
    if module.INTERPRETED:
        flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 20).sum().backward()
        assert qkv.grad.shape == qkv.shape
    else:
        with pytest.raises(ValueError, match="meta.*sdpa"):
            flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 20)


def test_trains_under_ddp(tmp_path):
    layer = torch.nn.Linear(16, 48).to(DEVICE)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(layer)
        x = torch.randn(20, 16, device=DEVICE)
        cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
        out = flash_attn_varlen_qkvpacked_func(model(x).view(20, 3, 2, 8), cu_seqlens, 20)
        out.square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert layer.weight.grad.abs().max() > 0 and layer.weight.grad.isfinite().all()


def test_memory_is_linear_in_tokens(monkeypatch):
    """The published kernel took a bias of (batch, heads, seqlen, seqlen)."""
    use_tiles(monkeypatch, "square")

    class Allocated(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            self.bytes += sum(x.nbytes for x in tree_leaves(result) if torch.is_tensor(x))
            return result

    counted = []
    for length in (64, 256):
        qkv, cu_seqlens, slopes, dout = make_batch([length], 1, 8)
        with Allocated() as allocated:
            kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes, position_ids=make_holes([length]))
        counted.append(allocated.bytes)
    assert counted[0] > 64 * 3 * 8 * 4
    # One byte for each score would already add this much.
    assert counted[1] - 4 * counted[0] < 256**2 - 4 * 64**2


def test_loading_the_file_twice_leaves_both_copies_working():
    """Two repositories on the Hub bring the file twice; one operator name broke the first."""
    qkv, cu_seqlens, slopes, dout = make_batch([20], 2, 16)
    expected = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    spec = importlib.util.spec_from_file_location("another", ROOT / "flash_attn_triton.py")
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    for copy in (another, module):
        leaf = qkv.detach().requires_grad_()
        out = copy.flash_attn_varlen_qkvpacked_func(leaf, cu_seqlens, 20, alibi_slopes=slopes)
        out.backward(dout)
        assert torch.equal(out, expected[0]) and torch.equal(leaf.grad, expected[2])


# What it cannot do

WRONG = {
    "bfloat": (dict(qkv=lambda x: x.double()), "float64"),
    "rank": (dict(qkv=lambda x: x.flatten(2)), r"\(10, 3, 32\)"),
    "parts": (dict(qkv=lambda x: x[:, :2]), r"\(10, 2, 2, 16\)"),
    "head_dim 12": (dict(qkv=lambda x: x[..., :12]), "12.*sdpa"),
    "head_dim 136": (dict(qkv=lambda x: x.new_empty(10, 3, 2, 136)), "136.*sdpa"),
    "last axis": (dict(qkv=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)), "strides"),
    "cu_seqlens dtype": (dict(cu_seqlens=lambda x: x.long()), "int32.*int64"),
    "cu_seqlens rank": (dict(cu_seqlens=lambda x: x[None]), r"\(1, 2\)"),
    "cu_seqlens empty": (dict(cu_seqlens=lambda x: x[:0]), "cu_seqlens"),
    "cu_seqlens end": (dict(cu_seqlens=lambda x: x - 1), "cu_seqlens"),
    "max_seqlen": (dict(max_seqlen=lambda x: 9), "max_seqlen"),
    "max_seqlen type": (dict(max_seqlen=lambda x: torch.tensor(10)), "max_seqlen"),
    "slopes dtype": (dict(alibi_slopes=lambda x: x.half()), "float16"),
    "slopes shape": (dict(alibi_slopes=lambda x: x[None]), r"\(1, 2\)"),
    "slopes device": (dict(alibi_slopes=lambda x: x.to("meta")), "meta"),
    "positions dtype": (dict(position_ids=lambda x: torch.arange(10)), "int64"),
    "positions shape": (dict(position_ids=lambda x: torch.arange(9).int()), r"\(9,\)"),
    "positions fall": (dict(position_ids=lambda x: -torch.arange(10).int()), "position_ids"),
    "positions alone": (
        dict(position_ids=lambda x: torch.arange(10).int(), alibi_slopes=lambda x: None),
        "alibi_slopes",
    ),
    "seed dtype": (dict(seed=lambda x: torch.zeros(1), dropout_p=lambda x: 0.1), "seed"),
    "dropout 1": (dict(dropout_p=lambda x: 1.0), r"1\.0"),
    "dropout -0.1": (dict(dropout_p=lambda x: -0.1), r"-0\.1"),
    "scale 0": (dict(softmax_scale=lambda x: 0.0), r"0\.0"),
    "scale inf": (dict(softmax_scale=lambda x: float("inf")), "inf"),
    "tile_map": (
        dict(tile_map=lambda x: torch.zeros(2, 3).int(), max_seqlen=lambda x: 999),
        "tile_map",
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a look at the data is a sync")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_value_error(name):
    changes, message = WRONG[name]
    qkv, cu_seqlens, slopes, _ = make_batch([10], 2, 16)
    arguments = dict(
        qkv=qkv, cu_seqlens=cu_seqlens, max_seqlen=10, dropout_p=0.0, softmax_scale=None,
        alibi_slopes=slopes, position_ids=None, seed=None, tile_map=None,
    )  # fmt: skip
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_qkvpacked_func(**arguments)


def run_without_interpreter(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_cpu_tensors_are_sent_to_sdpa():
    code = """
import torch
from flash_attn_triton import flash_attn_varlen_qkvpacked_func
flash_attn_varlen_qkvpacked_func(torch.zeros(4, 3, 1, 16), torch.tensor([0, 4]).int(), 4)
"""
    run = run_without_interpreter("-c", code)
    assert "ValueError" in run.stderr and "sdpa" in run.stderr and "cpu" in run.stderr, run.stderr


# Compiled, without a GPU


@functools.cache
def resources(*arguments):
    """What the script prints, by the sm, head_dim, bytes, kernel and variant it is for."""
    script = ROOT / "benchmarks" / "kernel" / "resources.py"
    run = run_without_interpreter(str(script), *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = [json.loads(line) for line in run.stdout.splitlines()]
    return {tuple(figure.values())[:5]: figure for figure in figures}


def assert_no_spills(figures, row, variants):
    """With dropout, tiles that were the fastest on a GPU without it may spill 8 registers."""
    for kernel in module.KERNELS:
        for variant in variants:
            figure = figures[(*row, kernel, variant)]
            print(figure)
            allowed = 32 if row == (90, 64, 2) and variant == "dropout" else 0
            assert figure["spill_bytes"] <= allowed and figure["fits"], figure


def few_resources():
    """What fits in a test run of minutes: the recipe's head_dim on two chips."""
    rows = ["80-64-2", "80-64-4", "90-64-2", "90-64-4"]
    return resources("--rows", *rows, "--variants", "none", "alibi")


@pytest.mark.parametrize("row", [(80, 64, 2), (80, 64, 4), (90, 64, 2), (90, 64, 4)], ids=str)
def test_kernels_compile_without_spills(row):
    assert_no_spills(few_resources(), row, ["none", "alibi"])


@pytest.mark.slow
@pytest.mark.parametrize("row", module.TILES, ids=str)
def test_all_kernels_compile_without_spills(row):
    assert_no_spills(resources(), row, ["none", "alibi", "holes", "dropout"])


@pytest.mark.parametrize("sm, at_most", [(80, 1.15), (90, 1.2)])
def test_alibi_costs_at_most_a_fifth_more_instructions(sm, at_most):
    """Of sm_90 more than of sm_80: its smaller tiles, which are faster, share fewer scalars."""
    figures = few_resources()
    for kernel in ("forward", "dq", "dkdv"):
        none, alibi = (
            figures[sm, 64, 2, kernel, variant]["per_score"] for variant in ("none", "alibi")
        )
        # Without a bias there is one loop; with ALiBi the diagonal's, the left and the right one.
        assert (len(none), len(alibi)) == (1, 3)
        for side, count in zip(("left", "right"), alibi[1:], strict=True):
            print(f"sm_{sm} {kernel}, {side}: {none[0]} -> {count}, {count / none[0]:.3f}")
            assert count <= at_most * none[0], (kernel, side)


# On a GPU


# Those that take longer to compile than the time one may get on a GPU are slow.
DTYPES_AND_HEAD_DIMS = [(torch.bfloat16, 64), (torch.bfloat16, 40), (torch.float16, 64)] + [
    pytest.param(dtype, head_dim, marks=pytest.mark.slow)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for head_dim in (8, 16, 32, 64, 96, 128)
    if head_dim != 64 or dtype == torch.float32
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim", DTYPES_AND_HEAD_DIMS, ids=str)
@pytest.mark.parametrize("lengths", [[1, 63, 0, 128], [129, 1, 700]], ids=str)
def test_compiled_kernels_match_the_oracle(dtype, head_dim, lengths):
    for position_ids in (None, make_holes(lengths)):
        qkv, cu_seqlens, slopes, dout = make_batch(lengths, 12, head_dim, dtype)
        assert_matches(qkv, dout, cu_seqlens, slopes, position_ids)
    assert_matches(qkv, dout, cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("max_seqlen", [128, 256], ids=["one-block", "two-pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_dropout_matches_the_oracle(dtype, max_seqlen):
    lengths, p, seed = [128, 1, 100], 0.4, seed_of(123)
    mask = read_mask(lengths, 3, p, seed, "square")
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, 3, 64, dtype)
    options = dict(dropout_p=p, seed=seed, max_seqlen=max_seqlen)
    assert_matches(qkv, dout, cu_seqlens, slopes, mask=mask, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[128] * 40, [2500, 129, 64, 1]], ids=["short", "long"])
def test_compiled_kernels_repeat_200_times_to_the_bit(lengths):
    qkv, cu_seqlens, slopes, dout = make_batch(lengths, 12, 64, torch.bfloat16)
    options = dict(alibi_slopes=slopes, dropout_p=0.1, seed=seed_of(5))
    first = kernel_of(qkv, dout, cu_seqlens, **options)
    for _ in range(200):
        again = kernel_of(qkv, dout, cu_seqlens, **options)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("seqlen", [2048, 8192])
def test_compiled_kernels_skip_correctly(seqlen, size):
    qkv, cu_seqlens, slopes, dout = make_batch([seqlen, 5, 1030], 4, 64, torch.bfloat16)
    assert_matches(qkv.detach() * size, dout, cu_seqlens, slopes)


@pytest.mark.gpu
def test_compiled_row_of_65536_tokens():
    """Too long for the oracle: shifting a window of 3000 tokens out must not matter at slope 1."""
    qkv, cu_seqlens, _, dout = make_batch([65_536], 2, 64, torch.bfloat16)
    slopes = torch.tensor([1.0, 2.0], device=DEVICE)
    out, _, dqkv = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    window = slice(60_000, 63_000)
    inner = slice(1000, 2000)
    short = torch.tensor([0, 3000], dtype=torch.int32, device=DEVICE)
    oracle = oracle_of(qkv[window], dout[window], short, slopes=slopes)
    plain = oracle_of(qkv[window], dout[window], short, slopes=slopes, dtype=torch.bfloat16)
    assert_as_close(out[window][inner], plain[0][inner], oracle[0][inner], 2)
    assert_as_close(dqkv[window][inner], plain[2][inner], oracle[2][inner], 3)


@pytest.mark.gpu
def test_compiled_batch_of_more_than_two_to_the_31_elements():
    total = 2**31 // (3 * 12 * 64) // 1000 * 1000 + 2000
    qkv = torch.randn(total, 3, 12, 64, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    cu_seqlens = torch.arange(0, total + 1, 1000, dtype=torch.int32, device=DEVICE)
    slopes = 2.0 ** -torch.arange(1, 13, device=DEVICE)
    dout = torch.randn(total, 12, 64, dtype=torch.bfloat16, device=DEVICE)
    out, lse, dqkv = kernel_of(qkv, dout, cu_seqlens, alibi_slopes=slopes)
    last = slice(total - 1000, total)
    alone = kernel_of(qkv[last], dout[last], cu_seqlens[:2], alibi_slopes=slopes)
    for one, other in zip((out[last], lse[:, last], dqkv[last]), alone, strict=True):
        assert torch.equal(one, other)
