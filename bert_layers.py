# SPDX-License-Identifier: Apache-2.0
"""MosaicBERT for transformers: post-norm BERT with ALiBi, gated MLPs and no padding inside.

The forward pass:
    pack_batch            which tokens are real, which form a sequence
    BertEmbeddings        word + token type, LayerNorm            (total,)     -> (total, dim)
    BertLayer, N times    attention with ALiBi, then a gated MLP  (total, dim) -> (total, dim)
    pad_input             zeros where padding was          (total, dim) -> (batch, seqlen, dim)
    a head                masked tokens, classes, answers, ...

Shapes: batch, seqlen, heads, head_dim, dim = heads * head_dim, inter, vocab; total = tokens that
are not padding. Parameter names and Wqkv's layout are frozen by published checkpoints.
"""

import contextlib
import itertools
import math
import os
import re
import zlib
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, logging

from .bert_padding import (
    PackedBatch,
    check_shape,
    check_tensor,
    is_abstract,
    is_functorch_wrapped_tensor,
    pack_batch,
    pack_flattened,
    packed_before,
    pad_input,
    tracing,
    under_vmap,
    unpad_input,
)
from .configuration_bert import AUTO_MAP, MosaicBertConfig

try:
    # transformers 5: these leave weights alone that a checkpoint has already filled.
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

try:
    from .flash_attn_triton import build_tile_map
    from .flash_attn_triton import flash_attn_varlen_qkvpacked_func as triton_varlen_attention
except Exception as error:  # a broken installation must not keep the model from a CPU
    triton_varlen_attention, triton_missing = None, str(error)

try:
    from flash_attn import flash_attn_varlen_qkvpacked_func as flash_attn_2_varlen_attention
except Exception as error:
    flash_attn_2_varlen_attention, flash_attn_2_missing = None, str(error)

logger = logging.get_logger(__name__)


# ---- ALiBi ----


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head.

    2^(-8k/n) for k = 1..n, where n is the largest power of two <= heads; the remaining heads take
    every other slope of the sequence for 2n, starting with the first (Press et al., 2022, and the
    code that the authors published with it).
    """

    def powers(n):
        return [2 ** (-8 * k / n) for k in range(1, n + 1)]

    n = 2 ** int(math.log2(heads))
    return powers(n) + powers(2 * n)[::2][: heads - n]


def alibi_window(slopes: Tensor, seqlen: int) -> Tensor:
    """(heads, 2 * seqlen - 1): ALiBi's bias for distances from -(seqlen - 1) to seqlen - 1."""
    distance = torch.arange(1 - seqlen, seqlen, device=slopes.device).abs()
    return -slopes[:, None] * distance


