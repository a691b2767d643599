# SPDX-License-Identifier: Apache-2.0
"""recipe.py: defaults, how a global batch is split, what is refused, and the precision chosen."""

import os

import pytest
import torch
import transformers
import yaml
from training import ROOT, flags

import convert_weights
import finetune
import train_mlm
from mosaic_tools import devices, embedding_trainer, pairs, recipe, runs


def parse(*words, **values):
    return recipe.parse([*words, *flags(output_dir="out", **values)])


def test_the_defaults_are_the_recipe():
    model, _, data, args = parse()
    assert (data.mlm_probability, data.eval_mlm_probability) == (0.3, 0.15)
    assert data.max_seq_length == 128
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    # torch's AdamW multiplies decay by the learning rate, the recipe's 1e-5 is decoupled from it.
    assert args.weight_decay * args.learning_rate == pytest.approx(1e-5)
    assert args.lr_scheduler_type == "linear" and args.get_warmup_steps(70_000) == 4200
    assert model.low_precision_layernorm


def test_warm_up_is_a_number_of_steps_or_a_share():
    args = parse(warmup_steps=7)[-1]
    assert args.get_warmup_steps(1000) == 7
    args.warmup_steps = 0.2
    assert args.get_warmup_steps(1000) == 200
    assert parse(warmup_ratio=0)[-1].get_warmup_steps(1000) == 0


@pytest.mark.parametrize("name", ["warmup_ratio", "warmup_share", "warmup-share"])
def test_the_share_of_warm_up_has_the_fields_name_and_its_former_one(name):
    """transformers 5.0 would put warmup_ratio in place of warmup_steps, and 5.23 has none."""
    args = parse(**{name: 0.2})[-1]
    assert args.warmup_ratio == args.share_of_warmup() == 0.2 and args.warmup_steps == 0
    assert args.get_warmup_steps(1000) == 200
    args = parse(**{name: 0.2}, warmup_steps=7)[-1]
    assert (args.warmup_ratio, args.warmup_steps, args.get_warmup_steps(1000)) == (0.2, 7, 7)
    with pytest.raises(ValueError, match="warmup_ratio is a share between 0 and 1, got 6"):
        parse(**{name: 6})


def test_former_names_are_keys_of_recipes_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("warmup_share: 0.2\nmodel: runs/mine\nprivate: false\n")
    model, *_, args = parse(str(tmp_path / "recipe.yaml"))
    assert model.model_name_or_path == "runs/mine" and args.get_warmup_steps(10) == 2


def as_by_train_mlm(argv):
    model, *_, args = recipe.parse(argv)
    return model.model_name_or_path, args.private


def as_by_finetune(argv):
    model, _, given = finetune.parse(["--task", "cola", *argv])
    return model.model, runs.FinetuneArguments(**given).private


def as_by_convert_weights(argv):
    args = convert_weights.parse_args([*argv[2:], "a/model", "out"])
    return args.source, args.private


COMMANDS = [as_by_train_mlm, as_by_finetune, as_by_convert_weights]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("words", "private"),
    [
        ([], False),
        (["--private"], True),
        (["--private", "true"], True),
        (["--private", "True"], True),
        (["--private=true"], True),
        (["--private", "false"], False),
    ],
    ids=["none", "alone", "true", "True", "=true", "false"],
)
def test_every_command_takes_private_alone_or_with_a_value(command, words, private):
    to_hub = ["--push_to_hub", "org/name"]
    for name in ("--model", "--model_name_or_path", "--model-name-or-path"):
        # The converter's SOURCE follows, and is no value of the flag's.
        assert command([name, "a/model", *to_hub, *words]) == ("a/model", private)


@pytest.mark.parametrize("words", [["--private"], ["--revision", "v2"]], ids=" ".join)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda f: f.__name__)
def test_no_command_takes_what_an_upload_needs_without_one(command, words):
    with pytest.raises((ValueError, SystemExit)):
        command(["--model", "a/model", *words])


@pytest.mark.parametrize(
    ("rows", "devices", "max_rows", "expected"),
    [
        (4096, 8, 128, (128, 4)),
        (4096, 1, 64, (64, 64)),
        (4096, 8, 1000, (512, 1)),
        (96, 2, 32, (24, 2)),
        (8, 8, 64, (1, 1)),
    ],
)
def test_a_global_batch_is_split_over_devices_and_micro_batches(rows, devices, max_rows, expected):
    micro, accumulated = recipe.split_batch(rows, devices, max_rows)
    assert (micro, accumulated) == expected
    assert micro * accumulated * devices == rows


