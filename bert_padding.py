# SPDX-License-Identifier: Apache-2.0
"""Padding is removed once, before the first layer, and put back once, after the last.

`pack_batch` reads the attention mask and position ids and says where the real tokens are and which
of them form a sequence; `unpad_input` and `pad_input` move tensors between (batch, seqlen, ...) and
(total, ...). Where values cannot be asked for, under a tracer, on meta and under FakeTensorMode,
padding stays, masked.
Legend: total = tokens that are not padding; a row may hold several sequences, or none.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
except ImportError:  # torch's own, which a release may rename: torch.func is refused less clearly

    def is_functorch_wrapped_tensor(x):
        return False


try:
    from torch._subclasses import FakeTensor
except ImportError:
    FakeTensor = ()


class PackedBatch(NamedTuple):
    """Where the tokens of a padded batch are, once padding is gone.

    Args:
        batch_size, seqlen: the padded shape.
        indices: (total,) int64, each token's place in the flattened (batch * seqlen) rows, or None:
            nothing is padding.
        cu_seqlens: (sequences + 1,) int32, bounds of the sequences within the total tokens; none is
            empty. None where there are `rows`.
        max_seqlen: at least the tokens of the longest sequence.
        positions: (total,) int32, distance of each token from the first of its sequence, or None:
            its index there.
        labelled_indices: (labelled,) int64, the tokens among total that carry a label, or None:
            nobody asked.
        tile_map: (pieces, 2) int32, the Triton kernel's plan of the batch, or None: it has none.
        rows: only where padding stays. Each (batch, seqlen) int64, or (1, seqlen) where all rows
            are alike: which of its row's sequences a token belongs to, from 1, and 0 at padding;
            and its position. `total` is then batch * seqlen.
        bias: what attention adds to scores, made by the encoder for all layers, or None: each layer
            makes its own. (batch or 1, heads, seqlen, seqlen) for "eager" and tracers; for "sdpa"
            (heads, 2 * max_seqlen - 1), by distance.
    """

    batch_size: int
    seqlen: int
    indices: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    positions: Tensor | None = None
    labelled_indices: Tensor | None = None
    tile_map: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


# Fields that had another name; collators of then still feed the model.
OLD_FIELDS = {"batch": "batch_size", "labelled": "labelled_indices"}


def check_tensor(name: str, x, *dtypes: torch.dtype):
    """ValueError unless x is a tensor, of one of these dtypes if there are any."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}: torch.tensor makes one")
    if dtypes and x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")


def check_shape(name: str, x: Tensor | None, *allowed: tuple[int, ...]):
    """ValueError unless x is None or a tensor of one of the allowed shapes."""
    if x is None:
        return
    check_tensor(name, x)
    if all(tuple(x.shape) != tuple(shape) for shape in allowed):
        expected = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}")


def unpad_input(x: Tensor, batch: PackedBatch) -> Tensor:
    """(batch, seqlen, ...) -> (total, ...): real tokens only, in row-major order."""
    x = x.flatten(0, 1)
    # Layers may lie on several devices.
    return x if batch.indices is None else x.index_select(0, batch.indices.to(x.device))


def pad_input(x: Tensor, batch: PackedBatch) -> Tensor:
    """(total, ...) -> (batch, seqlen, ...), with zeros at padding."""
    if batch.indices is not None:
        padded = x.new_zeros(batch.batch_size * batch.seqlen, *x.shape[1:])
        padded[batch.indices.to(x.device)] = x
        x = padded
    x = x.unflatten(0, (batch.batch_size, batch.seqlen))
    if batch.rows is not None:
        is_token = batch.rows[0] > 0
        x = torch.where(is_token.view(*is_token.shape, *[1] * (x.dim() - 2)), x, 0)
    return x