def bias_for_reversed_keys(window: Tensor, seqlen: int) -> Tensor:
    """ALiBi's bias (1, heads, seqlen, seqlen) for keys in reversed order, in O(seqlen) memory.

    Against reversed keys the distance depends on row + column alone, so each row of the bias is the
    row above moved by one: an overlapping view of `window`, never to be written to.
    """
    heads, width = window.shape
    return window.as_strided((1, heads, seqlen, seqlen), (0, width, 1, 1), width // 2 + 1 - seqlen)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32, what softmax and losses are computed in; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off, where it is on: to switch it off is a node in a traced graph."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


# ---- attention backends ----
# (qkv, slopes, batch, dropout_p) -> context, attention probabilities or None, with
# qkv (total, 3, heads, head_dim), context (total, heads, head_dim), and slopes (heads,) float32, or
# float64 where qkv are: torch's CPU kernel misreads a bias that is narrower than its queries.


def dense_bias(slopes: Tensor, batch: PackedBatch, total: int) -> Tensor:
    """What is added to scores of padded rows: ALiBi's bias, and the lowest number where the key
    belongs to another sequence than the query, or to padding.

    (batch, heads, seqlen, seqlen) in the slopes' dtype, or (1, ...) where `batch.rows` are one row.
    """
    if batch.rows is None:
        token = torch.arange(total, dtype=torch.int32, device=slopes.device)
        sequence = torch.searchsorted(batch.cu_seqlens[1:], token, right=True)
        start = batch.cu_seqlens[sequence]
        position = token - start if batch.positions is None else batch.positions
        # Sequences count from 1 here, since pad_input leaves 0 at padding.
        sequence, position = pad_input(sequence + 1, batch), pad_input(position, batch)
    else:
        sequence, position = batch.rows
    bias = -slopes[:, None, None] * (position[:, None, :, None] - position[:, None, None, :]).abs()
    elsewhere = sequence[:, None, :, None] != sequence[:, None, None, :]
    return bias.masked_fill(elsewhere, torch.finfo(bias.dtype).min)


def eager_attention(qkv: Tensor, slopes: Tensor, batch: PackedBatch, dropout_p: float):
    """The reference: scores, bias and probabilities are dense, the first two in float32 at least.

    Probabilities are (batch, heads, seqlen, seqlen), zero in the rows of padding.
    """
    # Not len(), which tracers take for a constant.
    total = qkv.shape[0]
    bias = dense_bias(slopes, batch, total) if batch.bias is None else batch.bias
    # each (batch, heads, seqlen, head_dim)
    query, key, value = pad_input(qkv, batch).permute(2, 0, 3, 1, 4)
    # In half precision softmax would take large scores for others, and fp16 has none over 65,504.
    with without_autocast(qkv.device):
        query, key = at_least_float32(query) * qkv.shape[-1] ** -0.5, at_least_float32(key)
        probs = (query @ key.transpose(-1, -2) + bias).softmax(-1)
    is_token = pad_input(qkv.new_ones(total), batch)
    probs = F.dropout(probs * is_token[:, None, :, None], dropout_p).to(qkv.dtype)
    return unpad_input((probs @ value).transpose(1, 2), batch), probs


# From this length on keys out of reach are left out on a CPU, and queries taken so many at a time.
LONG, QUERIES = 1024, 256


def alibi_reach(query: Tensor, key: Tensor, slopes: Tensor) -> list[int]:
    """Of each head, the distance from which on all keys together hold at most half an eps, 2^-24 in
    float32, of what the query's own key holds, in any of these sequences.

    A key at distance d holds exp(q (k_d - k_0) scale - slope d) of what the own key k_0 does, and
    q (k_d - k_0) is at most 2 |q| |k - c| for any c, here the mean of the keys. Summed over both
    sides that is a geometric series, which is solved for d.

    Args:
        query, key: (count, heads, seqlen, head_dim). slopes: (heads,).
    """
    query, key = at_least_float32(query), at_least_float32(key)
    key = key - key.mean(2, keepdim=True)
    # (heads,): the largest of each sequence, then of all sequences
    norms = query.norm(dim=-1).amax(2) * key.norm(dim=-1).amax(2)
    bound = 2 * norms.amax(0) * query.shape[-1] ** -0.5
    negligible = math.log(torch.finfo(query.dtype).eps / 2)
    reach = (bound - negligible - (-torch.expm1(-slopes) / 2).log()) / slopes
    # Also where it is NaN or infinite: then nothing is left out.
    seqlen = torch.full_like(reach, query.shape[2])
    return torch.where(reach < seqlen, reach.ceil(), seqlen).int().tolist()


def attention_within_reach(query, key, value, bias, slopes: Tensor) -> Tensor:
    """scaled_dot_product_attention without the keys that `alibi_reach` leaves out.

    Args:
        query: (count, heads, seqlen, head_dim). key, value: the same shape, in reversed order.
        bias: (1, heads, seqlen, seqlen), of `bias_for_reversed_keys`.
    """
    seqlen, contexts = query.shape[2], []
    for head, reach in enumerate(alibi_reach(query, key, slopes)):
        step = QUERIES if 2 * reach + QUERIES < seqlen else seqlen
        blocks = []
        for start in range(0, seqlen, step):
            end = min(start + step, seqlen)
            # Reversed: the key of column 0 is the last.
            columns = slice(max(seqlen - end - reach, 0), seqlen - max(start - reach, 0))
            one = slice(head, head + 1)
            blocks.append(
                F.scaled_dot_product_attention(
                    query[:, one, start:end],
                    key[:, one, columns],
                    value[:, one, columns],
                    bias[:, one, start:end, columns],
                )
            )
        contexts.append(torch.cat(blocks, 2))
    return torch.cat(contexts, 1)


def is_constant(x: Tensor) -> bool:
    """Whether no derivative is taken of x, be it by autograd or torch.func."""
    derived = x.requires_grad and torch.is_grad_enabled()
    return not (derived or is_functorch_wrapped_tensor(x))


def sdpa_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    slopes: Tensor,
    positions: Tensor | None,
    dropout_p: float,
    window: Tensor | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention, one call for each run of sequences of equal length.

    The bias takes O(seqlen) memory, and torch's CPU kernel no more. Two exceptions hold (heads,
    seqlen, seqlen): the bias of a sequence with gaps in its positions, and, with dropout, which
    that kernel lacks, the probabilities. `window` is `alibi_window` of the longest, made before.

    On a CPU a forward pass that records no gradient reads long sequences within ALiBi's reach only.
    """
    lengths = cu_seqlens.diff().tolist()
    # With gaps every sequence has distances of its own, and is a run of its own.
    runs = itertools.groupby(lengths) if positions is None else [(n, [n]) for n in lengths]
    runs = [(seqlen, len(list(run))) for seqlen, run in runs]
    if window is None:
        window = alibi_window(slopes, max(lengths))
    near_only = qkv.is_cpu and positions is None and not dropout_p and is_constant(qkv)
    # Split, not slices: the gradient of a slice is a whole tensor of zeros, once for each sequence.
    chunks = qkv.split([seqlen * count for seqlen, count in runs])
    contexts = []
    for (seqlen, count), chunk in zip(runs, chunks, strict=True):
        query, key_value = chunk.unflatten(0, (count, seqlen)).split([1, 2], dim=2)
        if positions is None:
            key_value, bias = key_value.flip(1), bias_for_reversed_keys(window, seqlen)
        else:
            position, positions = positions[:seqlen], positions[seqlen:]
            bias = -slopes[None, :, None, None] * (position[:, None] - position).abs()
        if not qkv.is_cpu:
            # Other kernels want rows that do not overlap, in the queries' dtype.
            bias = bias.to(qkv.dtype).contiguous()
        key, value = key_value.split(1, dim=2)
        # each (count, heads, seqlen, head_dim)
        query, key, value = (x.squeeze(2).transpose(1, 2) for x in (query, key, value))
        # Autocast would copy the bias to half precision, and the view would become dense.
        with torch.autocast(qkv.device.type, enabled=False):
            if near_only and seqlen >= LONG:
                context = attention_within_reach(query, key, value, bias, slopes)
            else:
                context = F.scaled_dot_product_attention(query, key, value, bias, dropout_p)
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return torch.cat(contexts)


# torch.compile cannot trace a loop over lengths that only the data knows, so there the loop is one
# operator. Its name carries the module's, since a process may load this file from several
# repositories. It takes ASCII only; the checksum tells folders apart whose letters have none.
NAMESPACE = f"{re.sub(r'[^a-zA-Z0-9]', '_', __name__)}_{zlib.crc32(__name__.encode()):08x}"


@contextlib.contextmanager
def drawn_from(seed: Tensor, device: torch.device):
    """Random numbers on `device` come from `seed`, (1,) int64, and go on as before afterwards.

    Raises:
        ValueError: the device has a generator of its own that is not CUDA's.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"torch.compile cannot repeat attention dropout on {device.type}: use "
            "attn_implementation='eager', or attention_probs_dropout_prob 0"
        )
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed.item())
        else:
            torch.default_generator.manual_seed(seed.item())
        yield


@torch.library.custom_op(f"{NAMESPACE}::sdpa_varlen", mutates_args=())
def sdpa_varlen_op(
    qkv: Tensor,
    cu_seqlens: Tensor,
    slopes: Tensor,
    positions: Tensor | None,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """`sdpa_varlen` as a pure function of `seed`, (1,) int64, which dropout is drawn from."""
    with drawn_from(seed, qkv.device) if dropout_p else contextlib.nullcontext():
        return sdpa_varlen(qkv, cu_seqlens, slopes, positions, dropout_p)


@torch.library.custom_op(f"{NAMESPACE}::sdpa_varlen_backward", mutates_args=())
def sdpa_varlen_backward_op(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    slopes: Tensor,
    positions: Tensor | None,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """Gradient of `sdpa_varlen_op` in qkv, which runs forward again."""
    with drawn_from(seed, qkv.device) if dropout_p else contextlib.nullcontext():
        _, vjp = torch.func.vjp(
            lambda x: sdpa_varlen(x, cu_seqlens, slopes, positions, dropout_p), qkv
        )
        return vjp(grad)[0].contiguous()


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _sdpa_varlen_gradient(ctx, grad):
    *tensors, seed = ctx.saved_tensors
    gradient = sdpa_varlen_backward_op(grad, *tensors, ctx.dropout_p, seed)
    return gradient, None, None, None, None, None


sdpa_varlen_op.register_fake(lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape))
sdpa_varlen_backward_op.register_fake(lambda grad, qkv, *_: qkv.new_empty(qkv.shape))
sdpa_varlen_op.register_autograd(_sdpa_varlen_gradient, setup_context=_save_inputs)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "there is no second derivative here: use attn_implementation='eager' and "
        "config.sparse_prediction=False, which have all"
    )


