# SPDX-License-Identifier: Apache-2.0
"""Which tile shapes are fastest on this GPU?

Method: for every row of the table (head_dim 64 and 128; 2 and 4 bytes) and every kernel, candidates
replace the table's tile, the other kernels keeping theirs. One that does not fit in shared memory
or fails the tests' error rule is left out; the rest are timed with ALiBi on sequences of --seqlen
tokens, every tile visited, by the median of triton.testing.do_bench. The one-block backward gets
the longest row at which it beats the two-pass kernels on full rows. Dropout is not timed:
afterwards ask resources.py for 0 spills in all variants.

    python benchmarks/kernel/tune.py              # this chip's four rows
    python benchmarks/kernel/tune.py --rows 64-2  # head_dim 64, 2 bytes per element
    python benchmarks/kernel/tune.py --toy        # proves the script, on a CPU

Output: a JSON line per candidate, appended to --output too, then the rows to paste into TILES.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernel.common import (
    assert_correct,
    cu_seqlens_of,
    empty_caches,
    milliseconds,
    ours,
    require_device,
    slopes_of,
)  # fmt: skip
from benchmarks.records import recorder
from benchmarks.speed.clocks import DEVICE, TOY, record_file

DTYPES = {2: torch.float16 if TOY else torch.bfloat16, 4: torch.float32}
# Accumulators of (owned tokens, head_dim) that a kernel keeps in registers.
ACCUMULATORS = {"forward": 1, "dq": 1, "dkdv": 2}
REGISTERS = 255
# A one-block backward shorter than any row sends all rows to the two-pass kernels.
TWO_PASS = (0, 0, 4, 1)
# A toy must still have all kernels and a choice between two tiles.
BLOCKS_M, BLOCKS_N = ((32, 64), (32,)) if TOY else ((16, 32, 64, 128), (16, 32, 64, 128))
WARPS, STAGES = ((4,), (2,)) if TOY else ((4, 8), (1, 2, 3, 4))


def candidates(direction, head_dim, table_tile):
    """The table's own tile, then all whose accumulators and scores alone fit in registers."""
    yield table_tile
    for tile in itertools.product(BLOCKS_M, BLOCKS_N, WARPS, STAGES):
        block_m, block_n, warps, _ = tile
        owned = block_n if direction == "dkdv" else block_m
        values = owned * ACCUMULATORS[direction] * head_dim + 2 * block_m * block_n
        if values <= REGISTERS * 32 * warps and tile != table_tile:
            yield tile


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


def check(row, lengths):
    """Raise AssertionError unless output and gradients are right."""
    case = qkv, (cu_seqlens, _), options, dout = make_case(row, lengths, 2)
    out = attend(case)
    grad = torch.autograd.grad(out, qkv, dout)[0]
    slopes = options["alibi_slopes"]
    assert_correct(out.detach(), grad, qkv, dout, cu_seqlens, slopes)


def clock(case, backward):
    """Median milliseconds of the forward or of the backward pass."""
    qkv, _, _, dout = case
    if not backward:
        with torch.no_grad():
            return milliseconds(lambda: attend(case))
    out = attend(case)
    return milliseconds(lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True))


class Tuner:
    """One row of the table: its tiles so far, and the log of what was tried."""

    def __init__(self, row, args, log):
        self.row, self.args, self.log = row, args, log
        self.tiles = dict(ours.TILES[row])
        # Takes the table's place, so that the kernels themselves stay as they are.
        ours.tile_shape = lambda qkv, direction: self.tiles[direction]

    def batch(self, seqlen):
        lengths = [seqlen] * max(1, self.args.tokens // seqlen)
        return make_case(self.row, lengths, self.args.heads)

    def attempt(self, direction, tile, seqlen, checked):
        """Median milliseconds with `tile` in place of the present one, inf if it is no good."""
        before, self.tiles[direction] = self.tiles[direction], tile
        times, reason = [float("inf")] * 3, None
        try:
            check(self.row, checked)
            times = clock(self.batch(seqlen), backward=direction != "forward")
        except OutOfResources as err:
            reason = str(err)
        except AssertionError as err:
            reason = f"wrong: {err}"
        finally:
            self.tiles[direction] = before
        figures = dict(zip(("ms", "p20", "p80"), times, strict=True)) if reason is None else {}
        figures = {"row": self.row, "kernel": direction, "tile": tile, "seqlen": seqlen} | figures
        self.log(figures | ({"left_out": reason} if reason else {}))
        return times[0]

    def stream(self, direction):
        """The fastest tile of a kernel that streams tokens."""
        times = {
            tile: self.attempt(direction, tile, self.args.seqlen, [self.args.seqlen // 2 + 1, 1])
            for tile in candidates(direction, self.row[1], self.tiles[direction])
        }
        self.tiles[direction] = min(times, key=times.get)

    def block(self):
        """The longest row at which one program per sequence beats the two-pass kernels."""
        for block in sorted(BLOCKS_M, reverse=True):
            two_pass = self.attempt("block", TWO_PASS, block, [block, 1])
            times = {
                tile: self.attempt("block", tile, block, [block, 1])
                for tile in ((block, block, warps, 1) for warps in WARPS)
            }
            self.tiles["block"] = min(times, key=times.get)
            if times[self.tiles["block"]] < two_pass:
                break

    def tune(self):
        self.tiles["block"] = TWO_PASS
        for direction in ACCUMULATORS:
            self.stream(direction)
        self.block()
        return f"    {self.row}: {tuple(tuple(tile) for tile in self.tiles.values())},"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{head_dim}-{itemsize}" for itemsize in DTYPES for head_dim in (64, 128)]
    parser.add_argument("--rows", nargs="+", choices=names, default=names[:1] if TOY else names)
    parser.add_argument("--seqlen", type=int, default=64 if TOY else 2048)
    parser.add_argument("--tokens", type=int, default=64 if TOY else 65_536)
    parser.add_argument("--heads", type=int, default=1 if TOY else 12)
    parser.add_argument("--output", default=record_file("tune"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    require_device()
    sm = ours.UNKNOWN_SM
    if not TOY:
        major, minor = torch.cuda.get_device_capability()
        sm = ours.SM_OF_CAPABILITY.get(10 * major + minor, sm)
    log, lines = recorder(args.output, "triton"), []
    for name in args.rows:
        lines.append(Tuner((sm, *map(int, name.split("-"))), args, log).tune())
    print("\n".join(lines))


if __name__ == "__main__":
    with empty_caches():
        main()
