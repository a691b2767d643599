# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, at toy size and in Triton's interpreter, and count what they say."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, run_python
from training import DOCUMENTS, run, write_vocab

from benchmarks import half_precision, plot
from benchmarks.learning import learning, pareto
from benchmarks.records import command, environment, place, version
from benchmarks.speed import clocks, compare, data, encoders, pretraining, profile_step, serving
from benchmarks.speed.lengths import HALF_PADDING, c4_lengths
from mosaic_tools import devices

# Toy models are to be had in a process of their own: Triton reads once whether it interprets.
TOYS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import toy
toy.choose(["--toy"])
import torch
from benchmarks.speed.encoders import *
"""


@pytest.mark.parametrize(
    "seqlen, percent", [(128, 91), (256, 77), (512, 56), (1024, 36), (2048, 20), (8192, 5)]
)
def test_c4_lengths_fill_rows_as_stated(seqlen, percent):
    drawn = c4_lengths(200_000, seqlen)
    assert max(drawn) == seqlen and min(drawn) > 2
    assert sum(drawn) / len(drawn) / seqlen == pytest.approx(percent / 100, abs=0.006)


def test_half_of_the_half_padded_rows_is_padding():
    assert sum(HALF_PADDING) == 8 * 128 // 2


def test_the_recipe_is_projected_from_tokens_per_second():
    args = SimpleNamespace(steps=70_000, global_batch=4096, gpus=8, price=2.0)
    # 36.7 G tokens by 8 GPUs of 600,000 a second.
    expected = 70_000 * 4096 * 128 / 4.8e6 / 3600
    found = pretraining.project(600_000, 128, args)
    assert found == {"hours": pytest.approx(expected), "dollars": pytest.approx(16 * expected)}


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 200])
def test_scores_near_counts_pairs_within_the_window(length):
    place = torch.arange(length)
    assert encoders.scores_near(length, 64) == ((place - place[:, None]).abs() <= 64).sum()


def test_functions_are_timed_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = clocks.interleaved(functions, rounds=9, seconds=0)
    assert calls == ["a", "b"] * 3 and set(times) == {"a", "b"}
    assert all(low <= median <= high for median, low, high in times.values())


@pytest.mark.parametrize(
    "name, part",
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matmul"),
        ("_dkdv_kernel", "attention"),
        ("triton_per_fused_add_native_dropout_native_layer_norm_3", "LayerNorm"),
        ("triton_poi_fused_gelu_mul_native_dropout_5", "GLU"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_log_softmax", "loss"),
        ("aten::bernoulli_", "dropout"),
        ("aten::div_", "other"),
    ],
)  # fmt: skip
def test_a_kernel_belongs_to_the_part_it_is_named_after(name, part):
    assert profile_step.part_of(name) == part


def test_plots_without_records_say_what_is_missing(tmp_path, capsys):
    plot.draw_cpu(tmp_path, "inference", **plot.ON_CPU["inference"])
    plot.draw_serving(tmp_path)
    plot.draw_gpu(tmp_path)
    said = capsys.readouterr().out
    assert "make bench-cpu" in said and "make bench-gpu" in said
    assert not list(tmp_path.iterdir())


def test_the_newest_records_are_drawn(tmp_path):
    steps = [
        {"task": task, "lengths": lengths, "seqlen": 128, "setting": "bert", "ms": 2.0} | rest
        for task, lengths in [("step", "c4"), ("fill-mask", "full"), ("step", "full")]
        for rest in (
            {"device": "Chip, 2 cores", "dtype": "float32", "ratio": 1.5},
            {"device": "Chip", "dtype": "bfloat16", "ratio": 1.5},
            # Newer ones, of a run without ours and of another dtype.
            {"device": "Chip", "dtype": "bfloat16"},
            {"device": "Chip", "dtype": "float32", "ratio": 9.0},
        )
    ]
    keys = ("dtype", "task", "lengths", "setting", "seqlen")
    (tmp_path / "pretraining.jsonl").write_text("\n".join(map(json.dumps, steps)))
    found = plot.newest(tmp_path, "pretraining", "ratio", *keys)
    assert found["bfloat16", "step", "c4", "bert", 128, "Chip"]["ratio"] == 1.5
    plot.draw_cpu(tmp_path, "pretraining", **plot.ON_CPU["pretraining"])
    plot.draw_gpu(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"cpu_pretraining.png", "gpu.png"}


# A cloud calls them by one name; bf16 is emulated by the second, and the first records do not say.
XEONS = [
    {"device": "Xeon, 2 cores"} | rest
    for rest in (
        {},
        {"cpu_instructions": ["avx2", "avx512f"]},
        {"cpu_instructions": ["avx2", "avx512f", "amx_bf16"]},
    )
]


def test_a_record_says_which_instructions_its_processor_has():
    where = environment()
    assert where["cpu_instructions"] == devices.cpu_instructions()
    assert [place(x) for x in XEONS] == [
        "Xeon, 2 cores (instructions not recorded)",
        "Xeon, 2 cores (avx2, avx512f)",
        "Xeon, 2 cores (avx2, avx512f, amx_bf16)",
    ]
    assert place({"device": "Chip", "cpu_instructions": ["avx2"]}) == "Chip"


def drawn(monkeypatch, draw, *args, **kwargs):
    figures = []
    monkeypatch.setattr(plot, "finish", lambda figure, path: figures.append(figure))
    draw(*args, **kwargs)
    return figures[0].axes


def test_ways_to_serve_are_drawn_beside_each_other(tmp_path, monkeypatch):
    """Left BERT's time over ours the same way, right ours over our eager one."""
    ways = {"mosaic-eager": (1, 1), "bert-eager": (0.7, 0.7), "mosaic-aot": (1, 0.5)}
    ways |= {"bert-aot": (0.8, 0.4), "modernbert-eager": (None, 1.6)}
    case = {"task": "embeddings", "batch": "1x16", "device": "Chip, 2 cores", "least_ms": 1.0}
    records = [
        case | {"dtype": dtype, "threads": threads, "setting": name}
        | {"over_ours": same, "over_eager": eager}
        for name, (same, eager) in ways.items()
        for threads in (1, 2)
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    records.append(case | {"dtype": "float32", "threads": 1, "setting": "mosaic-openvino"})
    (tmp_path / "serving.jsonl").write_text("\n".join(map(json.dumps, records)))
    panels = drawn(monkeypatch, plot.draw_serving, tmp_path)
    assert [[bar.get_height() for bar in axes.patches] for axes in panels] == [
        [0.7, 0.8],
        [1, 0.5],
    ] * 2


def test_processors_of_other_instructions_are_drawn_apart(tmp_path, monkeypatch):
    case = {"dtype": "bfloat16", "lengths": "full", "setting": "bert"}
    records = [
        case | x | {"task": task, "ratio": ratio}
        for ratio, x in enumerate(XEONS, 1)
        for task in ("fill-mask", "step")
    ]
    (tmp_path / "pretraining.jsonl").write_text("\n".join(map(json.dumps, records)))
    panels = drawn(
        monkeypatch, plot.draw_cpu, tmp_path, "pretraining", **plot.ON_CPU["pretraining"]
    )
    assert [[bar.get_height() for bar in axes.patches] for axes in panels] == [
        *([[1]] * 2 + [[2]] * 2 + [[3]] * 2)
    ]
    assert [axes.get_title().split("\n")[1] for axes in panels[::2]] == list(map(place, XEONS))


def test_gpus_of_other_names_have_curves_of_their_own(tmp_path, monkeypatch):
    case = {"dtype": "bfloat16", "lengths": "c4", "setting": "bert", "task": "step"}
    records = [
        case | {"device": name, "seqlen": seqlen, "ratio": 1.5}
        for name in ("Chip", "Other chip")
        for seqlen in (128, 512)
    ]
    (tmp_path / "pretraining.jsonl").write_text("\n".join(map(json.dumps, records)))
    steps, _ = drawn(monkeypatch, plot.draw_gpu, tmp_path)
    *curves, equal = steps.lines
    assert [line.get_label() for line in curves] == ["BERT, Chip", "BERT, Other chip"]
    assert [list(line.get_xdata()) for line in curves] == [[128, 512]] * 2
    assert list(equal.get_ydata()) == [1, 1]


def test_attention_is_drawn_by_the_gpus_own_time(tmp_path, monkeypatch):
    case = {"dtype": "bfloat16", "pass": "both", "inputs": "N(0, 1)", "device": "Chip"}
    case |= {"lengths": "fixed", "provider": "ours", "ms": 9.0}
    # An older script's record, without kernels_ms, must not replace the first.
    records = [case | {"seqlen": x, "kernels_ms": x / 128} for x in (128, 512)]
    records += [case | {"seqlen": 128}, case | {"lengths": "c4", "seqlen": 128, "kernels_ms": 7}]
    (tmp_path / "attention.jsonl").write_text("\n".join(map(json.dumps, records)))
    _, times = drawn(monkeypatch, plot.draw_gpu, tmp_path)
    assert [list(line.get_ydata()) for line in times.lines] == [[1, 4]]


def test_runs_are_compared_with_those_of_the_same_instructions_only(tmp_path, monkeypatch):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "curve": [{"step": 5}]}
    run = size | {"model": "bert", "learning_rate": 0.1}
    (tmp_path / "learning.jsonl").write_text("\n".join(json.dumps(run | x) for x in XEONS))
    args = SimpleNamespace(results=tmp_path, hidden_size=8, layers=1, steps=5)
    for where in XEONS:
        assert learning.comparable(args, where) == [run | where]

    versions = {"torch": "2", "transformers": "5"}
    run = versions | {"model": "bert", "minutes": 1, "seed": 2, "settings": {}}
    run |= {"seconds_by_trial": 9.0}
    (tmp_path / "pareto.jsonl").write_text("\n".join(json.dumps(run | x) for x in XEONS))
    monkeypatch.setattr(pareto, "of_training", lambda *_: {})
    args.plan = [("bert", 1, 2)]
    for where in XEONS:
        monkeypatch.setattr(pareto, "environment", lambda where=where: versions | where)
        assert pareto.recorded(args) == [run | where]


