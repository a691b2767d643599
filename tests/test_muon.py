# SPDX-License-Identifier: Apache-2.0
"""--optim muon of train_mlm.py: what it does to each parameter, and runs that change its rates, are
resumed, spread over processes, or refused."""

import copy
import sys

import accelerate
import pytest
import torch
import transformers
from models import make
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from training import (
    ACCELERATE,
    DOCUMENTS,
    ROOT,
    RUN,
    arguments,
    flags,
    losses,
    rates,
    run,
)

import train_mlm
from mosaic_bert.bert_layers import BertForMaskedLM
from mosaic_tools.muon import MuonWithAdamW
from mosaic_tools.recipe import PretrainingArguments
from mosaic_tools.runs import FinetuneArguments

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon: from torch 2.9 on"
)
MUON = {"lr": 2e-2, "weight_decay": 0.3}
ADAMW = {"lr": 1e-2, "weight_decay": 0.2, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
# The learning rates of steps, as shares of their peaks.
SCHEDULE = (0.5, 1.0, 0.75, 0.25, 0.0, 1.0)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=64, intermediate_size=96, **sizes)
    return transformers.BertForMaskedLM(config)


MODELS = {"mosaic_bert": lambda: make(BertForMaskedLM), "bert": bert}
on_every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def matrices(layer) -> list[tuple[torch.Tensor, slice]]:
    """The matrices of a layer: a weight, and which rows of it."""
    attention = layer.attention
    if hasattr(layer, "mlp"):
        # Of 64 dimensions, and 96 of the MLP.
        qkv, gated = attention.self.Wqkv.weight, layer.mlp.gated_layers.weight
        return [
            *((qkv, slice(0, 64)), (qkv, slice(64, 128)), (qkv, slice(128, 192))),
            *((gated, slice(0, 96)), (gated, slice(96, 192))),
            *((x.weight, slice(None)) for x in (attention.output.dense, layer.mlp.wo)),
        ]
    linear = (attention.self.query, attention.self.key, attention.self.value)
    linear += (attention.output.dense, layer.intermediate.dense, layer.output.dense)
    return [(x.weight, slice(None)) for x in linear]


class Apart:
    """torch's Muon and AdamW of copies, each matrix a parameter of its own."""

    def __init__(self, model):
        layers = model.bert.encoder.layer
        whole = slice(None)
        self.of_muon = [x for layer in layers for x in matrices(layer)]
        ids = {id(weight) for weight, _ in self.of_muon}
        self.of_adamw = [(x, whole) for x in model.parameters() if id(x) not in ids]
        rows = sum(x[part].numel() for x, part in self.of_muon + self.of_adamw)
        assert rows == sum(x.numel() for x in model.parameters())
        self.copies = [x[part].detach().clone() for x, part in self.of_muon + self.of_adamw]
        self.optimizers = (
            torch.optim.Muon(
                self.copies[: len(self.of_muon)], adjust_lr_fn="match_rms_adamw", **MUON
            ),
            torch.optim.AdamW(self.copies[len(self.of_muon) :], **ADAMW),
        )

    def step(self, share):
        for copy_, (weight, rows) in zip(self.copies, self.of_muon + self.of_adamw, strict=True):
            copy_.grad = weight.grad[rows].clone()
        for optimizer, peak in zip(self.optimizers, (MUON, ADAMW), strict=True):
            optimizer.param_groups[0]["lr"] = share * peak["lr"]
            optimizer.step()

    def check(self):
        for copy_, (weight, rows) in zip(self.copies, self.of_muon + self.of_adamw, strict=True):
            assert torch.equal(weight[rows], copy_)


def with_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def scheduled(model):
    """The optimizer and its schedule, prepared and in the order of Trainer."""
    optimizer = MuonWithAdamW(model, MUON, ADAMW)
    schedule = LambdaLR(optimizer, lambda step: SCHEDULE[step])
    return accelerate.Accelerator(cpu=True).prepare(optimizer), schedule


