# SPDX-License-Identifier: Apache-2.0
"""What only long runs show, by `make soak`; each test prints its figures.

- Memory stays flat over 2,000 training steps, compiled and not, and 5,000 calls of a model on each
  backend and compiled, shapes changing; no file, thread or child process is left, and no graph
  compiled anew.
- Eight threads that call one model at once get the results of one.
- A run whose DataLoader workers are killed at random says so, and goes on to the same curve.
- A run that is killed at 20 random moments ends with the same losses and weights, to the bit.

About 20 minutes on two cores that others use too.
"""

import ctypes
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import platform
import random
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from models import HEADS, VOCAB, make, make_labels
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from training import DOCUMENTS, RESUME, ROOT, RUN, arguments, flags, losses, read_log, train_here
from transformers import TrainerCallback

import train_mlm
from mosaic_bert.bert_layers import BertForMaskedLM, BertForMultipleChoice, BertModel
from mosaic_bert.bert_padding import pack_batch
from mosaic_tools import mlm_trainer

pytestmark = pytest.mark.soak


# ---- what a process holds ----


class MallInfo2(ctypes.Structure):
    """glibc's, in bytes; `uordblks` are in use on the heap, `hblkhd` in mappings of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")
        + ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def malloc_in_use() -> int:
    """Bytes that the C library has handed out: torch's tensors, graphs and caches. Unlike RSS it
    leaves out what was freed in pieces too small for what is asked for next."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


