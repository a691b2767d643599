# SPDX-License-Identifier: Apache-2.0
"""finetune.py on tiny models and made-up rows: what it learns, writes, skips and refuses."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import GOLDENS
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training import ACCELERATE, ROOT, flags, read_json, run

import convert_weights
import finetune
from mosaic_tools import classifiers, glue_tasks, labelled_data, recipe, runs
from mosaic_tools.devices import native_bf16
from mosaic_tools.glue_tasks import TASKS
from mosaic_tools.tokenization import SPECIAL_TOKENS, load_tokenizer

AGES, READERS, SIZES = ("old", "young", "tall", "wise"), ("man", "woman", "child"), ("long", "new")
SENTENCES = [f"the {x} {y} reads a {z} book" for z in SIZES for y in READERS for x in AGES]
# Enough for a tiny model to learn a word by heart.
QUICK = {"learning_rate": 1e-3, "num_train_epochs": 8, "global_batch_size": 8, "cpu_threads": 1}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    file.write_text("\n".join([*SPECIAL_TOKENS, *words, *(f"w{i}" for i in range(150))][:160]))
    return file


STOCK_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory, vocab):
    """A converted published checkpoint, of an MLM."""
    folder = tmp_path_factory.mktemp("golden") / "golden"
    convert_weights.main([str(GOLDENS / "mosaic_tiny"), str(folder), "--tokenizer", str(vocab)])
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory, vocab):
    """transformers' own BERT, which has learned positions, 16 of them."""
    folder = tmp_path_factory.mktemp("stock") / "stock"
    config = transformers.BertConfig(**STOCK_SIZES, max_position_embeddings=16)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(vocab)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modern(tmp_path_factory, vocab):
    """transformers' ModernBERT, which has no token types, and a pre-trained layer before its
    classifier."""
    folder = tmp_path_factory.mktemp("modern") / "modern"
    config = transformers.ModernBertConfig(
        **STOCK_SIZES, max_position_embeddings=32, pad_token_id=0
    )
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    # Of a class that transformers 5 names otherwise than 4.
    backend = transformers.BertTokenizerFast(str(vocab)).backend_tokenizer
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS, strict=True))
    names = {f"{name}_token": token for name, token in names.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_own(folder: Path, rows: list[dict]) -> dict:
    """Files of one's own, as flags."""
    return {
        "train_file": write_rows(folder / "train.jsonl", rows),
        "validation_file": write_rows(folder / "dev.jsonl", rows[::3]),
        "output_dir": folder / "out",
    }


def by_age(name=str) -> list[dict]:
    """Sentences, and whether the reader is old."""
    return [{"text": x, "label": name("old" if " old " in x else "other")} for x in SENTENCES]


def write_glue(folder: Path) -> Path:
    """A folder with MNLI, RTE, CoLA and STS-B, as far as their layout goes."""
    for name in ("mnli", "rte", "cola", "stsb"):
        task = TASKS[name]
        rows = [
            {column: SENTENCES[i - j] for j, column in enumerate(task.columns)}
            | {"label": i % len(task.labels) if task.labels else i / 5, "idx": i}
            for i in range(12)
        ]
        for split in ("train", *(x.replace("validation", "dev") for x in task.validation.values())):
            write_rows(folder / name / f"{split}.jsonl", rows)
    return folder


def start(**values):
    finetune.main(flags(**values))


def result_of(folder: Path, name="own", seed=19) -> dict:
    return read_json(folder, name, f"seed-{seed}", "result.json")


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def classify(folder: Path, *texts):
    return transformers.pipeline("text-classification", model=str(folder), trust_remote_code=True)(
        *texts
    )


# ---- what it learns and writes ----


@pytest.fixture(scope="module")
def finetuned(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    start(model=golden, **QUICK, **write_own(folder, by_age()))
    return folder / "out"


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


def built(model: Path, first: Path | None = None, **values):
    """The classifier of old and other readers that a run of `model` starts from."""
    task = glue_tasks.Task("own", ("text",), ("old", "other"))
    args = classifiers.ClassifierArguments(model=str(model), **values)
    return classifiers.build_classifier(args, str(first or model), task, load_tokenizer(model), 32)


def test_a_pretrained_layer_outside_the_encoder_is_kept(modern, tmp_path):
    """ModernBERT's head, which was drawn anew: from the MLM, and from an MNLI model."""
    expected = load_file(modern / "model.safetensors")["head.dense.weight"]
    model = built(modern)
    assert torch.equal(model.head.dense.weight, expected)
    model.save_pretrained(tmp_path)
    again = built(modern, first=tmp_path)
    assert torch.equal(again.head.dense.weight, expected)
    # Of the same shape, but for other labels.
    assert not torch.equal(again.classifier.weight, model.classifier.weight)
    assert 0 < again.classifier.weight.std() < 0.04 and not again.classifier.bias.any()


def test_only_what_gives_the_logits_is_drawn_anew(vocab, tmp_path):
    """A layer with as many outputs as there are labels was taken for it."""
    config = transformers.RobertaConfig(
        **STOCK_SIZES | {"hidden_size": 2, "num_attention_heads": 1}, pad_token_id=0
    )
    model = transformers.RobertaForSequenceClassification(config)
    torch.nn.init.ones_(model.classifier.dense.bias)
    torch.nn.init.ones_(model.classifier.out_proj.bias)
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(vocab)).save_pretrained(tmp_path)
    head = built(tmp_path, new_classifier=True).classifier
    assert torch.equal(head.dense.weight, model.classifier.dense.weight) and head.dense.bias.all()
    assert not torch.equal(head.out_proj.weight, model.classifier.out_proj.weight)
    assert 0 < head.out_proj.weight.abs().max() < 0.1 and not head.out_proj.bias.any()


def test_a_stock_modernbert_is_trained_and_its_tokenizer_gives_no_token_types(modern, tmp_path):
    own = write_own(tmp_path, by_age())
    start(model=modern, learning_rate=1e-3, max_steps=1, cpu_threads=1, **own)
    folder = own["output_dir"] / "own" / "seed-19"
    before, after = (load_file(x / "model.safetensors") for x in (modern, folder))
    trained = [x for x in before.keys() & after if not torch.equal(before[x], after[x])]
    assert "head.dense.weight" in trained and len(trained) > 10
    settings = read_json(folder, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["model_max_length"] == 32
    assert classify(folder, SENTENCES[0])[0]["label"] in ("old", "other")


def test_a_mosaicbert_is_tuned_with_layernorm_as_published(golden, stock):
    assert built(golden).config.low_precision_layernorm
    assert not built(golden, low_precision_layernorm=False).config.low_precision_layernorm
    assert not hasattr(built(stock).config, "low_precision_layernorm")


def test_the_second_text_of_a_pair_has_token_type_1(vocab, tmp_path):
    """transformers 5.0 leaves token types out unless asked."""
    (tmp_path / "tokenizer").mkdir()
    load_tokenizer(vocab).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    task, parts, _ = labelled_data.load_task(
        "rte", labelled_data.LabelledDataArguments(task=["rte"], data_dir=str(write_glue(tmp_path)))
    )
    ids = {"entailment": 0, "not_entailment": 1}
    rows = labelled_data.encode(parts["train"], task, ids, tokenizer, 12, True)
    # [CLS] the old man reads [SEP] the old man reads a [SEP]
    assert rows[0]["token_type_ids"] == [0] * 6 + [1] * 6
    assert rows["labels"][:3] == [0, 1, 0]
    rows = labelled_data.encode(parts["train"], task, ids, tokenizer, 12, False)
    assert "token_type_ids" not in rows.column_names


def test_fractions_are_regressed_on_in_float32(golden, tmp_path, monkeypatch, capsys):
    """bf16 would round values to eight bits; transformers 4.57 leaves a run's precision behind, and
    a launcher may have set another."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precisions, train = [], finetune.FinetuneTrainer.train

    def watched(self):
        precisions.append(self.accelerator.mixed_precision)
        return train(self)

    monkeypatch.setattr(finetune.FinetuneTrainer, "train", watched)
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


def test_a_classifier_without_weights_is_not_taken_for_a_trained_one(finetuned, tmp_path):
    folder = shutil.copytree(finetuned / "own" / "seed-19", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: classifier.weight. .*: --new_classifier true"):
        built(folder)
    assert built(folder, new_classifier=True).classifier.weight.std() > 0


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


# ---- GLUE: several tasks and seeds ----


@pytest.fixture(scope="module")
def glue(golden, tmp_path_factory):
    """Two seeds of four tasks, at learning rate 0: models keep the weights they start from."""
    cwd = tmp_path_factory.mktemp("glue")
    values = {"model": golden, "data_dir": write_glue(cwd / "data"), "output_dir": cwd / "out"}
    command = flags(**values, learning_rate=0, max_steps=1, cpu_threads=1)
    command += ["--save_all_seeds", "--seeds", "1", "2", "--task", "rte", "cola", "mnli", "stsb"]
    finetune.main(command)
    return SimpleNamespace(cwd=cwd, out=cwd / "out", command=command)


def weights_of(glue, name, seed):
    return load_file(glue.out / name / f"seed-{seed}" / "model.safetensors")


def test_rte_and_stsb_start_from_the_first_model_of_mnli(glue):
    pooler, mnli = "bert.pooler.dense.weight", weights_of(glue, "mnli", 1)
    for name, starts_there in {"rte": True, "stsb": True, "cola": False}.items():
        # Were it new, as the checkpoint has none, it would be another with each seed.
        assert torch.equal(weights_of(glue, name, 2)[pooler], mnli[pooler]) == starts_there
        start = result_of(glue.out, name, 2)["settings"]["start"]
        assert start == ("mnli/seed-1" if starts_there else "model")
    assert "fine-tuned on MNLI (seed-1)" in card_of(glue.out / "rte" / "seed-1")
    sizes = [len(weights_of(glue, x, 1)["classifier.weight"]) for x in ("mnli", "rte", "stsb")]
    assert sizes == [3, 2, 1]


def test_the_record_has_mean_and_spread_over_seeds(glue):
    record = read_json(glue.out, "results.json")
    assert set(record["tasks"]) == {"mnli", "rte", "cola", "stsb"}
    for name, task in record["tasks"].items():
        scores = [result_of(glue.out, name, seed)["score"] for seed in (1, 2)]
        assert task["score"]["mean"] == pytest.approx(sum(scores) / 2)
        assert task["score"]["std"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
        assert [run["score"] for run in task["runs"]] == scores
    assert {"accuracy", "accuracy_mm"} < set(record["tasks"]["mnli"]["metrics"])


def test_labels_of_glue_have_their_names(glue):
    config = read_json(glue.out, "mnli", "seed-1", "config.json")
    assert config["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
    assert "datasets:\n- nyu-mll/glue" in card_of(glue.out / "mnli" / "seed-1")


# What the Hub calls our metrics.
HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


@pytest.mark.parametrize("name", ["mnli", "rte", "stsb"])
def test_the_hub_reads_the_evaluation_by_its_own_names(glue, name):
    folder, metrics = glue.out / name / "seed-1", result_of(glue.out, name, 1)["metrics"]
    results = ModelCard.load(folder / "README.md").data.eval_results
    found = {(x.metric_type, x.dataset_split): x.metric_value for x in results}
    expected = {}
    for suffix, split in TASKS[name].validation.items():
        kinds = HUB_METRICS | {"loss": "mse" if name == "stsb" else "loss"}
        expected |= {
            (kind, split): metrics[ours + suffix]
            for ours, kind in kinds.items()
            if ours + suffix in metrics
        }
    assert found == expected and len(found) == len(metrics)
    for result in results:
        assert result.task_type == "text-classification"
        assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", name)
        assert result.dataset_name == f"GLUE {TASKS[name].title}"


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


def test_resumed_runs_start_from_the_mnli_model_that_the_first_started_from(glue):
    """seed-1 comes first by name; the first seed asked for does not."""

    def starts(*seeds, tasks=("mnli", "rte"), finished=()):
        command = [*glue.command[: glue.command.index("--seeds")], "--seeds", *seeds]
        args = labelled_data.LabelledDataArguments(task=list(tasks), data_dir=glue.command[3])
        loaded = {name: labelled_data.load_task(name, args) for name in args.names()}
        config = classifiers.read_config(glue.command[1])
        tokenizer = load_tokenizer(glue.command[1])
        planned = runs.plan(
            loaded, dict(finished), config, tokenizer, *finetune.parse([*command, "--task", *tasks])
        )
        rte = {run.settings["start"] for run in planned if run.name == "rte"}
        mnli = next((run for run in planned if run.name == "mnli"), None)
        return rte, mnli and mnli.settings

    rte, settings = starts("2", "1")
    assert rte == {"mnli/seed-2"}
    found = {
        glue.out / "mnli" / f"seed-{seed}": {"task": "mnli", "kept": True, "settings": settings}
        for seed in (1, 2)
    }
    assert starts("2", "1", finished=found)[0] == {"mnli/seed-2"}
    assert starts("2", "1", tasks=["rte"], finished=found)[0] == {"mnli/seed-2"}
    found[glue.out / "mnli" / "seed-2"]["kept"] = False
    assert starts("2", "1", finished=found)[0] == {"mnli/seed-2"}
    assert starts("2", "1", tasks=["rte"], finished=found)[0] == {"mnli/seed-1"}


def test_flags_are_parsed_once_whatever_the_number_of_runs(glue, monkeypatch):
    parsed, parse = [], recipe.HfArgumentParser.parse_known_args

    def counted(self, argv, *rest):
        parsed.append(argv)
        return parse(self, argv, *rest)

    monkeypatch.setattr(recipe.HfArgumentParser, "parse_known_args", counted)
    finetune.main(glue.command)
    assert parsed == [glue.command]


def test_a_tasks_own_values_stand_where_none_are_given(glue):
    """A given value stands although it is the default: 5e-4 is RecipeArguments' own."""
    args = labelled_data.LabelledDataArguments(task=["cola"], data_dir=glue.command[3])
    loaded = {"cola": labelled_data.load_task("cola", args)}
    config = classifiers.read_config(glue.command[1])
    command = ["--model", glue.command[1], *flags(output_dir="out", task="cola", seeds=3)]
    found = []
    for given in ([], ["--learning_rate", "5e-4"], ["--num_train_epochs", "2"]):
        parsed = finetune.parse([*command, *given])
        (run,) = runs.plan(loaded, {}, config, load_tokenizer(glue.command[1]), *parsed)
        args = runs.FinetuneArguments(**run.values)
        assert (args.seed, args.output_dir) == (3, str(Path("out", "cola", "seed-3")))
        assert args.learning_rate == run.settings["learning_rate"]
        found.append((args.learning_rate, args.num_train_epochs, args.rows_per_step()))
    assert found == [(5e-5, 10, 32), (5e-4, 10, 32), (5e-5, 2, 32)]


def test_a_result_from_before_warm_up_was_renamed_is_still_one(glue, tmp_path):
    out = shutil.copytree(glue.out, tmp_path / "out")
    for file in out.glob("*/seed-*/result.json"):
        result = read_json(file)
        result["settings"]["warmup_share"] = result["settings"].pop("warmup_ratio")
        file.write_text(json.dumps(result))
    before = {x: x.stat().st_mtime_ns for x in out.glob("*/seed-*/result.json")}
    finetune.main([*glue.command, "--output_dir", str(out)])
    assert {x: x.stat().st_mtime_ns for x in before} == before
    with pytest.raises(ValueError, match="made with warmup_ratio 0.06, not 0.1: give --warmup_ra"):
        finetune.main([*glue.command, "--output_dir", str(out), "--warmup_share", "0.1"])


def test_results_of_an_earlier_version_are_refused_by_name(glue, tmp_path):
    out = shutil.copytree(glue.out, tmp_path / "out")
    file = out / "cola" / "seed-1" / "result.json"
    result = read_json(file)
    del result["settings"]["low_precision_layernorm"]
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="with low_precision_layernorm None, not True: choose"):
        finetune.main([*glue.command, "--output_dir", str(out)])


def test_a_result_of_another_precision_is_refused_with_the_flag_that_keeps_it():
    """Another processor may choose another, where --bf16 is not given."""
    finished = {Path("out/cola/seed-1"): {"task": "cola", "settings": {"bf16": True}}}
    message = "seed-1 was made with bf16 True, not False: give --bf16 True, choose another"
    with pytest.raises(ValueError, match=message):
        runs.check_settings(finished, "cola", {"bf16": False})


def test_the_best_epochs_model_is_not_taken_for_the_last_ones(stock, tmp_path):
    command = QUICK | {"model": stock, "num_train_epochs": 2} | write_own(tmp_path, by_age())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "matthews"}
    start(**command, **best, eval_strategy="epoch", save_strategy="epoch")
    with pytest.raises(ValueError, match="made with best_of .*matthews.*, not False"):
        start(**command)


