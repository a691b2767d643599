# SPDX-License-Identifier: Apache-2.0
"""What goes on around a training step: throughput, a clean stop on SIGTERM, the log on disk and its
picture. Trainer callbacks."""

import json
import os
import signal
import time
from pathlib import Path

import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback

from mosaic_tools.checkpoints import saving

# Dense bf16 FLOP/s of NVIDIA's data sheets, by a part of the device's name. The first match counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


class Throughput(TrainerCallback):
    """Counts what training reads, and how fast, between two logs.

    Model FLOP of n tokens in sequences of lengths s, m of them with a label, by a model of L layers
    of width dim with P matmul weights each:

        3 * (2 * L * P * n + 4 * L * dim * sum(s ** 2) + 2 * (dim ** 2 + dim * vocab) * m)

    that is 2 per weight or score and multiplication, the backward pass taken as twice the forward,
    logits for labels only, and nothing for padding (shared with the literature: Chowdhery et al.
    2022, appendix B). MFU divides it by time and by the peak of all devices. Evaluating and saving
    take no part in the time.

    Args:
        model: BertForMaskedLM, ours or transformers'.
        peak_tflops: of one device; None: that of PEAK_TFLOPS, or no MFU if it is not there.
    """

    def __init__(self, model: nn.Module, peak_tflops: float | None):
        config = model.config
        layers = [x for x in model.base_model.modules() if isinstance(x, nn.Linear)]
        dim = config.hidden_size
        self.flop = 3 * torch.tensor(
            [
                2 * sum(x.weight.numel() for x in layers),
                4 * config.num_hidden_layers * dim,
                2 * (dim**2 + dim * config.vocab_size),
            ],
            dtype=torch.float64,
        )
        self.peak_tflops = peak_tflops or known_peak(model.device)
        self.since = None
        self.reset()

    def reset(self):
        self.counted, self.seconds, self.waited = None, 0.0, 0.0
        self.places = self.rows = self.sequences = 0

    def count(self, inputs: dict[str, Tensor]):
        """Adds a micro-batch; waits for nothing on the device."""
        labels = inputs["labels"]
        if "batch" in inputs:
            lengths = inputs["batch"]["cu_seqlens"].diff()
        else:
            lengths = inputs["attention_mask"].sum(1)
        lengths = lengths.float()
        counted = torch.stack([lengths.sum(), (lengths**2).sum(), (labels != -100).sum().float()])
        self.counted = counted if self.counted is None else self.counted + counted
        # These the host knows.
        self.places += labels.numel()
        self.rows += len(labels)
        self.sequences += len(lengths)

    def waiting_for(self, batches):
        """The batches; how long each takes to come counts as waiting."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds += now - (self.since or now)
        self.since = now

    def restart_clock(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    on_train_begin = on_evaluate = on_save = restart_clock

    def report(self, accelerator) -> dict[str, float]:
        """Figures since the last report, of all processes together; the share of time that went by
        waiting for data is that of the process that waited longest, and the peak memory is this
        one's, evaluations included. Every process must call it."""
        if self.counted is None or not self.seconds:
            return {}
        known = self.counted.new_tensor([self.places, self.rows, self.sequences])
        counts = torch.cat([self.counted, known]).to(accelerator.device)
        counts = accelerator.reduce(counts, "sum").tolist()
        waited = torch.tensor([self.waited / self.seconds], device=accelerator.device)
        tokens, _, _, places, rows, sequences = counts
        figures = {
            "tokens_per_second": tokens / self.seconds,
            "samples_per_second": rows / self.seconds,
            "mean_length": tokens / sequences,
            "padding_share": 1 - tokens / places,
            "data_wait_share": accelerator.gather(waited).max().item(),
        }
        if self.peak_tflops:
            flop = float(self.flop @ torch.tensor(counts[:3], dtype=torch.float64))
            peak = 1e12 * self.peak_tflops * accelerator.num_processes
            figures["mfu"] = flop / self.seconds / peak
        if torch.cuda.is_available():
            figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.reset()
        return figures


def known_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a device of PEAK_TFLOPS, None for others."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, which schedulers send before they take a machine: finishes the step, has a
    checkpoint saved, and ends the training.

    Several processes agree on the step, as the signal may reach them in different ones: each tells
    the others at the end of a step, and all read what was told at the end of the next.
    """

    def __init__(self):
        self.received = self.stopped = False
        self.told = None

    def on_train_begin(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, *_):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed(args):
            self.stopped = control.should_save = control.should_training_stop = True

    def agreed(self, args) -> bool:
        if args.world_size == 1:
            return self.received
        flag = torch.full((), float(self.received), device=args.device)
        torch.distributed.all_reduce(flag)
        told, self.told = self.told, Later(flag)
        return told is not None and told.read() > 0


class Later:
    """A number that a GPU is still computing, for the host to read in a while, without waiting for
    what is queued behind it."""

    def __init__(self, number: Tensor):
        self.number, self.known = number, None
        if number.is_cuda:
            self.number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self.number.copy_(number, non_blocking=True)
            self.known = torch.cuda.Event()
            self.known.record()

    def read(self) -> float | bool:
        if self.known:
            self.known.synchronize()
        return self.number.item()


class MaskEpoch(TrainerCallback):
    """Tells the collator the epoch, so that each masks other tokens."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(state.epoch or 0))


class LogFile(TrainerCallback):
    """log.jsonl in the output folder: a line for each log, and none twice after resuming."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.write(args, state.log_history, "w")

    def on_log(self, args, state, control, **kwargs):
        self.write(args, state.log_history[-1:], "a")

    @staticmethod
    def write(args, entries, mode):
        if args.process_index == 0:
            with saving("log.jsonl", args):
                os.makedirs(args.output_dir, exist_ok=True)
                with open(Path(args.output_dir, "log.jsonl"), mode) as file:
                    file.writelines(json.dumps(entry) + "\n" for entry in entries)


# What pictures show: keys of the log by the label of their panel, and what keys with company are.
OF_PRETRAINING = {
    "loss (nats)": ("loss", "eval_loss"),
    "masked tokens guessed": ("eval_masked_accuracy", "eval_commonest_token_accuracy"),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
    "share of time": ("data_wait_share",),
    "share of positions": ("padding_share",),
}
OF_EMBEDDINGS = {
    "loss (nats)": ("loss",),
    "held out": ("eval_cosine_ndcg@10", "eval_cosine_mrr@10", "eval_spearman_cosine"),
}
NAMES = {
    "loss": "training",
    "eval_loss": "held out",
    "eval_masked_accuracy": "the model",
    "eval_commonest_token_accuracy": "always the commonest token",
    "data_wait_share": "waiting for data",
    "padding_share": "padding",
    "eval_cosine_ndcg@10": "nDCG@10",
    "eval_cosine_mrr@10": "MRR@10",
    "eval_spearman_cosine": "Spearman correlation",
}


def draw_training(
    log_history: list[dict],
    path: Path,
    title: str,
    panels: dict[str, tuple[str, ...]] = OF_PRETRAINING,
):
    """A picture of what was logged against the step, two panels in a row."""
    from matplotlib.figure import Figure

    rows = len(panels) // 2
    figure = Figure(figsize=(9, 3 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, 2, sharex=True).flat
    for axes, (label, keys) in zip(grid, panels.items(), strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                marker = "." if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, label=NAMES.get(key))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=None if "loss" in label else 0, top=1 if "share" in label else None)
        axes.grid(alpha=0.3)
        if len(keys) > 1 or "share" in label:
            axes.legend()
    for axes in figure.axes[-2:]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=120)