sdpa_varlen_backward_op.register_autograd(_no_second_derivative)


def traced_attention(qkv: Tensor, bias: Tensor, batch: PackedBatch, dropout_p: float) -> Tensor:
    """torch's scaled_dot_product_attention of rows whose padding stays; bias is `dense_bias`."""
    # each (batch, heads, seqlen, head_dim)
    query, key, value = qkv.unflatten(0, (batch.batch_size, batch.seqlen)).permute(2, 0, 3, 1, 4)
    with without_autocast(qkv.device):
        # ONNX adds numbers of one dtype only, as GPUs' kernels do.
        bias = bias.to(qkv.dtype)
        context = F.scaled_dot_product_attention(query, key, value, bias, dropout_p)
    return context.transpose(1, 2).flatten(0, 1)


def sdpa_attention(qkv: Tensor, slopes: Tensor, batch: PackedBatch, dropout_p: float):
    """`sdpa_varlen`, which torch.compile sees as one operator; under tracers `traced_attention`."""
    if batch.rows is not None:
        return traced_attention(qkv, batch.bias, batch, dropout_p), None
    arguments = (qkv, batch.cu_seqlens, slopes, batch.positions, dropout_p)
    if torch.compiler.is_compiling():
        seed = torch.randint(2**62, (1,)) if dropout_p else torch.zeros(1, dtype=torch.int64)
        return sdpa_varlen_op(*arguments, seed), None
    return sdpa_varlen(*arguments, batch.bias), None


def triton_attention(qkv: Tensor, slopes: Tensor, batch: PackedBatch, dropout_p: float):
    """The package's own kernel, flash_attn_triton.py."""
    context = triton_varlen_attention(
        qkv,
        batch.cu_seqlens,
        batch.max_seqlen,
        dropout_p,
        alibi_slopes=slopes,
        position_ids=batch.positions,
        tile_map=batch.tile_map,
    )
    return context, None


def flash_attention_2(qkv: Tensor, slopes: Tensor, batch: PackedBatch, dropout_p: float):
    """The flash-attn package's kernel, with ALiBi's slopes; it measures distance by index."""
    if batch.positions is not None:
        raise ValueError(
            "attn_implementation='flash_attention_2' measures distance by index, but this batch "
            "has gaps (zeros inside a row of attention_mask, or position_ids that skip): use 'sdpa'"
        )
    context = flash_attn_2_varlen_attention(
        qkv, batch.cu_seqlens, batch.max_seqlen, dropout_p, alibi_slopes=slopes
    )
    return context, None


ATTENTION_BACKENDS = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "triton": triton_attention,
    "flash_attention_2": flash_attention_2,
}


# The largest head_dim and the dtypes that each kernel takes.
KERNEL_LIMITS = {
    "triton": (128, (torch.float16, torch.bfloat16, torch.float32)),
    "flash_attention_2": (256, (torch.float16, torch.bfloat16)),
}


