# SPDX-License-Identifier: Apache-2.0
"""Attention by ours and by others on the same packed batch, and whether each of them is right."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import flex_attention as flex

from benchmarks.kernel.common import assert_correct, cu_seqlens_of, ours, slopes_of
from benchmarks.speed.clocks import DEVICE, TOY
from benchmarks.speed.lengths import c4_lengths

WITHOUT_BIAS = ("ours-no-bias", "varlen_attn")
# These hold batch x heads x seqlen^2 scores.
DENSE = ("sdpa", "eager")


@dataclass
class Shape:
    """A batch; `name` says how its lengths were drawn."""

    name: str
    lengths: list[int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    qkv: torch.Tensor | None = None


@dataclass
class Case:
    """A provider ready to run: `attend(prepare())` is the forward pass, `leaf` takes the gradient,
    `pack` brings either to (total, ...) for comparisons."""

    leaf: torch.Tensor
    attend: Callable
    prepare: Callable = lambda: None
    pack: Callable = lambda tensor: tensor


def draw(name, seqlen, tokens):
    """Lengths of `tokens` in all: rows of `seqlen`, or C4's stand-in cut off there."""
    if name == "fixed":
        return [min(seqlen, tokens)] * max(1, tokens // seqlen)
    drawn, lengths = iter(c4_lengths(tokens, seqlen)), []
    while tokens:
        lengths.append(min(next(drawn), tokens))
        tokens -= lengths[-1]
    return lengths


@dataclass
class Inputs:
    """What every provider is given: a batch's packed q, k and v, and where its sequences are."""

    shape: Shape
    leaf: torch.Tensor  # (total, 3, heads, head_dim)
    cu_seqlens: torch.Tensor  # (batch + 1,)
    slopes: torch.Tensor  # (heads,)

    @property
    def longest(self):
        return max(self.shape.lengths)

    def row(self):
        """(total,) the sequence of each token"""
        return torch.repeat_interleave(torch.tensor(self.shape.lengths, device=DEVICE))


def make_inputs(shape):
    """The same for all providers: the shape's qkv, or N(0, 1)."""
    torch.manual_seed(0)
    total, leaf = sum(shape.lengths), shape.qkv
    if leaf is None:
        leaf = torch.randn(total, 3, shape.heads, shape.head_dim, device=DEVICE)
    leaf = leaf[:total].to(DEVICE, shape.dtype).detach().requires_grad_()
    return Inputs(shape, leaf, cu_seqlens_of(shape.lengths), slopes_of(shape.heads))


def set_up_ours(inputs, bias=True, skip_far_tiles=True):
    leaf, cu_seqlens, longest = inputs.leaf, inputs.cu_seqlens, inputs.longest
    options = dict(alibi_slopes=inputs.slopes if bias else None, skip_far_tiles=skip_far_tiles)
    return Case(
        leaf,
        lambda tile_map: ours.flash_attn_varlen_qkvpacked_func(
            leaf, cu_seqlens, longest, tile_map=tile_map, **options
        ),
        lambda: ours.build_tile_map(cu_seqlens, len(leaf)),
    )


def set_up_varlen_attn(inputs):
    """FlashAttention 2 inside torch, which takes no bias."""
    from torch.nn.attention.varlen import varlen_attn

    leaf, cu_seqlens, longest = inputs.leaf, inputs.cu_seqlens, inputs.longest
    return Case(
        leaf, lambda _: varlen_attn(*leaf.unbind(1), cu_seqlens, cu_seqlens, longest, longest)
    )


def set_up_flash_attn(inputs):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    leaf, cu_seqlens, longest = inputs.leaf, inputs.cu_seqlens, inputs.longest
    return Case(
        leaf,
        lambda _: flash_attn_varlen_qkvpacked_func(
            leaf, cu_seqlens, longest, alibi_slopes=inputs.slopes
        ),
    )


def set_up_flex(inputs):
    """One long row, in which a mask keeps sequences apart."""
    # Every batch is a new mask: without a reset, the ninth would not be compiled.
    torch.compiler.reset()
    compiled = (lambda function: function) if TOY else torch.compile
    attention, block_mask = compiled(flex.flex_attention), compiled(flex.create_block_mask)
    leaf, slopes, row = inputs.leaf, inputs.slopes, inputs.row()

    def score(score, b, h, i, j):
        return score - slopes[h] * (i - j).abs()

    def attend(mask):
        q, k, v = rearrange(leaf, "total qkv heads head_dim -> qkv 1 heads total head_dim")
        context = attention(q, k, v, score_mod=score, block_mask=mask)
        return rearrange(context, "1 heads total head_dim -> total heads head_dim")

    total = len(leaf)
    return Case(
        leaf,
        attend,
        lambda: block_mask(lambda b, h, i, j: row[i] == row[j], 1, None, total, total, DEVICE),
    )


def set_up_dense(inputs, attention):
    """Rows padded before the clock starts, which favours these, and a bias that hides padding.

    Args:
        attention: a function of q, k, v, (batch, heads, seqlen, head_dim) each, and the bias,
            (batch, heads, seqlen, seqlen).
    """
    shape, longest, row = inputs.shape, inputs.longest, inputs.row()
    slopes, lengths = inputs.slopes, torch.tensor(shape.lengths, device=DEVICE)
    rank = torch.arange(len(row), device=DEVICE) - inputs.cu_seqlens[row]
    padded = inputs.leaf.new_zeros(len(lengths), longest, 3, shape.heads, shape.head_dim)
    padded[row, rank] = inputs.leaf.detach()
    padded = padded.detach().requires_grad_()

    def bias():
        step = torch.arange(longest, device=DEVICE)
        bias = -slopes[:, None, None] * (step[:, None] - step).abs()  # (heads, seqlen, seqlen)
        real = step < lengths[:, None]  # (batch, seqlen)
        return bias.masked_fill(~real[:, None, None], -torch.inf).to(shape.dtype)

    def attend(bias):
        q, k, v = rearrange(
            padded, "batch seqlen qkv heads head_dim -> qkv batch heads seqlen head_dim"
        )
        context = attention(q, k, v, bias)
        return rearrange(context, "batch heads seqlen head_dim -> batch seqlen heads head_dim")

    return Case(padded, attend, bias, lambda tensor: tensor[row, rank])


def sdpa(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def eager(q, k, v, bias):
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


PROVIDERS = {
    "ours": set_up_ours,
    "ours-all-tiles": functools.partial(set_up_ours, skip_far_tiles=False),
    "ours-no-bias": functools.partial(set_up_ours, bias=False),
    "varlen_attn": set_up_varlen_attn,
    "flash_attn": set_up_flash_attn,
    "flex": set_up_flex,
    "sdpa": functools.partial(set_up_dense, attention=sdpa),
    "eager": functools.partial(set_up_dense, attention=eager),
}


def setup(provider, shape):
    """The Case of a provider, from the same inputs for all of them."""
    return PROVIDERS[provider](make_inputs(shape))


@functools.cache
def gate(provider, heads, head_dim, dtype):
    """Raise AssertionError unless output and gradients are right on a small batch."""
    small = Shape("gate", [40, 1, 17] if TOY else [1500, 1, 129], heads, head_dim, dtype)
    case = setup(provider, small)
    out = case.pack(case.attend(case.prepare()))
    dout = torch.randn_like(out)
    grad = case.pack(torch.autograd.grad(out, case.leaf, dout)[0])
    slopes = None if provider in WITHOUT_BIAS else slopes_of(heads)
    qkv, cu_seqlens = case.pack(case.leaf), cu_seqlens_of(small.lengths)
    assert_correct(out.detach(), grad, qkv, dout, cu_seqlens, slopes)