def test_absent_packages_have_no_version():
    assert version("pytest") == pytest.__version__
    assert version("no-such-package") is None


def test_a_record_names_the_script_from_the_root(tmp_path):
    words = ["--output", str(tmp_path), "--rounds", "3"]
    script = str(ROOT / "benchmarks" / "speed" / "pretraining.py")
    expected = f"python benchmarks/speed/pretraining.py --output {tmp_path.name} --rounds 3"
    assert command([script, *words]) == expected
    # A file that is not there yet has no machine's path either.
    words[1] = str(tmp_path / "new" / tmp_path.name)
    assert command([script, *words]) == expected
    assert command([str(tmp_path / "other.py")]) == "python other.py"


def test_records_are_written_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_benchmarks_are_imported_whatever_the_command_line_says():
    """With --toy in it their sizes were others, and the kernel's left the process."""
    code = f"""
import importlib, sys
from pathlib import Path
sys.argv[1:], root = ["--toy", "--no-such-flag"], Path({str(ROOT)!r})
sys.path.insert(0, str(root))
scripts = [*root.glob("benchmarks/**/[a-z]*.py")]
for path in scripts:
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
import benchmarks.speed.encoders
print(len(scripts), benchmarks.speed.encoders.VOCAB, benchmarks.speed.clocks.TOY)
"""
    count, *rest = run_python(code).split()
    assert int(count) > 20 and rest == ["30528", "False"]