@pytest.mark.parametrize("changed", ["learning_rate", "data", "weights"])
def test_results_of_other_settings_are_not_taken_for_those_asked_for(
    glue, stock, tmp_path, changed
):
    command = list(glue.command)
    if changed == "learning_rate":
        command += flags(learning_rate=1e-5)
    elif changed == "weights":
        command += flags(model=stock)
    else:
        shutil.copytree(glue.cwd / "data", tmp_path / "data")
        file = tmp_path / "data" / "mnli" / "train.jsonl"
        file.write_text(file.read_text().replace("old", "wise"))
        command += flags(data_dir=tmp_path / "data")
    before = (glue.out / "results.json").read_text()
    with pytest.raises(ValueError, match=rf"made with {changed} .*another --output_dir, or forget"):
        finetune.main(command)
    assert (glue.out / "results.json").read_text() == before


def test_a_finished_run_counts_only_for_the_same_columns_and_if_its_model_is_kept(
    golden, tmp_path, capsys
):
    own = write_own(tmp_path, [row | {"title": row["text"][::-1]} for row in by_age()])
    command = {"model": golden, "max_steps": 1, "cpu_threads": 1, "text_columns": "text", **own}
    finetune.main([*flags(**command), "--seeds", "1", "2"])
    kept = [own["output_dir"] / "own" / f"seed-{i}" / "model.safetensors" for i in (1, 2)]
    assert [file.exists() for file in kept] == [True, False]
    capsys.readouterr()
    finetune.main([*flags(**command, save_all_seeds=True), "--seeds", "1", "2"])
    assert kept[1].exists() and capsys.readouterr().out.count(" is finished\n") == 1
    with pytest.raises(ValueError, match="made with columns .*'text', 'label'.*'title', 'label'"):
        start(**command | {"text_columns": "title"})


