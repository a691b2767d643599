# SPDX-License-Identifier: Apache-2.0
"""Where does the time of a training step go, or of inference, and how far is each part from its
floor?

Method: one setting of encoders.py, checked, takes whole optimizer steps over rows as in
pretraining.py, or embeds them or fills their masks as in inference.py. torch.profiler adds up the
time of kernels on a GPU, of operators on a CPU, over --steps, and PARTS sorts them by name. "gaps"
is the rest of a step's time, which is measured without the profiler: the GPU waits for launches, or
Python runs. Floors are what the part must do over the rate that this run reaches, `floors` says how
each is counted.

    python benchmarks/speed/profile_step.py        # 65,536 tokens in rows of 128
    python benchmarks/speed/profile_step.py --setting bert-compiled --lengths c4 --seqlen 512
    python benchmarks/speed/profile_step.py --task embeddings --rows 1 --seqlen 16 --dtype float32
    python benchmarks/speed/profile_step.py --toy  # proves the script, on a CPU

Output: one JSON line per part, with the names that took most, appended to --output too; a table.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch

from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import (
    DEVICE,
    TOY,
    ceilings,
    first_call,
    interleaved,
    kernel_times,
    record_file,
)  # fmt: skip
from benchmarks.speed.encoders import POSITIONS, SETTINGS, Encoder, make_rows
from benchmarks.speed.lengths import c4_lengths

# The first part one of whose words is in a kernel's or operator's name takes it. Inductor names a
# fused kernel by the operators in it, so that dropout and residual count where they are fused.
PARTS = {
    "optimizer": ("adam", "multi_tensor"),
    "attention": (
        "_forward_kernel", "_dq_kernel", "_dkdv_kernel", "_block_backward_kernel", "_norms_kernel",
        "flash", "fmha", "flex", "scaled_dot_product", "varlen",
    ),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "::addmm", "::mm", "::bmm"),
    "LayerNorm": ("layer_norm", "layernorm", "gammabeta"),
    "loss": ("softmax", "nll", "cross_entropy", "gather", "scatter", "expm1", "::exp"),
    "GLU": ("gelu", "erf"),
    "dropout": ("dropout", "bernoulli", "philox", "rand"),
    "embeddings": ("embedding", "index"),
    "casts and copies": ("copy", "memcpy", "memset", "fill", "zero"),
    "other": ("",),
}  # fmt: skip
COLUMNS = {"part": "", "ms": ".2f", "share": ".1%", "floor_ms": ".2f", "over_floor": ".1f"}


def part_of(name):
    """The part that a kernel or an operator belongs to."""
    return next(
        part for part, words in PARTS.items() if any(word in name.lower() for word in words)
    )


def floors(encoder, rows, rates):
    """Milliseconds that parts of a step or of inference take at least, for our model and for BERT.

    The larger of FLOP / matmul rate and bytes / copy rate, each input read and each output written
    once. A step goes forward and backward, inference forward only, where matrix products read their
    weights at least. Attention has 4 FLOP per score and dimension forward, 10 backward. LayerNorm
    adds a residual: it reads two tensors and writes one, and as many backward. Dropout needs no
    bytes of its own where it is fused. Of the loss, logits are read and their gradient written.
    AdamW reads four and writes three float32 tensors; autocast casts each weight there and its
    gradient back.

    A floor is by the rates that this run measured, and can be beaten where they are no ceilings: on
    a CPU a copy also reads what it overwrites, which is not counted, and AdamW in place has read it
    anyway; and matrix products of other sizes may reach more than the one that was timed.
    """
    config, itemsize, step = encoder.model.config, encoder.dtype.itemsize, encoder.task == "step"
    layers, dim, tokens = config.num_hidden_layers, config.hidden_size, sum(rows.lengths)
    labelled = (rows.labels != -100).sum().item()
    scores = sum(length**2 for length in rows.lengths)
    weights = sum(x.numel() for x in encoder.model.parameters())
    attention_flop = 4 * layers * dim * scores
    # GELU(gate) * value: 3 tensors forward, 5 backward; without a gate 2 and 3.
    glu = {True: (3, 8), False: (2, 5)}[encoder.setting.model == "mosaic"][step]
    hidden = tokens * dim * itemsize
    matrices = sum(x.numel() for x in encoder.run.parameters() if x.dim() == 2)
    if encoder.task == "embeddings":
        matrices -= encoder.run.get_input_embeddings().weight.numel()
    work = {  # FLOP, bytes
        "matmul": (encoder.flop(rows), 0 if step else matrices * itemsize),
        "attention": (attention_flop, 4 * layers * hidden),
        "LayerNorm": (0, 3 * (2 * layers + 1) * hidden),
        "GLU": (0, glu * layers * tokens * config.intermediate_size * itemsize),
        "gaps": (0, 0),
    }
    if step:
        work |= {
            "attention": (3.5 * attention_flop, 12 * layers * hidden),
            "LayerNorm": (0, 6 * (2 * layers + 1) * hidden),
            "dropout": (0, 0),
            "loss": (0, 2 * labelled * config.vocab_size * itemsize),
            "optimizer": (0, 28 * weights),
            "casts and copies": (0, 12 * weights if encoder.dtype != torch.float32 else 0),
        }
    flop, size = work["matmul"]
    # Model FLOP count attention's matrix products too, forward and twice that backward.
    work["matmul"] = (flop - (3 if step else 1) * attention_flop, size)
    return {
        part: max(flop / rates["matmul_tflops"] / 1e9, size / rates["copy_gbytes_per_s"] / 1e6)
        for part, (flop, size) in work.items()
    }


def table(times, step_ms, lowest):
    """A row for each part, the largest first."""
    parts = {part: Counter() for part in PARTS}
    for name, ms in times.items():
        parts[part_of(name)][name] = ms
    rows = [
        {"part": part, "ms": found.total(), "names": dict(found.most_common(5))}
        for part, found in parts.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    rows.append({"part": "gaps", "ms": max(0.0, step_ms - times.total())})
    rows.append({"part": "step", "ms": step_ms, "floor_ms": sum(lowest.values())})
    for row in rows:
        row["share"] = row["ms"] / step_ms
        if floor := row.setdefault("floor_ms", lowest.get(row["part"])):
            row["over_floor"] = row["ms"] / floor
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = DEVICE == "cuda"
    parser.add_argument(
        "--setting",
        choices=[name for name, setting in SETTINGS.items() if setting.model != "modernbert"],
        default="mosaic-compiled" if on_gpu else "mosaic",
        help="not ModernBERT's, whose windows and gates the floors do not know",
    )
    parser.add_argument("--task", choices=["step", "embeddings", "fill-mask"], default="step")
    parser.add_argument("--dtype", default="float32" if TOY else "bfloat16")
    parser.add_argument("--lengths", choices=["full", "c4"], default="full")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--rows", type=int, default=POSITIONS // 128 if on_gpu else 8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=record_file("profile_step"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if TOY:
        args.seqlen, args.rows = 32, 4
    lengths = [args.seqlen] * args.rows
    if args.lengths == "c4":
        lengths = c4_lengths(args.rows, args.seqlen)
    torch.set_num_threads(args.threads)
    record, dtype = recorder(args.output), getattr(torch, args.dtype)
    rates = ceilings(dtype)
    encoder, rows = Encoder(args.setting, dtype, args.task), make_rows(lengths)
    step = encoder.function(rows)
    for _ in range(2):
        first_call(step)
    step_ms, *_ = interleaved({"": step}, 2 if TOY else 5, repeats=3 if on_gpu else 1)[""]
    facts = {"setting": args.setting, "dtype": args.dtype, "lengths": args.lengths} | rates
    facts |= {"task": args.task, "threads": args.threads}
    facts |= {"seqlen": args.seqlen, "rows": len(lengths), "tokens": sum(lengths)}
    found = table(kernel_times(step, args.steps), step_ms, floors(encoder, rows, rates))
    for row in found:
        record(facts | row)
    print_table(found, COLUMNS)


if __name__ == "__main__":
    main()
