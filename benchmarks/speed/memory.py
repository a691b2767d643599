# SPDX-License-Identifier: Apache-2.0
"""How much memory does a longer sequence take, and how long may it be?

Method: encoders.py builds each setting and checks it. Lengths are doubled from 512 to --longest, in
a full row, which takes no mask, and in two rows, the second half as long, until one does not fit or
takes more than --seconds. "embeddings" is inference, "step" a whole optimizer step. What is
measured is what a call allocates at most beyond what was there before: on a GPU by torch's
allocator; on a CPU by the peak of the resident set (Linux), freed memory being given back at once.
BERT keeps its 512 learned positions, which longer rows use over and over.
A CPU does not say that memory is short before the process is killed, so there only the slope is
to be had.

    python benchmarks/speed/memory.py
    python benchmarks/speed/memory.py --settings mosaic bert --tasks step --longest 16384
    python benchmarks/speed/memory.py --toy  # proves the script, on a CPU

Output: one JSON line per setting and length, appended to --output too, then a table of the longest
rows. "bytes_per_token" is the slope from half that length; "exponent" the power of the length that
memory grew with from there.
"""

import argparse
import ctypes
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch

from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import DEVICE, TOY, Deadline, first_call, record_file
from benchmarks.speed.compare import build, free, warm
from benchmarks.speed.encoders import SETTINGS, Encoder, make_rows

COLUMNS = {
    "task": "", "rows": "", "setting": "", "seqlen": ",", "tokens": ",", "peak_bytes": ",",
    "bytes_per_token": ",.0f", "exponent": ".2f",
}  # fmt: skip
# glibc's M_MMAP_THRESHOLD: memory of this many bytes and more goes back to the system when freed.
M_MMAP_THRESHOLD, THRESHOLD = -3, 2**16


def grow(encoder, two_rows, args, deadline):
    """A row of figures for each length, the last perhaps why it is the last."""
    seqlen, before = args.shortest, None
    while seqlen <= args.longest:
        lengths = [seqlen, seqlen // 2] if two_rows else [seqlen]
        row = {"rows": len(lengths), "seqlen": seqlen, "tokens": sum(lengths)}
        if reason := deadline.reason():
            yield row | {"skipped": reason}
            return
        function, figures = warm(encoder, make_rows(lengths))
        row |= figures
        if before and before["peak_bytes"] and row.get("peak_bytes"):
            more = row["peak_bytes"] - before["peak_bytes"]
            row["bytes_per_token"] = more / (row["tokens"] - before["tokens"])
            row["exponent"] = math.log2(row["peak_bytes"] / before["peak_bytes"])
        yield row
        if "skipped" in row:
            return
        # The first call may have waited for a compiler.
        most_ms = 1e3 * args.seconds
        if row["first_ms"] > most_ms and first_call(function)[1] > most_ms:
            yield row | {"seqlen": 2 * seqlen, "skipped": f"{seqlen} took over {args.seconds:g} s"}
            return
        before, seqlen = row, 2 * seqlen


def measure(name, task, args, deadline, record):
    """Records all lengths of a setting, and returns the longest row and the longest two that fit,
    with what came next."""
    facts = {"task": task, "dtype": args.dtype, "setting": name} | vars(SETTINGS[name])
    encoder = build([name], getattr(torch, args.dtype), task).get(name)
    if not isinstance(encoder, Encoder):
        return [facts | {"skipped": encoder}] if encoder else []
    # Two rows at once, however long.
    encoder.positions = 2 * args.longest
    longest = []
    for two_rows in (False, True):
        fits = facts
        for row in grow(encoder, two_rows, args, deadline):
            record(facts | row)
            if "skipped" in row:
                fits = fits | {"skipped": f"{row['seqlen']:,}: {row['skipped']}"}
            else:
                fits = facts | row
        longest.append(fits)
    return longest


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = ["embeddings", "step"]
    settings = ["mosaic", "bert", "bert-no-dropout", "modernbert"]
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=settings)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--shortest", type=int, default=16 if TOY else 512)
    longest = 64 if TOY else 2**20 if DEVICE == "cuda" else 2048
    parser.add_argument("--longest", type=int, default=longest)
    seconds = 3 if DEVICE == "cuda" else 30
    parser.add_argument("--seconds", type=float, default=seconds, help="a call may take")
    parser.add_argument("--minutes", type=float, default=10, help="then nothing more is begun")
    parser.add_argument("--output", default=record_file("memory"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if DEVICE == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    record, deadline, longest = recorder(args.output), Deadline(args.minutes), []
    for task in args.tasks:
        for name in args.settings:
            longest += measure(name, task, args, deadline, record)
            free()
    print_table(longest, COLUMNS)


if __name__ == "__main__":
    main()
