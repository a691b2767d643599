# SPDX-License-Identifier: Apache-2.0
"""What a run computes on: the processor's instructions, whether bfloat16 is worth its while there,
threads, and the attention backend that a model will choose.

Where bf16 is not native, torch emulates it. A core of an AMD EPYC multiplies matrices at 95 GFLOP/s
in float32, at 214 in bf16, and at 38 in bf16 without its AVX512-BF16 (torch 2.13, for the last
ONEDNN_MAX_CPU_ISA=AVX512_CORE).
"""

import functools
import os
import platform
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import is_torch_bf16_gpu_available

from mosaic_tools.family import is_ours

# Those that decide how fast matrix products are, by /proc/cpuinfo's name: torch's name.
INSTRUCTIONS = {
    "avx2": "avx2",
    "avx512f": "avx512_f",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "sve": "sve",
    "bf16": "bf16",
}
CPUINFO = Path("/proc/cpuinfo")


def cpu_instructions() -> list[str]:
    """Which of INSTRUCTIONS this processor has; none where neither torch nor Linux says so."""
    # Older versions of torch have only functions of changing names.
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return [name for name, torchs in INSTRUCTIONS.items() if found.get(torchs)]
    words = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return [name for name in INSTRUCTIONS if name in words]


def cpu_bf16() -> tuple[bool, str]:
    """(whether the CPU computes bf16 natively, how that is known)."""
    native = [name for name in ("amx_bf16", "avx512_bf16") if name in cpu_instructions()]
    if native:
        return True, f"native by {' and '.join(native)}"
    if platform.machine() in ("x86_64", "AMD64"):
        return False, "this CPU has neither amx_bf16 nor avx512_bf16, and would emulate bf16"
    speed = bf16_over_float32()
    return speed > 1, f"a product in bf16 is {speed:.2g} times as fast as in float32 on this CPU"


@functools.cache
def bf16_over_float32(size: int = 512, rounds: int = 3) -> float:
    """Speed of (size, size) matrix products in bfloat16 over that in float32, the best of a few
    rounds; at 1 GFLOP/s a round takes 0.3 s. A process measures once, and keeps its choice."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def native_bf16(use_cpu: bool) -> tuple[bool, str]:
    """(whether the device of this process computes bf16 natively, how that is known)."""
    if use_cpu:
        return cpu_bf16()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        # transformers counts the emulation of GPUs before Ampere too.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"native to {name}" if native else f"{name} would emulate bf16"
    if not torch.accelerator.is_available():
        return cpu_bf16()
    kind = torch.accelerator.current_accelerator().type
    native = is_torch_bf16_gpu_available()
    return native, f"{kind} has bf16" if native else f"{kind} has no bf16"


# ---- a process ----


def prepare_environment():
    """Sets what accelerate and transformers read of the environment, before arguments are made.

    A launcher's mixed precision would come in where ours is float32, and transformers 4.57 leaves
    that of a run for the next. A compiled model is one graph for any number of tokens.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")


def one_gpu_each(args):
    """ValueError: this process would spread a batch over several GPUs by itself."""
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, it can use one: start one process for each by "
            f"accelerate launch --num_processes {args.n_gpu}, or set CUDA_VISIBLE_DEVICES"
        )


def leave_group():
    """Leaves the group of processes, if there is one. A process that ends while it is in one may be
    aborted, which the launcher takes for a failure of the whole run."""
    PartialState().destroy_process_group()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_all_cores(args):
    """accelerate launch leaves a process one thread unless it is told otherwise."""
    if args.use_cpu:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(args.cpu_threads or max(1, usable_cores() // processes))


def attention_backend(model, args) -> str:
    """The backend that the model will choose on this device, in this dtype."""
    config = model.config
    if not is_ours(config):
        return config._attn_implementation
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    head_dim = config.hidden_size // config.num_attention_heads
    choose_backend = sys.modules[type(model).__module__].choose_backend
    return choose_backend(config._attn_implementation, args.device, dtype, head_dim)