@needs_muon
@on_every_model
def test_it_is_muon_of_each_matrix_and_adamw_of_the_rest_to_the_bit(model):
    model = model()
    apart, (optimizer, schedule) = Apart(model), scheduled(model)
    # What is trained is what the model has, whatever it had when the optimizer was made.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    for step, share in enumerate(SCHEDULE[:-1]):
        with_gradients(model, step)
        before = [x.clone() for x in model.parameters()]
        optimizer.step()
        schedule.step()
        apart.step(share)
        apart.check()
        moved = [not torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True)]
        assert moved == [share > 0] * len(moved)
        optimizer.zero_grad()
        assert all(x.grad is None for x in model.parameters())


@needs_muon
@on_every_model
def test_it_goes_on_from_a_loaded_state_and_its_rates_still_change(model):
    """Loading replaces the groups, which the schedule writes to and a step reads."""
    models = model(), model()
    (old, old_schedule), (new, new_schedule) = map(scheduled, models)
    for step in range(len(SCHEDULE) - 1):
        if step == 2:
            models[1].load_state_dict(models[0].state_dict())
            new.load_state_dict(copy.deepcopy(old.state_dict()))
            new_schedule.load_state_dict(old_schedule.state_dict())
        with_gradients(models[0], step)
        old.step()
        old_schedule.step()
        if step >= 2:
            with_gradients(models[1], step)
            new.step()
            new_schedule.step()
            assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
            rates = [group["lr"] for group in new.param_groups]
            assert rates == [SCHEDULE[step + 1] * peak["lr"] for peak in (ADAMW, MUON)]


@needs_muon
def test_a_loss_scale_is_taken_out_and_a_step_that_overflows_is_skipped():
    models = make(BertForMaskedLM), make(BertForMaskedLM)
    plain, scaled = (MuonWithAdamW(x, MUON, ADAMW) for x in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for model in models:
        with_gradients(model, 0)
    for weight in models[1].parameters():
        weight.grad *= 1024
    plain.step()
    scaler.step(scaled)
    scaler.update()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    with_gradients(models[1], 1)
    models[1].bert.encoder.layer[1].mlp.wo.weight.grad[0, 0] = float("inf")
    scaler.step(scaled)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@needs_muon
def test_a_model_without_the_layers_of_a_bert_is_refused():
    with pytest.raises(ValueError, match="Linear has no encoder.layer"):
        MuonWithAdamW(torch.nn.Linear(2, 2), MUON, ADAMW)


# ---- arguments ----


def recipe(**values):
    return PretrainingArguments(output_dir="out", optim="muon", use_cpu=True, **values)


@needs_muon
def test_its_rate_is_adamws_unless_given_and_a_step_decays_all_weights_alike():
    values = {"learning_rate": 1e-3, "decoupled_weight_decay": 1e-5}
    same, other = recipe(**values), recipe(**values, muon_learning_rate=4e-3)
    assert same.muon() == pytest.approx({"lr": 1e-3, "weight_decay": 1e-2})
    assert other.muon() == pytest.approx({"lr": 4e-3, "weight_decay": 2.5e-3})
    assert other.optimizer() == (
        "muon, learning rate 0.004, weight decay 0.0025, beside adamw_torch_fused, learning rate "
        "0.001"
    )
    assert PretrainingArguments(output_dir="out").optimizer() == (
        "adamw_torch_fused, learning rate 0.0005"
    )


def test_a_torch_without_it_is_refused_with_what_helps(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="needs torch 2.9 or newer, this is 2.*: update it"):
        recipe()


@needs_muon
def test_what_cuts_matrices_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="whole matrices, which fsdp cuts"):
        recipe(fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="whole matrices, which deepspeed cuts"):
        recipe()


def test_its_rate_without_it_and_other_commands_are_refused():
    with pytest.raises(ValueError, match="--muon_learning_rate needs --optim muon"):
        PretrainingArguments(output_dir="out", muon_learning_rate=1e-3)
    with pytest.raises(ValueError, match="muon is not a valid OptimizerNames"):
        FinetuneArguments(output_dir="out", optim="muon")


# ---- runs ----

