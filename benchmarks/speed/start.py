# SPDX-License-Identifier: Apache-2.0
"""How long does training take to begin, and what does it hold, however many rows there are?

Method: a process builds train_mlm.py's trainer for a small model, with steps of 4,096 rows, and
trains until the first step's rows are there; then once more, resumed at step 35,000, in a later
epoch where one is shorter. Measured are seconds from `train()` on, and how much the resident set
grows from there to its peak, files that are read by memory map apart (Linux). Rows are computed, as
many as in the paper's run without a disk of that size, or come from a folder that prepare_data.py
wrote, whose opening is measured too.

    python benchmarks/speed/start.py
    python benchmarks/speed/start.py --prepared_data FOLDER --max_seq_length 128
    python benchmarks/speed/start.py --rows 20000000 --sampler torch   # Trainer's own, as it was

Output: one JSON line per case, appended to benchmarks/results/start.jsonl, then a table.
"""

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.records import RESULTS, print_table, recorder
from benchmarks.speed.clocks import kilobytes, resident_growth
from mosaic_tools import mlm_trainer
from mosaic_tools.devices import prepare_environment
from mosaic_tools.mlm_trainer import MlmTrainer, build_model
from mosaic_tools.prepared import load_prepared
from mosaic_tools.recipe import TokenizerArguments, parse
from mosaic_tools.tokenization import train_tokenizer

STEP, PER_STEP = 35_000, 4096
COLUMNS = {
    "rows": ",", "sampler": "", "from_step": ",", "open_seconds": ".1f", "seconds": ".1f",
    "megabytes": ",.0f", "of_files": ",.0f",
}  # fmt: skip


class ComputedRows:
    """Rows of 128 tokens, each a function of its number."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": (np.arange(128) * 2654435761 + i * 40503) % 2**32 % 100 + 5}


class UntilFirstStep(TrainerCallback):
    """Ends the training once the first step's rows are there."""

    def on_step_begin(self, args, state, control, **kwargs):
        raise StopIteration


def begin(case: dict) -> dict:
    """Seconds and megabytes until the first step, in this process."""
    prepare_environment()
    tokenizer = train_tokenizer(iter(["a b c"] * 9), TokenizerArguments())
    rows, held_out = ComputedRows(case.get("rows", 0)), [ComputedRows(1)[0]]
    with tempfile.TemporaryDirectory() as folder:
        words = f"--output_dir {folder} --hidden_size 64 --num_hidden_layers 1 --max_steps 70000"
        words += " --num_attention_heads 1 --intermediate_size 64 --save_strategy no --use_cpu true"
        words += f" --global_batch_size {PER_STEP} --per_device_train_batch_size 64 --pack false"
        words += f" --max_seq_length {case['max_seq_length']} --disable_tqdm true"
        model_args, _, data, args = parse(words.split())
        if case["prepared_data"]:
            data.prepared_data, began = case["prepared_data"], time.perf_counter()
            rows, held_out, tokenizer = load_prepared(data)
            case |= {"rows": len(rows), "open_seconds": round(time.perf_counter() - began, 1)}
        if case["sampler"] == "torch":
            mlm_trainer.WINDOW = len(rows)
        model = build_model(model_args, tokenizer, data.max_seq_length)
        trainer = MlmTrainer(model, args, rows, held_out, tokenizer, data)
        checkpoint = None
        if case["from_step"]:
            checkpoint = write_checkpoint(trainer, case["from_step"], Path(folder, "checkpoint"))
        trainer.add_callback(UntilFirstStep())
        began = time.perf_counter()

        def train():
            with contextlib.suppress(StopIteration):
                trainer.train(resume_from_checkpoint=checkpoint)

        # Of files that are read by memory map, which all processes share.
        files = kilobytes("RssFile")
        growth, files = resident_growth(train), 1024 * (kilobytes("RssFile") - files)
    seconds = round(time.perf_counter() - began, 1)
    return case | {"seconds": seconds, "megabytes": growth / 1e6, "of_files": files / 1e6}


def write_checkpoint(trainer: MlmTrainer, step: int, folder: Path) -> str:
    """What a run of so many steps leaves, but for the optimizer's state."""
    trainer.save_model(str(folder))
    trainer.state.global_step, trainer.state.max_steps = step, trainer.args.max_steps
    trainer.state.logging_steps = trainer.state.save_steps = trainer.state.eval_steps = 50
    trainer.state.train_batch_size = trainer.args.train_batch_size
    trainer.state.epoch = step * PER_STEP / len(trainer.train_dataset)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return str(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 5_000_000, 286_720_000])
    parser.add_argument("--prepared_data", help="a folder, in place of computed rows")
    parser.add_argument("--max_seq_length", type=int, default=128, help="of its rows")
    parser.add_argument("--sampler", choices=["ours", "torch"], default="ours")
    parser.add_argument("--output", default=RESULTS / "start.jsonl", help="where records go")
    args = parser.parse_args()

    case = {x: getattr(args, x) for x in ("sampler", "prepared_data", "max_seq_length")}
    cases = [case | {"rows": n} for n in args.rows] if not args.prepared_data else [case]
    record, done = recorder(args.output, "accelerate", "datasets"), []
    for case in cases:
        for step in (0, STEP):
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as process:
                done.append(process.submit(begin, case | {"from_step": step}).result())
            record(done[-1] | {"prepared_data": bool(args.prepared_data)})
    print_table(done, COLUMNS)


if __name__ == "__main__":
    main()
