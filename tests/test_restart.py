# SPDX-License-Identifier: Apache-2.0
"""Runs of train_mlm.py that are killed, stopped, spread over processes, compiled, or fail: the
losses of a resumed run are those of one that was never interrupted, to the bit."""

import multiprocessing
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from training import (
    ACCELERATE,
    DOCUMENTS,
    RESUME,
    ROOT,
    RUN,
    arguments,
    flags,
    losses,
    rates,
    read_log,
    run,
    start,
    wait_until,
)
from transformers import Trainer

import train_mlm
from mosaic_tools import mlm_trainer, recipe_trainer
from mosaic_tools.checkpoints import checkpoint_to_resume, newest_checkpoint
from mosaic_tools.masking import MaskingCollator
from mosaic_tools.publishing import files_to_upload
from mosaic_tools.recipe import RecipeArguments

STEPS = RUN["max_steps"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the text, the tokenizer and an uninterrupted run."""
    cwd = tmp_path_factory.mktemp("whole")
    (cwd / "text.txt").write_text("\n".join(DOCUMENTS))
    run(cwd, ROOT / "train_mlm.py", *flags(**RUN))
    assert list(losses(cwd / "out")) == list(range(1, STEPS + 1))
    return cwd


def test_a_run_that_is_killed_again_and_again_has_the_losses_of_a_whole_one(whole, tmp_path):
    out, command, generator = tmp_path / "out", arguments(whole), random.Random(4)
    log = out / "log.jsonl"

    # At a random step.
    step = generator.randint(4, 12)
    process = start(tmp_path, *command, *RESUME)
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= step, process)
    process.kill()
    assert "resuming from the start" in process.communicate()[0]

    # During a save: the folder is there, the mark that it is complete is not.
    torn = out / f"checkpoint-{generator.choice((18, 21))}"
    process = start(tmp_path, *command, *RESUME)
    wait_until(torn.exists, process)
    process.kill()
    process.wait()
    assert not (torn / "complete.json").exists()
    complete, _ = newest_checkpoint(out)
    assert complete and complete != torn

    said = run(tmp_path, *command, *RESUME)
    assert f"passed over out/{torn.name}: it was not finished" in said
    assert f"resuming from out/{complete.name}" in said
    assert losses(out) == losses(whole / "out")
    weights, expected = (load_file(x / "out" / "model.safetensors") for x in (tmp_path, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_that_is_killed_before_its_first_checkpoint_is_begun_anew(tmp_path):
    """Its log was there already, and 'last' was refused with the advice to give 'last'."""
    recipe = RecipeArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert checkpoint_to_resume(recipe) is None
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is not empty") as e:
        checkpoint_to_resume(recipe)
    assert "last" not in str(e.value)


def test_sigterm_saves_and_exits_cleanly(whole, tmp_path):
    out, command = tmp_path / "out", arguments(whole, save_steps=1000)
    process = start(tmp_path, *command)
    wait_until((out / "log.jsonl").exists, process)
    wait_until(lambda: (out / "log.jsonl").read_text().count("\n") >= 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    complete, torn = newest_checkpoint(out)
    step = int(complete.name.split("-")[1])
    assert 5 <= step < STEPS and not torn
    assert f"stopped by SIGTERM after step {step}, which is saved" in said
    # The model in the folder itself is that of a finished run.
    assert not (out / "model.safetensors").exists()
    run(tmp_path, *command, *RESUME)
    assert losses(out) == losses(whole / "out")


def test_a_stream_is_resumed_to_the_bit(whole, tmp_path):
    values = {"max_steps": 12, "dataloader_num_workers": 1}
    command = [*arguments(whole, **values), "--streaming"]
    run(tmp_path, *command)
    expected = losses(tmp_path / "out")
    for step in (9, 12):
        (tmp_path / "out" / f"checkpoint-{step}" / "complete.json").unlink()
    log = run(tmp_path, *command, *RESUME, "--dataloader_num_workers", "0", fails=True)
    assert "checkpoint-6 is of 1 process(es) with --dataloader_num_workers 1, this run has 1" in log
    log = run(tmp_path, *command, *RESUME, "--shuffle_buffer", "5", fails=True)
    assert "with --shuffle_buffer 20000 --seed 42, this run has --shuffle_buffer 5" in log
    log = run(tmp_path, *command, *RESUME)
    assert "resuming from out/checkpoint-6" in log
    assert losses(tmp_path / "out") == expected and len(expected) == 12


@pytest.mark.parametrize("model_type", ["mosaic_bert", "bert"])
def test_two_processes_have_the_losses_of_one(whole, tmp_path, model_type):
    # Full batches only: several processes repeat documents to fill the last one of an epoch.
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS[:64]))
    (tmp_path / "held_out.txt").write_text("\n".join(DOCUMENTS[64:]))
    values = {"train_file": "train.txt", "validation_file": "held_out.txt", "max_steps": 20}
    values |= {"model_type": model_type, "bf16": False}
    values |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    run(tmp_path, *arguments(whole, **values, output_dir="one"))
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    log = run(tmp_path, *ACCELERATE, *config, *arguments(whole, **values, output_dir="two"))
    assert "split: 2 process(es) x 8 rows x 1 micro-batches" in log
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    # Sums in another order: 2 ** -24 for each, amplified by 20 steps of training.
    assert two == pytest.approx(one, rel=1e-4)


def test_two_processes_share_a_stream(whole, tmp_path):
    """Each reads its part, and what they counted is added up."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("\n".join(DOCUMENTS[i * 40 : i * 40 + 40]))
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    command = [*arguments(whole, train_file="?.txt", max_steps=6, output_dir="two"), "--streaming"]
    said = run(tmp_path, *ACCELERATE, *config, *command)
    assert "2 files are shared by 2 readers" in said
    entries = [entry for entry in read_log(tmp_path / "two") if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        # [CLS] the old man reads a long book [SEP]
        assert entry["mean_length"] == 9 and entry["padding_share"] == 0
        assert entry["tokens_per_second"] == pytest.approx(9 * entry["samples_per_second"])
    places = sorted(x.name for x in (tmp_path / "two" / "checkpoint-6").glob("stream-*.pt"))
    assert places == ["stream-0.pt", "stream-1.pt"]


IN_BLOCKS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_mlm
from mosaic_tools import mlm_trainer, shuffling
from mosaic_tools.devices import leave_group

class Told(shuffling.BlockShuffle):
    def __init__(self, rows, *args):
        print("BlockShuffle of", rows, "rows", flush=True)
        super().__init__(rows, *args)

mlm_trainer.WINDOW, shuffling.BLOCK, shuffling.BLOCKS = 32, 4, 8
mlm_trainer.BlockShuffle = Told
train_mlm.main()
leave_group()
"""


def test_rows_shuffled_in_blocks_are_resumed_to_the_bit(whole, tmp_path):
    """As those of more than 1,048,576 rows; the second of epochs of 4 steps has an order of its
    own, which accelerate does not tell a sampler that skips batches."""
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS[:64]))
    (tmp_path / "held_out.txt").write_text("\n".join(DOCUMENTS[64:]))
    (tmp_path / "in_blocks.py").write_text(IN_BLOCKS)
    values = {"train_file": "train.txt", "validation_file": "held_out.txt", "max_steps": 12}
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    command = [*ACCELERATE, *config, "in_blocks.py", *arguments(whole, **values)[1:]]
    assert run(tmp_path, *command).count("BlockShuffle of 64 rows") == 2
    expected = losses(tmp_path / "out")
    for step in (9, 12):
        (tmp_path / "out" / f"checkpoint-{step}" / "complete.json").unlink()
    assert "resuming from out/checkpoint-6" in run(tmp_path, *command, *RESUME)
    assert losses(tmp_path / "out") == expected and len(expected) == 12


# ---- in this process ----


@pytest.fixture
def train(whole, tmp_path, monkeypatch):
    """Runs train_mlm.py with these flags in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def main(**values):
        command = arguments(whole, **{"max_steps": 8} | values)
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        train_mlm.main()

    return main


def test_a_compiled_step_serves_any_number_of_tokens(train, tmp_path, monkeypatch):
    generator = random.Random(0)
    texts = [" ".join(text.split()[: generator.randint(1, 9)]) for text in DOCUMENTS]
    (tmp_path / "ragged.txt").write_text("\n".join(f"{text} {i}" for i, text in enumerate(texts)))
    values = {"train_file": "ragged.txt", "max_steps": 12, "divergence": 100}
    train(**values, output_dir="eager", torch_compile=False)

    graphs, evaluate = [], mlm_trainer.MlmTrainer.evaluate

    def count_before(self, *args, **kwargs):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(mlm_trainer.MlmTrainer, "evaluate", count_before)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(**values, output_dir="compiled", torch_compile_backend="aot_eager")
    # 24 micro-batches of different totals, labels and lengths: a graph where rows have padding, and
    # at most one more where none has.
    assert 1 <= graphs[0] <= 2
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert len(eager) == 12 and compiled == pytest.approx(eager, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_batch(train, tmp_path, monkeypatch):
    step, compute_loss = 5, mlm_trainer.MlmTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        bad = self.state.global_step == step - 1
        return compute_loss(self, *args, **kwargs) * (float("nan") if bad else 1)

    monkeypatch.setattr(mlm_trainer.MlmTrainer, "compute_loss", poisoned)
    with pytest.raises(
        FloatingPointError, match="stopped in step 5: the loss is nan.*learning_rate"
    ):
        train(save_steps=1)
    batch = load_file(tmp_path / "out" / "step-5-process-0.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["labels"]) == 8
    tokens = batch["batch.cu_seqlens"][-1]
    assert len(batch["batch.cu_seqlens"]) == 9 and 0 < tokens <= batch["labels"].numel()
    # The step's own checkpoint would hold weights that are not finite.
    complete, torn = newest_checkpoint(tmp_path / "out")
    assert complete.name == "checkpoint-4" and not torn


def test_a_loss_that_rises_stops_the_run(train, tmp_path, monkeypatch):
    compute_loss = mlm_trainer.MlmTrainer.compute_loss

    def rising(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) + (2.0 if self.state.global_step == 5 else 0)

    monkeypatch.setattr(mlm_trainer.MlmTrainer, "compute_loss", rising)
    with pytest.raises(FloatingPointError, match=r"stopped in step 6: the loss rose from .* 1.5"):
        train(divergence=1.5, learning_rate=1e-6)
    assert (tmp_path / "out" / "step-6-process-0.safetensors").exists()


def test_a_complete_run_that_is_resumed_ends_as_it_had(train, tmp_path):
    """Trainer took another step; and then the last checkpoint passed for the best."""
    # The first checkpoint's loss is higher, which is called better here.
    values = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    values |= {"load_best_model_at_end": True, "greater_is_better": True}
    train(**values)
    before = load_file(tmp_path / "out" / "model.safetensors")
    best = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(before[name], best[name]) for name in before)
    train(**values, resume_from_checkpoint="last")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert newest_checkpoint(tmp_path / "out")[0].name == "checkpoint-6"
    with pytest.raises(ValueError, match="checkpoint is of step 6, of which the run has 3"):
        train(max_steps=3, resume_from_checkpoint="last")


def test_a_run_goes_on_with_the_same_model_and_says_if_rows_change(train, tmp_path, capfd):
    """Weights of other heads fit, and rows of another order were read, both without a word."""
    values = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}
    train(**values)
    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-3 has num_attention_heads 2, this run 4: giv"):
        train(**values, num_attention_heads=4, resume_from_checkpoint="last")
    capfd.readouterr()
    train(**values, resume_from_checkpoint="last")
    assert "or come twice" not in capfd.readouterr().out
    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    train(**values, seed=43, global_batch_size=4, resume_from_checkpoint="last")
    said = capfd.readouterr().out
    assert "checkpoint-3 was trained with global_batch_size 16, not 4, seed 42, not 43" in said


def test_a_smoothed_loss_is_a_tokens_mean_whatever_the_micro_batches(train, tmp_path):
    """With transformers 4 and 5.0 it was as many times as large."""
    for rows in (16, 4):
        values = {"output_dir": f"out-{rows}", "per_device_train_batch_size": rows}
        train(**values, label_smoothing_factor=0.1, max_steps=2, hidden_dropout_prob=0.0)
    assert losses(tmp_path / "out-4") == pytest.approx(losses(tmp_path / "out-16"), rel=0.05)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_run_goes_on_with_the_rates_and_betas_that_it_is_told(train, tmp_path, capfd, optim):
    """They were the checkpoint's, whatever the flags said."""
    if optim == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    values = {"max_steps": 6, "hidden_dropout_prob": 0.0, "optim": optim}
    values |= {"muon_learning_rate": 2e-3} if optim == "muon" else {}
    train(**values)
    before = losses(tmp_path / "out")
    scheduled = rates(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    capfd.readouterr()
    train(**values, resume_from_checkpoint="last")
    assert losses(tmp_path / "out") == before
    assert "was trained with" not in capfd.readouterr().out

    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    values |= {"muon_learning_rate": 1e-4} if optim == "muon" else {}
    values |= {"learning_rate": 3e-4, "decoupled_weight_decay": 1e-3, "adam_beta2": 0.9}
    train(**values, resume_from_checkpoint="last")
    said = capfd.readouterr().out
    change = "learning_rate 0.003, and goes on with 0.0003"
    assert f"out/checkpoint-3 was trained with {change}" in said
    change = "muon_learning_rate 0.002, and goes on with 0.0001"
    assert (f"out/checkpoint-3 was trained with {change}" in said) == (optim == "muon")
    found = rates(tmp_path / "out")
    assert found[:3] == scheduled[:3]
    assert found[3:] == pytest.approx([x / 10 for x in scheduled[3:]])
    checkpoint = tmp_path / "out" / "checkpoint-6"
    groups = torch.load(checkpoint / "optimizer.pt")["param_groups"]
    peaks = [group["initial_lr"] for group in groups]
    assert peaks[0] == 3e-4 and peaks[-1] == (1e-4 if optim == "muon" else 3e-4)
    assert torch.load(checkpoint / "scheduler.pt")["base_lrs"] == peaks
    assert groups[0]["betas"] == (0.9, 0.9)
    for group in groups:
        assert group["weight_decay"] in (0, pytest.approx(1e-3 / group["initial_lr"]))


def test_a_rate_that_goes_by_the_loss_is_kept_and_betas_are_what_the_run_is_told(train, tmp_path):
    values = {"max_steps": 6, "lr_scheduler_type": "reduce_lr_on_plateau"}
    values |= {"eval_strategy": "steps", "eval_steps": 3}
    train(**values)
    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    train(**values, learning_rate=1e-4, adam_beta2=0.9, resume_from_checkpoint="last")
    (group, *_) = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.pt")["param_groups"]
    assert group["betas"] == (0.9, 0.9) and group["lr"] == 3e-3


@pytest.mark.parametrize("micro_batch", [4, 16])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_with_other_micro_batches(train, tmp_path, micro_batch, streaming):
    """With transformers 4 steps had the checkpoint's micro-batches, as many as of the new size fill
    a step."""
    values = {"max_steps": 6, "hidden_dropout_prob": 0.0, "streaming": streaming}
    train(**values)
    expected = losses(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-6" / "complete.json").unlink()
    train(**values, per_device_train_batch_size=micro_batch, resume_from_checkpoint="last")
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-4)


def test_a_full_disk_after_the_model_is_saved_names_the_flag_that_helps(train, tmp_path):
    """Without a checkpoint it was --resume_from_checkpoint last, which was refused then."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="report could not be written.* with --overwrite"):
        train(overwrite=True, save_strategy="no")


def test_a_full_disk_is_an_error_that_says_what_is_intact(train, tmp_path):
    (tmp_path / "out" / "checkpoint-6").mkdir(parents=True)
    # Whatever is written there finds no space left on the device.
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="checkpoint-6 could not be written.*Make room.*checkpoint-3"):
        train(overwrite=True)
    assert newest_checkpoint(tmp_path / "out")[0].name == "checkpoint-3"


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), EOFError()])
def test_a_worker_that_dies_while_it_is_read_from_is_named_too(train, monkeypatch, error):
    """It was a bare ConnectionResetError, or an EOFError that said nothing."""

    def cut_off(*args):
        raise error

    monkeypatch.setattr(Trainer, "get_batch_samples", cut_off)
    with pytest.raises(RuntimeError, match="died: .*(Connection reset|EOFError). Repeat the"):
        train(dataloader_num_workers=1)


@pytest.mark.parametrize("busy", ["save_model", "evaluate", "save_metrics"])
def test_a_worker_that_is_killed_after_the_last_step_is_named_too(train, monkeypatch, busy):
    """torch raises in whatever the process does when it hears of it."""

    def killed(*args, **kwargs):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(mlm_trainer.MlmTrainer, busy, killed)
    with pytest.raises(RuntimeError, match="died: .*Killed.*(--resume_from.* last|--overwrite)"):
        train(dataloader_num_workers=1, save_steps=1000)


def test_a_death_that_torch_hears_of_while_it_is_told_is_told(train, monkeypatch):
    """A worker that is read from is missed twice: by its pipe, and a moment later by a signal."""
    way_on, calls = recipe_trainer.way_on, []

    def interrupted(args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        return way_on(args)

    def cut_off(*args):
        raise EOFError

    monkeypatch.setattr(recipe_trainer, "way_on", interrupted)
    monkeypatch.setattr(Trainer, "get_batch_samples", cut_off)
    with pytest.raises(RuntimeError, match="loads rows died: EOFError. Repeat the command"):
        train(dataloader_num_workers=1)


def test_an_error_inside_a_worker_stays_what_it_is(train, monkeypatch):
    def strange(*args):
        raise RuntimeError("a strange row")

    monkeypatch.setattr(MaskingCollator, "mask", strange)
    with pytest.raises(RuntimeError, match="a strange row") as e:
        train(dataloader_num_workers=1)
    assert "died" not in str(e.value)


@pytest.mark.parametrize("busy", ["training_step", "_save_checkpoint", "prediction_step"])
def test_a_killed_worker_is_named_wherever_the_run_was_and_what_is_intact(train, monkeypatch, busy):
    """During a save it passed for a full disk: torch raises in whatever the run is busy with."""
    method = getattr(Trainer, busy)

    def killing(self, *args, **kwargs):
        if self.state.global_step >= 4:
            multiprocessing.active_children()[0].kill()
            time.sleep(60)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, busy, killing)
    with pytest.raises(RuntimeError, match="loads rows died: .*killed by signal.*checkpoint-") as e:
        train(save_steps=3, dataloader_num_workers=1, per_device_eval_batch_size=1)
    assert "--resume_from_checkpoint last" in str(e.value) and "Make room" not in str(e.value)


def test_a_finished_folder_is_uploaded_once_and_whole(train, monkeypatch, capsys):
    uploads = []

    def publish(folder, *where):
        assert (folder / "README.md").exists() and (folder / "model.safetensors").exists()
        uploads.append((folder.name, *where))
        return "https://huggingface.co/org/name/commit/1"

    monkeypatch.setattr(train_mlm, "publish", publish)
    train(push_to_hub="org/name", private=True, revision="v2")
    assert uploads == [("out", "org/name", True, "v2")]
    assert "https://huggingface.co/org/name/commit/1" in capsys.readouterr().out


def test_an_overwritten_folder_keeps_nothing_made_of_the_former_weights(train, tmp_path):
    """They would be uploaded beside the new weights."""
    former = ("onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.xml")
    former += ("openvino/openvino_model.bin", "adapter_config.json", "adapter_model.safetensors")
    former += ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")
    kept = ("notes.txt", "onnx/notes.txt", "openvino/notes.bin")
    for name in (*former, *kept):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("former")
    train(overwrite=True)
    assert [x for x in former if (tmp_path / "out" / x).exists()] == []
    assert all((tmp_path / "out" / x).exists() for x in kept)
    assert "model.safetensors" in files_to_upload(tmp_path / "out")


def test_a_bad_name_to_upload_to_is_refused_before_training(train):
    with pytest.raises(ValueError, match="'name' is no ORG/NAME"):
        train(push_to_hub="name")
