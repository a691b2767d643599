# SPDX-License-Identifier: Apache-2.0
"""train_mlm.py and demo.py: tiny runs in processes of their own, offline, with caches of their own;
what needs no training is called directly."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import embedded_text
import train_mlm

ROOT = Path(__file__).resolve().parents[1]

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 150,
}
STEPS = 240
ACCELERATE = ["-m", "accelerate.commands.launch"]
DOCUMENTS = [
    f"the {age} {reader} reads a {size} book"
    for age in ("old", "young", "tall", "small", "wise")
    for reader in ("man", "woman", "child", "teacher")
    for size in ("long", "short", "new", "green")
]


def run(cwd: Path, *command, fails=False) -> str:
    """Output of `python *command`, offline and with caches under cwd."""
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, *(str(word) for word in command)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def flags(**values) -> list[str]:
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


def read_json(*path):
    return json.loads(Path(*path).read_text())


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
    }
    (cwd / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = run(cwd, *ACCELERATE, ROOT / "train_mlm.py", "recipe.yaml", "--max_steps", STEPS)
    return SimpleNamespace(cwd=cwd, folder=cwd / "out", log=log)


def test_flags_after_a_recipe_override_it(trained):
    assert log_history(trained.folder, STEPS)[-1]["step"] == STEPS


def test_a_run_says_at_its_start_what_it_is(trained):
    parameters = re.search(
        r"model: 2 layers x 64, vocabulary 128, ([\d,]+) parameters", trained.log
    )
    assert parameters and int(parameters[1].replace(",", "")) > 128 * 64
    assert re.search(r"data: text.txt: \d+ documents, [\d,]+ tokens", trained.log)
    assert "bf16 autocast, attention sdpa, 1 process(es) on cpu" in trained.log


def test_loss_falls(trained):
    losses = [entry["loss"] for entry in log_history(trained.folder, STEPS) if "loss" in entry]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1


def test_evaluation_reports_loss_and_masked_accuracy_beside_a_constant_guess(trained):
    metrics = read_json(trained.folder, "eval_results.json")
    assert metrics["eval_loss"] < math.log(128)
    assert 0 < metrics["eval_commonest_token_accuracy"] < metrics["eval_masked_accuracy"] <= 1


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
    assert yaml.safe_load(front)["library_name"] == "transformers"
    metrics = read_json(trained.folder, "eval_results.json")
    assert f"| masked accuracy | {metrics['eval_masked_accuracy']:.1%} |" in card
    assert f"{STEPS} steps of 16 documents" in card

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
    words = [*train_mlm.SPECIAL_TOKENS, *(f"word{i}" for i in range(200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
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


def test_demo_judges_the_model_that_the_embedded_text_made(tmp_path):
    tiny = SIZES | {"vocab_size": 2000, "max_seq_length": 32, "max_steps": 2, "cpu_threads": 1}
    log = run(tmp_path, ROOT / "train_mlm.py", *flags(**tiny, output_dir="out"))
    assert "English text that CPython carries" in log
    output = run(tmp_path, ROOT / "demo.py", "out", "--factor", "1000", fails=True)
    assert output.count("truth: ") == 5
    assert re.search(r"that is [\d.]+ times as good, 1000 times are asked for", output)


# ---- without training ----


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def parse(*words, **values):
    return train_mlm.parse([*words, *flags(output_dir="out", **values)])


def test_the_defaults_are_the_recipe():
    model, _, data, recipe = parse()
    assert (data.mlm_probability, data.eval_mlm_probability) == (0.3, 0.15)
    assert data.max_seq_length == 128
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon) == (0.9, 0.98, 1e-6)
    # torch's AdamW multiplies decay by the learning rate, the recipe's 1e-5 is decoupled from it.
    assert recipe.weight_decay * recipe.learning_rate == pytest.approx(1e-5)
    assert recipe.lr_scheduler_type == "linear" and recipe.get_warmup_steps(70_000) == 4200
    assert recipe.bf16 and model.low_precision_layernorm


def test_warm_up_is_a_number_of_steps_or_a_share(monkeypatch):
    recipe = parse(warmup_steps=7)[-1]
    assert recipe.get_warmup_steps(1000) == 7
    recipe.warmup_steps = 0.2
    assert recipe.get_warmup_steps(1000) == 200
    assert parse(warmup_share=0)[-1].get_warmup_steps(1000) == 0


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    """AdamW's updates are lost in bfloat16's 8 bits."""
    sizes = SIZES | {"vocab_size": 128, "max_position_embeddings": 128}
    config = train_mlm.AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **sizes)
    model = train_mlm.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    args = train_mlm.ModelArguments(
        model_name_or_path=str(tmp_path), attention_probs_dropout_prob=0.2
    )
    continued = train_mlm.continued_model(args, trained_tokenizer(), 64)
    assert {p.dtype for p in continued.parameters()} == {torch.float32}
    assert continued.config.attention_probs_dropout_prob == 0.2


def test_weight_decay_reaches_every_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    names = train_mlm.MlmTrainer.get_decay_parameter_names(None, model)
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_metrics_need_token_ids_only_and_count_masked_ones():
    logits = torch.tensor([[[0.0, 2, 1], [3, 0, 0], [0, 0, 1]]])
    guesses = train_mlm.most_likely_tokens(logits, None)
    assert guesses.tolist() == [[1, 0, 2]]
    labels = np.array([[1, -100, 1]])
    metrics = train_mlm.masked_accuracy(
        SimpleNamespace(predictions=guesses.numpy(), label_ids=labels)
    )
    assert metrics == {"masked_accuracy": 0.5, "commonest_token_accuracy": 1.0}


def write_documents(folder: Path, suffix: str):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS, "label": list(range(len(DOCUMENTS)))})
    path = str(folder / f"rows{suffix}")
    if suffix == ".txt":
        Path(path).write_text("\n".join(DOCUMENTS))
    else:
        writers = {".csv": rows.to_csv, ".parquet": rows.to_parquet}
        writers.get(suffix, rows.to_json)(path)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, suffix, streaming):
    path = write_documents(tmp_path, suffix)
    data = train_mlm.DataArguments(train_file=[path], streaming=streaming, validation_split=20)
    train, validation = ([row["text"] for row in part] for part in train_mlm.load_documents(data))
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert len(validation) > 5 and not set(train) & set(validation)


def test_files_come_by_pattern_and_validation_from_its_own_file(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "held.csv").write_text("text\nheld out\n")
    data = train_mlm.DataArguments(
        train_file=[f"{tmp_path}/?.txt"], validation_file=[f"{tmp_path}/held.csv"]
    )
    train, validation = train_mlm.load_documents(data)
    assert train["text"][:] == ["text of a.txt", "text of b.txt"]
    assert validation["text"][:] == ["held out"]


def test_a_dataset_keeps_its_own_validation_part(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"text": part}) + "\n")
    data = train_mlm.DataArguments(dataset_name=str(tmp_path))
    assert [part["text"][:] for part in train_mlm.load_documents(data)] == [
        ["train"],
        ["validation"],
    ]


def test_the_embedded_text_shares_nothing_between_training_and_evaluation():
    train, validation = embedded_text.embedded_passages()
    assert len(train) > 3000 and len(validation) > 100
    assert not set(train) & set(validation)


def trained_tokenizer():
    args = train_mlm.TokenizerArguments(vocab_size=100)
    return train_mlm.train_tokenizer(iter(DOCUMENTS), args)


def test_documents_are_cut_and_blank_ones_left_out():
    data = train_mlm.DataArguments(max_seq_length=4)
    rows = datasets.Dataset.from_dict({"text": ["", "the old man reads", None, " ", "a"]})
    encoded = train_mlm.tokenize(train_mlm.with_text(rows, "text"), data, trained_tokenizer())
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 3]
    assert encoded["special_tokens_mask"][:] == [[1, 0, 0, 1], [1, 0, 1]]


def test_a_new_tokenizer_is_berts_kind():
    tokenizer = trained_tokenizer()
    assert tokenizer.all_special_ids == [tokenizer.vocab[t] for t in tokenizer.all_special_tokens]
    assert [tokenizer.convert_tokens_to_ids(t) for t in train_mlm.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    pair = tokenizer("The man", "a Book")
    assert tokenizer.decode(pair["input_ids"]) == "[CLS] the man [SEP] a book [SEP]"


def test_berts_vocabulary_file_is_a_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*train_mlm.SPECIAL_TOKENS, "the", "man", "##s"]))
    tokenizer = train_mlm.existing_tokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
    assert tokenizer("The mans")["input_ids"] == [2, 5, 6, 7, 3]


# ---- bad input ----


def test_an_output_folder_with_files_is_refused_and_kept(tmp_path):
    (tmp_path / "precious").write_text("kept")
    recipe = train_mlm.RecipeArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty.*--overwrite"):
        train_mlm.checkpoint_to_resume(recipe)
    recipe.overwrite = True
    assert train_mlm.checkpoint_to_resume(recipe) is None
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("checkpoint", ["last", "missing/checkpoint-7"])
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, checkpoint):
    recipe = train_mlm.RecipeArguments(output_dir=str(tmp_path), resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"{checkpoint}: no such checkpoint; looked in {tmp_path}"):
        train_mlm.checkpoint_to_resume(recipe)


def test_an_unknown_recipe_key_is_refused_with_the_nearest_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("hiden_size: 32\n")
    with pytest.raises(ValueError, match="unknown key 'hiden_size'; see hidden_size"):
        parse(str(tmp_path / "recipe.yaml"))


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="--hiden_size"):
        parse(hiden_size=32)


def test_output_dir_is_asked_for():
    with pytest.raises(ValueError, match="give --output_dir"):
        train_mlm.parse([])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_seq_length": 2}, "max_seq_length is 2.*at least 3"),
        ({"validation_split": 0.0}, "validation_split is a percentage, got 0.0"),
        (
            {"train_file": ["a.txt"], "dataset_name": "b"},
            "train_file or dataset_name .b., not both",
        ),
        ({"validation_file": ["a.txt"]}, "validation_file .* needs a train_file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_data_arguments_that_contradict_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        train_mlm.DataArguments(**values)


def load_one(path, **values):
    data = train_mlm.DataArguments(train_file=[str(path)], **values)
    return train_mlm.tokenize(train_mlm.load_documents(data)[0], data, trained_tokenizer())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/none.txt"):
        load_one(tmp_path / "none.txt")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=f"empty.*{tmp_path}/empty.txt"):
        load_one(tmp_path / "empty.txt")


def test_a_file_of_blank_lines_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(ValueError, match="blank.txt: no text is left"):
        load_one(tmp_path / "blank.txt")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "text.docx").write_text("text")
    with pytest.raises(ValueError, match="text.docx: give files of one format of .txt, .json"):
        load_one(tmp_path / "text.docx")


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, streaming):
    path = write_documents(tmp_path, ".csv")
    with pytest.raises(ValueError, match="--text_column body is not in the data.*text, label"):
        load_one(path, text_column="body", streaming=streaming)


@pytest.mark.parametrize("lacking", ["mask_token", "pad_token"])
def test_a_tokenizer_that_cannot_mask_or_pad_is_refused(tmp_path, lacking):
    roles = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    del roles[lacking]
    vocabulary = {token: i for i, token in enumerate(train_mlm.SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    folder = str(tmp_path / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match=f"{folder} has no {lacking}.*--tokenizer_name"):
        train_mlm.existing_tokenizer(folder, lowercase=True)


def test_a_vocabulary_file_without_berts_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe")
    with pytest.raises(ValueError, match=r"vocab.txt lacks \[MASK\]"):
        train_mlm.existing_tokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
