# SPDX-License-Identifier: Apache-2.0
"""Which tile shapes are fastest on this GPU?

Method: for every row of the table (head_dim 64 and 128; 2 and 4 bytes) and every kernel, candidates
replace the table's tile, the other kernels keeping theirs. Processes side by side compile them and
hold each to the tests' error rule. One that does not fit in shared memory or fails the rule is left
out; the rest are timed one at a time, with ALiBi on sequences of --seqlen tokens, every tile
visited, by what torch.profiler counts of all kernels of the pass. The one-block backward gets the
longest row at which it beats the two-pass kernels on full rows. Dropout is not timed: afterwards
ask resources.py for spills in all variants.

    python benchmarks/kernel/tune.py              # this chip's four rows
    python benchmarks/kernel/tune.py --rows 64-2  # head_dim 64, 2 bytes per element
    python benchmarks/kernel/tune.py --toy        # proves the script, on a CPU

Output: a JSON line per candidate, appended to --output too, then the rows to paste into TILES.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch

from benchmarks.kernel.common import (
    assert_correct,
    cu_seqlens_of,
    empty_caches,
    ours,
    require_device,
    slopes_of,
)  # fmt: skip
from benchmarks.records import recorder
from benchmarks.speed.clocks import DEVICE, FAILURES, TOY, kernel_times, record_file, why
from mosaic_tools.devices import usable_cores

DTYPES = {2: torch.float16 if TOY else torch.bfloat16, 4: torch.float32}
# Accumulators of (owned tokens, head_dim) that a kernel keeps in registers.
ACCUMULATORS = {"forward": 1, "dq": 1, "dkdv": 2}
REGISTERS = 255
# A one-block backward shorter than any row sends all rows to the two-pass kernels.
TWO_PASS = (0, 0, 4, 1)
# Of queries and of keys, by the bytes of an element. A toy must still have all kernels and a choice
# between two tiles.
BLOCKS = {2: ((32, 64, 128), (32, 64, 128)), 4: ((16, 32, 64, 128), (16, 32, 64))}
WARPS, STAGES = ((4, 8), (1, 2, 3, 4))
if TOY:
    BLOCKS, WARPS, STAGES = {2: ((32, 64), (32,))}, (4,), (2,)


def candidates(direction, row, table_tile):
    """The table's own tile, then all whose accumulators and scores alone fit in registers."""
    _, head_dim, itemsize = row
    tiles = [table_tile]
    for tile in itertools.product(*BLOCKS[itemsize], WARPS, STAGES):
        block_m, block_n, warps, _ = tile
        owned = block_n if direction == "dkdv" else block_m
        values = owned * ACCUMULATORS[direction] * head_dim + 2 * block_m * block_n
        if values <= REGISTERS * 32 * warps and tile != table_tile:
            tiles.append(tile)
    return tiles


def blocks(row):
    """Rows that the one-block backward may hold, longest first, each with its tiles."""
    return {
        block: [(block, block, warps, 1) for warps in WARPS]
        for block in sorted(BLOCKS[row[2]][0], reverse=True)
    }


def make_case(row, lengths, heads):
    """qkv, arguments of the attention function, and a gradient."""
    _, head_dim, itemsize = row
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=DEVICE).to(DTYPES[itemsize])
    dout = torch.randn(sum(lengths), heads, head_dim, device=DEVICE).to(DTYPES[itemsize])
    options = dict(alibi_slopes=slopes_of(heads), skip_far_tiles=False)
    return qkv.requires_grad_(), (cu_seqlens_of(lengths), max(lengths)), options, dout


def attend(case):
    qkv, sequences, options, _ = case
    return ours.flash_attn_varlen_qkvpacked_func(qkv, *sequences, **options)


def use(tiles):
    """Takes the table's place, so that the kernels themselves stay as they are."""
    ours.tile_shape = lambda qkv, direction: tiles[direction]


def check(row, tiles, lengths):
    """Raise AssertionError unless output and gradients with these tiles are right."""
    use(tiles)
    case = qkv, (cu_seqlens, _), options, dout = make_case(row, lengths, 2)
    out = attend(case)
    grad = torch.autograd.grad(out, qkv, dout)[0]
    slopes = options["alibi_slopes"]
    assert_correct(out.detach(), grad, qkv, dout, cu_seqlens, slopes)


def judge(row, tiles, batches):
    """Why these tiles are no good, or None. Triton's cache then has what was compiled."""
    try:
        for lengths in batches:
            check(row, tiles, lengths)
    except FAILURES as err:
        return why(err)


