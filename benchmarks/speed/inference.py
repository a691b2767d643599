# SPDX-License-Identifier: Apache-2.0
"""How fast are embeddings and fill-mask, beside BERT-Base and ModernBERT-Base?

Method: encoders.py builds each setting with random weights in the dtype, and checks it in float32.
"embeddings" is the mean of a row's last hidden states, "fill-mask" the logits of all its tokens.
Each is given ids, padded to the longest row, and a mask where there is padding, as its users do;
settings that pad nothing find the tokens within the time. Rows are full ones of 128 tokens, 8 with
half padding, or of C4's lengths (lengths.py) up to 256, on a GPU 2048. Timed in turn, medians with
20 and 80 % quantiles; on a GPU, of 3 calls without waiting in between. serving.py has other ways to
run the models on a CPU.

    python benchmarks/speed/inference.py
    python benchmarks/speed/inference.py --settings mosaic bert --tasks embeddings
    python benchmarks/speed/inference.py --toy  # proves the script, on a CPU

Output: one JSON line per setting and rows, appended to --output too, then a table. "ratio" is a
setting's time over that of our fastest one.
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
from benchmarks.speed.encoders import SETTINGS
from benchmarks.speed.lengths import HALF_PADDING, c4_lengths

ON_GPU = ["mosaic", "mosaic-compiled", "bert", "bert-compiled", "modernbert", "modernbert-compiled"]
ON_CPU = ["mosaic", "bert", "modernbert"]
COLUMNS = {
    "task": "", "dtype": "", "batch": "", "setting": "", "ms": ".1f", "tokens_per_s": ",.0f",
    "mfu": ".1%", "ratio": ".2f", "peak_bytes": ",",
}  # fmt: skip


def batches(task):
    """(facts, lengths) of every batch."""
    if TOY:
        yield {"batch": "8, half padding"}, [x // 4 for x in HALF_PADDING]
        return
    yield {"batch": "1"}, [128]
    yield {"batch": "8"}, [128] * 8
    yield {"batch": "8, half padding"}, HALF_PADDING
    if DEVICE == "cuda":
        yield {"batch": "64"}, [128] * 64
        yield {"batch": "64, C4 to 2048"}, c4_lengths(64, 2048)
    elif task == "embeddings":
        yield {"batch": "8, C4 to 256"}, c4_lengths(8, 256)
        # Minutes, with logits.
        yield {"batch": "64"}, [128] * 64


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = DEVICE == "cpu" and not TOY
    tasks = ["embeddings", "fill-mask"]
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="of a batch; 3 rounds at least")
    parser.add_argument("--minutes", type=float, default=10, help="then nothing more is begun")
    parser.add_argument("--output", default=record_file("inference"))
    parser.add_argument("--toy", action="store_true")
    parser.set_defaults(
        settings=ON_CPU if on_cpu else ON_GPU,
        dtypes=["float32", "bfloat16"] if on_cpu else ["bfloat16"],
    )
    if TOY:
        # Not bf16, of which Triton's interpreter gets products wrong.
        parser.set_defaults(settings=ON_GPU, dtypes=["float32"], rounds=2)
    args = parser.parse_args()
    record, deadline, rows = recorder(args.output), Deadline(args.minutes), []
    for row in sweep(args, batches, args.seconds, deadline):
        record(row)
        rows.append(row)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