# ---- figures ----


def test_metrics_are_those_counted_by_hand():
    # Of class 1: 2 right, 1 guessed wrongly, 1 missed; of class 0: 1 right.
    guesses, labels = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    found = glue_tasks.metrics(np.eye(2)[guesses], labels)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    # Logits of 0 and 1: three rows are right, two are wrong.
    assert found["loss"] == pytest.approx(math.log(1 + math.e) - 3 / 5)
    values, labels = np.array([[0.0], [1], [8]]), np.array([1.0, 2, 3])
    found = glue_tasks.metrics(values, labels)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(8 / math.sqrt(2 * 38))
    assert found["loss"] == pytest.approx((1 + 1 + 25) / 3)


def test_a_model_that_always_says_the_same_correlates_with_nothing():
    found = glue_tasks.metrics(np.ones((3, 1)), np.arange(3.0))
    assert found["pearson"] == found["spearman"] == 0
    assert glue_tasks.metrics(np.eye(2)[[1, 1]], np.array([0, 1]))["matthews"] == 0


def test_outputs_that_are_not_finite_are_no_result():
    with pytest.raises(FloatingPointError, match="diverged"):
        glue_tasks.metrics(np.array([[math.nan], [1]]), np.arange(2.0))


def test_the_table_has_the_model_cards_columns():
    scores = {name: {"score": runs.summary([0.5, 0.6])} for name in reversed(TASKS)}
    head, _, row = runs.table(scores).splitlines()
    assert head == ("| MNLI-(m/mm) | QQP | QNLI | SST-2 | CoLA | STS-B | MRPC | RTE | Average |")
    assert row == "|" + " 55.00 ± 7.07 (n = 2) |" * 8 + " 55.00 |"
    assert runs.table({"rte": {"score": runs.summary([0.5])}}).endswith("| 50.00 |")


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_decays_by_as_much_at_its_peak_as_published(name):
    task = TASKS[name]
    args = runs.FinetuneArguments(**task.recipe())
    assert args.weight_decay * args.learning_rate == pytest.approx(task.decay)
    assert args.rows_per_step() == task.batch and args.num_train_epochs == task.epochs
    assert args.get_warmup_steps(100) == 6
    assert args.bf16 == (name != "stsb" and native_bf16(args.use_cpu)[0])


