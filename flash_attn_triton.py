# SPDX-License-Identifier: Apache-2.0
"""Flash attention with ALiBi for variable-length batches, in Triton 3.2 to 3.9.

For every head of every sequence, with keys from that sequence only,

    score_ij = scale * (q_i . k_j) - slope * |position_i - position_j|
    out_i = sum_j softmax(score_i)_j * v_j,    lse_i = log(sum_j exp(score_ij))

Memory is O(total): nothing of size seqlen x seqlen exists. Keys so far away that all of them
together hold at most 2**-24 of a row's mass are not visited. Gradients flow to qkv only. Two runs
agree to the bit, attention dropout included. Not here: causal masks, cross attention, CPUs (use
sdpa). tests/reference.py is the same mathematics in plain PyTorch.
"""

import math
import os
import re
import zlib

import torch

try:
    import triton
    import triton.language as tl
except ImportError as err:
    raise ImportError("flash_attn_triton needs Triton: pip install triton") from err

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Tokens per entry of a tile map, and the longest row that needs no map. Every block divides it.
MAP_ROWS = tl.constexpr(128)
# The longest max_seqlen at which reading q and k once more, to bound their products, does not pay.
SKIP_ABOVE = 1024

# (sm, padded head_dim, bytes per element): (BLOCK_M, BLOCK_N, warps, stages) of each kernel. A
# program owns BLOCK_M queries and streams the keys, BLOCK_N at a time; one of "dkdv" owns BLOCK_N
# keys and streams the queries; one of "block" owns a whole sequence of up to BLOCK_M tokens. Head
# dims below 64 use the row of 64. (90, 64, 2) was the fastest on an H200 (Triton 3.6; 2,048 tokens,
# and 128 of "block"); the others are chosen for no spills on Triton 3.9 and not timed:
# benchmarks/kernel/tune.py does it on a GPU.
KERNELS = ("forward", "dq", "dkdv", "block")
TILES = {
    (80, 64, 2): ((128, 64, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 1)),
    (80, 128, 2): ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
    (80, 64, 4): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    (80, 128, 4): ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    (89, 64, 2): ((128, 64, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 1)),
    (89, 128, 2): ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
    (89, 64, 4): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    (89, 128, 4): ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    (90, 64, 2): ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 1)),
    (90, 128, 2): ((128, 64, 8, 2), (128, 64, 8, 3), (32, 128, 8, 3), (64, 64, 8, 1)),
    (90, 64, 4): ((128, 32, 8, 2), (128, 32, 8, 2), (32, 16, 4, 1), (32, 32, 4, 1)),
    (90, 128, 4): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    (100, 64, 2): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 3), (128, 128, 8, 1)),
    (100, 128, 2): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 1)),
    (100, 64, 4): ((32, 32, 4, 2), (16, 32, 4, 1), (32, 16, 4, 2), (64, 64, 8, 1)),
    (100, 128, 4): ((16, 32, 4, 1), (16, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
}
TILES = {row: dict(zip(KERNELS, tiles, strict=True)) for row, tiles in TILES.items()}
SM_OF_CAPABILITY = {80: 80, 86: 89, 87: 80, 89: 89, 90: 90, 100: 100, 103: 100}
# Chips that the table does not name get the rows with the least shared memory.
UNKNOWN_SM = 89
NORMS_TILE = (MAP_ROWS.value, None, 4, 1)


def tile_shape(qkv: torch.Tensor, direction: str) -> tuple[int, int, int, int]:
    """The table's (BLOCK_M, BLOCK_N, warps, stages) for the chip, dtype and head_dim of `qkv`."""
    sm = UNKNOWN_SM
    if qkv.is_cuda:
        major, minor = torch.cuda.get_device_capability(qkv.device)
        if major < 8:
            raise ValueError(f"needs compute capability 8.0, got {major}.{minor}: use sdpa")
        sm = SM_OF_CAPABILITY.get(10 * major + minor, UNKNOWN_SM)
    return TILES[sm, 64 if qkv.shape[-1] <= 64 else 128, qkv.itemsize][direction]


# What the kernels share. "Owned" tokens stay in registers, "streamed" ones pass by: in the forward
# and dq kernels queries are owned and keys streamed, in the dk/dv kernel the other way round. OWNED
# and STREAMED are how many at a time: BLOCK_M queries, BLOCK_N keys.


@triton.jit
def _locate(cu_seqlens, tile_map, heads, BLOCK: tl.constexpr, ROWS: tl.constexpr = MAP_ROWS):
    """This program's head, sequence, first token of it, its length, and the first row owned.

    Heads vary fastest, then the ROWS // BLOCK parts of a sequence or of an entry in the tile map.
    """
    program = tl.program_id(0)
    head = program % heads
    sequence = program // heads // (ROWS // BLOCK)
    start = program // heads % (ROWS // BLOCK) * BLOCK
    if tile_map is not None:
        start += tl.load(tile_map + 2 * sequence + 1)
        sequence = tl.load(tile_map + 2 * sequence)
    first = tl.load(cu_seqlens + sequence)
    seqlen = tl.load(cu_seqlens + sequence + 1) - first
    return head.to(tl.int64), sequence, first.to(tl.int64), seqlen, start


@triton.jit
def _below(index, end, KNOWN: tl.constexpr):
    """index < end. Known to be true of all, it is a constant, a mask that the compiler drops."""
    # `| KNOWN` would be shorter, but not in the interpreters of Triton 3.2 and 3.3.
    return tl.zeros_like(index) == 0 if KNOWN else index < end


@triton.jit
def _pointers(
    base, stride, start, seqlen,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """Addresses of BLOCK rows of one head, and which of them exist: (BLOCK, BLOCK_D) both."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    # The product of scalars moves with the tile, the tensor does not: loops compute it once.
    base += start.to(tl.int64) * stride
    pointers = base + (rows.to(tl.int64)[:, None] * stride + dims[None, :])
    exists = _below(rows, seqlen - start, FULL)
    within = _below(dims, HEAD_DIM, HEAD_DIM == BLOCK_D)
    return pointers, exists[:, None] & within[None, :]


@triton.jit
def _load(
    base, stride, start, seqlen,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """BLOCK rows of one head: (BLOCK, BLOCK_D), zero where there is nothing."""
    pointers, mask = _pointers(base, stride, start, seqlen, HEAD_DIM, BLOCK, BLOCK_D, FULL)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(
    tile, base, stride, start, seqlen,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a (BLOCK, BLOCK_D) tile where rows exist, in the dtype of `base`."""
    pointers, mask = _pointers(base, stride, start, seqlen, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc in fp32. fp32 operands cost three tf32 products and keep their precision."""
    # Triton 3.2 does not take None for the sum (benchmarks/kernel/resources.py on 3.2).
    if acc is None:
        product = tl.dot(a, b, input_precision="tf32x3")
    else:
        product = tl.dot(a, b, acc, input_precision="tf32x3")
    return product


@triton.jit
def _slope(slopes, head, scale):
    """This head's slope in units of q . k, 0 without ALiBi."""
    return tl.load(slopes + head) / scale if slopes is not None else 0.0


@triton.jit
def _walk(
    norms, slope, scale, start, seqlen,
    OWNED: tl.constexpr, STREAMED: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """The tiles of STREAMED tokens that a program visits: [low, high), of which `exact` need care.

    Those are the tiles [near, past) on the diagonal, where distances change sign, and a last tile
    that is only partly filled; all others are treated alike. Keys at distance d hold at most
    exp(2 * bound - alibi * d) of what the row's own key holds, bound = scale * max|q| * max|k|;
    summed over both sides from `reach` on that is 2**-24.
    """
    low = 0
    high = tl.cdiv(seqlen, STREAMED)
    if ALIBI:
        if norms is not None:
            alibi = slope * scale
            bound = scale * tl.sqrt(tl.load(norms)) * tl.sqrt(tl.load(norms + 1))
            tail = tl.log(2.0 / (1.0 - tl.exp(-alibi)))
            reach = tl.ceil((2.0 * bound + 24 * LN2 + tail) / alibi)
            # Written so that a slope of 0, a negative one and NaN all give the full row.
            reach = tl.where((alibi > 0) & (reach < seqlen), reach, seqlen).to(tl.int32)
            low = tl.maximum(start - reach, 0) // STREAMED
            high = tl.cdiv(tl.minimum(start + OWNED + reach, seqlen), STREAMED)
        near = start // STREAMED
        past = tl.cdiv(tl.minimum(start + OWNED, seqlen), STREAMED)
    else:
        near = seqlen // STREAMED
        past = near
    exact = past - near + tl.where((high > past) & (high * STREAMED > seqlen), 1, 0)
    return low, near, past, high, exact


@triton.jit
def _span(low, near, past, high, exact, SIDE: tl.constexpr):
    """The steps of one of three loops: tiles that need care, tiles to the left, to the right."""
    if SIDE == 0:
        begin, end = 0, exact
    elif SIDE == 1:
        begin, end = low, near
    else:
        begin, end = past, high - (exact - (past - near))
    return begin, end


@triton.jit
def _visit(step, near, past, high, SIDE: tl.constexpr):
    """The tile that belongs to a step: the one that needs care may lie at the end of the row."""
    return tl.where(step < past - near, near + step, high - 1) if SIDE == 0 else step


@triton.jit
def _offsets(position_ids, start, seqlen, BLOCK: tl.constexpr, ANCHOR: tl.constexpr = 0):
    """Positions of BLOCK tokens less that of the ANCHOR-th of them: (BLOCK,), exact in fp32."""
    index = tl.arange(0, BLOCK) - ANCHOR
    if position_ids is not None:
        position = tl.load(position_ids + tl.minimum(start + tl.arange(0, BLOCK), seqlen - 1))
        index = position - tl.load(position_ids + start + ANCHOR)
    return index.to(tl.float32)


@triton.jit
def _scores(
    owned, streamed, offsets, position_ids, slope, scale, start, column, seqlen,
    STREAMED: tl.constexpr, ALIBI: tl.constexpr, SIDE: tl.constexpr,
    KEYS_OWNED: tl.constexpr = False,
):  # fmt: skip
    """Scores / scale: (OWNED, STREAMED), and for every query what is left to add, in base 2.

    To the left (SIDE 1) and right (2) of the diagonal, |owned - streamed| is a difference of known
    sign: `away`, from the owned token to the near edge of the streamed tile, less `there`, from
    that edge on. The keys' part is the one instruction per score that ALiBi costs. The queries'
    part joins the row's maximum or log-sum-exp: (OWNED,), or (STREAMED,) where keys are owned.
    """
    # Not streamed.T: the interpreter of Triton 3.2 loses its type (any test of the output).
    tile = _dot(owned, tl.trans(streamed))  # (OWNED, STREAMED)
    ANCHOR: tl.constexpr = STREAMED - 1 if SIDE == 1 else 0
    there = _offsets(position_ids, column, seqlen, STREAMED, ANCHOR)  # (STREAMED,)
    rest = tl.zeros_like(there if KEYS_OWNED else offsets)
    if ALIBI:
        if position_ids is not None:
            gap = tl.load(position_ids + column + ANCHOR) - tl.load(position_ids + start)
        else:
            gap = column + ANCHOR - start
        away = offsets - gap  # (OWNED,)
        if SIDE == 0:
            tile -= slope * tl.abs(away[:, None] - there[None, :])
        else:
            signed = slope if SIDE == 1 else -slope
            # Triton 3.9 would make `tile += ...` the product's initial value: on sm_100 a trip to
            # tensor memory, which spills (test_all_kernels_compile_without_spills).
            if KEYS_OWNED:
                tile = tl.fma(away[:, None], -signed, tile)
                rest = there * (signed * scale * LOG2E)
            else:
                tile = tl.fma(there[None, :], signed, tile)
                rest = away * (-signed * scale * LOG2E)
    if SIDE == 0:
        tile = tl.where((column + tl.arange(0, STREAMED) < seqlen)[None, :], tile, float("-inf"))
    return tile, rest


@triton.jit
def _mask_words(seed, sequence, head):
    """Two random words, of which the dropout mask of one head of one sequence is a function."""
    head = head.to(tl.int32)
    first, second, _, _ = tl.philox(tl.load(seed), head, sequence, head, sequence)
    return first, second


@triton.jit
def _keep_mask(first, second, query, key, threshold):
    """Which weights survive dropout; `query` and `key`, places in the sequence, broadcast.

    Only these places and the mask's two words count, so that every kernel draws the same mask
    whatever its tiles. The number query * 2**16 + key goes through the steps of triple32 (Wellons,
    Prospecting for Hash Functions). Dropout then costs 11 instructions per score; with a call of
    Philox for four scores it costs 17 (forward, sm_90, Triton 3.9). Fewer than three products leave
    correlations behind (test_dropout_masks_are_white_and_unlike_each_other).
    """
    high = query.to(tl.uint32) << 16
    # A key is below 2**16: the first step, x ^ (x >> 17), only concerns the query.
    bits = (high ^ (high >> 17) ^ first) ^ key.to(tl.uint32)
    bits = bits * 0xED5AD4BB + second
    bits = (bits ^ (bits >> 11)) * 0xAC4C1B51
    bits = (bits ^ (bits >> 15)) * 0x31848BAB
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _norms_kernel(
    qkv, stride_token, stride_part, stride_head,
    norms,
    cu_seqlens, tile_map,
    heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Largest |q|^2 and |k|^2 of every sequence and head; grid: (tiles * heads,)."""
    head, sequence, first, seqlen, start = _locate(cu_seqlens, tile_map, heads, BLOCK_M)
    if start >= seqlen:
        return
    base = qkv + first * stride_token + head * stride_head
    norms += 2 * (sequence * heads + head)
    for part in tl.static_range(2):
        rows = _load(base, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D).to(tl.float32)
        # The result of a maximum does not depend on the order of arrival.
        tl.atomic_max(norms + part, tl.max(tl.sum(rows * rows, 1), 0))
        base += stride_part


@triton.jit
def _forward_kernel(
    qkv, stride_token, stride_part, stride_head,
    out, lse,
    cu_seqlens, tile_map, slopes, position_ids, norms,
    seed, dropout_threshold, keep_prob,
    total, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out, and lse in base 2, of BLOCK_M queries; grid: (tiles * heads,)."""
    head, sequence, first, seqlen, start = _locate(cu_seqlens, tile_map, heads, BLOCK_M)
    if start >= seqlen:
        return
    q_base = qkv + first * stride_token + head * stride_head
    lse += head * total + first
    k_base = q_base + stride_part
    v_base = k_base + stride_part
    if position_ids is not None:
        position_ids += first
    if norms is not None:
        norms += 2 * (sequence * heads + head)
    if seed is not None:
        first_word, second_word = _mask_words(seed, sequence, head)
    ALIBI: tl.constexpr = slopes is not None
    slope = _slope(slopes, head, scale)
    low, near, past, high, exact = _walk(
        norms, slope, scale, start, seqlen, BLOCK_M, BLOCK_N, ALIBI
    )

    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    offsets = _offsets(position_ids, start, seqlen, BLOCK_M)  # (BLOCK_M,)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # The diagonal comes first: it holds most mass, so that later tiles seldom raise m_i.
    for SIDE in tl.static_range(3 if ALIBI else 2):
        begin, end = _span(low, near, past, high, exact, SIDE)
        for step in range(begin, end):
            start_n = _visit(step, near, past, high, SIDE) * BLOCK_N
            k = _load(k_base, stride_token, start_n, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D, SIDE != 0)
            v = _load(v_base, stride_token, start_n, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D, SIDE != 0)
            scores, rest = _scores(
                q, k, offsets, position_ids, slope, scale, start, start_n, seqlen,
                BLOCK_N, ALIBI, SIDE,
            )  # (BLOCK_M, BLOCK_N), (BLOCK_M,)  # fmt: skip
            m_ij = tl.maximum(m_i, tl.max(scores, 1) * (scale * LOG2E) + rest)
            alpha = tl.exp2(m_i - m_ij)
            p = tl.exp2(scores * (scale * LOG2E) - (m_ij - rest)[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            if seed is not None:
                keys = start_n + tl.arange(0, BLOCK_N)
                keep_mask = _keep_mask(
                    first_word, second_word, rows[:, None], keys[None, :], dropout_threshold
                )
                p = tl.where(keep_mask, p, 0.0)
            acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])
            m_i = m_ij

    out_base = out + (first * heads + head) * HEAD_DIM
    out_tile = acc / (l_i * keep_prob)[:, None]
    _store(out_tile, out_base, heads * HEAD_DIM, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse_i = m_i + tl.log2(l_i)
    tl.store(lse + rows, lse_i, mask=rows < seqlen)


@triton.jit
def _dq_kernel(
    qkv, stride_token, stride_part, stride_head,
    dout, dout_stride_token, dout_stride_head,
    out, lse, delta, dqkv,
    cu_seqlens, tile_map, slopes, position_ids, norms,
    seed, dropout_threshold, keep_prob,
    total, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(out * dout) for dk/dv, of BLOCK_M queries; grid: (tiles * heads,)."""
    head, sequence, first, seqlen, start = _locate(cu_seqlens, tile_map, heads, BLOCK_M)
    if start >= seqlen:
        return
    q_base = qkv + first * stride_token + head * stride_head
    lse += head * total + first
    delta += head * total + first
    k_base = q_base + stride_part
    v_base = k_base + stride_part
    dout_base = dout + first * dout_stride_token + head * dout_stride_head
    out_base = out + (first * heads + head) * HEAD_DIM
    dq_base = dqkv + (first * 3 * heads + head) * HEAD_DIM
    if position_ids is not None:
        position_ids += first
    if norms is not None:
        norms += 2 * (sequence * heads + head)
    if seed is not None:
        first_word, second_word = _mask_words(seed, sequence, head)
    ALIBI: tl.constexpr = slopes is not None
    slope = _slope(slopes, head, scale)
    low, near, past, high, exact = _walk(
        norms, slope, scale, start, seqlen, BLOCK_M, BLOCK_N, ALIBI
    )

    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    do = _load(dout_base, dout_stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = _load(out_base, heads * HEAD_DIM, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta_i = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) * keep_prob  # (BLOCK_M,)
    tl.store(delta + rows, delta_i, mask=rows < seqlen)
    lse_i = tl.load(lse + rows, mask=rows < seqlen, other=0.0)
    offsets = _offsets(position_ids, start, seqlen, BLOCK_M)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for SIDE in tl.static_range(3 if ALIBI else 2):
        begin, end = _span(low, near, past, high, exact, SIDE)
        for step in range(begin, end):
            start_n = _visit(step, near, past, high, SIDE) * BLOCK_N
            k = _load(k_base, stride_token, start_n, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D, SIDE != 0)
            v = _load(v_base, stride_token, start_n, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D, SIDE != 0)
            scores, rest = _scores(
                q, k, offsets, position_ids, slope, scale, start, start_n, seqlen,
                BLOCK_N, ALIBI, SIDE,
            )  # (BLOCK_M, BLOCK_N), (BLOCK_M,)  # fmt: skip
            p = tl.exp2(scores * (scale * LOG2E) - (lse_i - rest)[:, None])
            dp = _dot(do, tl.trans(v))  # (BLOCK_M, BLOCK_N)
            if seed is not None:
                keys = start_n + tl.arange(0, BLOCK_N)
                keep_mask = _keep_mask(
                    first_word, second_word, rows[:, None], keys[None, :], dropout_threshold
                )
                dp = tl.where(keep_mask, dp, 0.0)
            dq = _dot((p * (dp - delta_i[:, None])).to(k.dtype), k, dq)
    dq *= scale / keep_prob
    _store(dq, dq_base, 3 * heads * HEAD_DIM, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _dkdv_kernel(
    qkv, stride_token, stride_part, stride_head,
    dout, dout_stride_token, dout_stride_head,
    lse, delta, dqkv,
    cu_seqlens, tile_map, slopes, position_ids, norms,
    seed, dropout_threshold, keep_prob,
    total, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys; grid: (tiles * heads,). Score tiles are (keys, queries)."""
    head, sequence, first, seqlen, start = _locate(cu_seqlens, tile_map, heads, BLOCK_N)
    if start >= seqlen:
        return
    q_base = qkv + first * stride_token + head * stride_head
    lse += head * total + first
    delta += head * total + first
    k_base = q_base + stride_part
    v_base = k_base + stride_part
    dout_base = dout + first * dout_stride_token + head * dout_stride_head
    dk_base = dqkv + ((first * 3 + 1) * heads + head) * HEAD_DIM
    dv_base = dk_base + heads * HEAD_DIM
    if position_ids is not None:
        position_ids += first
    if norms is not None:
        norms += 2 * (sequence * heads + head)
    if seed is not None:
        first_word, second_word = _mask_words(seed, sequence, head)
    ALIBI: tl.constexpr = slopes is not None
    slope = _slope(slopes, head, scale)
    low, near, past, high, exact = _walk(
        norms, slope, scale, start, seqlen, BLOCK_N, BLOCK_M, ALIBI
    )

    k = _load(k_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v = _load(v_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D)
    offsets = _offsets(position_ids, start, seqlen, BLOCK_N)  # (BLOCK_N,)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for SIDE in tl.static_range(3 if ALIBI else 2):
        begin, end = _span(low, near, past, high, exact, SIDE)
        for step in range(begin, end):
            start_m = _visit(step, near, past, high, SIDE) * BLOCK_M
            rows = start_m + tl.arange(0, BLOCK_M)
            q = _load(q_base, stride_token, start_m, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D, SIDE != 0)
            do = _load(
                dout_base, dout_stride_token, start_m, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D, SIDE != 0
            )
            exists = _below(rows, seqlen, SIDE != 0)
            lse_i = tl.load(lse + rows, mask=exists, other=0.0)  # (BLOCK_M,)
            scores, rest = _scores(
                k, q, offsets, position_ids, slope, scale, start, start_m, seqlen,
                BLOCK_M, ALIBI, SIDE, KEYS_OWNED=True,
            )  # (BLOCK_N, BLOCK_M), (BLOCK_M,)  # fmt: skip
            p = tl.exp2(scores * (scale * LOG2E) - (lse_i - rest)[None, :])
            dp = _dot(v, tl.trans(do))  # (BLOCK_N, BLOCK_M)
            p_dropped = p
            if seed is not None:
                keys = start + tl.arange(0, BLOCK_N)
                keep_mask = _keep_mask(
                    first_word, second_word, rows[None, :], keys[:, None], dropout_threshold
                )
                dp = tl.where(keep_mask, dp, 0.0)
                p_dropped = tl.where(keep_mask, p, 0.0)
            dv = _dot(p_dropped.to(do.dtype), do, dv)
            delta_i = tl.load(delta + rows, mask=exists, other=0.0)  # (BLOCK_M,)
            dk = _dot((p * (dp - delta_i[None, :])).to(q.dtype), q, dk)
    stride = 3 * heads * HEAD_DIM
    _store(dk * (scale / keep_prob), dk_base, stride, start, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D)
    _store(dv / keep_prob, dv_base, stride, start, seqlen, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _block_backward_kernel(
    qkv, stride_token, stride_part, stride_head,
    dout, dout_stride_token, dout_stride_head,
    lse, dqkv,
    cu_seqlens, slopes, position_ids,
    seed, dropout_threshold, keep_prob,
    total, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a sequence of up to BLOCK_M tokens; grid: (batch * heads,).

    It holds whole rows, so delta is a sum over the tile and `out` is not read.
    """
    head, sequence, first, seqlen, start = _locate(cu_seqlens, None, heads, BLOCK_M, BLOCK_M)
    q_base = qkv + first * stride_token + head * stride_head
    lse += head * total + first
    dout_base = dout + first * dout_stride_token + head * dout_stride_head
    dq_base = dqkv + (first * 3 * heads + head) * HEAD_DIM
    if position_ids is not None:
        position_ids += first
    slope = _slope(slopes, head, scale)

    rows = tl.arange(0, BLOCK_M)
    v_base = q_base + stride_part + stride_part
    q = _load(q_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    k = _load(q_base + stride_part, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    v = _load(v_base, stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    do = _load(dout_base, dout_stride_token, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse_i = tl.load(lse + rows, mask=rows < seqlen, other=float("inf"))  # (BLOCK_M,)
    offsets = _offsets(position_ids, start, seqlen, BLOCK_M)  # (BLOCK_M,)
    scores, _ = _scores(
        q, k, offsets, position_ids, slope, scale, start, start, seqlen,
        BLOCK_M, ALIBI=slopes is not None, SIDE=0,
    )  # (BLOCK_M, BLOCK_M)  # fmt: skip
    p = tl.exp2(scores * (scale * LOG2E) - lse_i[:, None])
    dp = _dot(do, tl.trans(v))
    p_dropped = p
    if seed is not None:
        first_word, second_word = _mask_words(seed, sequence, head)
        keep_mask = _keep_mask(
            first_word, second_word, rows[:, None], rows[None, :], dropout_threshold
        )
        dp = tl.where(keep_mask, dp, 0.0)
        p_dropped = tl.where(keep_mask, p, 0.0)
    dv = _dot(tl.trans(p_dropped.to(do.dtype)), do)
    # Rows of p sum to 1 + e, the log-sum-exp being rounded. Without its inverse, 1 - e, delta does
    # not cancel dp (test_fp32_gradients_hold_at_large_scores).
    delta_i = tl.sum(p * dp, 1) * (2.0 - tl.sum(p, 1))  # (BLOCK_M,)
    ds = (p * (dp - delta_i[:, None])).to(k.dtype)
    dk = _dot(tl.trans(ds), q)
    dq = _dot(ds, k)
    stride = 3 * heads * HEAD_DIM
    dk_base = dq_base + heads * HEAD_DIM
    dv_base = dk_base + heads * HEAD_DIM
    _store(dq * (scale / keep_prob), dq_base, stride, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    _store(dk * (scale / keep_prob), dk_base, stride, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)
    _store(dv / keep_prob, dv_base, stride, start, seqlen, HEAD_DIM, BLOCK_M, BLOCK_D)


# Operators. Their names carry the module's: the Hub may bring this file twice, and of two operators
# with one name the first stops working. They take ASCII only; the checksum tells folders apart
# whose letters have none.
NAMESPACE = f"{re.sub(r'[^a-zA-Z0-9]', '_', __name__)}_{zlib.crc32(__name__.encode()):08x}"


def build_tile_map(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Split the batch into tiles of up to 128 tokens, longest sequence first, without a host sync.

    It depends on the batch alone: build it once and pass it to every layer as `tile_map`.

    Args:
        cu_seqlens: (batch + 1,) int32
        total: number of tokens, which bounds the number of tiles

    Returns:
        (tiles, 2) int32: sequence and first row. Spare tiles start beyond any row.
    """
    rows, batch = MAP_ROWS.value, cu_seqlens.shape[0] - 1
    tiles, order = ((cu_seqlens.diff() + rows - 1) // rows).sort(descending=True, stable=True)
    ends = tiles.cumsum(0)
    tile = torch.arange((total + rows - 1) // rows + batch, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, tile, right=True)
    spare = rank == batch
    rank = rank.clamp(max=batch - 1)
    start = (tile - (ends - tiles)[rank]) * rows
    return torch.stack([order[rank], start.masked_fill(spare, 2**30)], 1).to(torch.int32)


def _launch(kernel, tile, num_tiles, qkv, dropout_p, **arguments):
    """Run `kernel` for every head of every tile, a sequence or part of one, of the batch."""
    block_m, block_n, warps, stages = tile
    total, _, heads, head_dim = qkv.shape
    dropped = min(round(dropout_p * 2**32), 2**32 - 1)
    arguments |= dict(
        qkv=qkv, stride_token=qkv.stride(0), stride_part=qkv.stride(1), stride_head=qkv.stride(2),
        dropout_threshold=dropped - 2**31, keep_prob=1 - dropped / 2**32, total=total, heads=heads,
        HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    arguments = {name: arguments[name] for name in kernel.arg_names}
    with torch.cuda.device_of(qkv):
        # Fusing is not the default from Triton 3.10 on; the instruction counts are with it.
        kernel[(num_tiles * heads,)](
            **arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True
        )


def _num_tiles(cu_seqlens, tile_map, block):
    """How many tiles of `block` tokens `_locate` makes of the batch."""
    entries = cu_seqlens.shape[0] - 1 if tile_map is None else tile_map.shape[0]
    return entries * (MAP_ROWS.value // block)


@torch.library.custom_op(f"{NAMESPACE}::varlen_forward", mutates_args=())
def _forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tile_map: torch.Tensor | None,
    slopes: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    scale: float,
    skip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (total, heads, head_dim), log2-sum-exp2 (heads, total), norms (batch or 0, heads, 2)."""
    out, lse, norms = _forward_fake(
        qkv, cu_seqlens, tile_map, slopes, position_ids, seed, max_seqlen, dropout_p, scale, skip
    )
    if not qkv.is_cuda:
        _check_values(qkv, cu_seqlens, position_ids, max_seqlen)
    batch = dict(
        cu_seqlens=cu_seqlens, tile_map=tile_map, slopes=slopes, position_ids=position_ids,
        norms=norms.zero_() if skip else None, seed=seed, scale=scale,
    )  # fmt: skip
    if skip:
        num_tiles = _num_tiles(cu_seqlens, tile_map, NORMS_TILE[0])
        _launch(_norms_kernel, NORMS_TILE, num_tiles, qkv, dropout_p, **batch)
    tile = tile_shape(qkv, "forward")
    num_tiles = _num_tiles(cu_seqlens, tile_map, tile[0])
    _launch(_forward_kernel, tile, num_tiles, qkv, dropout_p, out=out, lse=lse, **batch)
    return out, lse, norms


@_forward.register_fake
def _forward_fake(
    qkv, cu_seqlens, tile_map, slopes, position_ids, seed, max_seqlen, dropout_p, scale, skip
):
    total, _, heads, head_dim = qkv.shape
    batch = cu_seqlens.shape[0] - 1 if skip else 0
    return (
        qkv.new_empty(total, heads, head_dim),
        qkv.new_empty(heads, total, dtype=torch.float32),
        qkv.new_empty(batch, heads, 2, dtype=torch.float32),
    )


@torch.library.custom_op(f"{NAMESPACE}::varlen_backward", mutates_args=())
def _backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    norms: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tile_map: torch.Tensor | None,
    slopes: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    scale: float,
    skip: bool,
) -> torch.Tensor:
    """dqkv (total, 3, heads, head_dim)."""
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dqkv = _backward_fake(dout, qkv)
    arguments = dict(
        cu_seqlens=cu_seqlens, tile_map=tile_map, slopes=slopes, position_ids=position_ids,
        norms=norms if skip else None, seed=seed, scale=scale, out=out, lse=lse, dqkv=dqkv,
        dout=dout, dout_stride_token=dout.stride(0), dout_stride_head=dout.stride(1),
    )  # fmt: skip
    tile = tile_shape(qkv, "block")
    if max_seqlen <= tile[0]:
        batch = cu_seqlens.shape[0] - 1
        _launch(_block_backward_kernel, tile, batch, qkv, dropout_p, **arguments)
        return dqkv
    arguments["delta"] = torch.empty_like(lse)
    # The order matters: the first writes the delta that the second reads.
    for kernel, direction, owned in ((_dq_kernel, "dq", 0), (_dkdv_kernel, "dkdv", 1)):
        tile = tile_shape(qkv, direction)
        num_tiles = _num_tiles(cu_seqlens, tile_map, tile[owned])
        _launch(kernel, tile, num_tiles, qkv, dropout_p, **arguments)
    return dqkv


@_backward.register_fake
def _backward_fake(dout, qkv, *_):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    # Else backward is handed zeros for lse and norms, which nobody differentiates.
    ctx.set_materialize_grads(False)
    qkv, cu_seqlens, tile_map, slopes, position_ids, seed, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, tile_map, slopes, position_ids, seed)


def _backward_of_forward(ctx, dout, dlse, dnorms):
    return _backward(dout, *ctx.saved_tensors, *ctx.options), *[None] * 9


def _no_second_derivative(ctx, grad):
    raise NotImplementedError(
        "the Triton kernel has no second derivative: use attn_implementation='eager'"
    )


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
_backward.register_autograd(_no_second_derivative)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    *,
    alibi_slopes: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    tile_map: torch.Tensor | None = None,
    skip_far_tiles: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention within each sequence of a packed batch, with ALiBi.

    fp16, bf16 and fp32 (as three tf32 products); head_dim a multiple of 8 up to 128; any number of
    heads. Differentiable in qkv, also under torch.compile; deterministic. Under autocast an fp32
    qkv is cast first. Queries the GPU for nothing, so what only the GPU knows is not checked there:
    `cu_seqlens` must rise from 0 to total, no sequence be longer than max_seqlen.

    Gradients are recomputed from the rounded out and log-sum-exp. In fp32, the worst of 432 random
    batches (N(0, 1), head_dim 16, scale 0.5 to 2, interpreter) was 2.6 times as far off as PyTorch
    in fp32; none was off by more than 2.2e-6 of the largest gradient.

    Args:
        qkv: (total, 3, heads, head_dim), any strides with a contiguous last axis
        cu_seqlens: (batch + 1,) int32, where sequences begin and, last, total
        max_seqlen: at least the longest sequence; it is free to round it up to a power of two, from
            128 on
        dropout_p: chance of an attention weight to be dropped, the others being scaled up
        softmax_scale: positive, by default 1 / sqrt(head_dim)
        alibi_slopes: (heads,) fp32, no bias without it
        position_ids: (total,) int32, rising strictly in each sequence, for ALiBi's distances where
            the mask has holes; by default the index in the sequence
        seed: (1,) int64, of which the dropout mask is a pure function; drawn when None
        return_lse: also return the scores' log-sum-exp, without gradient
        tile_map: `build_tile_map(cu_seqlens, total)`, made here when None
        skip_far_tiles: leave out keys that ALiBi makes hold at most 2**-24 of a row

    Returns:
        out (total, heads, head_dim) and, if asked for, lse (heads, total) fp32, natural logarithm

    Raises:
        ValueError: tensors that are not on one GPU, or of another dtype, shape or layout than said
            here; dropout_p outside [0, 1), or above 0 for sequences of more than 65,536 tokens;
            position_ids without alibi_slopes
    """
    device = qkv.device.type
    # Meta knows no autocast, and raises when asked.
    if device != "meta" and torch.is_autocast_enabled(device) and qkv.dtype == torch.float32:
        qkv = qkv.to(torch.get_autocast_dtype(device))
    tensors = dict(
        cu_seqlens=cu_seqlens, alibi_slopes=alibi_slopes, position_ids=position_ids, seed=seed,
        tile_map=tile_map,
    )  # fmt: skip
    _check(qkv, max_seqlen, dropout_p, softmax_scale, tensors)
    total, _, _, head_dim = qkv.shape
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=qkv.device)
    if max_seqlen <= MAP_ROWS.value:
        tile_map = None
    elif tile_map is None:
        tile_map = build_tile_map(cu_seqlens, total)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    skip = skip_far_tiles and alibi_slopes is not None and max_seqlen > SKIP_ABOVE
    out, lse, _ = _forward(
        qkv, cu_seqlens, tile_map, alibi_slopes, position_ids, seed,
        max_seqlen, dropout_p, scale, skip,
    )  # fmt: skip
    return (out, lse.detach() * LN2.value) if return_lse else out


def _check(qkv, max_seqlen, dropout_p, softmax_scale, tensors):
    """Raise ValueError for anything the kernels cannot do, as far as that needs no host sync."""
    if not (qkv.is_cuda or INTERPRETED):
        raise ValueError(f"qkv is on {qkv.device}: this kernel needs a GPU, use sdpa elsewhere")
    if qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"qkv must be float16, bfloat16 or float32, got {qkv.dtype}")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (total, 3, heads, head_dim), got {tuple(qkv.shape)}")
    total, _, heads, head_dim = qkv.shape
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head_dim must be a multiple of 8 up to 128, got {head_dim}: use sdpa")
    if qkv.stride(-1) != 1:
        raise ValueError(f"head_dim must be contiguous, got strides {qkv.stride()}")
    expected = dict(
        cu_seqlens=(torch.int32, (None,)),
        alibi_slopes=(torch.float32, (heads,)),
        position_ids=(torch.int32, (total,)),
        seed=(torch.int64, (1,)),
        tile_map=(torch.int32, (None, 2)),
    )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype, shape = expected[name]
        sizes = tuple(
            size if want is None else want for want, size in zip(shape, tensor.shape, strict=False)
        )
        if tensor.dtype != dtype or tensor.ndim != len(shape) or tensor.shape != sizes:
            raise ValueError(
                f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != qkv.device:
            raise ValueError(f"{name} is on {tensor.device}, qkv on {qkv.device}: move one of them")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensors["cu_seqlens"].shape[0] < 2:
        raise ValueError("cu_seqlens must have 2 elements or more: 0, where sequences end, total")
    if not isinstance(max_seqlen, (int, torch.SymInt)) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int of 0 or more, got {max_seqlen!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p and max_seqlen > 2**16:
        # Places beyond would share the random bits of others.
        raise ValueError(f"dropout takes sequences of up to 65,536 tokens, got {max_seqlen}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    if tensors["position_ids"] is not None and tensors["alibi_slopes"] is None:
        raise ValueError("position_ids only set ALiBi's distances: pass alibi_slopes with them")


def _check_values(qkv, cu_seqlens, position_ids, max_seqlen):
    """Raise ValueError for what only the data tells, which would cost a GPU a sync."""
    total, seqlens = qkv.shape[0], cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (seqlens < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {total}, got {cu_seqlens.tolist()}")
    if seqlens.max() > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest sequence {seqlens.max().item()}")
    if position_ids is not None and total > 1:
        inside = torch.ones(total - 1, dtype=torch.bool)
        ends = cu_seqlens[1:-1]
        inside[ends[(ends > 0) & (ends < total)].long() - 1] = False
        if (position_ids.diff()[inside] <= 0).any():
            raise ValueError("position_ids must rise strictly within every sequence")
