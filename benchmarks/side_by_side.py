# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks that train share: runs side by side, and their curves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from records import ROOT


def train(recipes: dict[str, dict], folder: Path):
    """Trains a model by each recipe into folder/name, which must be new.

    On a CPU all at the same time, each pinned to a core of its own, so that what disturbs one
    disturbs the others; on a GPU one after the other.
    """
    waiting = list(recipes)
    gpu = torch.cuda.is_available()
    cores = sorted(os.sched_getaffinity(0))
    if not gpu and len(cores) < len(waiting):
        raise SystemExit(f"{len(waiting)} runs side by side need as many cores, there are {cores}")
    for group in [[name] for name in waiting] if gpu else [waiting]:
        running = []
        for core, name in zip(cores, group, strict=False):
            words = [sys.executable, str(ROOT / "train_mlm.py"), "--output_dir", str(folder / name)]
            words += ["--disable_tqdm", "true"]
            words += [] if gpu else ["--cpu_threads", "1"]
            words += [str(x) for key, value in recipes[name].items() for x in (f"--{key}", value)]
            pin = None if gpu else (lambda core=core: os.sched_setaffinity(0, {core}))
            environment = os.environ | ({} if gpu else {"OMP_NUM_THREADS": "1"})
            running.append((name, subprocess.Popen(words, preexec_fn=pin, env=environment)))
        if failed := [name for name, process in running if process.wait()]:
            raise SystemExit(f"training failed: {', '.join(failed)}")


def curve(folder: Path, rows_per_step: int) -> list[dict]:
    """Held-out loss and accuracy of a run against steps, non-padding tokens and seconds of training
    (evaluation not counted), summed up from the rates in its log."""
    tokens = seconds = step = 0
    points = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            passed = (entry["step"] - step) * rows_per_step / entry["samples_per_second"]
            step = entry["step"]
            seconds += passed
            tokens += entry["tokens_per_second"] * passed
        elif "eval_masked_accuracy" in entry:
            points.append(
                {
                    "step": entry["step"],
                    "tokens": round(tokens),
                    "seconds": round(seconds, 1),
                    "eval_loss": entry["eval_loss"],
                    "eval_masked_accuracy": entry["eval_masked_accuracy"],
                }
            )
    # The evaluation after training repeats the last one.
    return [p for i, p in enumerate(points) if i == 0 or p["step"] > points[i - 1]["step"]]