def test_an_error_without_a_message_has_a_name():
    assert compare.why(AssertionError()) == "AssertionError: "


def failing(error):
    raise error


def test_these_failures_skip_a_setting():
    """Were one left out, what it skips would end a benchmark."""
    expected = {"AssertionError", "ImportError", "RuntimeError", "ValueError"}
    expected |= {"FailOnRecompileLimitHit", "TritonError"}
    # Without Triton its error is RuntimeError.
    assert {x.__name__ for x in compare.FAILURES} | {"TritonError"} == expected


@pytest.mark.parametrize("failure", compare.FAILURES)
def test_what_a_setting_cannot_do_is_skipped(failure):
    error = failure.__new__(failure)
    encoder = SimpleNamespace(function=lambda rows: lambda: failing(error))
    assert compare.warm(encoder, None) == (None, {"skipped": f"{failure.__name__}: "})


def test_bert_repeats_its_positions_in_longer_rows():
    run_python(
        TOYS
        + """
rows = make_rows([600, 3])
encoder = Encoder("bert", torch.float32, "step")
assert encoder.model.config.max_position_embeddings == 512
[batch] = encoder.inputs(rows, labels=True)
assert batch["position_ids"].flatten().tolist() == [*range(512), *range(88)]
assert encoder.function(rows)().isfinite()
"""
    )