# ---- bad input ----


def own_files(tmp_path, train: str, validation: str | None = None, suffix="csv") -> dict:
    """Files with this text, validation as training unless given."""
    files = [tmp_path / f"{split}.{suffix}" for split in ("train", "dev")]
    for file, text in zip(files, (train, validation or train), strict=True):
        file.write_text(text)
    return {"train_file": str(files[0]), "validation_file": str(files[1])}


GOOD = "text,label\na man,x\na woman,y\n"


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("", {}, r"train.csv is empty"),
        ("text,label\n", {}, r"train.csv cannot be read as csv, or has no rows"),
        ("text,class\na man,x\n", {}, r"no column label, only text, class: .*--label_column"),
        (GOOD, {"text_columns": ["body"]}, r"no column body, only text, label"),
        ("a,b,c,label\np,q,r,x\n", {}, r"3 columns of text \(a, b, c\): .*--text_columns"),
        ("id,label\n1,x\n", {}, r"0 columns of text"),
        ("text,label\na man,x\na woman,\n", {}, r"row 2 of 2: the label is ''; fill it in"),
        ("text,label\na man,0.5\na woman,nan\n", {}, r"row 2 of 2: the label is '?nan'?; fill"),
        ("text,label\na man,x\na woman,x\n", {}, r"has the label x only"),
        ("text,label\na man,x\n", {"problem": "regression"}, r"row 1: the label is 'x'"),
        ("text,label\na man,inf\n", {"problem": "regression"}, r"row 1: the label is inf"),
        ('{"text": null, "label": 1}\n{"text": "a", "label": 0}', {}, r"row 1: text is None"),
        ("text,label\na man,x\n ,y\n", {}, r"row 2: text is ' ', expected text"),
        ('{"text": "a man", "label": [1, 2]}', {}, r"the label is \[1, 2\], expected one"),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}',
            {},
            r"row 2: the label is 1, expected one|cannot be read as json",
        ),
        ('{"text": "a man", "label": null}', {}, r"row 1 of 1: the label is None"),
        ('{"text": "a man", "label": NaN}', {}, r"row 1 of 1: the label is nan"),
        ('{"text": ', {}, r"cannot be read as json"),
    ],
)
def test_rows_that_lack_something_are_named(tmp_path, text, values, message):
    suffix = "jsonl" if text.startswith("{") else "csv"
    files = own_files(tmp_path, text, suffix=suffix)
    args = labelled_data.LabelledDataArguments(**files, **values)
    with pytest.raises(ValueError, match=message):
        labelled_data.load_task("own", args)


