# SPDX-License-Identifier: Apache-2.0
"""train_mlm.py and demo.py: tiny runs in processes of their own; what needs no training is called
directly."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from training import (
    ACCELERATE,
    DOCUMENTS,
    ROOT,
    SIZES,
    flags,
    read_json,
    read_log,
    run,
    trained_tokenizer,
    write_vocab,
)

import train_mlm
from mosaic_tools import checkpoints, mlm_trainer, tokenization
from mosaic_tools.checkpoints import Checkpoints, change_of_precision, mark_complete, what_is_torn
from mosaic_tools.recipe import ModelArguments, RecipeArguments

STEPS = 240


def log_history(folder: Path, step: int) -> list[dict]:
    return read_json(folder, f"checkpoint-{step}", "trainer_state.json")["log_history"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run through accelerate: a recipe for 10 steps, of which a flag makes 240."""
    cwd = tmp_path_factory.mktemp("trained")
    # A blank line and one of spaces are no documents.
    (cwd / "text.txt").write_text("\n".join([*DOCUMENTS, "", "   "]))
    recipe = SIZES | {
        "train_file": "text.txt",
        "output_dir": "out",
        "validation_split": 20,
        "max_steps": 10,
        # A string in YAML, a number on the command line.
        "learning_rate": "3e-3",
        "hidden_dropout_prob": 0.0,
        "per_device_train_batch_size": 16,
        "cpu_threads": 1,
        "logging_steps": 20,
        "save_steps": STEPS // 2,
        "mlm_probability": None,
        "lr_scheduler_kwargs": {},
        "license": "mit",
        "language": ["en"],
    }
    (cwd / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = run(cwd, *ACCELERATE, ROOT / "train_mlm.py", "recipe.yaml", "--max_steps", STEPS)
    return SimpleNamespace(cwd=cwd, folder=cwd / "out", log=log)


def test_flags_after_a_recipe_override_it(trained):
    assert log_history(trained.folder, STEPS)[-1]["step"] == STEPS


def test_a_run_says_at_its_start_what_it_is(trained):
    parameters = re.search(
        r"model: mosaic_bert, 2 layers x 64, vocabulary 128, ([\d,]+) parameters", trained.log
    )
    assert parameters and int(parameters[1].replace(",", "")) > 128 * 64
    assert re.search(r"data: text.txt: \d+ rows, [\d,]+ tokens", trained.log)
    precision = RecipeArguments(output_dir="out").precision()
    assert re.search(rf"computed in: {precision} \(.+\), attention sdpa, on cpu", trained.log)


def test_loss_falls(trained):
    losses = [entry["loss"] for entry in log_history(trained.folder, STEPS) if "loss" in entry]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1


def test_evaluation_reports_loss_and_masked_accuracy_beside_a_constant_guess(trained):
    metrics = read_json(trained.folder, "eval_results.json")
    assert metrics["eval_loss"] < math.log(128)
    assert 0 < metrics["eval_commonest_token_accuracy"] < metrics["eval_masked_accuracy"] <= 1


def test_the_log_says_how_fast_and_how_full(trained):
    entries = [entry for entry in read_log(trained.folder) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(20, STEPS + 1, 20))
    for entry in entries:
        # [CLS] the old man reads a long book [SEP], of which none is cut into pieces.
        assert entry["mean_length"] == 9 and entry["padding_share"] == 0
        assert entry["tokens_per_second"] == pytest.approx(9 * entry["samples_per_second"])
        assert entry["samples_per_second"] > 0 and "mfu" not in entry


def test_the_picture_shows_the_curves(trained):
    pixels = matplotlib.image.imread(trained.folder / "training.png")
    assert pixels.shape[:2] == (1080, 1080) and pixels.std() > 0.05
    assert "(training.png)" in (trained.folder / "README.md").read_text()


def test_the_learning_rate_warms_up_for_six_per_cent_and_falls_to_zero(trained):
    rates = [
        entry["learning_rate"] for entry in log_history(trained.folder, STEPS) if "loss" in entry
    ]
    # Logged is the rate of the step just made; 14 of 240 steps warm up.
    assert rates == pytest.approx([3e-3 * (240 - step) / 226 for step in range(19, 240, 20)])


def test_the_folder_is_a_complete_hub_repository(trained):
    files = {path.name for path in trained.folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files
    for name in ("bert_layers", "bert_padding", "configuration_bert", "flash_attn_triton"):
        assert (trained.folder / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    config, ours = read_json(trained.folder, "config.json"), read_json(ROOT, "config.json")
    assert config["auto_map"] == ours["auto_map"]
    assert config["model_type"] == ours["model_type"]
    assert config["alibi_starting_size"] == config["max_position_embeddings"] == 128
    assert config["vocab_size"] == 128 and config["low_precision_layernorm"]
    assert str(ROOT) not in (trained.folder / "config.json").read_text()


def test_tokenizers_name_a_class_that_transformers_4_and_5_know(trained):
    # 5.x writes "TokenizersBackend", which 4.57 cannot load; 5.0 then forgets token types.
    for folder in (trained.folder, trained.folder / f"checkpoint-{STEPS}"):
        settings = read_json(folder, "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "token_type_ids" in settings["model_input_names"]


def test_the_model_card_holds_figures_of_the_run_and_an_example_that_runs(trained):
    front, card = (trained.folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(front)["pipeline_tag"] == "fill-mask"
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["language"] == ["en"]
    assert yaml.safe_load(front)["library_name"] == "transformers"
    metrics = read_json(trained.folder, "eval_results.json")
    assert f"| masked accuracy | {metrics['eval_masked_accuracy']:.1%} |" in card
    assert f"{STEPS} steps of 16 rows" in card

    checks = """
from transformers import AutoModelForMaskedLM, AutoTokenizer
trust = {"trust_remote_code": True}
model, info = AutoModelForMaskedLM.from_pretrained(".", output_loading_info=True, **trust)
assert not any(info.values()), info
pair = AutoTokenizer.from_pretrained(".", **trust)("a man", "a book")
assert sorted(set(pair["token_type_ids"])) == [0, 1]
guess = pipe(f"the old man {pipe.tokenizer.mask_token} a new book")[0]
assert guess["token_str"] == "reads", guess
"""
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert run(trained.folder, "-c", example + checks).count("'score': ") == 5


def test_the_model_card_has_the_evaluation_where_the_hub_reads_it(trained):
    data = ModelCard.load(trained.folder / "README.md").data
    metrics = read_json(trained.folder, "eval_results.json")
    assert data.model_name == "out"
    assert {x.metric_type: x.metric_value for x in data.eval_results} == {
        "accuracy": metrics["eval_masked_accuracy"],
        "loss": metrics["eval_loss"],
    }
    for result in data.eval_results:
        assert result.task_type == "fill-mask" and "15% of tokens masked" in result.metric_name
        assert (result.dataset_type, result.dataset_name) == ("custom", "text.txt")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained, tmp_path):
    shutil.copytree(trained.folder / "checkpoint-120", tmp_path / "out" / "checkpoint-120")
    shutil.copy(trained.cwd / "text.txt", tmp_path)
    recipe = trained.cwd / "recipe.yaml"
    resume = flags(max_steps=STEPS, resume_from_checkpoint="last")
    run(tmp_path, ROOT / "train_mlm.py", recipe, *resume)
    # Had it trained its tokenizer again, ids would differ.
    saved = [folder / "tokenizer.json" for folder in (tmp_path / "out", trained.folder)]
    assert saved[0].read_text() == saved[1].read_text()
    resumed, whole = log_history(tmp_path / "out", STEPS), log_history(trained.folder, STEPS)
    losses = [[x["loss"] for x in log if "loss" in x] for log in (resumed, whole)]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_checkpoint_is_continued_from_a_stream(trained, tmp_path):
    rows = "\n".join(json.dumps({"body": text, "other": 1}) for text in DOCUMENTS)
    (tmp_path / "rows.jsonl").write_text(rows)
    arguments = flags(
        model_name_or_path=trained.folder,
        train_file="rows.jsonl",
        text_column="body",
        validation_split=20,
        max_steps=4,
        max_seq_length=256,
        cpu_threads=1,
        learning_rate=0,
        output_dir="out",
    )
    log = run(tmp_path, ROOT / "train_mlm.py", *arguments, "--streaming")
    assert "data: rows.jsonl: streamed" in log
    before, after = (read_json(f, "eval_results.json") for f in (trained.folder, tmp_path / "out"))
    # The same documents are held out, and nothing was learnt at rate 0.
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=0.02)
    config = read_json(tmp_path, "out", "config.json")
    assert config["alibi_starting_size"] == config["max_position_embeddings"] == 256
    assert config["auto_map"] == read_json(ROOT, "config.json")["auto_map"]


def test_a_tokenizer_larger_than_the_checkpoints_vocabulary_is_refused(trained, tmp_path):
    write_vocab(tmp_path / "vocab.txt", entries=205)
    arguments = flags(
        model_name_or_path=trained.folder,
        tokenizer_name="vocab.txt",
        train_file=trained.cwd / "text.txt",
        output_dir="out",
    )
    log = run(tmp_path, ROOT / "train_mlm.py", *arguments, fails=True)
    assert re.search(
        r"ValueError: .*ids up to 204, .* vocabulary of 128: give the --tokenizer_name", log
    )


def test_a_tokenizer_of_other_entries_is_refused(trained, tmp_path):
    write_vocab(tmp_path / "vocab.txt", "the", "man")
    args = ModelArguments(model_name_or_path=str(trained.folder))
    tokenizer = tokenization.existing_tokenizer(str(tmp_path / "vocab.txt"), None)
    with pytest.raises(ValueError, match="other entries than that of .*leave out --tokenizer_name"):
        mlm_trainer.continued_model(args, tokenizer, 64)


def test_demo_judges_the_model_that_the_embedded_text_made(tmp_path):
    tiny = SIZES | {"vocab_size": 2000, "max_seq_length": 32, "max_steps": 2, "cpu_threads": 1}
    log = run(tmp_path, ROOT / "train_mlm.py", *flags(**tiny, output_dir="out"))
    assert "English text that CPython carries" in log
    output = run(tmp_path, ROOT / "demo.py", "out", "--factor", "1000", fails=True)
    assert output.count("truth: ") == 5
    assert re.search(r"that is [\d.]+ times as good, 1000 times are asked for", output)


# ---- without training ----


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    """AdamW's updates are lost in bfloat16's 8 bits."""
    sizes = SIZES | {"vocab_size": 128, "max_position_embeddings": 128}
    config = transformers.AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **sizes)
    model = transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), attention_probs_dropout_prob=0.2)
    continued = mlm_trainer.continued_model(args, trained_tokenizer(), 64)
    assert {p.dtype for p in continued.parameters()} == {torch.float32}
    assert continued.config.attention_probs_dropout_prob == 0.2