@pytest.mark.parametrize(
    ("rows", "devices", "max_rows", "near"),
    [
        (4096, 3, 64, "4095 or 4104"),
        (4, 8, 64, "8"),
        (254, 2, 64, "252 or 256"),
        (26, 1, 6, "25 or 27"),
    ],
    ids=["3 devices", "fewer rows than devices", "127 is prime", "a third, beside a half"],
)
def test_an_impossible_split_is_refused_with_the_nearest(rows, devices, max_rows, near):
    message = f"global_batch_size {rows} .* {devices} devices .* at most {max_rows} .*is ({near})$"
    with pytest.raises(ValueError, match=message):
        recipe.split_batch(rows, devices, max_rows)
    between = range(*sorted(map(int, near.split(" or ")))) if " or " in near else range(1, 8)
    for proposal in near.split(" or "):
        recipe.split_batch(int(proposal), devices, max_rows)
    for other in list(between)[" or " in near :]:
        with pytest.raises(ValueError):
            recipe.split_batch(other, devices, max_rows)


def test_a_global_batch_sets_micro_batch_and_accumulation():
    args = parse(global_batch_size=96, per_device_train_batch_size=40)[-1]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (32, 3)
    assert args.rows_per_step() == 96


def test_decay_is_decoupled_from_the_learning_rate():
    """What Composer's AdamW does at the peak: a factor of 1 - 1e-5, whatever the rate."""
    for rate in (5e-4, 2e-3):
        args = parse(learning_rate=rate)[-1]
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=args.weight_decay)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert torch.allclose(weight, torch.full_like(weight, 1 - 1e-5), rtol=1e-15, atol=0)
    assert parse(weight_decay=0.1)[-1].weight_decay == 0.1


def test_the_rate_falls_to_the_share_of_the_peak_that_is_asked_for():
    given = {"lr_end": 0.02, "learning_rate": 1e-3, "max_steps": 100}
    args = parse(**given)[-1]
    by_name = parse(**given, lr_scheduler_type="polynomial")[-1]
    assert by_name.lr_scheduler_kwargs == args.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=args.learning_rate)
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type, optimizer, 10, 100, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    # Linear in between, as the published schedule is.
    assert rates[10] == 1e-3 and rates[55] == pytest.approx(0.51e-3)
    assert rates[100] == pytest.approx(2e-5)


def test_tensorboard_that_is_not_installed_is_missed_before_anything_else(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        parse(report_to="tensorboard")
    assert parse()[-1].report_to == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda x: x.stem)
def test_every_recipe_is_understood(path):
    given = yaml.safe_load(path.read_text())
    if given.get("optim") == recipe.MUON and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    if path.stem.startswith("embeddings"):
        model = embedding_trainer.EmbedderArguments
        groups = (model, pairs.PairArguments, embedding_trainer.EmbeddingArguments)
        _, data, args = recipe.parse([str(path)], groups)
        assert args.num_train_epochs == given["num_train_epochs"]
    else:
        _, _, data, args = recipe.parse([str(path)])
        assert args.max_steps == given["max_steps"]
    assert args.output_dir == given["output_dir"]
    assert data.max_seq_length == given.get("max_seq_length", 128)
    if "base" in path.stem or "large" in path.stem:
        # 70,000 steps of 4,096, as the paper's.
        assert args.rows_per_step() == 4096 and args.max_steps == 70_000
        assert str(data.max_seq_length) == path.stem.split("-")[-1]


# ---- precision ----

AVX512 = ["avx2", "avx512f"]


@pytest.mark.parametrize(
    ("instructions", "precision", "why"),
    [
        ([], "float32", "this CPU has neither amx_bf16 nor avx512_bf16, and would emulate bf16"),
        (AVX512, "float32", "this CPU has neither amx_bf16 nor avx512_bf16"),
        ([*AVX512, "avx512_bf16"], "bf16 autocast", "native by avx512_bf16"),
        ([*AVX512, "amx_bf16"], "bf16 autocast", "native by amx_bf16"),
    ],
    ids=["AVX2", "AVX-512", "AVX512-BF16", "AMX"],
)
def test_bf16_is_chosen_where_the_cpu_computes_it(monkeypatch, instructions, precision, why):
    """It was on for every CPU, and five times slower than float32 on those that emulate it."""
    monkeypatch.setattr(devices, "cpu_instructions", lambda: instructions)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    args = parse(use_cpu=True)[-1]
    assert (args.precision(), args.bf16) == (precision, precision != "float32")
    assert args.why_bf16.startswith(why)
    for asked in (True, False):
        args = parse(use_cpu=True, bf16=asked)[-1]
        assert args.bf16 is asked and args.why_bf16 == "as set"