def test_columns_are_found_or_named_in_any_format(tmp_path):
    rows = {"id": [1, 2], "body": ["a man", "a woman"], "kind": ["x", "y"], "label": ["p", "q"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "rows.parquet"))
    args = labelled_data.LabelledDataArguments(**files, label_column="kind", text_columns=["body"])
    task, parts, _ = labelled_data.load_task("own", args)
    assert task.columns == ("body",) and parts["train"].labels == ["x", "y"]
    # A pair, as far as can be told: the line says so before anything is trained.
    task, parts, _ = labelled_data.load_task("own", labelled_data.LabelledDataArguments(**files))
    said = "rows: body with kind; labels p, q; 2 rows for train, 2 rows for validation"
    assert labelled_data.describe(task, parts) == said


def test_a_label_that_training_has_not_is_named(tmp_path):
    files = own_files(tmp_path, GOOD, GOOD + "a child,z\n")
    with pytest.raises(ValueError, match=r"dev.csv has labels .* not know: z; known are x, y"):
        labelled_data.load_task("own", labelled_data.LabelledDataArguments(**files))


def test_words_that_look_like_missing_values_are_text(tmp_path):
    files = own_files(tmp_path, "text,label\nnull,NA\nNA,None\n")
    args = labelled_data.LabelledDataArguments(**files)
    task, parts, _ = labelled_data.load_task("own", args)
    assert task.labels == ("NA", "None") and list(parts["train"].rows["text"]) == ["null", "NA"]


