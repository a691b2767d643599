# SPDX-License-Identifier: Apache-2.0
"""Attention by ours and by others on the same packed batch, and whether each of them is right."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import common  # before the kernels: with --toy it chooses the interpreter
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from benchmarks.kernel.common import cu_seqlens_of, ours, slopes_of
from benchmarks.speed.clocks import DEVICE, TOY
from benchmarks.speed.lengths import c4_lengths

WITHOUT_BIAS = ("ours-no-bias", "varlen_attn")
DENSE = ("sdpa", "eager")
# varlen_attn is FlashAttention 2 inside torch. The dense ones hold batch x heads x seqlen^2 scores.
PROVIDERS = (
    "ours", "ours-all-tiles", "ours-no-bias", "varlen_attn", "flash_attn", "flex", "sdpa", "eager"
)  # fmt: skip


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


def setup(provider, shape):
    """The Case of a provider, from the same inputs for all of them."""
    torch.manual_seed(0)
    total, longest = sum(shape.lengths), max(shape.lengths)
    cu_seqlens = cu_seqlens_of(shape.lengths)
    leaf = shape.qkv
    if leaf is None:
        leaf = torch.randn(total, 3, shape.heads, shape.head_dim, device=DEVICE)
    leaf = leaf[:total].to(DEVICE, shape.dtype).detach().requires_grad_()
    slopes = slopes_of(shape.heads)

    if provider.startswith("ours"):
        options = dict(
            alibi_slopes=None if provider in WITHOUT_BIAS else slopes,
            skip_far_tiles=provider != "ours-all-tiles",
        )
        return Case(
            leaf,
            lambda tile_map: ours.flash_attn_varlen_qkvpacked_func(
                leaf, cu_seqlens, longest, tile_map=tile_map, **options
            ),
            lambda: ours.build_tile_map(cu_seqlens, total),
        )
    if provider == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        return Case(
            leaf, lambda _: varlen_attn(*leaf.unbind(1), cu_seqlens, cu_seqlens, longest, longest)
        )
    if provider == "flash_attn":
        from flash_attn import flash_attn_varlen_qkvpacked_func

        return Case(
            leaf,
            lambda _: flash_attn_varlen_qkvpacked_func(
                leaf, cu_seqlens, longest, alibi_slopes=slopes
            ),
        )
    row = torch.repeat_interleave(torch.tensor(shape.lengths, device=DEVICE))  # (total,)
    if provider == "flex":
        # Every batch is a new mask: without a reset, the ninth would not be compiled.
        torch.compiler.reset()
        compiled = (lambda function: function) if TOY else torch.compile
        attention, block_mask = compiled(flex.flex_attention), compiled(flex.create_block_mask)

        def score(score, b, h, i, j):
            return score - slopes[h] * (i - j).abs()

        def attend(mask):
            q, k, v = leaf.permute(1, 2, 0, 3)[:, None]  # (1, heads, total, head_dim) each
            return attention(q, k, v, score_mod=score, block_mask=mask)[0].transpose(0, 1)

        return Case(
            leaf,
            attend,
            lambda: block_mask(lambda b, h, i, j: row[i] == row[j], 1, None, total, total, DEVICE),
        )
    # Dense: padded before the clock starts, which favours these.
    rank = torch.arange(total, device=DEVICE) - cu_seqlens[row]
    batch = len(shape.lengths)
    padded = leaf.new_zeros(batch, longest, 3, shape.heads, shape.head_dim)
    padded[row, rank] = leaf.detach()
    padded = padded.detach().requires_grad_()

    def bias():
        step = torch.arange(longest, device=DEVICE)
        bias = -slopes[:, None, None] * (step[:, None] - step).abs()  # (heads, seqlen, seqlen)
        real = step < torch.tensor(shape.lengths, device=DEVICE)[:, None]  # (batch, seqlen)
        return bias.masked_fill(~real[:, None, None], -torch.inf).to(shape.dtype)

    def attend(bias):
        q, k, v = padded.permute(2, 0, 3, 1, 4)  # (batch, heads, seqlen, head_dim) each
        if provider == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = (q @ k.transpose(2, 3) * shape.head_dim**-0.5 + bias).softmax(-1) @ v
        return out.transpose(1, 2)

    return Case(padded, attend, bias, lambda tensor: tensor[row, rank])


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
    common.assert_correct(out.detach(), grad, qkv, dout, cu_seqlens, slopes)
