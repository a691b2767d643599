# SPDX-License-Identifier: Apache-2.0
"""How fast does MosaicBERT-Base pre-train, beside BERT-Base and ModernBERT-Base?

Method: encoders.py builds each setting with random weights; before any clock starts, its loss and
gradients must be those of its weights in float32 with padding. A step is masked-LM forward,
backward and fused AdamW, 30 % of the words labelled, over the same random rows for all: full ones,
or of C4's lengths (lengths.py), about --tokens of them without padding. Settings that pad do it to
the longest row of a micro-batch of at most 65,536 positions. Batches lie on the device. "forward"
is inference: logits of all tokens, weights in the dtype. Settings are timed in turn, medians with
20 and 80 % quantiles; on a GPU, of 3 steps without waiting in between. MFU is train_callbacks'
FLOP formula over time and the matmul rate measured in the same run.

    python benchmarks/pretraining.py                     # a GPU; or a CPU: 8 x 128, see --help
    python benchmarks/pretraining.py --seqlens 128 --settings mosaic-compiled bert-compiled
    python benchmarks/pretraining.py --toy               # proves the script, on a CPU

Output: one JSON line per setting and rows, appended to --output too, then a table. "ratio" is the
fastest setting of ours over this one, in tokens that are not padding per second. Hours and dollars
are a projection of the recipe's 70,000 x 4096 rows: rows x mean length / (tokens/s x GPUs), no
all-reduce, no loading.
"""

import argparse
import gc

import torch
from clocks import DEVICE, TOY, Deadline, ceilings, first_call, interleaved, peak_bytes, record_file
from encoders import POSITIONS, SETTINGS, Encoder, make_rows
from lengths import HALF_PADDING, c4_lengths
from records import print_table, recorder

ON_GPU = [x for x in SETTINGS if x not in ("bert-no-dropout", "bert-flash", "modernbert-flash")]
ON_CPU = ["mosaic", "bert", "bert-no-dropout", "modernbert"]
COLUMNS = {
    "pass": "", "dtype": "", "lengths": "", "seqlen": "", "setting": "", "ms": ".1f",
    "tokens_per_s": ",.0f", "mfu": ".1%", "ratio": ".2f", "peak_bytes": ",", "hours": ".2f",
    "dollars": ".0f",
}  # fmt: skip


def batches(args):
    """(name, seqlen, lengths) of every batch."""
    if DEVICE == "cpu" and not TOY:
        yield "half padding", 128, HALF_PADDING
        yield "full", 128, [128] * 8
        return
    for seqlen in args.seqlens:
        # As many rows as fill whole micro-batches of the settings that pad.
        at_once = max(1, POSITIONS // seqlen) if not TOY else 2
        mean = sum(c4_lengths(10_000, seqlen)) / 10_000
        count = max(1, round(args.tokens / mean / at_once)) * at_once
        yield "c4", seqlen, c4_lengths(count, seqlen)
        yield "full", seqlen, [seqlen] * max(1, args.tokens // seqlen)


def project(tokens_per_s, mean_length, args):
    """Hours, and dollars if the price of a GPU-hour is given, of the recipe."""
    hours = args.steps * args.global_batch * mean_length / (tokens_per_s * args.gpus) / 3600
    return {"hours": hours} | ({"dollars": hours * args.gpus * args.price} if args.price else {})


def build(name, dtype, training, longest):
    """The Encoder, or why there is none."""
    try:
        return Encoder(name, dtype, longest, training)
    except (AssertionError, ImportError, RuntimeError, ValueError) as err:
        return f"{type(err).__name__}: {str(err).splitlines()[0]}"


def warm(encoder, rows, training):
    """The function to time and what is known before it is, or None and a reason."""
    try:
        function = encoder.step(rows) if training else encoder.forward(rows)
        # A compiler wants to be called more than once.
        _, first_ms = first_call(function)
        figures = {"first_ms": first_ms, "peak_bytes": peak_bytes(function)}
    except RuntimeError as err:
        torch.cuda.empty_cache()
        return None, {"skipped": f"{type(err).__name__}: {str(err).splitlines()[0]}"}
    if figures["peak_bytes"] is not None and training:
        # Weights and the optimizer's two states, in float32.
        figures["peak_bytes"] += 12 * sum(x.numel() for x in encoder.model.parameters())
    return function, figures


def measure(encoders, rows, facts, args, deadline):
    """A row of figures for each encoder on this batch."""
    training, functions, known = facts["pass"] == "step", {}, {}
    for name, encoder in encoders.items():
        reason = encoder if isinstance(encoder, str) else deadline.reason()
        if reason:
            known[name] = {"skipped": reason}
            continue
        function, known[name] = warm(encoder, rows, training)
        if function:
            functions[name] = function
    times = interleaved(functions, args.rounds, 3 if DEVICE == "cuda" else 1)
    tokens = sum(rows.lengths)
    ours = min((ms for name, (ms, *_) in times.items() if "mosaic" in name), default=None)
    for name, row in known.items():
        if name in times:
            ms, low, high = times[name]
            flop = encoders[name].flop(rows, all_logits=not training)
            row |= {"ms": ms, "p20": low, "p80": high, "tokens_per_s": 1e3 * tokens / ms}
            row |= {"flop": flop, "mfu": flop / ms / 1e9 / facts["matmul_tflops"]}
            row |= {"ratio": ms / ours} if ours else {}
            if training and DEVICE == "cuda":
                row |= project(row["tokens_per_s"], tokens / len(rows.lengths), args)
        yield facts | {"setting": name} | vars(SETTINGS[name]) | row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = DEVICE == "cpu" and not TOY
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--passes", nargs="+", choices=["forward", "step"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[128, 2048, 512, 8192])
    parser.add_argument("--tokens", type=int, default=POSITIONS, help="of a step, about")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10, help="then nothing more is begun")
    parser.add_argument("--steps", type=int, default=70_000, help="of the projection; also below")
    parser.add_argument("--global_batch", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--price", type=float, help="dollars of a GPU-hour")
    parser.add_argument("--output", default=record_file("pretraining"))
    parser.add_argument("--toy", action="store_true")
    parser.set_defaults(
        settings=ON_CPU if on_cpu else ON_GPU,
        passes=["forward", "step"] if on_cpu else ["step"],
        dtypes=["float32", "bfloat16"] if on_cpu else ["bfloat16"],
    )
    if TOY:
        # Not bf16, of which Triton's interpreter gets products wrong.
        parser.set_defaults(dtypes=["float32"], seqlens=[32], tokens=128, rounds=2)
    args = parser.parse_args()
    record, deadline, rows = recorder(args.output), Deadline(args.minutes), []
    for dtype in args.dtypes:
        rates = ceilings(getattr(torch, dtype))
        for name in args.passes:
            encoders = {
                x: build(x, getattr(torch, dtype), name == "step", max(args.seqlens))
                for x in args.settings
            }
            for lengths, seqlen, drawn in batches(args):
                batch = make_rows(drawn)
                facts = {
                    "pass": name, "dtype": dtype, "lengths": lengths, "seqlen": seqlen,
                    "rows": len(drawn), "tokens": sum(drawn), "threads": torch.get_num_threads(),
                } | rates  # fmt: skip
                for row in measure(encoders, batch, facts, args, deadline):
                    record(row)
                    rows.append(row)
            # Before the next ones take their memory.
            del encoders
            gc.collect()
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