def test_a_published_checkpoint_is_continued_as_a_mosaic_bert():
    """transformers 4.57 keeps its config's model_type, "bert"."""
    args = ModelArguments(model_name_or_path=str(ROOT / "tests/goldens/mosaic_tiny"))
    model = mlm_trainer.continued_model(args, trained_tokenizer(), 64)
    assert train_mlm.is_ours(model.config)


def test_a_run_says_why_it_computes_in_float32(monkeypatch):
    monkeypatch.setattr("mosaic_tools.devices.cpu_instructions", lambda: ["avx2", "avx512f"])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    *_, data, args = train_mlm.parse(flags(output_dir="out", use_cpu=True))
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]]})
    trainer = SimpleNamespace(args=args, model=model, train_dataset=rows, eval_dataset=rows)
    said = train_mlm.describe(trainer, data)["computed in"]
    why = "this CPU has neither amx_bf16 nor avx512_bf16, and would emulate bf16"
    assert said == f"float32 ({why}), attention sdpa, on cpu"


def test_a_run_that_goes_on_in_another_precision_says_so(tmp_path):
    """A checkpoint of a processor with bf16 may be resumed on one without."""
    bf16, float32 = (
        RecipeArguments(output_dir=str(tmp_path), use_cpu=True, bf16=x) for x in (True, False)
    )
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    # As those of earlier versions are.
    assert change_of_precision(checkpoint, float32) is None
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    Checkpoints(streams=False).on_save(bf16, state, None)
    assert change_of_precision(checkpoint, bf16) is None and not what_is_torn(checkpoint)
    change = change_of_precision(checkpoint, float32)
    assert change == f"{checkpoint} was trained in bf16 autocast, and goes on in float32 (as set)"