def test_numbers_are_classes_in_their_order(tmp_path):
    rows = "".join(f"w{i},{i}\n" for i in (10, 9, 2))
    args = labelled_data.LabelledDataArguments(**own_files(tmp_path, "text,label\n" + rows))
    assert labelled_data.load_task("own", args)[0].labels == ("2", "9", "10")


def test_hidden_labels_of_glue_are_refused(tmp_path):
    """The test sets' labels are -1."""
    file = write_glue(tmp_path) / "cola" / "dev.jsonl"
    write_rows(file, [{"sentence": "a man", "label": -1}])
    args = labelled_data.LabelledDataArguments(task=["cola"], data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"not know: -1; known are unacceptable, acceptable"):
        labelled_data.load_task("cola", args)


def test_a_column_that_a_task_needs_is_named(tmp_path):
    write_rows(write_glue(tmp_path) / "rte" / "dev.jsonl", [{"sentence1": "a man", "label": 0}])
    args = labelled_data.LabelledDataArguments(task=["rte"], data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"dev.jsonl has no column sentence2, only sentence1"):
        labelled_data.load_task("rte", args)


def test_a_text_beside_the_rows_of_a_task_is_passed_over(tmp_path):
    (write_glue(tmp_path) / "cola" / "train.txt").write_text("a man\n")
    args = labelled_data.LabelledDataArguments(task=["cola"], data_dir=str(tmp_path))
    assert len(labelled_data.load_task("cola", args)[1]["train"].rows) == 12