class Held:
    """What this process holds, sample by sample."""

    def __init__(self):
        self.samples = []
        self.process = psutil.Process()
        # What is there already, modules above all, is not looked through each time.
        gc.collect()
        gc.freeze()

    def sample(self, step: int):
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in objects)
        del objects
        self.samples.append(
            {
                "step": step,
                "malloc": malloc_in_use(),
                # Python's own objects of up to 512 bytes, which are not of malloc.
                "objects": sys.getallocatedblocks(),
                "tensors": tensors,
                "rss": self.process.memory_info().rss,
                **self.outside(),
            }
        )

    def outside(self) -> dict[str, int]:
        """What would outlive the objects of a run: open files, threads, child processes."""
        return {
            "files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "python threads": threading.active_count(),
            "children": len(self.process.children(recursive=True)),
        }

    def slope(self, name: str) -> float:
        """By least squares over the later half, a step."""
        later = self.samples[len(self.samples) // 2 :]
        steps, values = zip(*((x["step"], x[name]) for x in later), strict=True)
        return float(np.polyfit(steps, values, 1)[0])

    def check(self, what: str):
        """Prints the figures, and asserts that nothing grows.

        The bounds are less than a thing a step: a tensor that is kept takes more than 128 bytes,
        however small. 128 bytes would be 9 MB in the 70,000 steps of the published recipe. What is
        logged is kept, every 200 steps.
        """
        gc.unfreeze()
        first, last = self.samples[len(self.samples) // 2], self.samples[-1]
        slopes = {name: self.slope(name) for name in ("malloc", "objects", "tensors", "rss")}
        print(
            f"\n{what}: {slopes['malloc']:+.1f} bytes of malloc, {slopes['objects']:+.3f} Python "
            f"objects a step from step {first['step']} to {last['step']}; {last['tensors']} live "
            f"tensors, {last['files']} files, {last['threads']} threads, {last['children']} "
            f"children; in use {last['malloc'] / 2**20:.0f} MiB, RSS {first['rss'] / 2**20:.0f} "
            f"to {last['rss'] / 2**20:.0f} MiB ({slopes['rss']:+.0f} bytes a step)"
        )
        assert len(self.samples) >= 20
        assert slopes["malloc"] < 128 and slopes["objects"] < 1
        for name in ("tensors", *self.outside()):
            assert first[name] == last[name], name


# oneDNN keeps what it compiled for the last 1,024 shapes, about 30 kB each, which would pass for a
# leak until they are that many. It is told before it is first used.
measured = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") != "0",
    reason="needs glibc, which says what is in use, and ONEDNN_PRIMITIVE_CACHE_CAPACITY=0",
)


# ---- memory, files, threads, graphs ----


def ragged_documents(count: int, words: int) -> list[str]:
    generator = random.Random(0)
    known = " ".join(DOCUMENTS).split()
    return [" ".join(generator.choices(known, k=generator.randint(1, words))) for _ in range(count)]


@measured
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_training_for_2000_steps_holds_what_it_held(tmp_path, monkeypatch, compiled):
    """With loader workers, which come and go, saves and evaluations."""
    steps, every, graphs, held = 2000, 40, [], Held()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0:
                held.sample(state.global_step)
                graphs.append(counters["stats"]["unique_graphs"])

    class Watched(mlm_trainer.MlmTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.add_callback(Watch())

    monkeypatch.setattr(train_mlm, "MlmTrainer", Watched)
    (tmp_path / "text.txt").write_text("\n".join(ragged_documents(1000, 60)))
    values = {"train_file": tmp_path / "text.txt", "max_seq_length": 64, "logging_steps": 200}
    values |= {"save_steps": 200, "save_total_limit": 2, "eval_strategy": "steps"}
    values |= {
        "global_batch_size": 8,
        "eval_steps": 200,
        "dataloader_num_workers": 2,
        "disable_tqdm": True,
    }
    if compiled:
        values |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    torch._dynamo.reset()
    counters.clear()
    outside = []
    # What the first run of a process loads stays.
    for name, length in (("first", 10), ("long", steps)):
        held.samples.clear()
        own = {"max_steps": length, "output_dir": tmp_path / name}
        monkeypatch.setattr(
            sys, "argv", [str(x) for x in ["train_mlm.py", *flags(**RUN | values | own)]]
        )
        train_mlm.main()
        gc.collect()
        outside.append(held.outside())
    assert len(held.samples) == steps // every
    held.check("training, compiled" if compiled else "training")
    assert outside[0] == outside[1]
    print(f"graphs after step 400 and {steps}: {graphs[9]}, {graphs[-1]}")
    assert graphs[9] == graphs[-1] and bool(graphs[-1]) == compiled


# What one compiled model is asked for in turn.
COMPILED_KINDS = ("plain", "padded", "packed")
KINDS = ("plain", "padded", "holes", "packed", "before", "flattened")


def draw_inputs(generator: random.Random, kind: str, least=1) -> dict:
    """Inputs of `least` to 6 rows and up to 48 columns, their sequences described in one of the
    ways that the model knows."""
    shape = generator.randint(least, 6), generator.randint(least, 48)
    random_of_torch = torch.Generator().manual_seed(generator.getrandbits(40))
    ids = torch.randint(0, VOCAB, shape, generator=random_of_torch)
    lengths = torch.tensor([generator.randint(least - 1, shape[1]) for _ in range(shape[0])])
    mask = torch.arange(shape[1]) < lengths[:, None]
    if kind == "plain":
        return {"input_ids": ids}
    if kind == "padded":
        return {"input_ids": ids, "attention_mask": mask.long()}
    if kind == "holes":
        mask = torch.rand(shape, generator=random_of_torch) < 0.7
        return {"input_ids": ids, "attention_mask": mask.long()}
    if kind == "before":
        return {"input_ids": ids, "batch": pack_batch(ids, mask)}
    cut = generator.randint(1, shape[1])
    if kind == "packed":
        positions = torch.cat([torch.arange(cut), torch.arange(shape[1] - cut)])
        return {"input_ids": ids, "position_ids": positions.expand(shape), "attention_mask": mask}
    bounds = torch.tensor([0, cut, shape[1]]).unique().int()
    return {"input_ids": ids[:1], "cu_seq_lens_q": bounds}


def call(model, inputs: dict, labels=False):
    """All tensors of the outputs."""
    if isinstance(model, BertForMultipleChoice):
        inputs = {name: x[None] for name, x in inputs.items()}
    if labels:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).long()
        inputs = inputs | {"labels": make_labels(inputs | {"attention_mask": mask})}
    return [x for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor)]