VALUES = {"max_steps": 12, "optim": "muon", "muon_learning_rate": 5e-3, "lr_end": 0.1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the text, a tokenizer and a run with Muon."""
    cwd = tmp_path_factory.mktemp("muon")
    (cwd / "text.txt").write_text("\n".join(DOCUMENTS))
    run(cwd, ROOT / "train_mlm.py", *flags(**RUN | VALUES))
    return cwd


@pytest.fixture
def train(whole, tmp_path, monkeypatch):
    """Runs train_mlm.py with these flags in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def main(**values):
        command = arguments(whole, **values)
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        train_mlm.main()

    return main


@needs_muon
def test_a_run_with_it_learns_by_its_schedule_and_its_card_names_it(whole):
    found = list(losses(whole / "out").values())
    assert len(found) == 12 and found[-1] < found[0] - 0.5
    # A step of warm-up, then 11 to a tenth of the peak.
    expected = [0.0] + [3e-3 * (1 - 0.9 * step / 11) for step in range(11)]
    assert rates(whole / "out") == pytest.approx(expected)
    groups = torch.load(whole / "out" / "checkpoint-12" / "optimizer.pt")["param_groups"]
    assert [x["lr"] for x in groups] == pytest.approx([3e-4, 5e-4])
    said = "muon, learning rate 0.005, weight decay 0.002, beside adamw_torch_fused, learning rate"
    assert said in (whole / "out" / "README.md").read_text()


@needs_muon
def test_it_is_resumed_to_the_bit(whole, train, tmp_path):
    train(**VALUES)
    for step in (9, 12):
        (tmp_path / "out" / f"checkpoint-{step}" / "complete.json").unlink()
    train(**VALUES, resume_from_checkpoint="last")
    ends = [x / "out" for x in (tmp_path, whole)]
    assert losses(ends[0]) == losses(ends[1]) and rates(ends[0]) == rates(ends[1])
    weights, expected = (load_file(x / "model.safetensors") for x in ends)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    weights, expected = (torch.load(x / "checkpoint-12" / "optimizer.pt") for x in ends)
    assert weights["param_groups"] == expected["param_groups"]
    for name, state in expected["state"].items():
        assert all(torch.equal(weights["state"][name][key], x) for key, x in state.items())


@needs_muon
def test_a_checkpoint_of_another_optimizer_is_refused(whole, train, tmp_path):
    checkpoint = whole / "out" / "checkpoint-12"
    with pytest.raises(ValueError, match="was trained with --optim muon, this run is without"):
        train(max_steps=15, resume_from_checkpoint=checkpoint)
    train(max_steps=3, overwrite=True)
    with pytest.raises(ValueError, match="was trained without --optim muon, this run is with"):
        train(**VALUES, resume_from_checkpoint="last")


COMPARED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from accelerate.utils import gather
import train_mlm
from mosaic_tools import mlm_trainer
from mosaic_tools.devices import leave_group

class Compared(mlm_trainer.MlmTrainer):
    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        momenta = [x["momentum_buffer"] for x in self.optimizer.state.values() if len(x) == 1]
        for x in [*self.model.parameters(), *momenta]:
            one, two = gather(x.detach()[None])
            assert torch.equal(one, two)
        # In one piece, with which the other process's does not mix.
        sys.stdout.write(f"{{len(momenta)}} momenta are the same\\n")
        return result

train_mlm.MlmTrainer = Compared
train_mlm.main()
leave_group()
"""


@needs_muon
def test_two_processes_have_the_losses_of_one_and_the_same_weights(whole, train, tmp_path):
    # Full batches only: several processes repeat documents to fill the last one of an epoch.
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS[:64]))
    (tmp_path / "held_out.txt").write_text("\n".join(DOCUMENTS[64:]))
    (tmp_path / "compared.py").write_text(COMPARED)
    values = VALUES | {"train_file": "train.txt", "validation_file": "held_out.txt", "bf16": False}
    values |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    train(**values, output_dir="one")
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    words = arguments(whole, **values, output_dir="two")[1:]
    log = run(tmp_path, *ACCELERATE, *config, "compared.py", *words)
    assert "split: 2 process(es) x 8 rows x 1 micro-batches" in log
    # Four weights of each of two layers, in each process.
    assert log.count("8 momenta are the same") == 2
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    # Muon computes in bfloat16: sums in another order may round to another 2 ** -9.
    assert len(one) == 12 and two == pytest.approx(one, rel=1e-2)
