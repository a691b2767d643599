# SPDX-License-Identifier: Apache-2.0
"""The flat folder as the package `mosaic_bert`, no network, and caches of its own for each test
session."""

import os
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"

# Read when transformers is imported, and inherited by the processes that tests start.
caches = tempfile.TemporaryDirectory()
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HOME=caches.name, HF_MODULES_CACHE=f"{caches.name}/modules"
)

import torch  # noqa: E402

# Read when the kernels are defined: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Two threads wait for each other on a machine that others use too; tests are small.
torch.set_num_threads(1)

package = types.ModuleType("mosaic_bert")
package.__path__ = [str(ROOT)]
sys.modules["mosaic_bert"] = package

import hashlib  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same cases in every run, so that a red test is a fault of the change. `make fuzz` draws others
# and 20 times as many. A case may be slow to draw on a busy machine.
settings.register_profile(
    "suite",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz", settings.get_profile("suite"), max_examples=2000, derandomize=False
)
settings.load_profile("suite")

# Helpers with assertions of their own.
pytest.register_assert_rewrite("embeddings", "finetuning", "hub", "training")

from safetensors.torch import load_file  # noqa: E402

from mosaic_bert.bert_layers import triton_varlen_attention  # noqa: E402

# Where each attention backend runs. On a CPU, triton is its interpreter, which a machine with a GPU
# does not use.
HAS_TRITON = triton_varlen_attention is not None
CPU_BACKENDS = ["eager", "sdpa"] + ["triton"] * (HAS_TRITON and not torch.cuda.is_available())
PLACES = [pytest.param(backend, "cpu", id=f"{backend}-cpu") for backend in CPU_BACKENDS] + [
    pytest.param(backend, "cuda", id=f"{backend}-cuda", marks=pytest.mark.gpu)
    for backend in ("eager", "sdpa", "triton")
]
on_every_backend = pytest.mark.parametrize("backend, device", PLACES)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
# docs/compatibility.md has what older ones lack.
needs_compile = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch.compile: from torch 2.11 on"
)
needs_export = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch.export: from torch 2.7 on"
)

MODEL_FILES = ("configuration_bert.py", "bert_layers.py", "bert_padding.py", "flash_attn_triton.py")


def load_golden(name):
    """Config, weights and recorded outputs of a golden checkpoint; mosaic_tiny's weights include
    pooler and classifier."""
    folder = GOLDENS / name
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    if (folder / "classification_head.safetensors").exists():
        weights |= load_file(folder / "classification_head.safetensors")
    return (
        json.loads((folder / "config.json").read_text()),
        weights,
        load_file(folder / "golden.safetensors"),
    )


def to(device, tensors):
    """A dict of tensors, on another device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def published_folder(folder, name="mosaic_tiny"):
    """A published checkpoint as it is, config.json included, with our .py files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (
        GOLDENS / name / "config.json",
        GOLDENS / name / "pytorch_model.bin",
        *(ROOT / x for x in MODEL_FILES),
    ):
        shutil.copy(file, folder)
    return folder


def run_python(code, *args, **environment):
    """Runs code in a new process, with a module cache of its own, and returns what it printed."""
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env={**os.environ, "HF_MODULES_CACHE": modules, **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def restore_environment():
    """transformers 4.57 leaves a run's precision in the environment, for all that come after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def environment_of_a_module():
    """For what a module's fixtures run before its first test begins."""
    yield from restore_environment()


@pytest.fixture(autouse=True)
def environment_of_a_test():
    # Fixtures of the whole session leave it too.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    yield from restore_environment()


@pytest.fixture(autouse=True, scope="session")
def goldens_stay_as_recorded():
    """Before and after all tests: one that wrote to them would hide faults."""
    check_goldens()
    yield
    check_goldens()


def check_goldens(folder=GOLDENS):
    """AssertionError unless the folder's files are those of its SHA256SUMS."""
    sums = (line.split() for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = [x for x in folder.rglob("*") if x.is_file() and x.name != "SHA256SUMS"]
    found = {
        f"./{x.relative_to(folder).as_posix()}": hashlib.sha256(x.read_bytes()).hexdigest()
        for x in files
    }
    assert found == {name: digest for digest, name in sums}


@pytest.fixture(scope="session")
def mosaic(tmp_path_factory):
    """Folder of the published tiny MosaicBERT with our code."""
    return published_folder(tmp_path_factory.mktemp("published") / "mosaic_tiny")


# What involves no transformers: with older ones `make test` leaves it out by -m "not once". These
# are whole files; a single test has @pytest.mark.once.
ONCE = ("aot", "benchmark_figures", "documented_commands", "examples", "flash_attn_triton")
ONCE += ("quantized", "readme")


# First, since pytest chooses by marks in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.stem.removeprefix("test_") in ONCE:
            item.add_marker("once")
        for mark in ("slow", "soak"):
            if mark in item.keywords and mark not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"takes long: choose it with -m {mark}"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