@measured
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_5000_calls_of_changing_shapes_hold_what_was_held(backend):
    generator, held = random.Random(1), Held()
    models = [make(cls, backend) for cls in (BertModel, *HEADS, BertForMultipleChoice)]
    for i in range(1, 5001):
        model, kind = generator.choice(models), generator.choice(KINDS)
        # A head keeps its tokens apart only where it says so.
        if type(model) in (BertForMultipleChoice, *HEADS[1:]) and kind in ("before", "flattened"):
            kind = "padded"
        with torch.inference_mode(generator.random() < 0.5):
            outputs = call(
                model, draw_inputs(generator, kind), type(model) is BertForMaskedLM and i % 2
            )
        assert all(x.isfinite().all() for x in outputs)
        del outputs
        if i % 100 == 0:
            held.sample(i)
    held.check(f"inference, {backend}")


@measured
def test_5000_calls_of_a_compiled_model_compile_nothing_after_the_first_500():
    """Two rows, columns and tokens at least: torch makes a graph of its own for each size of 1."""
    generator, held, graphs = random.Random(2), Held(), []
    torch._dynamo.reset()
    counters.clear()
    model = make(BertModel)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for i in range(1, 5001):
            inputs = draw_inputs(generator, COMPILED_KINDS[i % 3], least=2)
            outputs = compiled(**inputs)
            if i % 100 == 0:
                assert torch.allclose(outputs[0], model(**inputs)[0], atol=1e-5)
                graphs.append(counters["stats"]["unique_graphs"])
                held.sample(i)
    print(f"\ngraphs after 100, 500, 5,000 calls: {graphs[0]}, {graphs[4]}, {graphs[-1]}")
    assert 0 < graphs[4] == graphs[-1]
    held.check("inference, compiled")


# ---- threads ----


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "compiled"])
def test_eight_threads_get_the_results_of_one(backend, autocast):
    """Each calls the same model on 100 batches in an order of its own, and takes the gradients of
    one in five."""
    generator = random.Random(3)
    model = make(BertForMaskedLM, None if backend == "compiled" else backend)
    parameters = list(model.parameters())
    kinds = KINDS
    if backend == "compiled":
        torch._dynamo.reset()
        model, kinds = torch.compile(model, dynamic=True, backend="aot_eager"), COMPILED_KINDS
    least = 2 if backend == "compiled" else 1
    batches = [draw_inputs(generator, kinds[i % len(kinds)], least) for i in range(100)]

    def result(i):
        gradients = i % 5 == 0 and backend != "compiled"
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=autocast):
            outputs = call(model, batches[i])
        if gradients:
            outputs += torch.autograd.grad(outputs[0].float().square().sum(), parameters[:4])
        return outputs

    expected = [result(i) for i in range(len(batches))]
    barrier = threading.Barrier(8)

    def work(seed):
        order = random.Random(seed).sample(range(len(batches)), len(batches))
        barrier.wait()
        for i in order:
            got = result(i)
            assert len(got) == len(expected[i])
            assert all(map(torch.equal, got, expected[i])), (seed, i)
        return len(order)

    with ThreadPoolExecutor(8) as pool:
        calls = list(pool.map(work, range(8)))
    print(f"\n{backend}: {sum(calls)} calls by 8 threads, all as by one, to the bit")


# ---- kills ----

# A run of its own length in each process: 60 steps, 15 saves, 3 evaluations.
KILLED = {"max_steps": 60, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 20}