def test_weight_decay_reaches_every_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    names = mlm_trainer.MlmTrainer.get_decay_parameter_names(None, model)
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_metrics_need_token_ids_and_losses_and_count_masked_ones():
    logits = torch.tensor([[[0.0, 2, 1], [3, 0, 0], [0, 0, 1]]])
    labels = torch.tensor([[1, -100, 1]])
    guesses, losses = mlm_trainer.guesses_and_losses(logits, labels)
    assert guesses.tolist() == [[1, 0, 2]]
    metrics = mlm_trainer.of_masked_tokens(
        SimpleNamespace(predictions=(guesses.numpy(), losses.numpy()), label_ids=labels.numpy())
    )
    first = math.log(1 + math.e**2 + math.e) - 2
    last = math.log(2 + math.e)
    assert metrics.pop("loss") == pytest.approx((first + last) / 2)
    assert metrics == {"masked_accuracy": 0.5, "commonest_token_accuracy": 1.0}


@pytest.mark.parametrize("model_type", ["mosaic_bert", "bert"])
def test_the_evaluations_loss_does_not_depend_on_its_batches(trained, tmp_path, model_type):
    """A batch's mean counted by its rows, however few of their tokens were masked."""
    lines = DOCUMENTS[:6] + [f"the {x}" for x in ("old", "young", "man", "reader", "book")] * 3
    (tmp_path / "held-out.txt").write_text("\n".join(lines))
    losses = []
    for size in (1, 4, 64):
        values = SIZES | {"train_file": trained.cwd / "text.txt", "seed": 7, "max_steps": 1}
        values |= {"validation_file": "held-out.txt", "per_device_eval_batch_size": size}
        values |= {"output_dir": f"out-{size}", "cpu_threads": 1, "bf16": "false"}
        values |= {"tokenizer_name": trained.folder, "model_type": model_type}
        run(tmp_path, ROOT / "train_mlm.py", *flags(**values))
        losses.append(read_json(tmp_path, f"out-{size}", "eval_results.json")["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, " after a warm-up of 6%, then linear to 0%"),
        ({"lr_end": 0.002}, " after a warm-up of 6%, then polynomial to 0.2%"),
        ({"lr_scheduler_type": "constant"}, ", constant"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
            " after a warm-up of 9 steps, then constant_with_warmup",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
            " after a warm-up of 6%, then cosine_with_min_lr with {'min_lr': 1e-05}",
        ),
    ],
)
def test_a_card_says_no_end_that_a_schedule_does_not_have(tmp_path, values, expected):
    args = RecipeArguments(output_dir=str(tmp_path), **values)
    assert train_mlm.schedule(args) == expected


