# SPDX-License-Identifier: Apache-2.0
"""What the CPU computes natively: its instructions, and whether bfloat16 is worth its while.

Where bf16 is not native, torch emulates it. A core of an AMD EPYC multiplies matrices at 95 GFLOP/s
in float32, at 214 in bf16, and at 38 in bf16 without its AVX512-BF16 (torch 2.13, for the last
ONEDNN_MAX_CPU_ISA=AVX512_CORE).
"""

import functools
import platform
import time
from pathlib import Path

import torch

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