def test_micro_batches_are_a_step_like_any_other():
    run_python(
        TOYS
        + """
rows = make_rows([40, 40, 3, 17])
losses = []
for positions in (80, 160):
    encoder = Encoder("bert-no-dropout", torch.float32, "step")
    encoder.model.eval()
    encoder.positions = positions
    losses.append(encoder.function(rows)())
assert len(encoder.inputs(rows, labels=True)) == 1
torch.testing.assert_close(*losses)
"""
    )


def test_model_flop_are_those_that_torch_counts():
    run_python(
        TOYS
        + """
from torch.utils.flop_counter import FlopCounterMode
for name in ("mosaic", "bert", "modernbert"):
    SETTINGS["eager"] = Setting(name, "eager")
    encoder = Encoder("eager", torch.float32, "fill-mask")
    # Full rows, as torch counts padding too, and shorter than ModernBERT's window.
    rows = make_rows([8] * 12)
    with FlopCounterMode(display=False) as counter:
        encoder.function(rows)()
    # ModernBERT's rotations were small products before transformers 5.1.
    slack = 0.01 if name == "modernbert" else 0
    assert abs(encoder.flop(rows) / counter.get_total_flops() - 1) <= slack, name
"""
    )


@pytest.mark.skipif(
    transformers.__version__ < "5.1", reason="transformers had no FlexAttention in both models"
)
def test_settings_that_pack_give_the_logits_of_those_that_pad():
    run_python(
        TOYS
        + """
rows = make_rows([30, 3, 17])
for name in ("bert", "modernbert"):
    packed, padded = (
        Encoder(x, torch.float32, "fill-mask").function(rows)() for x in (f"{name}-flex", name)
    )
    torch.testing.assert_close(packed[0], padded[rows.mask.bool()])
"""
    )


def test_the_check_finds_a_mask_left_out():
    run_python(
        TOYS
        + """
encoder = Encoder("bert", torch.float32, "step")
inputs = encoder.inputs

def without_mask(rows, labels):
    batch = inputs(rows, labels)[0]
    del batch["attention_mask"]
    return [batch]

encoder.inputs = without_mask
try:
    encoder.check()
except AssertionError as error:
    assert "off by" in str(error)
else:
    raise SystemExit("not found")
"""
    )


@pytest.mark.parametrize(
    "lengths, expected",
    [([5], [(5, 0, 1)]), ([8, 8, 3], [(8, 0, 2), (3, 2, 3)]), ([3, 2], [(3, 0, 1), (2, 1, 2)])],
)
def test_rows_of_one_length_are_a_call(lengths, expected):
    assert [(n, rows.start, rows.stop) for n, rows in serving.runs(lengths)] == expected


def test_a_result_is_judged_by_its_worst_real_token():
    rows = encoders.make_rows([3, 8])
    right = torch.eye(8).expand(2, 8, 8).clone()
    wrong = right.clone()
    # Padding, which nobody reads, and then a token.
    wrong[0, 5] = -1
    assert serving.least_cosine(wrong, right, rows) == 1
    wrong[0, 2] = right[0, 3]
    assert serving.least_cosine(wrong, right, rows) == 0
    unpadded = right[rows.mask.bool()]
    assert serving.least_cosine(unpadded, right, rows) == 1


