# SPDX-License-Identifier: Apache-2.0
"""finetune.py on tiny models and made-up rows: what it learns, writes and skips."""

import re

import pytest
import torch
from conftest import GOLDENS
from finetuning import (
    QUICK,
    SENTENCES,
    by_age,
    card_of,
    classify,
    result_of,
    start,
    write_own,
    write_rows,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training import ACCELERATE, ROOT, flags, read_json, run
from transformers import Trainer

import finetune
from mosaic_tools import recipe

pytest_plugins = ["finetuning"]


def test_a_converted_golden_learns_which_reader_is_old(finetuned):
    result = result_of(finetuned)
    assert result["score"] == result["metrics"]["accuracy"] == 1
    # Always the commoner label would have 3/4.
    assert result["metrics"]["f1"] == result["metrics"]["matthews"] == 1
    folder = finetuned / "own" / "seed-19"
    guesses = classify(folder, [SENTENCES[0], SENTENCES[1]])
    assert [guess["label"] for guess in guesses] == ["old", "other"]


def test_the_folder_is_a_complete_hub_repository_whose_example_runs(finetuned, capsys):
    folder = finetuned / "own" / "seed-19"
    config, ours = read_json(folder, "config.json"), read_json(ROOT, "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["auto_map"] == ours["auto_map"] and config["model_type"] == ours["model_type"]
    assert config["label2id"] == {"old": 0, "other": 1}
    # As published, whatever the checkpoint pre-trained with.
    assert config["attention_probs_dropout_prob"] == 0
    assert config["alibi_starting_size"] == config["max_position_embeddings"] == 256
    settings = read_json(folder, "tokenizer_config.json")
    assert settings["tokenizer_class"] in ("BertTokenizer", "PreTrainedTokenizerFast")
    assert "token_type_ids" in settings["model_input_names"]
    card = card_of(folder)
    result = ModelCard(card).data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("accuracy", 1.0)
    assert (result.dataset_type, result.dataset_name) == ("custom", "train")
    assert (
        "pipeline_tag: text-classification" in card and "| accuracy, validation | 1.0000 |" in card
    )
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(example.replace('"."', repr(str(folder))))
    assert "'score': " in capsys.readouterr().out


def test_a_stock_bert_learns_pairs_and_is_cut_at_its_positions(stock, tmp_path):
    # 1 if both are the same; the second sentence is cut at 16 tokens.
    rows = [
        {"one": x, "two": x if i % 2 else "a woman reads", "label": i % 2}
        for i, x in enumerate(SENTENCES)
    ]
    start(model=stock, **QUICK, **write_own(tmp_path, rows))
    result = result_of(tmp_path / "out")
    assert result["score"] == 1 and result["settings"]["max_seq_length"] == 16
    folder = tmp_path / "out" / "own" / "seed-19"
    config = read_json(folder, "config.json")
    assert config["model_type"] == "bert" and config["label2id"] == {"0": 0, "1": 1}
    pair = {"text": SENTENCES[0], "text_pair": "a woman reads"}
    assert 'pipe({"text": "A sentence.", "text_pair": "Another one."})' in card_of(folder)
    assert classify(folder, pair)["label"] == "0"


@pytest.mark.parametrize("name", ["mosaic_tiny", "dnabert2_tiny"])
def test_a_published_checkpoint_is_trained_as_it_is_by_this_folders_code(name, vocab, tmp_path):
    """Its config looks like a stock BERT's, or like nothing, and its code does not load."""
    own, quick = write_own(tmp_path, by_age()), {"max_steps": 1, "cpu_threads": 1}
    start(model=GOLDENS / name, tokenizer_name=vocab, **quick, **own)
    config = read_json(own["output_dir"], "own", "seed-19", "config.json")
    assert config["model_type"] == "mosaic_bert"
    assert config["auto_map"] == read_json(ROOT, "config.json")["auto_map"]
    assert config["pad_token_id"] == 0


def test_fractions_are_regressed_on_in_float32(golden, tmp_path, monkeypatch, capsys):
    """bf16 would round values to eight bits; transformers 4.57 leaves a run's precision behind, and
    a launcher may have set another."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precisions, train = [], finetune.RecipeTrainer.train

    def watched(self):
        precisions.append(self.accelerator.mixed_precision)
        return train(self)

    monkeypatch.setattr(finetune.RecipeTrainer, "train", watched)
    own = write_own(tmp_path / "1", by_age())
    start(model=golden, max_steps=1, cpu_threads=1, bf16=True, **own)
    rows = [{"text": x, "label": 2.5 if " old " in x else 0.5} for x in SENTENCES]
    longer = QUICK | {"num_train_epochs": 30}
    start(model=golden, **longer, **write_own(tmp_path / "2", rows))
    assert precisions == ["bf16", "no"]
    said = capsys.readouterr().out
    assert all(f"{x} (as set), attention" in said for x in ("bf16 autocast", "float32"))
    result = result_of(tmp_path / "2" / "out")
    assert result["score"] == result["metrics"]["spearman"] and result["metrics"]["pearson"] > 0.95
    folder = tmp_path / "2" / "out" / "own" / "seed-19"
    assert read_json(folder, "config.json")["problem_type"] == "regression"
    old, young = (guess["score"] for guess in classify(folder, SENTENCES[:2]))
    assert abs(old - 2.5) < 0.5 and abs(young - 0.5) < 0.5


def test_a_loader_worker_that_dies_is_named(golden, tmp_path, monkeypatch):
    """A library's error, and in a save it passed for a full disk."""

    def cut_off(*args):
        raise EOFError

    monkeypatch.setattr(Trainer, "get_batch_samples", cut_off)
    values = {"model": golden, "dataloader_num_workers": 1} | write_own(tmp_path, by_age())
    with pytest.raises(RuntimeError, match="died: EOFError. Repeat the command: what is finished"):
        start(**QUICK, **values)


def test_a_classifier_is_trained_on_if_it_knows_the_labels(finetuned, tmp_path):
    """Its ids stay, whatever labels the new data has."""
    folder = finetuned / "own" / "seed-19"
    only_others = [{"text": x, "label": "other" if i else "old"} for i, x in enumerate(SENTENCES)]
    own = write_own(tmp_path, only_others)
    start(model=folder, learning_rate=0, max_steps=1, cpu_threads=1, **own)
    out = own["output_dir"] / "own" / "seed-19"
    before, after = (load_file(x / "model.safetensors") for x in (folder, out))
    assert all(torch.equal(before[name], after[name]) for name in before)

    renewed = flags(model=folder, learning_rate=0, max_steps=1, cpu_threads=1, **own)
    finetune.main([*renewed, "--new_classifier", "--overwrite"])
    after = load_file(out / "model.safetensors")
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_two_processes_evaluate_every_row_once_and_train_as_one(golden, tmp_path):
    own = write_own(tmp_path, by_age())
    write_rows(own["validation_file"], by_age()[:7])
    values = QUICK | own | {"model": golden, "num_train_epochs": 2, "bf16": False}
    values |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    start(**values | {"output_dir": tmp_path / "one"})
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    run(
        tmp_path,
        *ACCELERATE,
        *config,
        ROOT / "finetune.py",
        *flags(**values | {"output_dir": tmp_path / "two"}),
    )
    one, two = (result_of(tmp_path / x)["metrics"] for x in ("one", "two"))
    # Sums in another order: 2 ** -24 for each, amplified by 6 steps of training.
    assert two == pytest.approx(one, rel=1e-4)


def weights_of(glue, name, seed):
    return load_file(glue.out / name / f"seed-{seed}" / "model.safetensors")


def test_rte_and_stsb_start_from_the_first_model_of_mnli(glue):
    pooler, mnli = "bert.pooler.dense.weight", weights_of(glue, "mnli", 1)
    for name, starts_there in {"rte": True, "stsb": True, "cola": False}.items():
        # Were it new, as the checkpoint has none, it would be another with each seed.
        assert torch.equal(weights_of(glue, name, 2)[pooler], mnli[pooler]) == starts_there
        start = result_of(glue.out, name, 2)["settings"]["start"]
        assert start.split(",")[0] == ("mnli/seed-1" if starts_there else "model")
    assert "fine-tuned on MNLI (seed-1)" in card_of(glue.out / "rte" / "seed-1")
    sizes = [len(weights_of(glue, x, 1)["classifier.weight"]) for x in ("mnli", "rte", "stsb")]
    assert sizes == [3, 2, 1]


def test_only_what_is_unfinished_is_run_again(glue, capsys):
    results = sorted(glue.out.glob("*/seed-*/result.json"))
    before = {file: file.stat().st_mtime_ns for file in results}
    results[0].unlink()
    finetune.main(glue.command)
    after = {file: file.stat().st_mtime_ns for file in results}
    assert [file for file in results if before[file] != after[file]] == results[:1]
    said = capsys.readouterr().out
    assert said.count(" is finished\n") == 7
    assert re.search(r"\| MNLI-\(m/mm\) \| CoLA \| STS-B \| RTE \| Average of these \|\n", said)


def test_flags_are_parsed_once_whatever_the_number_of_runs(glue, monkeypatch):
    parsed, parse = [], recipe.HfArgumentParser.parse_known_args

    def counted(self, argv, *rest):
        parsed.append(argv)
        return parse(self, argv, *rest)

    monkeypatch.setattr(recipe.HfArgumentParser, "parse_known_args", counted)
    finetune.main(glue.command)
    assert parsed == [glue.command]


def test_overwriting_forgets_nothing_before_the_input_is_checked(glue):
    before = sorted(glue.out.rglob("result*.json"))
    with pytest.raises(ValueError, match="there is no|has no train.jsonl"):
        finetune.main([*glue.command, "--overwrite", "--data_dir", "nowhere"])
    assert sorted(glue.out.rglob("result*.json")) == before


def test_overwriting_forgets_what_was_there(stock, tmp_path):
    command = flags(model=stock, max_steps=1, cpu_threads=1, **write_own(tmp_path, by_age()))
    finetune.main([*command, "--seeds", "1"])
    export = tmp_path / "out" / "own" / "seed-2" / "onnx" / "model.onnx"
    export.parent.mkdir(parents=True)
    export.write_text("of former weights")
    finetune.main([*command, "--seeds", "2", "--learning_rate", "1e-3", "--overwrite"])
    found = read_json(tmp_path, "out", "results.json")["tasks"]["own"]["runs"]
    assert [run["seed"] for run in found] == [2]
    # It would be uploaded beside the new ones.
    assert (tmp_path / "out" / "own" / "seed-2" / "model.safetensors").exists()
    assert not export.exists()