# ---- bad input ----


def test_an_output_folder_with_files_is_refused_and_kept(tmp_path):
    (tmp_path / "precious").write_text("kept")
    recipe = RecipeArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty.*--overwrite"):
        checkpoints.checkpoint_to_resume(recipe)
    recipe.overwrite = True
    assert checkpoints.checkpoint_to_resume(recipe) is None
    assert (tmp_path / "precious").read_text() == "kept"


def test_what_a_crashed_run_left_is_not_overwritten_unasked(tmp_path):
    (checkpoint_of(tmp_path, 3) / "complete.json").unlink()
    recipe = RecipeArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="is not empty.*--resume_from_checkpoint last"):
        checkpoints.checkpoint_to_resume(recipe)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    recipe = RecipeArguments(
        output_dir=str(tmp_path), resume_from_checkpoint="missing/checkpoint-7"
    )
    with pytest.raises(ValueError, match="missing/checkpoint-7: there is no such folder"):
        checkpoints.checkpoint_to_resume(recipe)


def test_a_checkpoint_without_optimizer_is_not_resumed_from(tmp_path):
    """The rate began anew at its peak, without a word."""
    checkpoint = checkpoint_of(tmp_path, 5)
    (checkpoint / "optimizer.pt").rename(checkpoint / "weights.pt")
    (checkpoint / "complete.json").unlink()
    mark_complete(checkpoint)
    for wanted in ("last", str(checkpoint)):
        recipe = RecipeArguments(output_dir=str(tmp_path), resume_from_checkpoint=wanted)
        with pytest.raises(ValueError, match="checkpoint-5 has no optimizer's state, as --save_on"):
            checkpoints.checkpoint_to_resume(recipe)
    for name in ("optimizer_0/x", "global_step5/x", "optimizer.bin"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).touch()
        assert checkpoints.checkpoint_to_resume(recipe) == str(checkpoint)
        (checkpoint / name).unlink()
        if "/" in name:
            (checkpoint / name).parent.rmdir()


def checkpoint_of(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"12345678")
    mark_complete(checkpoint)
    return checkpoint