def test_drift_is_that_of_the_outputs():
    """In one of two dimensions; the second of two guesses is another word."""
    hidden, logits = torch.ones(1, 4, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    exact = half_precision.drift((hidden, logits), (hidden, logits))
    assert exact == pytest.approx({"hidden": 0, "embedding": 0, "guesses": 0, "KL": 0})
    off = torch.tensor([0.2, 0.0]).expand(1, 4, 2)
    found = half_precision.drift((hidden + off, logits[:1].repeat(2, 1)), (hidden, logits))
    # Of the second token, whose words have 1 : e ** 3 and are given e : 1.
    right, given = 1 / (1 + torch.e**-3), 1 / (1 + torch.e)
    nats = right * math.log(right / given)
    nats += (1 - right) * math.log((1 - right) / (1 - given))
    cosine = 2.2 / math.sqrt(2 * (1.2**2 + 1))
    expected = {"hidden": 0.2 / math.sqrt(2), "embedding": 1 - cosine, "guesses": 0.5}
    assert found == pytest.approx(expected | {"KL": nats / 2})


def test_half_precision_measures_what_it_says():
    """Words are masked, not the row's ends; BERT has no LayerNorm in low precision."""
    rows, masked = half_precision.make_rows(torch.arange(10, 46), (1, 2, 3), 20)
    assert rows.shape == (2, 20) and masked.any()
    assert torch.equal(rows[:, [0, -1]], torch.tensor([[1, 2]] * 2))
    assert torch.equal(rows == 3, masked) and not masked[:, [0, -1]].any()
    run_python(
        TOYS
        + """
from benchmarks.half_precision import SETTINGS, in_setting, random_model
for name in ("mosaic-base", "bert-base"):
    model = random_model(name)
    for setting, (dtype, low_precision) in SETTINGS.items():
        candidate = in_setting(model, setting)
        if name == "bert-base" and low_precision:
            assert candidate is None
            continue
        assert candidate.dtype == dtype and model.dtype == torch.float32
        if name == "mosaic-base":
            norm = candidate.base_model.embeddings.LayerNorm
            assert norm.low_precision == bool(low_precision)
"""
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, cases",
    [
        ("speed/pretraining.py --settings mosaic bert modernbert --rounds 1", 6),
        ("speed/inference.py --settings mosaic bert --rounds 1 --tasks embeddings", 2),
        ("speed/serving.py --settings mosaic-eager mosaic-torch-int8 bert-eager --rounds 1", 25),
        ("speed/memory.py --settings mosaic --tasks step --longest 32", 4),
        ("speed/sentence_embeddings.py --trained mosaic --rounds 1", 6),
        ("speed/profile_step.py --steps 1", 12),
        ("speed/profile_step.py --steps 1 --task embeddings --setting bert", 12),
        ("speed/long_inputs.py --rounds 1", 8),
        ("learning/quantized.py --ways float32 torch onnx-int8", 9),
        ("kernel/attention.py --providers ours sdpa", 16),
        ("kernel/tune.py", 11),
        ("half_precision.py --models mosaic-base bert-base --lengths 16", 7),
    ],
)
def test_a_toy_run_prints_records_and_a_table(words, cases):
    done = subprocess.run(
        [sys.executable, *f"benchmarks/{words} --toy".split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(records) == cases
    for record in records:
        assert "skipped" not in record
        assert record["command"].split()[:2] == ["python", f"benchmarks/{words.split()[0]}"]
        assert record.keys() >= {"device", "torch", "transformers", "commit", "date"}
        assert record["cpu_instructions"] == devices.cpu_instructions()
    assert any(not line.startswith("{") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, records",
    [
        ("data.py --train_file text.txt --tokenizer vocab.txt --repeats 1 --seconds 0.1", 18),
        ("start.py --rows 100", 2),
    ],
)
def test_the_benchmarks_of_data_run_on_a_few_rows(tmp_path, words, records):
    write_vocab(tmp_path / "vocab.txt", *DOCUMENTS[0].split())
    (tmp_path / "text.txt").write_text("\n".join(text * 9 for text in DOCUMENTS * 9))
    output = tmp_path / "records.jsonl"
    run(tmp_path, *f"{ROOT}/benchmarks/speed/{words} --output {output}".split())
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found) == records
    rates = [row[way] for row in found for way in data.WAYS if way in row]
    shares = [x for row in found for name, x in row.items() if name.endswith("wait_share")]
    if words.startswith("data"):
        assert len(rates) == 15 and min(rates) > 0
        assert len(shares) == 30 and 0 <= min(shares) <= max(shares) <= 1
    else:
        assert [row["from_step"] for row in found] == [0, 35_000]
        assert all(row["seconds"] > 0 and row["megabytes"] >= 0 for row in found)