def test_a_task_that_is_not_in_the_folder_is_named(tmp_path):
    args = labelled_data.LabelledDataArguments(task=["all"], data_dir=str(write_glue(tmp_path)))
    assert args.names() == list(TASKS)
    with pytest.raises(ValueError, match=r"qqp has no dev.jsonl|qqp has no train.jsonl"):
        labelled_data.load_task("qqp", args)


def test_glue_without_a_network_asks_for_a_folder():
    args = labelled_data.LabelledDataArguments(task=["rte"])
    with pytest.raises(ValueError, match=r"nyu-mll/glue rte cannot be had .*give --data_dir"):
        labelled_data.load_task("rte", args)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either --task .* or --train_file"),
        ({"task": ["cola"], "train_file": "a.csv"}, "give either --task .* or --train_file"),
        ({"task": ["cola", "wnli"]}, "unknown --task wnli: all, or mnli, "),
        ({"train_file": "a.csv"}, "give both --train_file and --validation_file"),
        (
            {"train_file": "a", "validation_file": "b", "text_columns": ["a", "b", "c"]},
            "one or two, got a, b, c",
        ),
        (
            {"task": ["cola"], "label_column": "kind", "problem": "regression"},
            "leave out --problem, --label_column, or give --train_file",
        ),
        (
            {"train_file": "a", "validation_file": "b", "data_dir": "glue"},
            "leave out --data_dir glue, or give --task",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        labelled_data.LabelledDataArguments(**values)


def test_data_that_a_trained_classifier_does_not_know_is_refused(finetuned, tmp_path):
    folder = finetuned / "own" / "seed-19"
    own = write_own(tmp_path, [{"text": x, "label": x.split()[2]} for x in SENTENCES])
    with pytest.raises(ValueError, match=r"labels old, other, .*child, man.*--new_classifier true"):
        start(model=folder, **own)
    own = write_own(tmp_path, [{"text": x, "label": 0.5} for x in SENTENCES])
    with pytest.raises(ValueError, match=r"labels old, other, the data has scores"):
        start(model=folder, **own)
    assert not own["output_dir"].exists()


def without_tokenizer(golden, folder):
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)


