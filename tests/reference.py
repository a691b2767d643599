# SPDX-License-Identifier: Apache-2.0
"""MosaicBERT written for reading, in float64, one sequence at a time, and the rule for how far off
one may be.

It shares no code with the model. `weights` are a checkpoint's tensors by their published names.
"""

import math

import torch


def slopes(heads):
    """ALiBi's slopes for 4, 6, 8 and 12 heads, written out by hand."""
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    listed = {
        4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
        6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
        8: eight,
        12: eight + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    }
    return torch.tensor(listed[heads], dtype=torch.float64)


def alibi_attention(
    qkv, cu_seqlens, slopes=None, position_ids=None, softmax_scale=None, dropout_mask=None,
    dtype=torch.float64,
):  # fmt: skip
    """One sequence after the other, every score written out.

    Args:
        qkv: (total, 3, heads, head_dim)
        cu_seqlens: (batch + 1,) where sequences begin
        slopes: (heads,) of ALiBi
        position_ids: (total,) for the distances, by default the index in the sequence
        softmax_scale: by default 1 / sqrt(head_dim)
        dropout_mask: per sequence (heads, seqlen, seqlen), the factor of every attention weight
        dtype: of all arithmetic; a candidate's own one gives the error it may be measured by

    Returns:
        out (total, heads, head_dim), lse (heads, total)
    """
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    bounds = cu_seqlens.tolist()
    for index, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        # each (heads, seqlen, head_dim)
        q, k, v = qkv[begin:end].to(dtype).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * scale  # (heads, seqlen, seqlen)
        if slopes is not None:
            if position_ids is None:
                position = torch.arange(end - begin, device=qkv.device)
            else:
                position = position_ids[begin:end].long()
            distance = (position[:, None] - position[None, :]).abs().to(dtype)
            scores = scores - slopes.to(dtype)[:, None, None] * distance
        weights = scores.softmax(-1)
        if dropout_mask is not None:
            weights = weights * dropout_mask[index].to(dtype)
        outs.append((weights @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def norm(x, weights, name, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    bias = weights.get(f"{name}.bias")
    out = x @ weights[f"{name}.weight"].T
    return out if bias is None else out + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def encode(weights, config, ids, token_types, positions):
    """One sequence: ids, token_types, positions (seqlen,) -> the output of the embeddings and of
    each layer."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    x = weights["bert.embeddings.word_embeddings.weight"][ids]
    x = x + weights["bert.embeddings.token_type_embeddings.weight"][token_types]
    states = [norm(x, weights, "bert.embeddings.LayerNorm", eps)]
    for i in range(config["num_hidden_layers"]):
        x, layer = states[-1], f"bert.encoder.layer.{i}"
        qkv = linear(x, weights, f"{layer}.attention.self.Wqkv").unflatten(1, (3, heads, -1))
        whole = torch.tensor([0, len(x)])
        context, _ = alibi_attention(qkv, whole, slopes(heads), positions)
        attended = linear(context.flatten(1), weights, f"{layer}.attention.output.dense")
        x = norm(attended + x, weights, f"{layer}.attention.output.LayerNorm", eps)
        gate, value = linear(x, weights, f"{layer}.mlp.gated_layers").chunk(2, dim=1)
        states.append(
            norm(
                linear(gelu(gate) * value, weights, f"{layer}.mlp.wo") + x,
                weights,
                f"{layer}.mlp.layernorm",
                eps,
            )
        )
    return states


def masked_lm(weights, states):
    """(n, dim) -> logits (n, vocab)."""
    x = gelu(linear(states, weights, "cls.predictions.transform.dense"))
    x = norm(x, weights, "cls.predictions.transform.LayerNorm", 1e-12)
    return (
        x @ weights["bert.embeddings.word_embeddings.weight"].T
        + weights["cls.predictions.decoder.bias"]
    )


class Oracle:
    """The whole model on a padded batch: the real tokens of every row form one sequence, at their
    places in the row."""

    def __init__(self, weights, config):
        self.weights = {
            k: v.double().requires_grad_()
            for k, v in weights.items()
            if k != "cls.predictions.decoder.weight"
        }
        self.config = config

    def __call__(self, input_ids, attention_mask, token_type_ids, labels=None):
        """Returns states, each (total, dim); logits (total, vocab); loss."""
        rows = []
        for ids, mask, types in zip(input_ids, attention_mask.bool(), token_type_ids, strict=True):
            if mask.any():
                rows.append(
                    encode(
                        self.weights, self.config, ids[mask], types[mask], mask.nonzero().squeeze(1)
                    )
                )
        states = [torch.cat(x) for x in zip(*rows, strict=True)]
        out = {"states": states}
        if "cls.predictions.decoder.bias" in self.weights:
            out["logits"] = masked_lm(self.weights, states[-1])
        if labels is not None:
            labels = labels[attention_mask.bool()]
            scored = labels != -100
            out["loss"] = torch.nn.functional.cross_entropy(out["logits"][scored], labels[scored])
        return out


def assert_as_close(candidate, plain, oracle, factor=2.0):
    """`candidate` is at most `factor` times as far from the float64 `oracle` as `plain` is, which
    is PyTorch in the candidate's own dtype, plus 2 eps of the oracle's largest value."""
    assert candidate.shape == plain.shape == oracle.shape
    assert candidate.numel() > 0
    assert candidate.isfinite().all()
    assert oracle.dtype == torch.float64 and plain.dtype == candidate.dtype
    slack = 2 * torch.finfo(candidate.dtype).eps * oracle.abs().max()
    allowed = factor * (plain.double() - oracle).abs().max() + slack
    error = (candidate.double() - oracle).abs().max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"