def unsupported_reason(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """The reason why `backend` cannot run on such queries, or None if it can."""
    if backend not in KERNEL_LIMITS:
        return None
    largest, dtypes = KERNEL_LIMITS[backend]
    if not (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        if device.type != "cuda":
            return f"it needs CUDA tensors, got {device.type}"
        if torch.version.hip:
            return "it is written for NVIDIA's GPUs, not for ROCm's"
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            return f"it needs compute capability 8.0, got {capability}"
    if dtype not in dtypes:
        return f"it takes {', '.join(map(str, dtypes))}, got {dtype}"
    if head_dim % 8 or head_dim > largest:
        return f"it takes head_dim that is a multiple of 8 up to {largest}, got {head_dim}"
    return None


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    output_attentions: bool = False,
) -> str:
    """Name of the backend that runs on queries of this device, dtype and head_dim.

    It is chosen at each forward pass, since a model may be moved after it is loaded.

    | requested | queries                                       | backend                |
    |-----------|-----------------------------------------------|------------------------|
    | auto      | any, and attentions are to be returned        | eager                  |
    | auto      | on CUDA, Triton is there and can take them    | triton                 |
    | auto      | on CUDA, Triton is there and cannot take them | sdpa, with one warning |
    | auto      | any others                                    | sdpa                   |
    | a name    | it can take them                              | that name              |
    | a name    | it cannot, or it returns no attentions        | ValueError             |
    """
    if requested == "auto":
        if output_attentions:
            return "eager"
        if triton_varlen_attention is None or device.type != "cuda":
            return "sdpa"
        if reason := unsupported_reason("triton", device, dtype, head_dim):
            logger.warning_once(f"Attention runs on 'sdpa' instead of 'triton': {reason}")
            return "sdpa"
        return "triton"
    if output_attentions and requested != "eager":
        raise ValueError(
            "output_attentions=True needs attn_implementation='eager' or none at all, "
            f"got {requested!r}, which never holds them"
        )
    if reason := unsupported_reason(requested, device, dtype, head_dim):
        raise ValueError(
            f"attn_implementation={requested!r} cannot run: {reason}. Use 'sdpa', or leave it out"
        )
    return requested


# ---- the loss of masked language modelling ----

# The loss holds the logits of at most so many labels at a time, and of so many bytes in float32.
# More labels of the same id could leave fp16's range in the weight's gradient.
LOSS_ROWS, LOSS_BYTES = 2**12, 2**29


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of a linear layer's outputs, summed, without holding them all.

    Gradients are made on the way, a few rows at a time, so that logits are computed once. Logits
    are in the dtype of hidden_states; softmax, loss and the sums over chunks are in float32, or in
    float64 where hidden_states are.

    Args:
        hidden_states: (labelled, dim). weight: (vocab, dim). bias: (vocab,).
        labels: (labelled,) int64, each from 0 to vocab - 1.
        weight_grad: whether weight is trained.

    Returns:
        loss, a scalar, and its gradients in hidden_states, (labelled, dim) in their dtype, in
        weight, (vocab, dim), or (0, dim) unless weight_grad, and in bias, (vocab,); all but the
        second in float32, or float64 as said above.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    narrow_weight, narrow_bias = weight.to(hidden_states.dtype), bias.to(hidden_states.dtype)
    rows = max(1, min(LOSS_ROWS, LOSS_BYTES // (4 * len(weight))))
    loss = hidden_states.new_zeros((), dtype=wide)
    bias_sum = torch.zeros_like(bias, dtype=wide)
    weight_sum, hidden_grads = None, []
    with torch.autocast(hidden_states.device.type, enabled=False):
        for x, label in zip(hidden_states.split(rows), labels[:, None].split(rows), strict=True):
            logits = torch.addmm(narrow_bias, x, narrow_weight.T)  # (rows, vocab)
            log_probs = logits.log_softmax(-1, dtype=wide)
            label_log_prob = log_probs.gather(1, label)
            loss -= label_log_prob.sum()
            # The logits' gradient, in their place: softmax, less 1 at the label, where the
            # difference would cancel in half precision.
            grad = torch.exp(log_probs, out=logits)
            grad.scatter_(1, label, label_log_prob.expm1().to(grad.dtype))
            hidden_grads.append(grad @ narrow_weight)
            bias_sum += grad.sum(0, dtype=wide)
            if weight_grad:
                part = grad.T @ x
                weight_sum = part.to(wide) if weight_sum is None else weight_sum.add_(part)
    if not weight_grad:
        weight_sum = weight.new_empty((0, weight.shape[1]), dtype=wide)
    return loss, torch.cat(hidden_grads), weight_sum, bias_sum


# One operator, since torch.compile would make a graph for each number of chunks.
linear_cross_entropy_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_cross_entropy", linear_cross_entropy, mutates_args=()
)


@linear_cross_entropy_op.register_fake
def _(hidden_states, weight, bias, labels, weight_grad):
    rows = weight.shape[0] if weight_grad else 0
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return (
        hidden_states.new_empty((), dtype=wide),
        hidden_states.new_empty(hidden_states.shape),
        weight.new_empty(rows, weight.shape[1], dtype=wide),
        torch.empty_like(bias, dtype=wide),
    )


def _save_gradients(ctx, inputs, output):
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.weight_grad = inputs[-1]
    ctx.save_for_backward(*output[1:])
    # Else backward is handed zeros as large as weight for the outputs that nobody used.
    ctx.set_materialize_grads(False)


class FirstDerivative(torch.autograd.Function):
    """Returns the first three of its tensors; to derive them by the others raises."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors[:3]

    backward = staticmethod(_no_second_derivative)


def _scale_gradients(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None
    saved = ctx.saved_tensors
    with torch.no_grad():
        # In float32: a half-precision tensor times grad would round grad to half precision first.
        scaled = [x.to(grad.dtype, copy=True).mul_(grad) for x in saved]
        scaled = [x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)]
    if torch.is_grad_enabled():
        # create_graph=True. Without it they would pass for constant where they are derived again.
        scaled = FirstDerivative.apply(*scaled, *saved, grad)
    hidden, weight, bias = scaled
    return hidden, weight if ctx.weight_grad else None, bias, None, None


linear_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


def operator_takes(*tensors: Tensor) -> bool:
    """Whether `linear_cross_entropy_op` is right for these tensors.

    It is not for tensor subclasses (torchao's quantized weights, DTensors), nor for derivatives
    that autograd does not take backward through it: torch.func's, and forward mode.
    """
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    return not any(
        is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
        for x in tensors
    )


# ---- the model ----


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device, None where it is off."""
    # Meta knows no autocast, and raises when asked. (Dynamo before torch 2.13 cannot trace
    # torch.amp.is_autocast_available, which would tell.)
    if device.type == "meta":
        return None
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


class LayerNorm(nn.LayerNorm):
    """LayerNorm over dim; with `low_precision` it stays in autocast's dtype under autocast."""

    def __init__(self, dim: int, eps: float, low_precision: bool = False):
        super().__init__(dim, eps=eps)
        self.low_precision = low_precision

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device) if self.low_precision else None
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x.to(dtype),
                self.normalized_shape,
                self.weight.to(dtype),
                self.bias.to(dtype),
                self.eps,
            )


class Dropout(nn.Dropout):
    """Dropout that spends 16 random bits on an element on a CPU, outside torch.compile.

    torch draws them one by one there: a training step at base size takes 4 to 6 % longer with it in
    float32, 5 to 7 % in bfloat16 (two cores of an AMD EPYC with AVX512-BF16, torch 2.13;
    "mosaic-torch-dropout" in benchmarks/results/pretraining.jsonl). p is rounded to a multiple of
    2^-16, and what is kept is scaled for the rounded p.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        fast = x.is_cpu and 0 < dropped < 2**16 and not torch.compiler.is_compiling()
        if not (self.training and fast):
            return super().forward(x)
        # All 64 bits; four elements take a word.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = (bits >= dropped - 2**15).to(x.dtype)
        return x * keep.mul_(1 / (1 - dropped / 2**16))


class BertEmbeddings(nn.Module):
    """Word and token type embeddings. Positions have none: ALiBi is in the attention."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm
        )
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids=None, token_type_ids=None, inputs_embeds=None) -> Tensor:
        """input_ids, token_type_ids (total,), or inputs_embeds (total, dim) -> (total, dim).

        (batch, seqlen) in place of total where a hook looks on, see `BertModel.embed`.
        """
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size, TOKENIZER)
            inputs_embeds = self.word_embeddings(input_ids)
        if token_type_ids is None:
            # Looked up once: the gradients of all tokens would be added to one row in turn.
            token_type_ids = torch.zeros(1, dtype=torch.int64, device=inputs_embeds.device)
        else:
            check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size, TOKENIZER)
        types = self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(inputs_embeds + types))


TOKENIZER = "is the tokenizer the model's own?"
LABELS = "load the model with num_labels=, or leave the label out by -100"


def check_ids(name: str, ids: Tensor, count: int, hint: str):
    """Refuses ids that nothing is stored for, where looking costs no synchronisation: on a CPU.

    Args:
        name: of the argument. ids: of any shape, int64. count: of the ids, which count from 0.
        hint: what may be wrong.

    Raises:
        ValueError: the ids are no int64 or int32, or one is outside 0..count - 1.
    """
    check_tensor(name, ids, torch.int64, torch.int32)
    unknown = torch.compiler.is_compiling() or tracing() or is_abstract(ids) or under_vmap(ids)
    if ids.is_cpu and ids.numel() and not unknown:
        low, high = (x.item() for x in ids.aminmax())
        if low < 0 or high >= count:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}, but the model has only 0..{count - 1}: "
                f"{hint}"
            )


class BertSelfAttention(nn.Module):
    """Multi-head attention with ALiBi among the tokens of each sequence."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states: Tensor, slopes: Tensor, batch: PackedBatch, backend: str):
        """(total, dim) -> (total, dim), and weights (batch, heads, seqlen, seqlen) or None."""
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        dropout_p = self.dropout_p if self.training else 0.0
        context, probs = ATTENTION_BACKENDS[backend](qkv, slopes, batch, dropout_p)
        return context.flatten(1), probs


class BertSelfOutput(nn.Module):
    """Output projection of the attention, residual and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm
        )
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class BertAttention(nn.Module):
    """Self-attention and its output; the names `self` and `output` are the checkpoints'."""

    def __init__(self, config):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states, slopes, batch, backend, keep=None):
        """As BertSelfAttention's, but -> (kept, dim) if `keep`, (kept,) int64, names tokens."""
        context, probs = self.self(hidden_states, slopes, batch, backend)
        if keep is not None:
            context, hidden_states = (
                context.index_select(0, keep),
                hidden_states.index_select(0, keep),
            )
        return self.output(context, hidden_states), probs


