# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the kernel share: batches, the correctness gate, empty caches."""

import contextlib
import os
import sys
import tempfile

import torch
import triton

import flash_attn_triton as ours
from benchmarks.records import ROOT
from benchmarks.speed.clocks import DEVICE, TOY, interleaved

sys.path.append(str(ROOT / "tests"))
from reference import alibi_attention, assert_as_close

if TOY:
    ours.SKIP_ABOVE = 16


def require_device():
    """SystemExit without a device that the kernels are compiled for, unless this is a toy."""
    if DEVICE == "cpu" and not TOY:
        raise SystemExit("the kernel needs a CUDA device; --toy proves the script without one")


@contextlib.contextmanager
def empty_caches():
    """Compilers begin with nothing: what an earlier run compiled would hide a first call's cost."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        yield


def cu_seqlens_of(lengths):
    """(batch + 1,) int32"""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def slopes_of(heads):
    """ALiBi's slopes where heads are a power of two, and slopes of that range otherwise."""
    return 2.0 ** (-8 * torch.arange(1, heads + 1, device=DEVICE) / heads)


def assert_correct(out, grad, qkv, dout, cu_seqlens, slopes):
    """The tests' error rule for a forward and a backward pass, all tensors being (total, ...)."""
    expected = []
    for dtype in (qkv.dtype, torch.float64):
        leaf = qkv.detach().to(dtype).requires_grad_()
        result, _ = alibi_attention(leaf, cu_seqlens, slopes, dtype=dtype)
        result.backward(dout.to(dtype))
        expected.append((result.detach(), leaf.grad))
    (plain_out, plain_grad), (oracle_out, oracle_grad) = expected
    assert_as_close(out, plain_out, oracle_out, 2)
    assert_as_close(grad, plain_grad, oracle_grad, 3)


def milliseconds(function):
    """Median, 20 and 80 % quantile."""
    if not TOY:
        return triton.testing.do_bench(function, quantiles=(0.5, 0.2, 0.8))
    return interleaved({"": function}, rounds=3)[""]