def clock(case, backward):
    """Milliseconds of the kernels of the forward or of the backward pass."""
    qkv, _, _, dout = case
    if backward:
        out = attend(case)
        run = functools.partial(torch.autograd.grad, out, qkv, dout, retain_graph=True)
    else:
        run = functools.partial(attend, case)
    kernel_times(run, 2)
    return kernel_times(run, 1 if TOY else 20).total()


class Tuner:
    """One row of the table: its tiles so far, and the log of what was tried."""

    def __init__(self, row, args, log, pool):
        self.row, self.args, self.log = row, args, log
        self.tiles, names = dict(ours.TILES[row]), args.kernels
        self.choices = {x: candidates(x, row, self.tiles[x]) for x in ACCUMULATORS if x in names}
        # Lengths whose sum is divisible by 16, as that of the batches that are timed: for others
        # Triton would compile once more.
        batch = [args.seqlen // 2 + 1, 15]
        jobs = {(name, x): [batch] for name, tiles in self.choices.items() for x in tiles}
        if "block" in names:
            jobs["block", TWO_PASS] = []
            for block, tiles in blocks(row).items():
                short = [block, block - 1, 1]
                jobs |= {("block", x): [short] for x in tiles}
                jobs["block", TWO_PASS].append(short)
        waiting = {
            (name, tile): pool.submit(judge, row, self.tiles_with(name, tile), batches)
            for (name, tile), batches in jobs.items()
        }
        self.left_out = {key: future.result() for key, future in waiting.items()}

    def tiles_with(self, direction, tile):
        """The present tiles but for one; no row is short enough for the one-block backward."""
        return self.tiles | {"block": TWO_PASS, direction: tile}

    def attempt(self, direction, tile, seqlen):
        """Milliseconds with `tile` in place of the present one, inf if it is no good."""
        figures = {"row": self.row, "kernel": direction, "tile": tile, "seqlen": seqlen}
        if reason := self.left_out[direction, tile]:
            self.log(figures | {"left_out": reason})
            return float("inf")
        use(self.tiles_with(direction, tile))
        lengths = [seqlen] * max(1, self.args.tokens // seqlen)
        case = make_case(self.row, lengths, self.args.heads)
        figures["ms"] = clock(case, backward=direction != "forward")
        self.log(figures)
        return figures["ms"]

    def stream(self, direction):
        """The fastest tile of a kernel that streams tokens."""
        times = {
            tile: self.attempt(direction, tile, self.args.seqlen)
            for tile in self.choices[direction]
        }
        self.tiles[direction] = min(times, key=times.get)

    def block(self):
        """The longest row at which one program per sequence beats the two-pass kernels."""
        for block, tiles in blocks(self.row).items():
            two_pass = self.attempt("block", TWO_PASS, block)
            times = {tile: self.attempt("block", tile, block) for tile in tiles}
            self.tiles["block"] = min(times, key=times.get)
            if times[self.tiles["block"]] < two_pass:
                break

    def tune(self):
        for direction in self.choices:
            self.stream(direction)
        if "block" in self.args.kernels:
            self.block()
        return f"    {self.row}: {tuple(tuple(tile) for tile in self.tiles.values())},"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{head_dim}-{itemsize}" for itemsize in BLOCKS for head_dim in (64, 128)]
    parser.add_argument("--rows", nargs="+", choices=names, default=names[:1] if TOY else names)
    parser.add_argument("--kernels", nargs="+", choices=ours.KERNELS, default=ours.KERNELS)
    parser.add_argument("--seqlen", type=int, default=64 if TOY else 2048)
    parser.add_argument("--tokens", type=int, default=64 if TOY else 65_536)
    parser.add_argument("--heads", type=int, default=1 if TOY else 12)
    parser.add_argument("--processes", type=int, default=2 if TOY else usable_cores())
    parser.add_argument("--output", default=record_file("tune"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    require_device()
    sm = ours.UNKNOWN_SM
    if not TOY:
        major, minor = torch.cuda.get_device_capability()
        sm = ours.SM_OF_CAPABILITY.get(10 * major + minor, sm)
    log, lines = recorder(args.output, "triton"), []
    # Not forked: a process that has used the GPU cannot be.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for name in args.rows:
            lines.append(Tuner((sm, *map(int, name.split("-"))), args, log, pool).tune())
    print("\n".join(lines))


if __name__ == "__main__":
    with empty_caches():
        main()
