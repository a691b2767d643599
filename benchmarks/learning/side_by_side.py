# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks that train share: runs side by side, and their curves."""

import json
import os
import queue
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.records import ROOT


def at_a_time() -> int:
    """How many runs are side by side: one on a GPU, on a CPU as many as there are cores."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def each_on_a_core(work, items: list):
    """`work(item, execute)` for each item, `at_a_time`. `execute(words)` runs `python *words`, on a
    CPU pinned to a core that no other item has then, so that what disturbs one run disturbs those
    beside it.

    Raises:
        SystemExit: a command failed; the others of that moment are finished.
    """
    gpu, cores = torch.cuda.is_available(), queue.SimpleQueue()
    environment = os.environ | ({} if gpu else {"OMP_NUM_THREADS": "1"})
    for core in sorted(os.sched_getaffinity(0))[: at_a_time()]:
        cores.put(core)

    def on_a_core(item):
        core = cores.get()
        pin = None if gpu else (lambda: os.sched_setaffinity(0, {core}))

        def execute(words):
            command = [sys.executable, *map(str, words)]
            if subprocess.run(command, preexec_fn=pin, env=environment).returncode:
                raise SystemExit(f"failed: {item}: {shlex.join(command)}")

        try:
            work(item, execute)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(at_a_time()) as pool:
        list(pool.map(on_a_core, items))


def run(commands: dict[str, list]):
    """Runs `python *words` for each."""
    each_on_a_core(lambda name, execute: execute(commands[name]), list(commands))


def words_of(flags: dict) -> list:
    """Flags as words of a command."""
    return [word for key, value in flags.items() for word in (f"--{key}", value)]


def train(recipes: dict[str, dict], folder: Path):
    """Trains a model by each recipe, flags of train_mlm.py, into folder/name, which must be new."""
    if not torch.cuda.is_available() and len(recipes) > at_a_time():
        raise SystemExit(f"{len(recipes)} runs side by side need as many cores")
    fixed = {"disable_tqdm": "true", "cpu_threads": 1}
    flags = {name: {"output_dir": folder / name} | fixed | x for name, x in recipes.items()}
    run({name: [ROOT / "train_mlm.py", *words_of(x)] for name, x in flags.items()})


def curve(folder: Path, rows_per_step: int) -> list[dict]:
    """Held-out loss and accuracy of a run against steps, non-padding tokens and seconds of training
    (evaluation not counted), summed up from the rates in its log; and against model FLOP where it
    was trained with --peak_tflops 1."""
    tokens = seconds = flop = step = 0
    points = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            passed = (entry["step"] - step) * rows_per_step / entry["samples_per_second"]
            step = entry["step"]
            seconds += passed
            tokens += entry["tokens_per_second"] * passed
            flop += 1e12 * entry.get("mfu", 0) * passed
        elif "eval_masked_accuracy" in entry:
            points.append(
                {
                    "step": entry["step"],
                    "tokens": round(tokens),
                    "seconds": round(seconds, 1),
                    "eval_loss": entry["eval_loss"],
                    "eval_masked_accuracy": entry["eval_masked_accuracy"],
                }
                | ({"flop": flop} if flop else {})
            )
    # The evaluation after training repeats the last one.
    return [p for i, p in enumerate(points) if i == 0 or p["step"] > points[i - 1]["step"]]