def test_torn_checkpoints_are_named_and_passed_over(tmp_path, capsys):
    good, short, lacking, unfinished = (checkpoint_of(tmp_path, i) for i in (9, 10, 11, 100))
    (short / "optimizer.pt").write_bytes(b"1234")
    (lacking / "optimizer.pt").unlink()
    (unfinished / "complete.json").unlink()
    recipe = RecipeArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")
    assert checkpoints.checkpoint_to_resume(recipe) == str(good)
    said = capsys.readouterr().out
    assert f"passed over {short}: optimizer.pt has 4 bytes of 8" in said
    assert f"passed over {lacking}: optimizer.pt is missing" in said
    assert f"passed over {unfinished}: it was not finished" in said
    recipe.resume_from_checkpoint = None
    with pytest.raises(ValueError, match="holds checkpoint-9 of another run.*move the checkpoints"):
        checkpoints.checkpoint_to_resume(recipe)
    older = checkpoint_of(tmp_path, 8)
    recipe.resume_from_checkpoint = str(older)
    with pytest.raises(ValueError, match="checkpoint-9 is newer than .*checkpoint-8: move it away"):
        checkpoints.checkpoint_to_resume(recipe)
    recipe.resume_from_checkpoint = str(short)
    with pytest.raises(ValueError, match="checkpoint-10: optimizer.pt has 4 bytes of 8"):
        checkpoints.checkpoint_to_resume(recipe)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "holds a list, expected an object"),
        ("8", "holds a int, expected an object"),
        ('{"optimizer.pt": ', "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["list", "number", "cut", "empty"],
)
def test_a_checkpoint_whose_list_of_files_cannot_be_read_is_torn(tmp_path, content, reason):
    """One that is no object ended the run with an AttributeError."""
    good, torn = checkpoint_of(tmp_path, 9), checkpoint_of(tmp_path, 10)
    (torn / "complete.json").write_text(content)
    assert reason in what_is_torn(torn)
    newest, passed_over = checkpoints.newest_checkpoint(tmp_path)
    assert newest == good and len(passed_over) == 1 and reason in passed_over[0]


def test_last_starts_anew_where_no_checkpoint_is_complete_and_overwrites_nothing_else(
    tmp_path, capsys
):
    recipe = RecipeArguments(output_dir=str(tmp_path / "out"), resume_from_checkpoint="last")
    assert checkpoints.checkpoint_to_resume(recipe) is None
    assert "resuming from the start: there is no complete checkpoint" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="out is not empty"):
        checkpoints.checkpoint_to_resume(recipe)
    (checkpoint_of(tmp_path / "out", 3) / "complete.json").unlink()
    # A finished model, whose checkpoints someone has made smaller, was replaced.
    with pytest.raises(ValueError, match="out is not empty: choose another, or write into it with"):
        checkpoints.checkpoint_to_resume(recipe)
    (tmp_path / "out" / "model.safetensors").unlink()
    assert checkpoints.checkpoint_to_resume(recipe) is None


def test_a_checkpoint_of_another_folder_is_no_leave_to_overwrite(tmp_path):
    """It was: a finished run beside it, and files that are no run's."""
    checkpoint = checkpoint_of(tmp_path, 5)
    out = tmp_path / "out"
    asked = {"output_dir": str(out), "resume_from_checkpoint": str(checkpoint)}
    recipe = RecipeArguments(**asked)
    assert checkpoints.checkpoint_to_resume(recipe) == str(checkpoint)
    out.mkdir()
    (out / "README.md").touch()
    with pytest.raises(ValueError, match="out is not empty: choose another"):
        checkpoints.checkpoint_to_resume(recipe)
    overwriting = RecipeArguments(**asked, overwrite=True)
    assert checkpoints.checkpoint_to_resume(overwriting) == str(checkpoint)
    own = checkpoint_of(out, 7)
    for arguments in (recipe, overwriting):
        with pytest.raises(ValueError, match="holds checkpoint-7 of another run"):
            checkpoints.checkpoint_to_resume(arguments)
    recipe.resume_from_checkpoint = str(own)
    assert checkpoints.checkpoint_to_resume(recipe) == str(own)


def test_output_dir_is_asked_for():
    with pytest.raises(ValueError, match="give --output_dir"):
        checkpoints.checkpoint_to_resume(RecipeArguments())
