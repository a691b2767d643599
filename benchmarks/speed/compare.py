# SPDX-License-Identifier: Apache-2.0
"""Encoders compared on the same rows: built, warmed, timed in turn, put in relation."""

import gc

import torch

from benchmarks.speed.clocks import (
    DEVICE,
    FAILURES,
    ceilings,
    first_call,
    interleaved,
    peak_bytes,
    why,
)  # fmt: skip
from benchmarks.speed.encoders import SETTINGS, Encoder, make_rows

OURS = ("mosaic", "mosaic-compiled")


def build(names, dtype, task, make=Encoder):
    """dict: name to the Encoder, or to why there is none. Outside training dropout makes no
    difference, and the setting without it is left out."""
    built = {}
    for name in names:
        if name == "bert-no-dropout" and task != "step":
            continue
        try:
            built[name] = make(name, dtype, task)
        except FAILURES as err:
            built[name] = why(err)
    return built


def warm(encoder, rows):
    """The function to time, or None, and what is known before it is timed."""
    try:
        function = encoder.function(rows)
        result, first_ms = first_call(function)
        if not result.isfinite().all():
            return None, {"skipped": "its result is not finite"}
        # A compiler is called more than once before it has what it wants.
        figures = {"first_ms": first_ms, "peak_bytes": peak_bytes(function)}
    except FAILURES as err:
        torch.cuda.empty_cache()
        return None, {"skipped": why(err)}
    return function, figures


def measure(encoders, lengths, facts, rounds, seconds, deadline):
    """A row of figures for each encoder on rows of these lengths.

    Args:
        encoders: name to what `build` gave.
        facts: of all rows, with the matmul rate that "mfu" is a share of.
        rounds, seconds: as for `interleaved`.

    Yields:
        dict: "ms" with quantiles, tokens that are not padding per second, "mfu", "ratio" (this
        one's time over that of our fastest setting), on a GPU peak memory beyond weights and
        optimizer states, milliseconds of the first call; or "skipped", why not.
    """
    rows, functions, known = make_rows(lengths), {}, {}
    facts = facts | {"rows": len(lengths), "tokens": sum(lengths)}
    # Every batch is compiled for its own sizes; and torch counts compilations by code, which
    # transformers' models share.
    torch.compiler.reset()
    for name, encoder in encoders.items():
        if reason := encoder if isinstance(encoder, str) else deadline.reason():
            known[name] = {"skipped": reason}
            continue
        function, known[name] = warm(encoder, rows)
        if DEVICE == "cpu":
            # What a process has freed and kept hides it; memory.py looks with nothing kept.
            known[name].pop("peak_bytes", None)
        if function:
            functions[name] = function
    times = interleaved(functions, rounds, 3 if DEVICE == "cuda" else 1, seconds)
    ours = min((times[name][0] for name in OURS if name in times), default=None)
    for name, row in known.items():
        if name in times:
            ms, low, high = times[name]
            row |= {"ms": ms, "p20": low, "p80": high, "tokens_per_s": 1e3 * sum(lengths) / ms}
            row["mfu"] = encoders[name].flop(rows) / ms / 1e9 / facts["matmul_tflops"]
            row |= {"ratio": ms / ours} if ours else {}
        yield facts | {"setting": name} | vars(SETTINGS[name]) | row


def sweep(args, batches, seconds, deadline):
    """`measure`'s rows for every dtype, task and batch.

    Args:
        args: `settings`, `dtypes`, `tasks`, `rounds`.
        batches: a function of the task that gives (facts, lengths) of each batch.
        seconds, deadline: as for `measure`.
    """
    for name in args.dtypes:
        dtype = getattr(torch, name)
        rates = ceilings(dtype) | {"threads": torch.get_num_threads()}
        for task in args.tasks:
            encoders = build(args.settings, dtype, task)
            for batch, lengths in batches(task):
                facts = {"task": task, "dtype": name} | batch | rates
                yield from measure(encoders, lengths, facts, args.rounds, seconds, deadline)
            del encoders
            free()


def free():
    """Gives back the memory of encoders that nothing refers to any more, and of compiled code."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