class BertGatedLinearUnitMLP(nn.Module):
    """GELU-gated linear unit (GEGLU; Shazeer, 2020), residual and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = nn.GELU()
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layernorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, value = self.gated_layers(hidden_states).chunk(2, dim=-1)  # each (total, inter)
        if gate.is_cpu and not self.training:
            # torch's fast GELU, oneDNN's, takes a copy, but no half of a tensor. This does not
            # depend on gradients or compilers, so that they change no bit.
            gate = gate.contiguous()
        return self.layernorm(self.wo(self.dropout(self.act(gate) * value)) + hidden_states)


class BertLayer(GradientCheckpointingLayer):
    """Attention, then MLP. Under gradient checkpointing its tensors must be passed by position."""

    def __init__(self, config):
        super().__init__()
        self.attention = BertAttention(config)
        self.mlp = BertGatedLinearUnitMLP(config)

    def forward(self, hidden_states, slopes, batch, backend, keep=None):
        """As BertAttention's."""
        hidden_states, probs = self.attention(hidden_states, slopes, batch, backend, keep)
        return self.mlp(hidden_states), probs


class BertEncoder(nn.Module):
    """The layers, and ALiBi's slopes for all of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        batch: PackedBatch,
        output_attentions: bool,
        output_hidden_states: bool,
    ):
        """(total, dim) -> (total, dim), or (labelled, dim) if the batch names labelled tokens.

        Returns also the list of hidden states (batch, seqlen, dim), of the embeddings and of each
        layer, and the list of attention probabilities; each None unless asked for. A hidden state
        that is returned is the tensor that the next layer reads, so that it has a gradient.
        """
        heads, device = self.config.num_attention_heads, hidden_states.device
        if batch.rows is not None:
            # Kernels cannot mask padding that stays.
            wanted = self.config._attn_implementation
            backend = "eager" if output_attentions or wanted == "eager" else "sdpa"
        else:
            backend = choose_backend(
                self.config._attn_implementation,
                device,
                autocast_dtype(device) or hidden_states.dtype,
                self.config.hidden_size // heads,
                output_attentions,
            )
        # Not len(), which torch.export takes for a constant.
        if hidden_states.shape[0] == 0:
            # Kernels want at least one sequence; eager takes none.
            backend = "eager"
        elif backend == "triton" and batch.tile_map is None:
            tile_map = build_tile_map(batch.cu_seqlens, len(hidden_states))
            batch = batch._replace(tile_map=tile_map)
        # Filled in, since copying a list to a GPU waits for everything queued there.
        # Autocast leaves float64 alone.
        like = {"dtype": torch.promote_types(hidden_states.dtype, torch.float32), "device": device}
        slopes = torch.cat([torch.full((1,), x, **like) for x in alibi_slopes(heads)])
        # What these add to scores is made once for all layers.
        if backend == "eager" or batch.rows is not None:
            batch = batch._replace(bias=dense_bias(slopes, batch, hidden_states.shape[0]))
        elif backend == "sdpa" and batch.positions is None and not torch.compiler.is_compiling():
            batch = batch._replace(bias=alibi_window(slopes, batch.max_seqlen))
        states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None

        def shown(hidden_states):
            if states is None:
                return hidden_states
            states.append(pad_input(hidden_states, batch))
            return unpad_input(states[-1], batch)

        hidden_states = shown(hidden_states)
        for i, layer in enumerate(self.layer):
            keep = batch.labelled_indices if i == len(self.layer) - 1 else None
            hidden_states, probs = layer(hidden_states, slopes, batch, backend, keep)
            hidden_states = shown(hidden_states)
            if output_attentions:
                attentions.append(probs)
        return hidden_states, states, attentions


class BertPooler(nn.Module):
    """tanh(dense(first token of the row))."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seqlen, dim) -> (batch, dim)."""
        return torch.tanh(self.dense(hidden_states[:, 0]))


class BertPredictionHeadTransform(nn.Module):
    """dense, activation, LayerNorm, whose eps is 1e-12 whatever the config says, as published."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        if config.hidden_act not in ACT2FN:
            known = ", ".join(sorted(ACT2FN))
            raise ValueError(f"hidden_act {config.hidden_act!r} is not one of {known}")
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = LayerNorm(config.hidden_size, 1e-12, config.low_precision_layernorm)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    """Transform, then the decoder: word embeddings (tied) and a bias of its own."""

    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., dim) -> `logits`, or with labels their `summed_loss`.

        Both go through this call, where hooks sit (FSDP2, offloading, PEFT).
        """
        hidden_states = self.transform(hidden_states)
        if labels is None:
            return self.logits(hidden_states)
        return self.summed_loss(hidden_states, labels)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab)."""
        return self.decoder(hidden_states)

    def summed_loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """(labelled, dim), (labelled,) int64 -> scalar, by `linear_cross_entropy`."""
        weight, bias = self.decoder.weight, self.decoder.bias
        check_ids("labels", labels, len(weight), TOKENIZER)
        # As autocast does for the decoder itself.
        hidden_states = hidden_states.to(autocast_dtype(hidden_states.device) or weight.dtype)
        loss, *_ = linear_cross_entropy_op(
            hidden_states, weight, bias, labels, weight.requires_grad
        )
        return loss


class BertOnlyMLMHead(nn.Module):
    """As BertLMPredictionHead; the name `predictions` is the checkpoints'."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.predictions(hidden_states, labels)


# ---- arguments that callers of transformers' BERT pass besides ----

