# SPDX-License-Identifier: Apache-2.0
"""How fast does MosaicBERT-Base pre-train, beside BERT-Base and ModernBERT-Base?

Method: encoders.py builds each setting with random weights; before it is compiled and any clock
starts, its loss and gradients must be those of its weights in float32 with padding. A step is
masked-LM forward, backward and fused AdamW, 30 % of the words labelled, over the same random rows
for all: full ones, or of C4's lengths (lengths.py), about --tokens of them without padding; BERT's
512 positions are used over and over. Settings that pad do it to the longest row of a micro-batch of
at most 65,536 positions. Batches lie on the device, and each is compiled for. "fill-mask" is
inference: logits of all tokens, weights in the dtype. Settings are timed in turn, medians with 20
and 80 % quantiles; on a GPU, of 3 steps without waiting in between. MFU is the FLOP formula of
callbacks.Throughput over time and the matmul rate measured in the same run.

    python benchmarks/speed/pretraining.py        # a GPU; or a CPU: 8 x 128, see --help
    python benchmarks/speed/pretraining.py --seqlens 128 --settings mosaic-compiled bert-compiled
    python benchmarks/speed/pretraining.py --toy  # proves the script, on a CPU

Output: one JSON line per setting and rows, appended to --output too, then a table. "ratio" is a
setting's time over that of our fastest one. Hours and dollars are a projection of the recipe's
70,000 x 4096 rows: rows x mean length / (tokens/s x GPUs), without all-reduce or loading.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import DEVICE, TOY, Deadline, record_file
from benchmarks.speed.compare import sweep
from benchmarks.speed.encoders import POSITIONS, SETTINGS
from benchmarks.speed.lengths import HALF_PADDING, c4_lengths

ON_GPU = [
    "mosaic-compiled", "bert", "bert-compiled", "modernbert-compiled", "mosaic", "modernbert",
    "bert-flex", "modernbert-flex", "bert-flash", "modernbert-flash",
]  # fmt: skip
ON_CPU = [
    "mosaic", "mosaic-compiled", "bert", "bert-no-dropout", "bert-compiled", "modernbert",
]  # fmt: skip
COLUMNS = {
    "task": "", "dtype": "", "lengths": "", "seqlen": "", "setting": "", "ms": ".1f",
    "tokens_per_s": ",.0f", "mfu": ".1%", "ratio": ".2f", "peak_bytes": ",", "hours": ".2f",
    "dollars": ".0f",
}  # fmt: skip


def batches(args):
    """(facts, lengths) of every batch."""
    if DEVICE == "cpu" and not TOY:
        yield {"lengths": "half padding", "seqlen": 128}, HALF_PADDING
        yield {"lengths": "full", "seqlen": 128}, [128] * 8
        return
    for seqlen in args.seqlens:
        # As many rows as fill whole micro-batches of the settings that pad.
        at_once = 2 if TOY else max(1, POSITIONS // seqlen)
        mean = sum(c4_lengths(10_000, seqlen)) / 10_000
        count = max(1, round(args.tokens / mean / at_once)) * at_once
        drawn = {
            "c4": c4_lengths(count, seqlen), "full": [seqlen] * max(1, args.tokens // seqlen)
        }  # fmt: skip
        for name in args.lengths:
            yield {"lengths": name, "seqlen": seqlen}, drawn[name]


def project(tokens_per_s, mean_length, args):
    """Hours of the recipe, and dollars if the price of a GPU-hour is given."""
    hours = args.steps * args.global_batch * mean_length / (tokens_per_s * args.gpus) / 3600
    return {"hours": hours} | ({"dollars": hours * args.gpus * args.price} if args.price else {})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = DEVICE == "cpu" and not TOY
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--tasks", nargs="+", choices=["fill-mask", "step"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[128, 2048, 512, 8192])
    lengths = ["c4", "full"]
    parser.add_argument("--lengths", nargs="+", choices=lengths, default=lengths, help="on a GPU")
    parser.add_argument("--tokens", type=int, default=POSITIONS, help="of a step, about")
    parser.add_argument("--rounds", type=int, default=7)
    minutes = 20 if on_cpu else 10
    parser.add_argument("--minutes", type=float, default=minutes, help="then nothing more begins")
    parser.add_argument("--steps", type=int, default=70_000, help="of the projection; also below")
    parser.add_argument("--global_batch", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--price", type=float, help="dollars of a GPU-hour")
    parser.add_argument("--output", default=record_file("pretraining"))
    parser.add_argument("--toy", action="store_true")
    parser.set_defaults(
        settings=ON_CPU if on_cpu else ON_GPU,
        tasks=["fill-mask", "step"] if on_cpu else ["step"],
        dtypes=["float32", "bfloat16"] if on_cpu else ["bfloat16"],
    )
    if TOY:
        # Not bf16, of which Triton's interpreter gets products wrong.
        parser.set_defaults(dtypes=["float32"], seqlens=[32], tokens=128, rounds=2)
    args = parser.parse_args()
    record, deadline, rows = recorder(args.output), Deadline(args.minutes), []
    for row in sweep(args, lambda task: batches(args), 60, deadline):
        if row["task"] == "step" and "ms" in row and not on_cpu:
            row |= project(row["tokens_per_s"], row["tokens"] / row["rows"], args)
        record(row)
        rows.append(row)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