@pytest.fixture(scope="module")
def begin():
    """Begins train_mlm.py in a process of its own, in a folder, by these words. The processes are
    forked from one that has imported torch and transformers, which takes longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_mlm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def begin(folder, *words):
        folder.mkdir(exist_ok=True)
        (folder / "said.txt").write_text("")
        process = context.Process(target=train_here, args=(folder, words))
        process.start()
        return process

    return begin


def end(process, folder) -> str:
    """What a run said, once it has ended by itself. The limit tells a hang, not a speed."""
    process.join(600)
    assert process.exitcode is not None, "it hangs"
    return (folder / "said.txt").read_text()


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """A folder with the text, the tokenizer, an uninterrupted run, and its seconds."""
    cwd = tmp_path_factory.mktemp("whole")
    (cwd / "text.txt").write_text("\n".join(ragged_documents(400, 14)))
    words = [ROOT / "train_mlm.py", *flags(**RUN | KILLED)]
    # The first process waits for the import.
    for name in ("first", "out"):
        since = time.monotonic()
        said = end(process := begin(cwd, *words, "--output_dir", name), cwd)
        assert process.exitcode == 0, said
        (cwd / "seconds").write_text(str(time.monotonic() - since))
    same_as_whole(cwd / "first", cwd)
    return cwd


def same_as_whole(folder, whole):
    """The curves, in training and evaluation, and the weights, to the bit."""
    expected = whole / "out"
    assert losses(folder) == losses(expected) and len(losses(folder)) == KILLED["max_steps"]
    held_out, there = (
        {x["step"]: x["eval_loss"] for x in read_log(place) if "eval_loss" in x}
        for place in (folder, expected)
    )
    assert held_out == there and len(there) == KILLED["max_steps"] // KILLED["eval_steps"]
    weights, there = (load_file(x / "model.safetensors") for x in (folder, expected))
    assert weights.keys() == there.keys() and weights
    assert all(torch.equal(weights[name], there[name]) for name in there)


def resumed_from(said: str) -> str:
    found = re.search("^resuming from (?:out/)?([^:\n]*)", said, re.MULTILINE)
    return found[1] if found else "(not said yet)"


def logged(folder) -> int:
    log = folder / "out" / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_killed_at_20_random_moments_the_curve_is_the_same_to_the_bit(whole, begin, tmp_path):
    """The moments are uniform over the time of a whole run, from its start to its card. What
    follows a kill is the same command with --resume_from_checkpoint last, which may be killed in
    its turn; each run that comes to its end is compared, and the next begins anew."""
    generator, seconds = random.Random(5), float((whole / "seconds").read_text())
    words, kills, ends = [*arguments(whole, **KILLED), *RESUME], 0, 0
    print(f"\na whole run takes {seconds:.1f} s")
    while kills < 20 or (tmp_path / str(ends)).exists():
        folder, since = tmp_path / str(ends), time.monotonic()
        process = begin(folder, *words)
        if kills < 20:
            moment = generator.uniform(0, seconds)
            process.join(moment)
            process.kill()
        said = end(process, folder)
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            print(
                f"kill {kills}, of run {ends} after {moment:.2f} s: resumed from "
                f"{resumed_from(said)}, {logged(folder)} lines in the log"
            )
            continue
        assert process.exitcode == 0, said
        same_as_whole(folder / "out", whole)
        if "resuming from the start" in said:
            # Of late, as others may use the machine too.
            seconds = time.monotonic() - since
        print(f"run {ends} ended as the whole one, resumed from {resumed_from(said)}")
        ends += 1
    print(f"{kills} kills, {ends} runs, all as the whole one to the bit")


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_killed_workers_are_reported_and_nothing_is_lost(whole, begin, tmp_path, streaming):
    """The run ends, and its error says what is intact and how to go on."""
    generator, kills = random.Random(6), 0
    words = arguments(whole, **KILLED | {"dataloader_num_workers": 2})
    folder, expected = tmp_path / "killed", whole
    if streaming:
        # A stream's order is its own.
        expected = tmp_path / "unbroken"
        documents = (whole / "text.txt").read_text().splitlines()
        for i in range(2):
            (tmp_path / f"{i}.txt").write_text("\n".join(documents[i::2]))
        words += ["--streaming", "--train_file", tmp_path / "?.txt"]
        said = end(process := begin(expected, *words), expected)
        assert process.exitcode == 0, said
    while True:
        process, workers = begin(folder, *words, *RESUME), []
        step = generator.randint(logged(folder), KILLED["max_steps"])
        while kills < 4 and process.is_alive() and not workers:
            if logged(folder) >= step:
                workers = psutil.Process(process.pid).children()
            time.sleep(1e-3)
        if workers:
            generator.choice(workers).kill()
        said = end(process, folder)
        if process.exitcode == 0:
            break
        kills += 1
        _, _, error = said.rpartition("RuntimeError: a process that loads rows died")
        assert "--resume_from_checkpoint last" in error, (process.exitcode, said)
        print(f"\nkill {kills}, resumed from {resumed_from(said)}: {error.splitlines()[0][:150]}")
    same_as_whole(folder / "out", expected)
    assert kills
    print(f"{kills} workers killed, the curve is the unbroken one's to the bit")
