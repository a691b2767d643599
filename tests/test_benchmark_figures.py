# SPDX-License-Identifier: Apache-2.0
"""The figures that benchmarks write are counted right: with a clock that only what is timed moves
on, each is known beforehand."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernel import attention
from benchmarks.learning import learning, side_by_side
from benchmarks.speed import (
    clocks,
    compare,
    data,
    encoders,
    inference,
    memory,
    pretraining,
    profile_step,
    sentence_embeddings,
)


class FakeClock:
    """In place of the module time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = process_time = perf_counter

    def takes(self, seconds, result=None):
        """A function that takes so long."""

        def function(*_, **__):
            self.now += seconds
            return result

        return function


@pytest.fixture
def fake_clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(clocks, "time", clock)
    return clock


def fake_encoder(clock, seconds, flop):
    function = clock.takes(seconds, torch.zeros(1))
    return SimpleNamespace(function=lambda rows: function, flop=lambda rows: flop)


def run_script(module, monkeypatch, tmp_path, *words):
    """The records that the script writes."""
    file = tmp_path / "records.jsonl"
    monkeypatch.setattr(sys, "argv", [module.__file__, *words, "--output", str(file)])
    module.main()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("module, task", [(pretraining, "step"), (inference, "embeddings")])
def test_a_script_writes_milliseconds_rates_and_ratios(
    module, task, fake_clock, monkeypatch, tmp_path
):
    """A ratio upside down and tokens per second off 143 times stayed unnoticed."""
    # MosaicBERT compiled is the faster of ours: 0.25 s; 0.02 TFLOP are 80 % of 0.1 TFLOP/s.
    seconds = {"mosaic": 0.5, "mosaic-compiled": 0.25, "bert": 1.0, "modernbert": 0.125}
    encoders_ = {name: fake_encoder(fake_clock, x, flop=2e10) for name, x in seconds.items()}
    monkeypatch.setattr(compare, "build", lambda *_: encoders_)
    monkeypatch.setattr(compare, "ceilings", lambda dtype: {"matmul_tflops": 0.1})
    for place in (module, compare, clocks):
        monkeypatch.setattr(place, "DEVICE", "cpu")
    words = ["--tasks", task, "--dtypes", "float32", "--minutes", "1000"]
    rows = run_script(module, monkeypatch, tmp_path, *words, "--settings", *seconds)
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    # 8 x 128, half padding: 512 tokens; and full: 1,024.
    assert {512, 1024} <= {row["tokens"] for row in rows}
    for batch in batches:
        tokens = batch[0]["tokens"]
        found = {row["setting"]: row for row in batch}
        assert found.keys() == seconds.keys()
        for name, x in seconds.items():
            expected = {
                "ms": 1000 * x, "p20": 1000 * x, "p80": 1000 * x, "first_ms": 1000 * x,
                "tokens_per_s": tokens / x, "ratio": x / 0.25, "mfu": 0.02 / x / 0.1,
            }  # fmt: skip
            assert {key: found[name][key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_training_script_projects_the_recipe_from_its_own_rows(fake_clock, monkeypatch, tmp_path):
    encoder = fake_encoder(fake_clock, 0.5, flop=1.0)
    monkeypatch.setattr(compare, "build", lambda *_: {"mosaic": encoder})
    monkeypatch.setattr(compare, "ceilings", lambda dtype: {"matmul_tflops": 1.0})
    monkeypatch.setattr(compare, "DEVICE", "cpu")
    # Only there is the recipe projected.
    monkeypatch.setattr(pretraining, "DEVICE", "cuda")
    words = ["--seqlens", "128", "--tokens", "2048", "--settings", "mosaic", "--dtypes", "float32"]
    words += ["--steps", "1000", "--global_batch", "64", "--gpus", "4", "--price", "3"]
    c4, full = run_script(pretraining, monkeypatch, tmp_path, *words)
    # Each of 4 GPUs takes its rows in 0.5 s, whatever their lengths.
    for row, lengths in ((c4, "c4"), (full, "full")):
        assert row["lengths"] == lengths
        hours = 1000 * 64 / (row["rows"] / 0.5 * 4) / 3600
        assert (row["hours"], row["dollars"]) == pytest.approx((hours, hours * 4 * 3))
    assert (full["rows"], full["tokens"]) == (16, 2048)


def test_a_call_is_a_share_of_its_sample(fake_clock):
    """On a GPU three calls are a sample."""
    times = clocks.interleaved({"a": fake_clock.takes(0.25)}, rounds=4, repeats=3)
    assert times == {"a": pytest.approx([250, 250, 250])}


def test_quantiles_are_median_20_and_80_percent():
    assert clocks.quantiles([float(x) for x in range(11)]) == pytest.approx([5, 2, 8])


def test_ceilings_are_rates_of_what_was_computed_and_moved(fake_clock, monkeypatch):
    monkeypatch.setattr(clocks, "TOY", True)

    def in_half_a_second(functions, **_):
        return {name: (500.0, 500.0, 500.0) for name in functions}

    monkeypatch.setattr(clocks, "interleaved", in_half_a_second)
    # 2 x 64^3 FLOP; 2^16 bytes read and as many written.
    expected = {"matmul_tflops": 2 * 64**3 / 0.5 / 1e12, "copy_gbytes_per_s": 2**17 / 0.5 / 1e9}
    assert clocks.ceilings(torch.float32) == pytest.approx(expected)


def test_memory_grows_with_its_slope_and_exponent(fake_clock, monkeypatch):
    """A quadratic part of 3 bytes and a linear one of 100."""
    rows = []
    monkeypatch.setattr(memory, "make_rows", rows.append)

    def warm(encoder, _):
        length = rows[-1][0]
        figures = {"first_ms": 1.0, "peak_bytes": 3 * length**2 + 100 * length}
        return fake_clock.takes(0), figures

    monkeypatch.setattr(memory, "warm", warm)
    args = SimpleNamespace(shortest=512, longest=2048, seconds=1)
    first, _, last = memory.grow(None, False, args, clocks.Deadline(1000))
    assert first.keys().isdisjoint({"bytes_per_token", "exponent"})
    assert (last["seqlen"], last["tokens"]) == (2048, 2048)
    # 3 (2048 + 1024) + 100; log2 of 2 (3 x 2048 + 100) / (3 x 1024 + 100).
    assert last["bytes_per_token"] == 3 * 3072 + 100
    assert 2 ** last["exponent"] == pytest.approx(2 * (3 * 2048 + 100) / (3 * 1024 + 100))
    *_, last = memory.grow(None, True, args, clocks.Deadline(1000))
    assert (last["rows"], last["tokens"]) == (2, 3072)


def test_embeddings_are_counted_in_turn(fake_clock):
    """Rounds of 300, 100 and 200 tokens, ours in half a second; and a fourth that is too late."""
    seconds = iter([0.25, 1.0, 0.5])
    functions = {
        "mosaic": fake_clock.takes(0.5),
        "modernbert": "no such model",
        "bert": lambda: fake_clock.takes(next(seconds))(),
    }
    rows = sentence_embeddings.in_turn(functions, [300, 100, 200, 400], seconds=2)
    found = {row.pop("setting"): row for row in rows}
    assert found["modernbert"] == {"skipped": "no such model"}
    assert found["mosaic"]["tokens_per_s"] == 400 and found["mosaic"]["ratio"] == 1
    expected = {"rounds": 3, "tokens": 600, "seconds": 1.75, "tokens_per_s": 600 / 1.75}
    assert found["bert"] == pytest.approx(expected | {"ratio": 1, "p20": 0.7, "p80": 1.6})


def test_parts_have_the_batches_that_encode_makes_of_all_texts(monkeypatch):
    monkeypatch.setattr(sentence_embeddings, "BATCH", 2)
    monkeypatch.setattr(sentence_embeddings, "PARTS", 3)
    monkeypatch.setattr(sentence_embeddings, "CUT", 10)
    lengths = [7, 3, 12, 9, 5, 11, 4, 8, 6, 10, 13]
    texts = sentence_embeddings.make_texts(lengths)
    assert sentence_embeddings.count_tokens(texts) == sum(min(x, 10) for x in lengths)
    parts = sentence_embeddings.dealt(texts)
    found = [[len(text.split()) + 2 for text in part] for part in parts]
    assert found == [[13, 12, 7, 6], [11, 10, 5, 4], [9, 8, 3]]


def test_embeddings_of_a_model_that_reads_padding_get_no_time(monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(sentence_embeddings, "SMALL", sizes)
    monkeypatch.setattr(sentence_embeddings, "BATCH", 8)
    monkeypatch.setattr(sentence_embeddings, "DEVICE", "cpu")
    embedder = sentence_embeddings.Embedder("mosaic", torch.float32, "encode")
    encoder = embedder.model[0].model
    forward = encoder.forward
    encoder.forward = lambda attention_mask, **inputs: forward(**inputs)
    with pytest.raises(AssertionError, match="off by"):
        embedder.check(encoders.TOLERANCE[torch.float32])


def test_parts_of_a_step_are_shares_of_it_and_the_rest_is_gaps():
    times = profile_step.Counter({"gemm": 3.0, "_forward_kernel": 2.0, "_dq_kernel": 2.0})
    rows = profile_step.table(times, step_ms=9.0, lowest={"matmul": 1.5, "attention": 1.0})
    found = {row["part"]: row for row in rows}
    assert [row["part"] for row in rows[:2]] == ["attention", "matmul"]
    figures = {x: (found[x]["ms"], found[x]["share"]) for x in ("matmul", "attention", "gaps")}
    assert figures == {"matmul": (3, 3 / 9), "attention": (4, 4 / 9), "gaps": (2, 2 / 9)}
    assert found["matmul"]["over_floor"] == 2 and found["attention"]["over_floor"] == 4
    assert (found["step"]["floor_ms"], found["step"]["over_floor"]) == (2.5, 9 / 2.5)


def test_floors_are_what_a_part_must_do_over_the_rates():
    """One layer of width 4 on 6 tokens, in float32: 1 TFLOP/s, 1 GB/s."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 8, "vocab_size": 10}
    model = SimpleNamespace(
        config=SimpleNamespace(**sizes), parameters=lambda: [torch.zeros(5), torch.zeros(3, 5)]
    )
    encoder = SimpleNamespace(
        model=model,
        run=model,
        dtype=torch.float32,
        setting=encoders.SETTINGS["mosaic"],
        task="step",
        flop=lambda _: 1e9,
    )
    labels = torch.tensor([[1, -100, -100, -100], [1, 2, -100, -100]])
    rows = SimpleNamespace(lengths=[4, 2], labels=labels)
    found = profile_step.floors(encoder, rows, {"matmul_tflops": 1.0, "copy_gbytes_per_s": 1.0})
    scores = 4 * (16 + 4)
    hidden = 6 * 4 * 4
    expected = {  # ms: FLOP / 1e9, bytes / 1e6
        "matmul": (1e9 - 12 * scores) / 1e9,
        "attention": 12 * hidden / 1e6,
        "LayerNorm": 6 * 3 * hidden / 1e6,
        "GLU": 8 * 6 * 8 * 4 / 1e6,
        "dropout": 0,
        "loss": 2 * 3 * 10 * 4 / 1e6,
        "optimizer": 28 * 20 / 1e6,
        "casts and copies": 0,
        "gaps": 0,
    }
    assert found == pytest.approx(expected)
    # Where bytes cost nothing, attention's 4 + 10 FLOP a score and dimension.
    free = {"matmul_tflops": 1.0, "copy_gbytes_per_s": 1e9}
    found = profile_step.floors(encoder, rows, free)
    assert found["attention"] == pytest.approx(14 * scores / 1e9)

    # Inference goes forward only, and must read its matrices: here one of 3 x 5.
    encoder.task, encoder.flop = "fill-mask", lambda _: 4 * scores
    found = profile_step.floors(encoder, rows, {"matmul_tflops": 1.0, "copy_gbytes_per_s": 1.0})
    assert found == pytest.approx(
        {
            "matmul": 15 * 4 / 1e6,
            "attention": 4 * hidden / 1e6,
            "LayerNorm": 3 * 3 * hidden / 1e6,
            "GLU": 3 * 6 * 8 * 4 / 1e6,
            "gaps": 0,
        }
    )


def test_the_data_script_counts_million_tokens_a_second(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(data, "time", clock)
    assert data.median_rate(clock.takes(0.5, 3_000_000), 5) == 6


def test_a_consumer_waits_while_its_batch_is_made(monkeypatch):
    """Batches of a million tokens, each made in 3 s and, by two million a second, used in 0.5."""
    clock = FakeClock()
    clock.sleep = lambda seconds: clock.takes(seconds)()
    batch = {"batch": {"cu_seqlens": torch.tensor([0, 10**6])}}
    make = clock.takes(3, batch)
    monkeypatch.setattr(data, "time", clock)
    monkeypatch.setattr(data, "DataLoader", lambda *_, **__: (make() for _ in range(40)))
    assert data.wait_share(None, None, 2, seconds=100) == pytest.approx(3 / 3.5, abs=1e-3)


# The kernel's


@pytest.fixture
def attention_case(monkeypatch):
    """A provider whose passes do nothing, on sequences of 3 and 5 tokens, 2 heads of 4."""
    shape = attention.Shape("c4", [3, 5], 2, 4, torch.float32)
    leaf = torch.zeros(8, 2, 4, requires_grad=True)
    case = SimpleNamespace(leaf=leaf, attend=lambda _: leaf * 2, prepare=lambda: None)
    monkeypatch.setattr(attention, "setup", lambda *_: case)
    monkeypatch.setattr(attention, "gate", lambda *_: None)
    return shape


def test_attention_counts_flop_bytes_and_its_share_of_the_roofline(attention_case, monkeypatch):
    """Of what the kernels took, which is less than a call."""
    monkeypatch.setattr(attention, "milliseconds", lambda function: (0.005, 0.001, 0.009))
    monkeypatch.setattr(attention, "kernel_times", lambda *_: Counter(one=0.0015, other=0.0005))
    rates = {"matmul_tflops": 1e-3, "copy_gbytes_per_s": 0.5}
    found = {x["pass"]: x for x in attention.measure("ours", attention_case, rates)}
    # Scores: 2 heads x (9 + 25); out: 8 x 2 x 4 float32; lse: 8 x 2 float32.
    scores, out, lse = 68, 256, 64
    flop = {"forward": 2 * 2 * scores * 4, "backward": 2 * 5 * scores * 4}
    moved = {"forward": 3 * out + out + lse, "backward": 3 * out + 2 * out + 3 * out + lse}
    for counts in (flop, moved):
        counts["both"] = counts["forward"] + counts["backward"]
    assert found.keys() == {"prepare", *flop}
    for name, row in found.items():
        assert (row["ms"], row["p20"], row["p80"]) == (0.005, 0.001, 0.009)
        assert row["kernels_ms"] == 0.002
        if name != "prepare":
            by_flop, by_bytes = flop[name] / 2e-6 / 1e12, moved[name] / 2e-6 / 1e9
            assert row["tflops"] == pytest.approx(by_flop)
            assert row["gbytes_per_s"] == pytest.approx(by_bytes)
            assert row["roofline"] == pytest.approx(max(by_flop / 1e-3, by_bytes / 0.5))


def test_an_error_of_tritons_is_a_skipped_row(attention_case, monkeypatch):
    """It is no RuntimeError, and ended the script: a tile was too large for the chip."""
    errors = pytest.importorskip("triton.runtime.errors")

    def too_large(*_):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(attention, "setup", too_large)
    [row] = attention.rows_of("ours", attention_case, {}, clocks.Deadline(1))
    assert row["skipped"].startswith("OutOfResources: out of resource: shared memory, Required: 3")


class AtOnce:
    """A pool that does what it is given at once."""

    def submit(self, function, *args):
        result = function(*args)
        return SimpleNamespace(result=lambda: result)


@pytest.mark.parametrize("kernels", [["forward"], ["forward", "dq", "dkdv", "block"]], ids=len)
def test_tuning_takes_the_fastest_tile_that_is_right(monkeypatch, kernels):
    """Small tiles are fastest here but wrong, the next do not fit; one-block rows pay up to 64."""
    tune = pytest.importorskip("benchmarks.kernel.tune")
    errors = pytest.importorskip("triton.runtime.errors")
    monkeypatch.setattr(tune.ours, "tile_shape", None)
    monkeypatch.setattr(tune, "make_case", lambda row, lengths, heads: lengths)
    monkeypatch.setattr(tune, "BLOCKS", {2: ((32, 64, 128), (32, 64))})

    def check(row, tiles, lengths):
        if any(tiles[x][:2] == (32, 32) for x in ("forward", "dq", "dkdv")):
            raise AssertionError("off")
        if any(tiles[x][:2] == (32, 64) for x in ("forward", "dq", "dkdv")):
            raise errors.OutOfResources(300_000, 232_448, "shared memory")

    def clock(lengths, backward):
        tiles = {x: tune.ours.tile_shape(None, x) for x in tune.ours.KERNELS}
        if tiles["block"][0]:
            return {128: 9.0, 64: 1.0}[tiles["block"][0]] + tiles["block"][2] / 8
        names = ("dq", "dkdv") if backward else ("forward",)
        return (
            float(sum(tiles[x][0] * tiles[x][1] + 10 * tiles[x][2] - tiles[x][3] for x in names))
            / 1000
        )

    monkeypatch.setattr(tune, "check", check)
    monkeypatch.setattr(tune, "clock", clock)
    row, log = (90, 64, 2), []
    args = SimpleNamespace(kernels=kernels, seqlen=256, tokens=512, heads=2)
    tuner = tune.Tuner(row, args, log.append, AtOnce())
    tuner.tune()
    best = dict.fromkeys(("forward", "dq", "dkdv"), (64, 32, 4, 4)) | {"block": (64, 64, 4, 1)}
    assert tuner.tiles == tune.ours.TILES[row] | {x: best[x] for x in kernels}
    assert {x["kernel"] for x in log} == set(kernels)
    reasons = {tuple(x["tile"][:2]): x["left_out"] for x in log if "left_out" in x}
    assert reasons[32, 32] == "AssertionError: off" and "shared memory" in reasons[32, 64]
    assert all(("ms" in x) != ("left_out" in x) for x in log)


# Learning's


def test_a_curve_sums_up_seconds_tokens_and_flop_from_a_log(tmp_path):
    """10 steps of 32 rows at 64 rows a second take 5 s, 10 more at 32 a second 10 s."""
    log = [
        {"step": 10, "loss": 5.0, "samples_per_second": 64, "tokens_per_second": 1000, "mfu": 0.2},
        {"step": 10, "eval_loss": 4.0, "eval_masked_accuracy": 0.25},
        {"step": 20, "loss": 4.0, "samples_per_second": 32, "tokens_per_second": 500, "mfu": 0.3},
        {"step": 20, "eval_loss": 3.0, "eval_masked_accuracy": 0.5},
        {"step": 20, "eval_loss": 3.0, "eval_masked_accuracy": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    first, last = side_by_side.curve(tmp_path, rows_per_step=32)
    expected = {"step": 10, "tokens": 5000, "seconds": 5, "flop": 1e12}
    assert first == pytest.approx(expected | {"eval_loss": 4, "eval_masked_accuracy": 0.25})
    expected = {"step": 20, "tokens": 10_000, "seconds": 15, "flop": 4e12}
    assert last == pytest.approx(expected | {"eval_loss": 3, "eval_masked_accuracy": 0.5})


@pytest.mark.parametrize("loss, tokens", [(6, 100), (5, 150), (3, 300), (2.9, None)])
def test_what_a_loss_needed_is_between_the_points_around_it(loss, tokens):
    curve = [{"tokens": x, "eval_loss": y} for x, y in ((100, 6), (200, 4), (300, 3))]
    assert learning.needed(curve, loss, "tokens") == tokens