def with_a_small_vocabulary(golden, folder):
    words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(400))]
    without_tokenizer(golden, folder)
    (folder / "vocab.txt").write_text("\n".join(words))


def without_padding(golden, folder):
    without_tokenizer(golden, folder)
    ids = {"[UNK]": 0, "man": 1, "woman": 2, "child": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)


def without_a_layer(golden, folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: x for name, x in weights.items() if "layer.1." not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_layer_of_another_shape(golden, folder):
    weights = load_file(folder / "model.safetensors")
    name = next(x for x in weights if "layer.1." in x and x.endswith("bias"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def in_jinas_layout(golden, folder):
    shutil.copy(GOLDENS / "jina_v2_tiny" / "config.json", folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "(?s)no tokenizer can be loaded from .*--tokenizer_name"),
        (with_a_small_vocabulary, "ids up to 404, .* a vocabulary of 320: give the --tokenizer_"),
        (without_padding, "has no padding token.*--tokenizer_name"),
        (without_a_layer, "missing: bert.encoder.layer.1.att.* and 3 more$"),
        (
            with_a_layer_of_another_shape,
            r"differ in shape: bert.encoder.layer.1.*, expected \(96,\)",
        ),
        (in_jinas_layout, "in Jina's layout: python convert_weights.py"),
        (lambda golden, folder: shutil.rmtree(folder), "no folder of a model and no Hub id"),
    ],
    ids=["tokenizer", "vocabulary", "padding", "layer", "shape", "jina", "nothing"],
)
def test_a_model_that_lacks_something_is_refused(golden, tmp_path, damage, message):
    shutil.copytree(golden, tmp_path / "model")
    damage(golden, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        start(model=tmp_path / "model", cpu_threads=1, **write_own(tmp_path, by_age()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": ""}, "give --output_dir"),
        ({"model": ""}, "give --model"),
        ({"seed": 3}, "give --seeds"),
        ({"divergence": 3}, "not used .*--divergence"),
        ({"resume_from_checkpoint": "last"}, "the same command again runs what is unfinished"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_commands_that_lack_something_are_refused(golden, tmp_path, values, message):
    own = write_own(tmp_path, by_age())
    with pytest.raises(ValueError, match=message):
        start(**{"model": golden} | own | values)


def test_one_model_is_uploaded_not_several(golden):
    command = flags(model=golden, output_dir="out", push_to_hub="org/name")
    with pytest.raises(ValueError, match="give one --task of mnli, rte"):
        finetune.main([*command, "--task", "rte", "mnli"])


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


def test_an_output_folder_with_other_files_is_refused_and_kept(golden, tmp_path):
    own = write_own(tmp_path, by_age())
    own["output_dir"].mkdir()
    (own["output_dir"] / "precious").write_text("kept")
    with pytest.raises(ValueError, match="is not empty and has no results.json.*--overwrite true"):
        start(model=golden, **own)
    assert [file.name for file in own["output_dir"].iterdir()] == ["precious"]