def pack_batch(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> PackedBatch:
    """Finds the sequences of a batch.

    Args:
        tokens: (batch, seqlen) ids or (batch, seqlen, dim) embeddings; only shape and device are
            read.
        attention_mask: (batch, seqlen) bool, int or float, 1 for real tokens and 0 for padding,
            zeros anywhere.
        position_ids: (batch, seqlen) or (1, seqlen) int, increasing within a sequence. Distances
            are taken from them. Each 0 begins a new sequence, also where the mask hides it; in a
            row whose real tokens have no 0, so does the position of the first of them. A tracer
            cannot check that they increase.
        labels: (batch, seqlen) int64, -100 where there is no label. Given, `labelled_indices` are
            found too.

    Raises:
        ValueError: a shape does not fit, there are no columns, or 2**31 places and more; the mask
            holds other values than 0 and 1; position_ids do not increase, are no whole numbers, or
            leave a gap that int32 cannot hold.
    """
    batch, seqlen = tokens.shape[:2]
    check_shape("attention_mask", attention_mask, (batch, seqlen))
    check_shape("position_ids", position_ids, (batch, seqlen), (1, seqlen))
    check_shape("labels", labels, (batch, seqlen))
    if seqlen == 0:
        raise ValueError(f"the batch has no tokens: its shape is {tuple(tokens.shape)}")
    if tracing() or is_abstract(tokens):
        rows = _mark_sequences(tokens, attention_mask, position_ids)
        return PackedBatch(batch, seqlen, None, None, seqlen, rows=rows)
    if batch * seqlen >= 2**31:
        raise ValueError(f"the batch has {batch * seqlen:,} places, int32 counts fewer: split it")
    if attention_mask is None and position_ids is None and labels is None:
        cu_seqlens = seqlen * torch.arange(batch + 1, dtype=torch.int32, device=tokens.device)
        return PackedBatch(batch, seqlen, None, cu_seqlens, seqlen)
    found = _find_sequences(
        tokens, attention_mask, position_ids, labels, torch.compiler.is_compiling()
    )
    return PackedBatch(batch, seqlen, *found)


def pack_flattened(
    tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    labels: Tensor | None = None,
) -> PackedBatch:
    """`pack_batch` of one row of sequences end to end, whose bounds a flattening collator knows.

    Args:
        tokens: (1, total) ids or (1, total, dim) embeddings; only shape and device are read.
        cu_seqlens: (sequences + 1,) int, rising from 0 to total.
        max_seqlen: at least the tokens of the longest sequence; found if None.
        labels: as in `pack_batch`.

    Raises:
        ValueError: a shape does not fit, or the bounds do not rise from 0 to total or exceed
            max_seqlen. (Values are looked at on a CPU only, where that costs no synchronisation,
            and outside torch.compile.)
    """
    seqlen = tokens.shape[1]
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)"
        )
    check_shape("labels", labels, (1, seqlen))
    cu_seqlens = cu_seqlens.int()
    if max_seqlen is None:
        max_seqlen = cu_seqlens.diff().max()
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != seqlen or (lengths < 1).any():
            raise ValueError(f"cu_seqlens must rise from 0 to {seqlen}, got {cu_seqlens.tolist()}")
        if lengths.max() > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, the longest sequence {lengths.max()}")
    labelled = None if labels is None else (labels[0] != -100).nonzero().squeeze(1)
    return PackedBatch(1, seqlen, None, cu_seqlens, int(max_seqlen), labelled_indices=labelled)


def rounded_up(max_seqlen: int) -> int:
    """The next power of two, from 64 on: a compiled graph serves one max_seqlen, and the Triton
    kernel is as fast for this one, unless its one-block backward holds fewer tokens."""
    return max(64, 1 << (max_seqlen - 1).bit_length())