# Without meaning here, as in transformers' encoders.
MEANINGLESS = ("use_cache", "cache_position", "special_tokens_mask", "offset_mapping")
MEANINGLESS += ("overflow_to_sample_mapping", "num_truncated_tokens", "length")
# They would change the result, and are refused unless None.
REFUSED = {
    "head_mask": "heads cannot be masked",
    "past_key_values": "an encoder keeps none. Prefix tuning needs them; LoRA, prompt tuning and "
    "p-tuning do not",
    "encoder_hidden_states": "MosaicBERT has no cross-attention",
    "encoder_attention_mask": "MosaicBERT has no cross-attention",
}
# Where a flattening collator says its sequences begin.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def find_sequences(
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    batch: PackedBatch | None,
    extras: dict,
) -> PackedBatch:
    """The PackedBatch of a forward pass: handed over, or made of bounds, or of mask and positions.

    Args:
        extras: further keyword arguments of the forward pass, of the names above.
        The others are as in `pack_batch` and `packed_before`.

    Raises:
        TypeError: a name that is in none of the tables.
        ValueError: one that is refused, or inputs that contradict each other, which `check_bounds`
            sees on a CPU only.
    """
    for name, value in extras.items():
        if name not in (*MEANINGLESS, *REFUSED, *BOUNDS):
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if name in REFUSED and value is not None:
            raise ValueError(f"{name} must be None: {REFUSED[name]}")
    bounds = {name: extras[name] for name in BOUNDS if extras.get(name) is not None}
    if bounds and (batch is not None or attention_mask is not None or len(tokens) != 1):
        raise ValueError(
            f"{', '.join(bounds)} are for one row without attention_mask or batch, "
            f"got {len(tokens)} rows"
        )
    if batch is not None:
        return packed_before(batch, tokens, attention_mask, position_ids)
    if "cu_seq_lens_q" in bounds and not tracing():
        batch = pack_flattened(tokens, bounds["cu_seq_lens_q"], bounds.get("max_length_q"), labels)
    elif bounds and position_ids is None:
        raise ValueError(f"{', '.join(bounds)}: give position_ids too")
    else:
        batch = pack_batch(tokens, attention_mask, position_ids, labels)
    if bounds and tokens.is_cpu and not (torch.compiler.is_compiling() or tracing()):
        check_bounds(batch, tokens, position_ids, bounds)
    return batch


def check_bounds(batch: PackedBatch, tokens: Tensor, position_ids: Tensor | None, bounds: dict):
    """ValueError unless a flattening collator's bounds tell of the same sequences as `batch` does.

    Args:
        batch: of these tokens, by position_ids or by cu_seq_lens_q.
        tokens: (1, total) or (1, total, dim). position_ids: (1, total), or None.
        bounds: those of BOUNDS that were given; max_length_k is not looked at.
    """
    told = {"cu_seq_lens_k": bounds.get("cu_seq_lens_k")}
    if "seq_idx" in bounds:
        changes = bounds["seq_idx"].flatten().diff().nonzero().squeeze(1) + 1
        told["seq_idx"] = F.pad(F.pad(changes, (1, 0)), (0, 1), value=tokens.shape[1])
    if position_ids is not None and "cu_seq_lens_q" in bounds:
        by_position = pack_batch(tokens, None, position_ids)
        if by_position.positions is not None:
            raise ValueError("position_ids beside cu_seq_lens_q must rise by 1 in each sequence")
        told["position_ids"] = by_position.cu_seqlens
    for name, cu_seqlens in told.items():
        if cu_seqlens is not None and not torch.equal(cu_seqlens.int(), batch.cu_seqlens):
            raise ValueError(
                f"{name} tells of sequences that begin at {cu_seqlens.tolist()[:-1]}, the other "
                f"inputs of {batch.cu_seqlens.tolist()[:-1]}"
            )


class BertPreTrainedModel(PreTrainedModel):
    """What all models share: configuration, initialisation, choice of attention backend."""

    config_class = MosaicBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BertLayer"]
    # Trainer: only the MLM loss is divided by num_items_in_batch.
    accepts_loss_kwargs = False

    def __init__(self, config, *args, **kwargs):
        # Another copy of this folder's code has a class of its own for the same configuration.
        if type(config).model_type != MosaicBertConfig.model_type:
            config = MosaicBertConfig.from_stock(config)
        MosaicBertConfig.complete(config)
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation, is_init_check=False, **kwargs
    ):
        """transformers calls it at load and in set_attn_implementation; unusable names end here."""
        missing = {}
        if triton_varlen_attention is None:
            missing["triton"] = triton_missing
        if flash_attn_2_varlen_attention is None:
            missing["flash_attention_2"] = flash_attn_2_missing
        name = attn_implementation or "auto"
        usable = ["auto", *(x for x in ATTENTION_BACKENDS if x not in missing)]
        if name not in usable:
            reason = f" ({missing[name]})" if name in missing else ""
            raise ValueError(
                f"attn_implementation={name!r} is not available{reason}; "
                f"choose one of {', '.join(usable)}"
            )
        return name

    @classmethod
    def _can_set_attn_implementation(cls):
        return True

    def _finish(self, output, return_dict):
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class BertModel(BertPreTrainedModel):
    """The encoder, and a pooler unless `add_pooling_layer=False`, for checkpoints without one."""

    _auto_class = "AutoModel"

    def __init__(self, config, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(self.config)
        self.encoder = BertEncoder(self.config)
        self.pooler = BertPooler(self.config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        batch: PackedBatch | None = None,
        **kwargs,
    ):
        """
        Args:
            input_ids: (batch, seqlen) int64.
            attention_mask: (batch, seqlen) bool, int or float; 1 for tokens, 0 for padding, which
                may be anywhere.
            token_type_ids: (batch, seqlen) int64; zeros if None.
            position_ids: (batch, seqlen) or (1, seqlen) int64, increasing; distances are taken from
                them. Each 0 begins a new sequence, which attends to itself only; in a row whose
                tokens have no 0, so does the position of its first token. None: places in the row.
            inputs_embeds: (batch, seqlen, dim), in place of input_ids.
            output_attentions: return each layer's probabilities (batch, heads, seqlen, seqlen);
                needs "eager" or no attn_implementation; as config.output_attentions set after
                loading, "eager" on transformers 5.
            output_hidden_states: return the output of the embeddings and of each layer, (batch,
                seqlen, dim).
            return_dict: False for a tuple.
            batch: `pack_batch` of these inputs, made before, in place of attention_mask and
                position_ids. The last hidden state then stays unpadded, (total, dim), or (labelled,
                dim) if the batch names labelled tokens, and is not pooled.
            **kwargs: what a flattening collator says of its sequences (BOUNDS), in place of
                attention_mask, for one row; and what transformers' BERT takes without a meaning for
                an encoder (MEANINGLESS).

        Returns:
            BaseModelOutputWithPooling: last_hidden_state (batch, seqlen, dim), zeros at padding;
            pooler_output (batch, dim), from the first column, token or not, as published.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, a shape that does not fit, ids
                without embedding (on the CPU), a backend that cannot take these tensors, hidden
                states asked for of a batch that names labelled tokens, an argument of REFUSED.
            TypeError: an unknown argument.
        """
        tokens = exactly_one(input_ids, inputs_embeds)
        check_shape("token_type_ids", token_type_ids, tokens.shape[:2])
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stays_packed = batch is not None
        batch = find_sequences(tokens, attention_mask, position_ids, None, batch, kwargs)
        if output_hidden_states and batch.labelled_indices is not None:
            raise ValueError(
                "output_hidden_states needs a batch that was packed without labels: the last layer "
                "makes those of labelled tokens only"
            )
        last, states, attentions = self.encoder(
            self.embed(input_ids, token_type_ids, inputs_embeds, batch),
            batch,
            output_attentions,
            output_hidden_states,
        )
        pooled = None
        if not stays_packed:
            last = pad_input(last, batch) if states is None else states[-1]
            pooled = None if self.pooler is None else self.pooler(last)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=tuple(states) if states else None,
            attentions=tuple(attentions) if attentions else None,
        )
        return self._finish(output, return_dict)

    def embed(self, input_ids, token_type_ids, inputs_embeds, batch: PackedBatch) -> Tensor:
        """The embeddings of the real tokens, (total, dim); arguments as in `forward`.

        Forward hooks on the embeddings' modules, as NEFTune's or Captum's, expect to see (batch,
        seqlen, dim): where there are any, padding is embedded too, as id 0, and then left out.

        Raises:
            ValueError: ids without embedding, on a CPU.
        """
        inputs = [input_ids, token_type_ids, inputs_embeds]
        inputs = [x if x is None else unpad_input(x, batch) for x in inputs]
        hooked = any(x._forward_hooks or x._forward_pre_hooks for x in self.embeddings.modules())
        if not hooked:
            return self.embeddings(*inputs)
        inputs = [x if x is None else pad_input(x, batch) for x in inputs]
        return unpad_input(self.embeddings(*inputs), batch)