@pytest.mark.parametrize(("speed", "native"), [(2.51, True), (0.049, False)])
def test_bf16_is_measured_where_no_instruction_tells(monkeypatch, speed, native):
    monkeypatch.setattr(devices, "cpu_instructions", lambda: ["asimd", "bf16"])
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(devices, "bf16_over_float32", lambda: speed)
    args = parse(use_cpu=True)[-1]
    assert args.bf16 is native and f"{speed:.2g} times as fast as in float32" in args.why_bf16


def test_the_speed_of_bf16_is_that_of_its_products(monkeypatch):
    """A clock that a product in bf16 moves by 1 s, and one in float32 by 4."""
    clock, product = [0], torch.Tensor.__matmul__

    def slow(a, b):
        clock[0] += 4 if a.dtype == torch.float32 else 1
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert devices.bf16_over_float32.__wrapped__(size=2) == 4


@pytest.mark.parametrize("native", [True, False])
def test_gpus_that_emulate_bf16_do_without(monkeypatch, native):
    """torch says that a V100 supports it, unless asked to leave out emulation."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Chip")
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    why = "native to Chip" if native else "Chip would emulate bf16"
    assert devices.native_bf16(use_cpu=False) == (native, why)


@pytest.mark.parametrize("native", [True, False])
def test_other_accelerators_have_bf16_where_transformers_says_so(monkeypatch, native):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(devices, "is_torch_bf16_gpu_available", lambda: native)
    why = "mps has bf16" if native else "mps has no bf16"
    assert devices.native_bf16(use_cpu=False) == (native, why)


def test_without_an_accelerator_the_cpu_decides(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(devices, "cpu_bf16", lambda: (True, "so"))
    assert devices.native_bf16(use_cpu=False) == (True, "so")


@pytest.mark.parametrize("command", [train_mlm, finetune], ids=lambda x: x.__name__)
def test_the_environment_is_set_by_the_command_before_its_arguments_are_made(command, monkeypatch):
    """It was set by parsing."""
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_DYNAMIC", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    parse(bf16=False)
    assert "ACCELERATE_DYNAMO_USE_DYNAMIC" not in os.environ
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"
    seen = {}

    def stop(argv):
        seen.update(os.environ)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(*([[]] if command is finetune else []))
    assert seen["ACCELERATE_MIXED_PRECISION"] == "no"
    assert seen["ACCELERATE_DYNAMO_USE_DYNAMIC"] == "true"


def test_a_launchers_precision_does_not_come_in_for_float32(monkeypatch):
    """It did, while the run said that it computed in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    devices.prepare_environment()
    args = parse(bf16=False)[-1]
    assert getattr(args, "mixed_precision", "no") == "no"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_processes_on_unlike_devices_must_be_told_the_precision(monkeypatch):
    monkeypatch.setattr(devices, "cpu_instructions", lambda: AVX512)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    others = []
    monkeypatch.setattr(recipe, "gather_object", lambda own: own + others)
    monkeypatch.setattr(recipe.RecipeArguments, "world_size", 2)
    others.append((False, "a chip like this"))
    assert not parse(use_cpu=True)[-1].bf16
    others.append((True, "native by amx_bf16"))
    with pytest.raises(
        ValueError, match="native by amx_bf16; .*: give --bf16 true or --bf16 false"
    ):
        parse(use_cpu=True)
    assert parse(use_cpu=True, bf16=True)[-1].bf16


def test_instructions_are_torchs_or_linuxs(monkeypatch, tmp_path):
    found = {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": True, "neon": False}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found, raising=False)
    assert devices.cpu_instructions() == ["avx2", "avx512f", "amx_bf16"]
    monkeypatch.delattr("torch.cpu.get_capabilities")
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    assert devices.cpu_instructions() == []
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd svebf16 bf16\n")
    assert devices.cpu_instructions() == ["asimd", "bf16"]