def packed_before(
    batch: PackedBatch | Mapping,
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> PackedBatch:
    """`batch`, made by `pack_batch` of these tokens before, as this module's own PackedBatch.

    It may come from another copy of this module, or as a mapping of the fields, by their names of
    today or before. Whether it belongs to these tokens is judged by their shape only: to look at
    more would wait for the device.

    Raises:
        ValueError: a mask or position ids beside it, fields missing or unknown, another shape than
            that of the tokens, or a tracer.
    """
    if not (attention_mask is None and position_ids is None):
        raise ValueError("give batch, or attention_mask and position_ids, not both")
    if isinstance(batch, Mapping):
        fields = {OLD_FIELDS.get(name, name): x for name, x in batch.items()}
        required = set(PackedBatch._fields) - set(PackedBatch._field_defaults)
        if not required <= set(fields) <= set(PackedBatch._fields):
            raise ValueError(
                f"batch has the fields {', '.join(map(str, batch))}, expected those of "
                f"PackedBatch: {', '.join(PackedBatch._fields)}"
            )
        batch = PackedBatch(**fields)
    else:
        batch = PackedBatch(*batch)
    if tracing() and batch.rows is None:
        raise ValueError(
            "a traced graph would keep this batch's sequences for all inputs: give attention_mask "
            "and position_ids instead of batch"
        )
    if (batch.batch_size, batch.seqlen) != tuple(tokens.shape[:2]):
        raise ValueError(
            f"batch was packed from shape {(batch.batch_size, batch.seqlen)}, "
            f"but the inputs are {tuple(tokens.shape[:2])}"
        )
    return batch


def tracing() -> bool:
    """Whether a tracer that cannot follow data is recording: torch.export (which torch tells since
    2.7), torch.jit.trace, or the ONNX exporter built on it."""
    exporting = hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    # Dynamo before torch 2.13 takes is_exporting() for true in torch.compile too, but not its flag.
    exporting = exporting and getattr(torch.compiler, "_is_exporting_flag", True)
    return exporting or torch.jit.is_tracing()


def is_abstract(x: Tensor) -> bool:
    """Whether x has a shape and no values: on meta, or under FakeTensorMode."""
    # Not is_meta, which makes a graph of torch.compile more.
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def under_vmap(x: Tensor | None) -> bool:
    """Whether x stands for many tensors, whose values nobody can ask for."""
    while x is not None and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def _begins_sequence(position_ids, attention_mask):
    """(batch, seqlen) bool: where `pack_batch` sees a sequence begin, by position_ids of that shape
    and a mask of it or None."""
    is_zero = position_ids == 0
    real = torch.ones_like(is_zero) if attention_mask is None else attention_mask != 0
    # Of each row, the position of its first real token, or 0 if one has it.
    first = position_ids.gather(1, real.long().argmax(1, keepdim=True))
    first = first.masked_fill((is_zero & real).any(1, keepdim=True), 0)
    return is_zero | (position_ids == first)


def _mark_sequences(tokens, attention_mask, position_ids):
    """Field `rows` of PackedBatch."""
    if position_ids is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        sequences = torch.ones_like(positions)
    else:
        positions = position_ids.expand(tokens.shape[:2])
        sequences = 1 + _begins_sequence(positions, attention_mask).long().cumsum(1)
    if attention_mask is not None:
        sequences = sequences * (attention_mask != 0)
    return sequences, positions


@torch.compiler.disable
def _find_sequences(tokens, attention_mask, position_ids, labels, compiling):
    """Fields `indices` to `labelled_indices` of PackedBatch.

    Their sizes depend on data: torch.compile breaks its graph here, and only here.
    """
    batch, seqlen = tokens.shape[:2]
    if any(map(under_vmap, (attention_mask, position_ids, labels))):
        raise ValueError(
            "vmap cannot go over rows with attention_mask, position_ids or labels, since their "
            "tokens are found by value: leave these out, or call the model on the whole batch"
        )
    if attention_mask is None:
        attention_mask = torch.ones(batch, seqlen, dtype=torch.bool, device=tokens.device)
    elif (strange := attention_mask[(attention_mask != 0) & (attention_mask != 1)]).numel():
        raise ValueError(
            f"attention_mask holds {strange[0].item()}, expected 1 for tokens and 0 for padding"
        )
    indices = attention_mask.flatten().nonzero().squeeze(1)
    total = indices.numel()
    ids = indices % seqlen
    # What must be equal within a sequence: the row, and how many beginnings came before.
    row = segment = indices // seqlen
    if position_ids is not None:
        position_ids = position_ids.expand(batch, seqlen)
        ids = position_ids.flatten()[indices]
        segment = _begins_sequence(position_ids, attention_mask).cumsum(1).flatten()[indices]

    starts = torch.ones(total, dtype=torch.bool, device=tokens.device)
    starts[1:] = (row[1:] != row[:-1]) | (segment[1:] != segment[:-1])
    if position_ids is not None and not (starts[1:] | (ids[1:] > ids[:-1])).all():
        raise ValueError(
            "position_ids must increase within a sequence; a 0, or the row's first position again, "
            "begins a new one"
        )

    first = starts.nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(first, (0, 1), value=total).int()
    max_seqlen = rounded_up(int(cu_seqlens.diff().max())) if total else 0
    # Distances equal index distances unless the mask has holes or position_ids leave gaps.
    first_of_token = first[starts.cumsum(0) - 1]
    distances = ids - ids[first_of_token]
    positions = distances.int()
    if position_ids is not None and (positions != distances).any():
        raise ValueError(
            "position_ids must be whole numbers, at most 2**31 - 1 apart within a sequence"
        )
    if torch.equal(positions, (torch.arange(total, device=tokens.device) - first_of_token).int()):
        positions = None
    labelled = None if labels is None else (labels.flatten()[indices] != -100).nonzero().squeeze(1)
    if compiling:
        # The graph behind the break is to serve any number of tokens, sequences and labels.
        for x in (indices, cu_seqlens, positions, labelled):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, 0)
    elif total == batch * seqlen:
        indices = None
    return indices, cu_seqlens, max_seqlen, positions, labelled
