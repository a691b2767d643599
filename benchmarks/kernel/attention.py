# SPDX-License-Identifier: Apache-2.0
"""How fast is attention with ALiBi over a batch of variable-length sequences, and beside what?

Method: providers.py builds each provider's inputs once, for timing and for peak memory. "first_ms"
is the first call of a pass, compilation included: compilers' caches are empty when the script
starts, so a provider's first rows show what a new process waits for, unless one with the same
kernels came before. Then output and gradients must pass the tests' error rule on a small batch.
Other times are medians with 20 and 80 % quantiles of triton.testing.do_bench, which empties the L2
before each call: "ms", a call from Python, which short kernels wait for. "kernels_ms" is the GPU's
own work, as torch.profiler counts it, the mean of CALLS: what a call costs where the host runs
ahead, as in training.
What a batch needs once for all layers (tile map, BlockMask, dense bias) is measured apart, as
"prepare". Rates are of "kernels_ms": TFLOP/s count every score within a sequence, skipped ones too;
GB/s count qkv, out, lse, dout and dqkv once; neither counts padding. "roofline" is the time that
FLOP and bytes take at the matmul rate and copy bandwidth measured in this run, the larger of the
two, over the pass's: above 100 % tiles were skipped. varlen_attn is FlashAttention 2 inside torch.

    python benchmarks/kernel/attention.py                 # bf16, 65,536 tokens, 12 heads of 64
    python benchmarks/kernel/attention.py --qkv layer.pt  # a trained layer's, by layer_qkv.py
    python benchmarks/kernel/attention.py --toy           # proves the script, on a CPU

Output: one JSON line per provider, lengths and pass, appended to --output too, then a table. Cases
that cannot run are rows that say why.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
import torch._functorch.config

from benchmarks.kernel.common import empty_caches, milliseconds, require_device
from benchmarks.kernel.providers import DENSE, PROVIDERS, WITHOUT_BIAS, Shape, draw, gate, setup
from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import (
    FAILURES,
    TOY,
    Deadline,
    ceilings,
    first_call,
    kernel_times,
    peak_bytes,
    record_file,
    why,
)  # fmt: skip

# Should time run out, what is missing is the longest.
SEQLENS = [128, 2048, 512, 8192, 32_768, 65_536]
LENGTHS = ["fixed", "c4"]
# The dense ones hold batch x heads x seqlen x seqlen.
DENSE_UP_TO = 2048
# Twice the multiply-adds of 2, 5 and 7 products of seqlen x seqlen x head_dim.
FLOP_PER_SCORE = {"forward": 4, "backward": 10, "both": 14}
# That the profiler sees.
CALLS = 1 if TOY else 10


COLUMNS = {
    "seqlen": ",", "lengths": "", "provider": "", "pass": "", "ms": ".3f", "kernels_ms": ".3f",
    "tflops": ".0f", "gbytes_per_s": ",.0f", "roofline": ".0%", "peak_bytes": ",",
    "first_ms": ",.0f",
}  # fmt: skip


def measure(provider, shape, rates):
    """A dict of figures for every pass."""
    case, first = setup(provider, shape), {}
    prepared, first["prepare"] = first_call(case.prepare)
    scores = shape.heads * sum(length**2 for length in shape.lengths)
    tokens = sum(shape.lengths) * shape.heads
    out_bytes = tokens * shape.head_dim * shape.dtype.itemsize
    lse_bytes = 4 * tokens
    # Forward reads qkv; backward reads qkv, out and dout and writes dqkv.
    bytes_moved = {"forward": 4 * out_bytes + lse_bytes, "backward": 8 * out_bytes + lse_bytes}
    bytes_moved["both"] = sum(bytes_moved.values())
    out, first["forward"] = first_call(lambda: case.attend(prepared))
    dout = torch.randn_like(out)

    def forward():
        with torch.no_grad():
            case.attend(prepared)

    def backward():
        torch.autograd.grad(out, case.leaf, dout, retain_graph=True)

    def both():
        torch.autograd.grad(case.attend(prepared), case.leaf, dout)

    _, first["backward"] = first_call(backward)
    first["both"] = first["forward"] + first["backward"]
    gate(provider, shape.heads, shape.head_dim, shape.dtype)
    for function in (case.prepare, forward, backward, both):
        name = "prepare" if function is case.prepare else function.__name__
        ms, low, high = milliseconds(function)
        row = {"pass": name, "ms": ms, "p20": low, "p80": high, "first_ms": first[name]}
        row["peak_bytes"] = peak_bytes(function)
        row["kernels_ms"] = kernels_ms = kernel_times(function, CALLS).total()
        if name != "prepare":
            row["tflops"] = FLOP_PER_SCORE[name] * scores * shape.head_dim / kernels_ms / 1e9
            row["gbytes_per_s"] = bytes_moved[name] / kernels_ms / 1e6
            row["roofline"] = max(
                row["tflops"] / rates["matmul_tflops"],
                row["gbytes_per_s"] / rates["copy_gbytes_per_s"],
            )
        yield row


def unsupported_reason(provider, shape):
    """Why a provider is not tried, or None."""
    if provider not in DENSE:
        return None
    longest = max(shape.lengths)
    dense = len(shape.lengths) * shape.heads * longest**2 * shape.dtype.itemsize
    if longest > DENSE_UP_TO:
        return f"beyond {DENSE_UP_TO}: a dense bias would be {dense:,} bytes"
    if not TOY and 4 * dense > torch.cuda.mem_get_info()[0]:
        return f"a dense bias alone is {dense:,} bytes"
    return None


def rows_of(provider, shape, rates, deadline):
    """Figures of every pass, or one row that says why there are none."""
    reason = deadline.reason() or unsupported_reason(provider, shape)
    if reason is None:
        try:
            yield from measure(provider, shape, rates)
        except AssertionError as err:
            reason = f"wrong: {err}"
        except FAILURES as err:
            reason = why(err)
    if reason is not None:
        yield {"skipped": reason}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--seqlens", nargs="+", type=int, default=SEQLENS)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--qkv", help="file of layer_qkv.py, in place of N(0, 1)")
    parser.add_argument("--minutes", type=float, default=10, help="then nothing more is begun")
    parser.add_argument("--output", default=record_file("attention"))
    parser.add_argument("--toy", action="store_true")
    if TOY:
        # Not bf16, of which the interpreter gets products wrong.
        parser.set_defaults(seqlens=[32], tokens=80, heads=2, head_dim=16, dtype="float32")
    args = parser.parse_args()
    require_device()
    # retain_graph needs the buffers that compiled backward passes would otherwise give away.
    torch._functorch.config.donated_buffer = False
    record, dtype = recorder(args.output, "triton"), getattr(torch, args.dtype)
    qkv = torch.load(args.qkv, weights_only=True) if args.qkv else None
    if qkv is not None:
        _, _, args.heads, args.head_dim = qkv.shape
        qkv = qkv.repeat(-(-args.tokens // len(qkv)), 1, 1, 1)
    rates, deadline, rows = ceilings(dtype), Deadline(args.minutes), []
    for seqlen in args.seqlens:
        for lengths in args.lengths:
            drawn = draw(lengths, seqlen, args.tokens)
            shape = Shape(lengths, drawn, args.heads, args.head_dim, dtype, qkv)
            for provider in args.providers:
                facts = {
                    "provider": provider, "bias": provider not in WITHOUT_BIAS,
                    "inputs": Path(args.qkv).name if args.qkv else "N(0, 1)",
                    "lengths": lengths, "seqlen": seqlen, "batch": len(drawn),
                    "tokens": sum(drawn), "heads": args.heads, "head_dim": args.head_dim,
                    "dtype": args.dtype,
                } | rates  # fmt: skip
                for figures in rows_of(provider, shape, rates, deadline):
                    record(facts | figures)
                    rows.append(facts | figures)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    with empty_caches():
        main()
