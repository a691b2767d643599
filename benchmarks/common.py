# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: batches, the correctness gate, clocks, and where figures come from."""

import os
import sys
import tempfile
import time

from records import RESULTS, ROOT, provenance

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOY = "--toy" in sys.argv
if TOY:
    # Read when the kernels are defined, so it is set before they are imported.
    os.environ["TRITON_INTERPRET"] = "1"
# What an earlier run compiled would hide the cost of a first call.
caches = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = f"{caches.name}/triton"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{caches.name}/inductor"

import torch  # noqa: E402
import triton  # noqa: E402
from reference import alibi_attention, assert_as_close  # noqa: E402

import flash_attn_triton as ours  # noqa: E402

DEVICE = "cpu" if TOY else "cuda"
if TOY:
    ours.SKIP_FROM = 16


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
    times = []
    for _ in range(3):
        began = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - began))
    return torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def first_call(function):
    """What `function` returns, and the milliseconds until the device has it."""
    synchronize = (lambda: None) if TOY else torch.cuda.synchronize
    synchronize()
    began = time.perf_counter()
    result = function()
    synchronize()
    return result, 1e3 * (time.perf_counter() - began)


def peak_bytes(function):
    """What `function` allocates at most beyond what is there before, None on a CPU."""
    if TOY:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment():
    """Device, versions, commit and date, for every row of figures."""
    device = "CPU, interpreter" if TOY else torch.cuda.get_device_name()
    return {"device": device, **provenance("torch", "triton")}


def record_file(name):
    """Where a script's figures go: the records, or nowhere for a toy run."""
    return os.devnull if TOY else str(RESULTS / f"{name}.jsonl")