def exactly_one(input_ids, inputs_embeds):
    """The one of the two that is given. ValueError: both or none, or not (batch, seqlen[, dim])."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            f"give exactly one of input_ids and inputs_embeds, got "
            f"{'none' if input_ids is None else 'both'}"
        )
    tokens, rank = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    check_tensor(name, tokens)
    if tokens.dim() != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {tuple(tokens.shape)}")
    return tokens


def cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean over labels other than -100; 0 with a gradient graph if there are none. In float32 at
    least.

    Args:
        logits: (n, classes). labels: (n,) int64. count: divides the sum instead of the number of
            labels here.
    """
    check_whole("labels", labels)
    labels = labels.long().to(logits.device)
    check_ids("labels", labels.masked_fill(labels == -100, 0), logits.shape[-1], LABELS)
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
    return mean_loss(loss, labels, count)


def mean_loss(total: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """The summed loss, divided by count, or by the number of labels other than -100."""
    count = (labels != -100).sum() if count is None else torch.as_tensor(count)
    # A single number may stay on the CPU: moving it would wait for the device.
    count = count if count.is_cpu and count.dim() == 0 else count.to(total.device)
    return total / count.clamp(min=1)


def check_whole(name: str, labels: Tensor):
    """ValueError: labels that name classes or tokens are no whole numbers; their fractions would be
    cut off."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, got {labels.dtype}: give labels.long()")


def classifier_dropout(config) -> nn.Dropout:
    """Dropout before a classifier: `classifier_dropout`, or `hidden_dropout_prob` if that is
    None. ValueError: the classifier would have no outputs."""
    if config.num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {config.num_labels}")
    p = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if p is None else p)


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of `BertForSequenceClassification`, in float32 at least.

    Args:
        logits: (batch, num_labels).
        labels: (batch,), or (batch, num_labels) for several labels or values.
        problem_type: None for regression where num_labels is 1, several labels where they are float
            or bool, one label otherwise.
    """
    batch, num_labels = logits.shape
    labels = labels.to(logits.device)
    if problem_type is None:
        several = labels.is_floating_point() or labels.dtype == torch.bool
        problem_type = "multi_label_classification" if several else "single_label_classification"
        problem_type = "regression" if num_labels == 1 else problem_type
    if problem_type == "single_label_classification":
        check_shape("labels", labels, (batch,), (batch, 1))
        return cross_entropy(logits, labels.flatten())
    losses = {
        "regression": F.mse_loss,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
    }
    if problem_type not in losses:
        known = ", ".join(["single_label_classification", *losses])
        raise ValueError(f"problem_type is {problem_type!r}, expected None or one of {known}")
    if num_labels == 1:
        check_shape("labels", labels, (batch,), (batch, 1))
        labels = labels.reshape(batch, 1)
    check_shape("labels", labels, (batch, num_labels))
    logits = at_least_float32(logits)
    return losses[problem_type](logits, labels.to(logits.dtype))


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of (batch, seqlen) logits against (batch,) positions; a position outside the
    row has no loss."""
    batch, seqlen = logits.shape
    check_shape("start_positions and end_positions", positions, (batch,), (batch, 1))
    positions = positions.flatten()
    return cross_entropy(
        logits, positions.masked_fill((positions < 0) | (positions >= seqlen), -100)
    )


@dataclass
class MaskedLMLossOutput(ModelOutput):
    """What `BertForMaskedLM` returns in training with labels: no logits, and who asks learns why.

    Args:
        loss: float32 scalar.
        hidden_states, attentions: as in MaskedLMOutput.
    """

    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __getattr__(self, name):
        if name == "logits":
            raise AttributeError(
                "no logits are made in training with labels, which saves most of their cost and "
                "memory. To have them, as for distillation, set model.config.sparse_prediction = "
                "False, or call the model without labels"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class BertForMaskedLM(BertPreTrainedModel):
    """Masked language modelling, with the decoder tied to the word embeddings."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }
    accepts_loss_kwargs = True

    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(self.config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        """As transformers', which calls it. Release 5.0 leaves a decoder untied that the checkpoint
        stores beside its equal, the word embeddings, as published ones do."""
        if missing_keys is not None:
            kwargs["missing_keys"] = missing_keys
            decoder, words = self.get_output_embeddings().weight, self.get_input_embeddings().weight
            tied = self.config.tie_word_embeddings and not decoder.is_meta
            if tied and torch.equal(decoder, words):
                missing_keys.add("cls.predictions.decoder.weight")
        super().tie_weights(**kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        batch: PackedBatch | None = None,
        **kwargs,
    ):
        """
        Args:
            labels: (batch, seqlen) int64, -100 where there is none; labels on padding are ignored.
            num_items_in_batch: divides the summed loss, for gradient accumulation; the number of
                labels if None.
            batch: `pack_batch` of these inputs and labels, made before, as on the CPU by a data
                loader's worker, in place of attention_mask and position_ids. A GPU is then never
                waited for, nor a graph of torch.compile broken; without it, finding the tokens on a
                GPU waits for it several times. Trainer needs it as a dict, `batch._asdict()`.
            The others are as in `BertModel.forward`.

        Returns:
            MaskedLMOutput: loss, float32 scalar; logits (batch, seqlen, vocab), zeros at padding.
            MaskedLMLossOutput, which has no logits, in training with labels and
            `config.sparse_prediction`, unless hidden states are asked for. Where the head is not
            this file's own (adapters, quantized weights, hooks on the decoder), and under
            torch.func, logits are then those of the labelled tokens, (labelled, vocab) in row-major
            order.

        Raises:
            ValueError: labels of the wrong shape, and what `BertModel.forward` refuses.
        """
        tokens = exactly_one(input_ids, inputs_embeds)
        check_shape("labels", labels, tokens.shape[:2])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        sparse = self.training and self.config.sparse_prediction and not output_hidden_states
        wanted = labels if sparse else None
        batch = find_sequences(tokens, attention_mask, position_ids, wanted, batch, kwargs)
        if wanted is None:
            batch = batch._replace(labelled_indices=None)
        encoded = self.bert(
            input_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            batch=batch,
        )
        hidden_states, seen = encoded.last_hidden_state, (encoded.hidden_states, encoded.attentions)
        if labels is not None:
            labels = self.labels_of(hidden_states, labels, batch)
        if batch.labelled_indices is not None and self.head_is_plain(hidden_states):
            loss = mean_loss(self.cls(hidden_states, labels), labels, num_items_in_batch)
            return self._finish(MaskedLMLossOutput(loss, *seen), return_dict)
        logits, loss = self.cls(hidden_states), None
        if labels is not None:
            loss = cross_entropy(logits, labels, num_items_in_batch)
        if batch.labelled_indices is None:
            logits = pad_input(logits, batch)
        return self._finish(MaskedLMOutput(loss, logits, *seen), return_dict)

    def labels_of(self, hidden_states: Tensor, labels: Tensor, batch: PackedBatch) -> Tensor:
        """(batch, seqlen) int64 -> the labels of these hidden states, (total,) or (labelled,)."""
        check_whole("labels", labels)
        labels = labels.long().to(hidden_states.device)
        if batch.rows is not None:
            # Padding stays there, and labels on it are ignored all the same.
            labels = labels.masked_fill(batch.rows[0] == 0, -100)
        labels = unpad_input(labels, batch)
        if batch.labelled_indices is None:
            return labels
        return labels.index_select(0, batch.labelled_indices.to(labels.device))

    def head_is_plain(self, hidden_states: Tensor) -> bool:
        """Whether the loss of these hidden states can be had without logits, by the head's weights.

        Adapters and BiRNA-BERT's users put other modules there, which give logits only; hooks on
        the decoder may make its weight (spectral_norm, pruning) or change its output.
        """
        if not isinstance(self.cls, BertOnlyMLMHead):
            return False
        decoder = self.cls.predictions.decoder
        hooked = decoder._forward_hooks or decoder._forward_pre_hooks
        plain = type(decoder) is nn.Linear and not hooked
        return plain and operator_takes(hidden_states, *self.cls.parameters())


class BertForSequenceClassification(BertPreTrainedModel):
    """Classification or regression of whole rows from the pooled first token.

    A row that packs several sequences is judged by its first.
    """

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.bert = BertModel(self.config)
        self.dropout = classifier_dropout(self.config)
        self.classifier = nn.Linear(self.config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """
        Args:
            labels: by `config.problem_type`, or, where that is None, by num_labels and dtype:
                "regression" (num_labels 1), (batch,) or (batch, num_labels) float;
                "single_label_classification", (batch,) int64; "multi_label_classification", (batch,
                num_labels) float.
            The others are as in `BertModel.forward`.

        Returns:
            SequenceClassifierOutput: loss; logits (batch, num_labels).

        Raises:
            ValueError: labels of the wrong shape, an unknown problem_type, and what
                `BertModel.forward` refuses.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits, loss = self.classifier(self.dropout(outputs.pooler_output)), None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self._finish(output, return_dict)


class BertForTokenClassification(BertPreTrainedModel):
    """Classification of each token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.dropout = classifier_dropout(self.config)
        self.classifier = nn.Linear(self.config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """
        Args:
            labels: (batch, seqlen) int64, -100 where there is none.
            The others are as in `BertModel.forward`.

        Returns:
            TokenClassifierOutput: loss; logits (batch, seqlen, num_labels), constant at padding.

        Raises:
            ValueError: labels of the wrong shape, and what `BertModel.forward` refuses.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits, loss = self.classifier(self.dropout(outputs.last_hidden_state)), None
        if labels is not None:
            check_shape("labels", labels, logits.shape[:2])
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self._finish(output, return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Start and end of an answer within the row."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """
        Args:
            start_positions, end_positions: (batch,) int64, given together; those outside the row
                are ignored.
            The others are as in `BertModel.forward`.

        Returns:
            QuestionAnsweringModelOutput: loss, the mean of both; start_logits and end_logits
            (batch, seqlen), constant at padding.

        Raises:
            ValueError: one without the other, wrong shapes, and what `BertModel.forward` refuses.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or none of them")
        if start_positions is not None:
            loss = (
                span_loss(start_logits, start_positions) + span_loss(end_logits, end_positions)
            ) / 2
        output = QuestionAnsweringModelOutput(
            loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions
        )
        return self._finish(output, return_dict)


class BertForMultipleChoice(BertPreTrainedModel):
    """One score for each choice, from its pooled first token."""

    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(self.config)
        self.dropout = classifier_dropout(self.config)
        self.classifier = nn.Linear(self.config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (batch, choices, seqlen).
            inputs_embeds: (batch, choices, seqlen, dim).
            labels: (batch,) int64, the right choice.

        Returns:
            MultipleChoiceModelOutput: loss; logits (batch, choices). Hidden states and attentions
            are those of the batch * choices rows.

        Raises:
            ValueError: labels of the wrong shape, and what `BertModel.forward` refuses.
        """
        given, axes = (inputs_embeds, 4) if input_ids is None else (input_ids, 3)
        if given is None or given.dim() != axes:
            shape = None if given is None else tuple(given.shape)
            raise ValueError(
                "inputs of a multiple choice model are (batch, choices, seqlen), embedded (batch, "
                f"choices, seqlen, dim), got {shape}"
            )
        batch, choices = given.shape[:2]
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.bert(
            *(x if x is None else x.flatten(0, 1) for x in rows),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(batch, choices)
        loss = None
        if labels is not None:
            check_shape("labels", labels, (batch,), (batch, 1))
            loss = cross_entropy(logits, labels.flatten())
        output = MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self._finish(output, return_dict)


def register_for_auto_classes():
    """Teaches transformers' Auto classes MosaicBERT for this process, without trust_remote_code.

    For tools that cannot pass it (GLiNER, spaCy-transformers, Flair's tagger), and for
    EncoderDecoderModel. Folders then run the code that this function comes from, not their own.
    """
    transformers.AutoConfig.register(MosaicBertConfig.model_type, MosaicBertConfig, exist_ok=True)
    for auto_class, name in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = globals()[name.removeprefix("bert_layers.")]
            getattr(transformers, auto_class).register(MosaicBertConfig, model_class, exist_ok=True)
