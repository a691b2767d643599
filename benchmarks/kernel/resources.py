# SPDX-License-Identifier: Apache-2.0
"""Registers, spills, shared memory and instructions per score of the kernels, without a GPU.

Compiles every kernel for every row of the table of tile shapes and prints one JSON line each:

    python benchmarks/kernel/resources.py                 # all rows, all variants: 256 kernels
    python benchmarks/kernel/resources.py --rows 90-64-2  # sm, padded head_dim, bytes per element
    python benchmarks/kernel/resources.py --variants none alibi

"seconds" is what compiling took, about 0 where Triton's cache has the kernel: for the wait at a
first call, set TRITON_ALWAYS_COMPILE=1. "per_score" has one figure for every loop over tiles.
Not under TRITON_INTERPRET=1, which replaces the compiler.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import flash_attn_triton as attention

# Bytes of shared memory that one block may have.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
KERNELS = {
    "forward": attention._forward_kernel,
    "dq": attention._dq_kernel,
    "dkdv": attention._dkdv_kernel,
    "block": attention._block_backward_kernel,
}
VARIANTS = {
    "none": ("tile_map",),
    "alibi": ("tile_map", "slopes", "norms"),
    "holes": ("tile_map", "slopes", "norms", "position_ids"),
    "dropout": ("tile_map", "slopes", "norms", "position_ids", "seed"),
}
TYPES = {
    "cu_seqlens": "*i32", "tile_map": "*i32", "position_ids": "*i32", "seed": "*i64",
    "slopes": "*fp32", "norms": "*fp32", "lse": "*fp32", "delta": "*fp32",
    "keep_prob": "fp32", "scale": "fp32",
}  # fmt: skip
OPTIONAL = ("tile_map", "position_ids", "seed", "slopes", "norms")


def compile_kernel(kernel, row, variant, tile):
    """The compiled kernel of one row, with the attributes that the launcher would give it."""
    sm, head_dim, itemsize = row
    block_m, block_n, warps, stages = tile
    constexprs = dict(HEAD_DIM=head_dim, BLOCK_D=head_dim, BLOCK_M=block_m, BLOCK_N=block_n)
    constexprs |= {name: None for name in OPTIONAL if name not in VARIANTS[variant]}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    element = "*bf16" if itemsize == 2 else "*fp32"
    types = {}
    for name in kernel.arg_names:
        usual = element if name in ("qkv", "out", "dout", "dqkv") else "i32"
        types[name] = "constexpr" if name in constexprs else TYPES.get(name, usual)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name][0] == "*" or "stride" in name
    }
    source = ASTSource(kernel, types, constexprs, aligned)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def tool(name, *arguments):
    path = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_sizes(sass):
    """Instructions in every innermost loop that holds a matrix product."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", code[1])
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
    inner = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    product = re.compile(r"MMA|UTC")
    bodies = [instructions[begin:end] for begin, end in inner]
    return [body for body in bodies if any(product.search(code) for code in body)]


def measure(row, direction, variant="alibi", tile=None):
    """One dict of figures for a kernel on one row of the table."""
    tile = tile or attention.TILES[row][direction]
    began = time.time()
    kernel = compile_kernel(KERNELS[direction], row, variant, tile)
    seconds = time.time() - began
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        loops = loop_sizes(tool("nvdisasm", "-c", file.name))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    scores = tile[0] * tile[1] / (32 * tile[2])
    return {
        "sm": row[0], "head_dim": row[1], "bytes": row[2], "kernel": direction,
        "variant": variant, "tile": tile, "registers": registers, "spill_bytes": stack,
        "shared": kernel.metadata.shared, "fits": kernel.metadata.shared <= SHARED[row[0]],
        "seconds": round(seconds, 1),
        "per_score": [round(len(body) / scores, 2) for body in loops],
    }  # fmt: skip


if __name__ == "__main__":
    names = ["-".join(map(str, row)) for row in attention.TILES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    for name in arguments.rows:
        for direction in KERNELS:
            for variant in arguments.variants:
                figures = measure(tuple(map(int, name.split("-"))), direction, variant)
                print(json.dumps(figures), flush=True)
