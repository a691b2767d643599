# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks measure with: clocks, peak memory, and the ceilings of the device.

A toy (toy.py) runs on the CPU, and leaves no records.
"""

import math
import os
import time
from collections import Counter
from pathlib import Path

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.profiler import ProfilerActivity, profile

from benchmarks import toy
from benchmarks.records import RESULTS

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

TOY = toy.chosen()
DEVICE = "cuda" if torch.cuda.is_available() and not TOY else "cpu"
synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

# With which what is measured says that it is wrong or not to be had here. Triton's own, as of a
# tile too large for the chip, are no RuntimeErrors.
FAILURES = (
    AssertionError, ImportError, RuntimeError, ValueError, FailOnRecompileLimitHit, TritonError
)  # fmt: skip


def why(err):
    """An exception's name and the first line of its message."""
    return f"{type(err).__name__}: {str(err).partition(chr(10))[0]}"


def record_file(name):
    """Where a script's figures go: the records, or nowhere for a toy run."""
    return os.devnull if TOY else str(RESULTS / f"{name}.jsonl")


def first_call(function):
    """What `function` returns, and the milliseconds until the device has it."""
    synchronize()
    began = time.perf_counter()
    result = function()
    synchronize()
    return result, 1e3 * (time.perf_counter() - began)


def quantiles(times):
    """Median, 20 and 80 % quantile."""
    return torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def samples(functions, rounds, repeats=1, seconds=math.inf):
    """Times functions in turn, so that what disturbs one disturbs the others, and ratios are fair.

    Args:
        functions: dict by name, each warmed before.
        rounds: samples of each, fewer but at least 3 once `seconds` have passed.
        repeats: calls in a sample, between which a GPU is not waited for.

    Returns:
        dict: name to milliseconds of a call in each round.
    """
    times = {name: [] for name in functions}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 3 and time.monotonic() > end:
            break
        for name, function in functions.items():
            synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - began) / repeats)
    return times


def interleaved(functions, rounds, repeats=1, seconds=math.inf):
    """dict: name to milliseconds of a call, median, 20 and 80 % quantile, timed as by `samples`."""
    return {name: quantiles(x) for name, x in samples(functions, rounds, repeats, seconds).items()}


def kernel_times(function, calls):
    """Counter: milliseconds of a call by the name of kernel or operator, without what it calls. On
    a GPU its work alone, however long it waits for the host in between."""
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        # The host's operators would only slow it down.
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            first_call(function)
    attribute = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    times = Counter()
    for event in profiler.key_averages():
        # Ranges such as the optimizer's contain what is counted by itself.
        if event.is_user_annotation:
            continue
        times[event.key] += getattr(event, attribute) / calls / 1e3
    return times


def peak_bytes(function):
    """What `function` allocates at most beyond what is there before: on a CPU the growth of the
    resident set, to which memory that was freed and kept does not add; None where Linux does not
    tell."""
    if DEVICE == "cpu":
        return resident_growth(function)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_growth(function):
    """Bytes between the resident set and its peak during the call, or None."""
    try:
        # Sets the peak back.
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
    except OSError:
        function()
        return None
    function()
    return 1024 * (kilobytes("VmHWM") - before)


def kilobytes(name):
    """What Linux says of this process's memory under that name, as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def ceilings(dtype):
    """What the device reaches now: TFLOP/s of a square matrix product of random numbers, GB/s of a
    copy, read and written bytes counted, of far more than its caches hold."""
    size, elements = (8192, 2**31) if DEVICE == "cuda" else (64, 2**16) if TOY else (2048, 2**28)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    source = torch.randn(elements // dtype.itemsize, device=DEVICE).to(dtype)
    target = torch.empty_like(source)
    functions = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for function in functions.values():
        function()
    times = interleaved(functions, rounds=5, repeats=10 if DEVICE == "cuda" else 1)
    return {
        "matmul_tflops": 2 * size**3 / times["matmul"][0] / 1e9,
        "copy_gbytes_per_s": 2 * source.nbytes / times["copy"][0] / 1e6,
    }


class Deadline:
    """Whether `minutes` have passed since it was made."""

    def __init__(self, minutes):
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes

    def reason(self):
        """Why nothing more is begun, or None."""
        return f"--minutes {self.minutes:g} are over" if time.monotonic() > self.end else None
