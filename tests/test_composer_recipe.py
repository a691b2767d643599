# SPDX-License-Identifier: Apache-2.0
"""composer_recipe.py, its keys and rules: the published recipes of mosaicml/examples become ours,
what is refused, and --print_recipe.

PUBLISHED has the keys and values of examples/benchmarks/bert/yamls at daddaeff7a, anew.
"""

import copy
import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from finetuning import by_age, result_of, write_glue, write_own
from training import DOCUMENTS, flags, read_json, read_log, write_vocab

import convert_weights
import finetune
import prepare_data
import train_embeddings
import train_mlm
from mosaic_tools import corpus, recipe
from mosaic_tools.composer_keys import KINDS
from mosaic_tools.composer_recipe import is_composers
from mosaic_tools.glue_tasks import SEEDS, TASKS
from mosaic_tools.runs import FinetuneArguments

pytest_plugins = ["finetuning"]

LINEAR = {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.02}
LOGGING = {"progress_bar": False, "log_to_console": True}
NAMES = {"pretrained_model_name": "${tokenizer_name}", "tokenizer_name": "${tokenizer_name}"}
FUSED = {"algorithms": {"fused_layernorm": {}}}


def callbacks(**options):
    return {"speed_monitor": options, "lr_monitor": {}}


def adamw(lr, weight_decay):
    return {
        "name": "decoupled_adamw",
        "lr": lr,
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": weight_decay,
    }


def of_shards(split, mlm_probability):
    dataset = {
        "local": "${data_local}",
        "remote": "${data_remote}",
        "split": split,
        "tokenizer_name": "${tokenizer_name}",
        "max_seq_len": "${max_seq_len}",
        "shuffle": split == "train",
        "mlm_probability": mlm_probability,
    }
    return {"name": "text", "dataset": dataset, "num_workers": 8, "drop_last": split == "train"}


def of_rows(split):
    options = {"split": split, "tokenizer_name": "${tokenizer_name}", "num_workers": 8}
    return options | {"max_seq_len": "${max_seq_len}", "shuffle": True, "drop_last": True}


def main_yaml(run_name, model, rows, mlm_probability, **more):
    return {
        "run_name": run_name,
        "data_local": "./my-copy-c4",
        "data_remote": None,
        "max_seq_len": 128,
        "tokenizer_name": "bert-base-uncased",
        "mlm_probability": mlm_probability,
        "model": model | NAMES,
        "train_loader": of_shards("train", "${mlm_probability}"),
        "eval_loader": of_shards("val", 0.15),
        "scheduler": LINEAR,
        "optimizer": adamw(5.0e-4, 1.0e-5),
        "max_duration": "286720000sp",
        "eval_interval": "2000ba",
        "global_train_batch_size": 4096,
        "seed": 17,
        "device_eval_batch_size": rows,
        "device_train_microbatch_size": rows,
        "precision": "amp_bf16",
        "console_log_interval": "1ba",
        "callbacks": callbacks(window_size=500),
        **LOGGING,
        **more,
    }


def mosaic_main(run_name, rows=128):
    config = {"num_attention_heads": 12, "num_hidden_layers": 12, "attention_probs_dropout_prob": 0}
    model = {"name": "mosaic_bert", "model_config": config}
    return main_yaml(run_name, model, rows, 0.3, **FUSED)


def hf_main():
    config = {"num_attention_heads": 12, "num_hidden_layers": 12}
    config |= {"attention_probs_dropout_prob": 0.1, "max_position_embedding": 512}
    model = {"name": "hf_bert", "use_pretrained": False, "model_config": config}
    return main_yaml("hf-bert-base-uncased", model, 128, 0.15)


def classification(run_name, **model):
    return {
        "run_name": run_name,
        "tokenizer_name": "bert-base-uncased",
        "max_seq_len": 128,
        "load_path": None,
        "model": model | NAMES | {"num_labels": 2},
        "train_loader": of_rows("train"),
        "eval_loader": of_rows("validation"),
        "scheduler": LINEAR,
        "optimizer": adamw(1.0e-5, 1.0e-6),
        "max_duration": "10ep",
        "eval_interval": "1ep",
        "global_train_batch_size": 16,
        "seed": 17,
        "device_eval_batch_size": 16,
        "device_train_microbatch_size": 16,
        "precision": "amp_bf16",
        "console_log_interval": "10ba",
        "callbacks": callbacks(window_size=50),
        **LOGGING,
    }


def glue(base_run_name, name, checkpoint=None, **more):
    seeds = {"rte": 5, "sst2": 3, "stsb": 5, "mrpc": 5, "cola": 4}
    drawn = [19, 8364, 717, 10536, 90166]
    tasks = {
        task: ({"seeds": drawn[: seeds[task]]} if task in seeds else {})
        | {"trainer_kwargs": {"save_num_checkpoints_to_keep": int(task == "mnli")}}
        for task in ("mnli", "rte", "qqp", "qnli", "sst2", "stsb", "mrpc", "cola")
    }
    prefix = "save_finetune_checkpoint_prefix"
    return {
        "parallel": True,
        "base_run_name": base_run_name,
        "default_seed": 19,
        "precision": "bf16",
        "tokenizer_name": "bert-base-uncased",
        "model": {"name": name} | NAMES,
        "starting_checkpoint_load_path": checkpoint,
        "local_pretrain_checkpoint_folder": "./local-bert-checkpoints/",
        prefix: "./local-finetune-checkpoints/",
        "save_finetune_checkpoint_folder": f"${{{prefix}}}/${{base_run_name}}",
        "callbacks": callbacks(),
        "scheduler": LINEAR | {"alpha_f": 0.0},
        "tasks": tasks,
        **more,
    }


def mcloud(name, parameters, *command):
    repository = {"integration_type": "git_repo", "git_repo": "mosaicml/examples"}
    return {
        "name": name,
        "image": "mosaicml/pytorch:1.13.1_cu117-python3.10-ubuntu20.04",
        "compute": {"gpus": 8},
        "integrations": [repository | {"pip_install": "-e .[bert]", "ssh_clone": False}],
        "command": "\n".join(command),
        "parameters": parameters,
    }


def mcloud_main(rows):
    return mcloud(
        "mosaic-bert-base-uncased",
        mosaic_main(None, rows),
        "cd examples/examples/benchmarks/bert",
        "pip install -r requirements.txt",
        "python src/convert_dataset.py --dataset c4 --out_root ./my-copy-c4 --splits train_small",
        "composer main.py /mnt/config/parameters.yaml \\",
        "  train_loader.dataset.split=train_small",
    )


BASE, GLUE_RUN = "mosaic-bert-base-uncased", "mosaic-bert-base-uncased-glue-finetuning"
PUBLISHED = {
    "main/mosaic": mosaic_main(BASE),
    "main/hf": hf_main(),
    "main/mcloud_80gb": mcloud_main(512),
    "main/mcloud_40gb": mcloud_main(128),
    "finetuning/mosaic": classification("finetune-mosaic-bert", name="mosaic_bert"),
    "finetuning/hf": classification("finetune-hf-bert", name="hf_bert", use_pretrained=True),
    "finetuning/mcloud": mcloud(
        "finetune-mosaic-bert",
        classification(None, name="mosaic_bert"),
        "composer sequence_classification.py /mnt/config/parameters.yaml",
    ),
    "glue/mosaic": glue(GLUE_RUN, "mosaic_bert", "<checkpoint_from_pretraining>", **FUSED),
    "glue/hf": glue("hf-bert-base-uncased-glue-finetuning", "hf_bert"),
    "glue/mcloud": mcloud(
        GLUE_RUN, glue(None, "mosaic_bert", **FUSED), "python glue.py /mnt/config/parameters.yaml"
    ),
}
# As `--print_recipe` writes them.
OURS = {
    "main/mosaic": {
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "attention_probs_dropout_prob": 0.0,
        "tokenizer_name": "bert-base-uncased",
        "train_file": ["my-copy-c4/train"],
        "validation_file": ["my-copy-c4/val"],
        "streaming": True,
        "output_dir": "runs/mosaic-bert-base-uncased",
        "per_device_train_batch_size": 128,
        "max_steps": 70_000,
        "bf16": True,
        "eval_strategy": "steps",
        "eval_steps": 2000,
        "per_device_eval_batch_size": 128,
        "save_strategy": "no",
        "seed": 17,
        "dataloader_num_workers": 8,
        "global_batch_size": 4096,
        "lr_end": 0.02,
    },
    "finetuning/mosaic": {
        "tokenizer_name": "bert-base-uncased",
        "low_precision_layernorm": False,
        "max_seq_length": 128,
        "output_dir": "runs/finetune-mosaic-bert",
        "per_device_train_batch_size": 16,
        "num_train_epochs": 10,
        "learning_rate": 1e-5,
        "bf16": True,
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 16,
        "dataloader_num_workers": 8,
        "global_batch_size": 16,
        "lr_end": 0.02,
        "decoupled_weight_decay": 1e-6,
        "seeds": [17],
    },
    "glue/mcloud": {
        "tokenizer_name": "bert-base-uncased",
        "task": ["all"],
        "output_dir": f"local-finetune-checkpoints/{GLUE_RUN}",
    },
}
OURS["main/hf"] = OURS["main/mosaic"] | {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "alibi_starting_size": 512,
    "mlm_probability": 0.15,
    "output_dir": "runs/hf-bert-base-uncased",
}
OURS["main/mcloud_40gb"] = OURS["main/mosaic"] | {"train_file": ["my-copy-c4/train_small"]}
OURS["main/mcloud_80gb"] = OURS["main/mcloud_40gb"] | dict.fromkeys(
    ("per_device_train_batch_size", "per_device_eval_batch_size"), 512
)
OURS["finetuning/mcloud"] = OURS["finetuning/mosaic"]
OURS["finetuning/hf"] = OURS["finetuning/mosaic"] | {
    "model": "bert-base-uncased",
    "output_dir": "runs/finetune-hf-bert",
}
# transformers' BERT has it in float32 anyway.
del OURS["finetuning/hf"]["low_precision_layernorm"]
OURS["glue/mosaic"] = OURS["glue/mcloud"] | {"model": "FOLDER_OR_ID"}
OURS["glue/hf"] = OURS["glue/mcloud"] | {
    "output_dir": "local-finetune-checkpoints/hf-bert-base-uncased-glue-finetuning"
}
# Flags without which a file is refused.
NEEDED = {"glue/mosaic": ("--model", "FOLDER_OR_ID")}
EACH = pytest.mark.parametrize("name", PUBLISHED)


def put(values: dict, changes: dict) -> dict:
    """A copy with these values at dotted paths; of ... the key is taken away."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *way, last = path.split(".")
        group = values
        for name in way:
            group[name] = group.get(name) or {}
            group = group[name]
        group.pop(last, None) if value is ... else group.update({last: value})
    return values


def dump(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def groups_of(name):
    return recipe.PRETRAINING if name.startswith("main") else finetune.GROUPS


def read(file, of, *words, **changes):
    """(values given, what is said) of a published recipe with these changes, and of flags."""
    file.write_text(dump(put(PUBLISHED[of], changes)))
    with redirect_stderr(io.StringIO()) as said:
        given = recipe.read_arguments([str(file), *NEEDED.get(of, ()), *words], groups_of(of))
    return {k: v for values in given for k, v in values.items()}, said.getvalue()


@pytest.fixture
def of_main(tmp_path):
    """Our values for main/mosaic with changes at dotted paths, and flags."""

    def values(*words, **changes):
        return read(tmp_path / "mosaic.yaml", "main/mosaic", *words, **changes)[0]

    return values


def printed(name, *words):
    command = train_mlm if name.startswith("main") else finetune
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()),
        pytest.raises(SystemExit) as e,
        pytest.MonkeyPatch.context() as patch,
    ):
        words = (*map(str, words), *NEEDED.get(name, ()), "--print_recipe")
        patch.setattr(sys, "argv", ["command", *words])
        command.main(*([sys.argv[1:]] if command is finetune else []))
    assert not e.value.code
    return out.getvalue()


# ---- the published files ----


@EACH
def test_a_published_recipe_is_printed_as_one_of_ours_which_says_the_same(name, tmp_path):
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(dump(PUBLISHED[name]))
    text = printed(name, theirs)
    assert yaml.safe_load(text) == OURS[name]
    ours.write_text(text)
    assert printed(name, ours) == text
    check_that_both_say_the_same(name, theirs, ours)
    assert not [x for x in tmp_path.iterdir() if x not in (theirs, ours)]


def check_that_both_say_the_same(name, *files):
    """Of theirs and ours. What is left out of the second is the default of its field."""
    groups = groups_of(name)
    said = [recipe.read_arguments([str(x), *NEEDED.get(name, ())], groups) for x in files]
    for group, first, second in zip(groups, *said, strict=True):
        defaults = {field.name: field.default for field in recipe.fields(group)}
        assert {x: first[x] for x in first if first[x] != defaults[x]}.items() <= second.items()
        assert all(second.get(x, defaults[x]) == first[x] for x in first)


def test_the_published_run_is_that_of_the_paper(of_main):
    args = recipe.PretrainingArguments(**pick(recipe.PretrainingArguments, of_main()))
    assert args.max_steps == 70_000 and args.get_warmup_steps(70_000) == 4200
    assert args.lr_scheduler_type == "polynomial" and args.learning_rate == 5e-4
    assert args.lr_scheduler_kwargs == {"lr_end": pytest.approx(1e-5), "power": 1.0}
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert args.weight_decay * args.learning_rate == pytest.approx(1e-5)
    assert args.rows_per_step() == 4096 and args.per_device_train_batch_size == 128


def pick(group, values):
    names = {field.name for field in recipe.fields(group)}
    return {name: x for name, x in values.items() if name in names}


@pytest.mark.once
@EACH
def test_what_has_no_meaning_is_listed_once(name, tmp_path):
    _, said = read(tmp_path / "file.yaml", name)
    lists = [line for line in said.splitlines() if "has no meaning here: " in line]
    assert len(lists) == 1 and lists[0].startswith(f"{tmp_path / 'file.yaml'}: has no meaning")
    keys = lists[0].split("here: ")[1].split(", ")
    assert len(keys) == len(set(keys)) and {"callbacks.lr_monitor"} <= set(keys)
    assert ({"image", "compute", "integrations"} <= set(keys)) == ("mcloud" in name)
    # Variables and what is translated are none of it.
    assert not {"data_local", "tokenizer_name", "max_seq_len", "optimizer.lr", "tasks"} & set(keys)


@pytest.mark.once
def test_other_processes_do_not_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert read(tmp_path / "file.yaml", "main/mosaic")[1] == ""
    assert printed("main/mosaic", tmp_path / "file.yaml") == ""


@pytest.mark.once
def test_what_a_platforms_command_sets_is_honoured_and_said(tmp_path):
    values, said = read(tmp_path / "file.yaml", "main/mcloud_80gb")
    assert values["train_file"] == ["my-copy-c4/train_small"]
    assert "command: sets train_loader.dataset.split to train_small" in said
    command = "A=1 composer main.py a.yaml optimizer.lr=1e-3 seed=5 && echo b.yml c=d; echo e=f"
    values, _ = read(tmp_path / "file.yaml", "main/mcloud_80gb", command=command)
    assert (values["learning_rate"], values["seed"]) == (1e-3, 5)
    for wrong in ("main.py a.yaml seed", "main.py a.yaml seed=$SEED"):
        with pytest.raises(ValueError, match="command: 'seed.* is no KEY=VALUE: write it in param"):
            read(tmp_path / "file.yaml", "main/mcloud_80gb", command=wrong)
    with pytest.raises(ValueError, match="unknown key 'sed'; near are seed"):
        read(tmp_path / "file.yaml", "main/mcloud_80gb", command="main.py a.yaml sed=1")


@pytest.mark.once
def test_flags_come_last_and_win(of_main):
    values = of_main("--global_batch_size", "1024", "--seed", "3", "--model_type", "bert")
    # As if the file said so: samples are as many.
    assert values["max_steps"] == 280_000
    assert (values["seed"], values["model_type"]) == (3, "bert")
    values = of_main("--num_train_epochs", "2", "--warmup_steps", "9", "--eval_steps", "7")
    assert "max_steps" not in values and values["num_train_epochs"] == 2
    assert values["warmup_steps"] == 9 and "warmup_ratio" not in values
    assert (values["eval_strategy"], values["eval_steps"]) == ("steps", 7)
    assert of_main("--eval_strategy", "steps")["eval_steps"] == 2000
    assert of_main("--eval_strategy", "epoch", eval_interval="3ep")["eval_strategy"] == "epoch"
    values = of_main("--dataset_name", "allenai/c4", "--output_dir", "elsewhere")
    assert values["dataset_name"] == "allenai/c4" and values["output_dir"] == "elsewhere"
    assert not {"train_file", "validation_file", "streaming"} & set(values)


@pytest.mark.once
def test_ours_are_told_from_theirs():
    for file in (ROOT / "recipes").glob("*.yaml"):
        assert not is_composers(recipe.read_recipe(str(file)))
    for theirs in PUBLISHED.values():
        assert is_composers(theirs)
    assert not is_composers({"model": "runs/demo", "lr_scheduler_kwargs": {"power": 2}})


@pytest.mark.once
@pytest.mark.parametrize(
    ("command", "of", "said"),
    [
        (train_mlm, "glue/mosaic", "is a recipe of glue.py: finetune.py takes it"),
        (train_mlm, "finetuning/hf", "sequence_classification.py: finetune.py takes it"),
        (finetune, "main/mosaic", "is a recipe of main.py: train_mlm.py takes it"),
        (train_embeddings, "main/mosaic", "is a recipe of main.py: train_mlm.py takes it"),
    ],
)
def test_a_recipe_of_another_command_is_sent_there(command, of, said, tmp_path, monkeypatch):
    file = tmp_path / "file.yaml"
    file.write_text(dump(PUBLISHED[of]))
    monkeypatch.setattr(sys, "argv", ["command", str(file)])
    with pytest.raises(ValueError, match=said):
        command.main(*([[str(file)]] if command is finetune else []))


@pytest.mark.once
@pytest.mark.parametrize(
    ("page", "name"), [("pretraining", "main/mosaic"), ("finetuning", "glue/mosaic")]
)
def test_docs_have_what_is_printed(page, name, tmp_path):
    text = (ROOT / "docs" / f"{page}.md").read_text().split("## A recipe of mosaicml/examples")[1]
    text = text.split("\n## ")[0]
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M))
    assert yaml.safe_load(blocks["yaml"]) == OURS[name]
    said = read(tmp_path / "file.yaml", name)[1]
    said = said.replace(f"{tmp_path / 'file.yaml'}: ", "").splitlines()
    # Keys are listed in the order of the file, which is another here.
    said, shown = (
        [sorted(re.findall(r"[^\s,]+", line)) for line in lines]
        for lines in (said, blocks[""].splitlines())
    )
    assert shown and all(line in said for line in shown)


# ---- interpolation ----


@pytest.mark.once
def test_references_are_filled_in_with_their_type_or_as_text(tmp_path):
    variables = {"data_local": "${root}/${name.of}", "root": "/data", "name": {"of": "c${year}"}}
    changes = variables | {"year": 4, "max_seq_len": "${length}", "length": 64}
    values, said = read(tmp_path / "file.yaml", "main/mosaic", **changes)
    assert values["train_file"] == ["/data/c4/train"] and values["max_seq_length"] == 64
    assert not re.search(r"\b(root|year|length)\b", said.split("here: ")[1].splitlines()[0])


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_local": "${nowhere}/x"}, r"\$\{nowhere\} names no key of the file"),
        ({"data_local": "${model.nowhere}"}, r"\$\{model.nowhere\} names no key"),
        ({"data_local": "${oc.env:HOME}"}, r"\$\{oc.env:HOME\} names no key .*: write the value"),
        ({"data_local": "${data_remote}/x"}, r"\$\{data_remote\} is part of a text, and has none"),
        ({"seed": "${seed}"}, r"\$\{seed\} leads back to itself: seed -> seed"),
        (
            {"data_local": "${a}", "a": "b${b}", "b": "${a}"},
            r"\$\{a\} leads back to itself: a -> b -> a",
        ),
    ],
)
def test_references_that_lead_nowhere_are_named(changes, said, of_main):
    with pytest.raises(ValueError, match=f"mosaic.yaml: {said}"):
        of_main(**changes)


# ---- times ----


@pytest.mark.once
@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("286720000sp", {"max_steps": 70_000}),
        # The step that has the last sample is taken whole.
        ("286720001sp", {"max_steps": 70_001}),
        ("1sp", {"max_steps": 1}),
        ("500ba", {"max_steps": 500}),
        ("5E2BA", {"max_steps": 500}),
        # 128 x 4,096 positions a step.
        ("52428800tok", {"max_steps": 100}),
        ("52428801tok", {"max_steps": 101}),
        ("10ep", {"num_train_epochs": 10}),
        (3, {"num_train_epochs": 3}),
    ],
)
def test_a_run_lasts_as_long_as_in_composer(time, expected, of_main):
    values = of_main(max_duration=time, scheduler={"name": "constant_with_warmup"})
    assert {k: v for k, v in values.items() if k in ("max_steps", "num_train_epochs")} == expected
    # An epoch of a stream has no length.
    assert values.get("streaming", False) == ("max_steps" in expected)


@pytest.mark.once
@pytest.mark.parametrize(
    ("time", "run", "expected"),
    [
        ("0.06dur", "70000ba", {"warmup_ratio": 0.06}),
        ("4200ba", "70000ba", {"warmup_steps": 4200}),
        ("17203200sp", "286720000sp", {"warmup_steps": 4200}),
        ("524288000tok", "70000ba", {"warmup_steps": 1000}),
        ("1ep", "10ep", {"warmup_ratio": 0.1}),
        # 0 warmup_steps would be 6 %.
        ("0ba", "70000ba", {"warmup_ratio": 0.0}),
        ("0ep", "70000ba", {"warmup_ratio": 0.0}),
    ],
)
def test_a_warm_up_lasts_as_long_as_in_composer(time, run, expected, of_main):
    values = of_main(**{"scheduler.t_warmup": time, "max_duration": run})
    assert {k: v for k, v in values.items() if k.startswith("warmup")} == expected


@pytest.mark.once
@pytest.mark.parametrize(
    ("time", "run", "expected"),
    [
        ("2000ba", "70000ba", ("steps", 2000)),
        ("8192000sp", "70000ba", ("steps", 2000)),
        ("0.1dur", "70000ba", ("steps", 7000)),
        # Of a run in epochs Trainer takes the share.
        ("0.25dur", "4ep", ("steps", 0.25)),
        (1, "10ep", ("epoch", None)),
        # At the end only, or, as there is none, then.
        ("1dur", "70000ba", ("no", None)),
        ("0ba", "70000ba", ("no", None)),
    ],
)
@pytest.mark.parametrize("what", ["eval", "save"])
def test_intervals_are_kept(time, run, expected, what, of_main):
    changes = {f"{what}_interval": time, "max_duration": run, "save_folder": "out"}
    values = of_main(**changes)
    assert (values[f"{what}_strategy"], values.get(f"{what}_steps")) == expected


@pytest.mark.once
@pytest.mark.parametrize("what", ["eval", "save"])
def test_an_epoch_is_an_interval_where_it_ends(what, tmp_path):
    """A stream ends none, and nothing was saved or evaluated."""
    changes = {f"{what}_interval": "1ep", "max_duration": "100ba", "save_folder": "out"}
    file, strategy = tmp_path / "file.yaml", f"{what}_strategy"
    for words in ([], ["--dataset_name", "allenai/c4", "--streaming"]):
        with pytest.raises(ValueError, match=f"1ep: a stream ends no epoch: .* give --{what}_st"):
            read(file, "main/mosaic", *words, **changes)
    for words in (["--dataset_name", "allenai/c4"], ["--prepared_data", "rows"]):
        assert read(file, "main/mosaic", *words, **changes)[0][strategy] == "epoch"
    assert read(file, "finetuning/mosaic", **changes)[0][strategy] == "epoch"


@pytest.mark.once
@pytest.mark.parametrize(
    ("of", "changes", "steps"),
    [
        # 16 x 128 and 8 x 64 positions a step.
        ("finetuning/mosaic", {"max_duration": "1000000tok"}, 489),
        ("glue/hf", {"max_duration": "1000sp", "batch_size": 8}, 125),
        ("glue/hf", {"max_duration": "1000sp"}, 63),
        ("glue/hf", {"max_duration": "1000tok", "batch_size": 8, "max_sequence_length": 64}, 2),
    ],
)
def test_a_kind_of_file_counts_by_keys_of_its_own(of, changes, steps, tmp_path):
    if of == "glue/hf":
        # A task has a batch of its own, of RTE 16.
        changes = {"tasks": {"rte": {"trainer_kwargs": changes}}}
    assert read(tmp_path / "file.yaml", of, **changes)[0]["max_steps"] == steps


# ---- what becomes of a key ----


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scheduler.alpha_f": 0.1}, {"lr_end": 0.1}),
        ({"scheduler.name": "constant_with_warmup"}, {"lr_scheduler_type": "constant_with_warmup"}),
        (
            {"scheduler.name": "cosine_with_warmup", "scheduler.alpha_f": 0},
            {"lr_scheduler_type": "cosine"},
        ),
        ({"scheduler.t_max": "1dur"}, {"lr_end": 0.02}),
        ({"scheduler.t_max": "286720000sp"}, {"lr_end": 0.02}),
        ({"optimizer.betas": [0.8, 0.95]}, {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ({"optimizer.eps": "1e-8", "optimizer.lr": "5e-5"}, {"learning_rate": 5e-5}),
        ({"optimizer.eps": "1e-8"}, {"adam_epsilon": 1e-8}),
        ({"model.model_config.layer_norm_eps": "1e-12"}, {}),
        ({"run_name": 5}, {"output_dir": "runs/5"}),
        ({"data_local": 4, "train_loader.dataset.split": 5}, {"train_file": ["4/5"]}),
        ({"precision": "amp_fp16"}, {"bf16": False, "fp16": True}),
        ({"precision": "fp32"}, {"bf16": False}),
        ({"algorithms": ...}, {"low_precision_layernorm": False}),
        ({"algorithms": {"low_precision_layernorm": None}}, {"low_precision_layernorm": True}),
        (
            {"algorithms.gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 2}},
            {"max_grad_norm": 2, "low_precision_layernorm": True},
        ),
        ({"train_loader.num_workers": 2}, {"dataloader_num_workers": 2}),
        # bert-base-uncased's, which flash attention would not do.
        (
            {"model.model_config.attention_probs_dropout_prob": ...},
            {"attention_probs_dropout_prob": 0.1},
        ),
        ({"model.model_config.hidden_dropout_prob": 0}, {"hidden_dropout_prob": 0}),
        ({"model.model_config.hidden_size": 256}, {"hidden_size": 256, "num_hidden_layers": 12}),
        ({"model.gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"data_remote": "/far/c4"}, {"train_file": ["/far/c4/train"]}),
        ({"data_remote": "/far/c4"}, {"validation_file": ["/far/c4/val"]}),
        ({"eval_subset_num_batches": 20}, {"max_eval_documents": 20 * 4096}),
        (
            {"eval_subset_num_batches": 20, "global_eval_batch_size": 16},
            {"max_eval_documents": 320},
        ),
        ({"device": "cpu"}, {"use_cpu": True}),
        ({"loggers": {"wandb": {}}}, {"report_to": "wandb"}),
        ({"save_folder": "./ckpt/{run_name}/x"}, {"output_dir": f"ckpt/{BASE}/x"}),
        # Composer's own default.
        ({"save_folder": "out"}, {"save_strategy": "steps", "save_steps": 1000}),
        (
            {"save_folder": "out", "save_interval": "3500ba", "save_num_checkpoints_to_keep": 1},
            {"save_strategy": "steps", "save_steps": 3500, "save_total_limit": 2},
        ),
        (
            {"save_folder": "out", "save_num_checkpoints_to_keep": 0},
            {"save_strategy": "no", "output_dir": "out"},
        ),
        ({"load_path": "runs/mine"}, {"model_name_or_path": "runs/mine"}),
        ({"model.pretrained_checkpoint": "runs/mine"}, {"model_name_or_path": "runs/mine"}),
        ({"model.pretrained_model_name": "google-bert/bert-base-cased"}, {}),
    ],
)
def test_what_a_key_becomes(changes, expected, of_main):
    values = of_main(**changes)
    assert expected.items() <= values.items()


def test_a_cosine_ends_where_alpha_f_says(of_main, tmp_path):
    changes = {"scheduler.name": "cosine_with_warmup", "scheduler.alpha_f": 0.1}
    # Trainer makes the folder.
    words = flags(output_dir=tmp_path / "out")
    values = of_main(*words, **changes, max_duration="100ba", eval_interval=0)
    args = recipe.PretrainingArguments(**pick(recipe.PretrainingArguments, values))
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), args)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / 5e-4)
    assert rates[2] == pytest.approx(0.5) and rates[5] == pytest.approx(1)
    # Half of the way between the peak and the end.
    assert rates[52] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)


@pytest.mark.once
def test_a_checkpoint_has_its_own_shape(of_main):
    """train_mlm.py refuses a checkpoint and a shape."""
    sizes = {"num_hidden_layers", "num_attention_heads"}
    assert sizes <= set(of_main())
    assert not sizes & set(of_main(load_path="runs/mine"))
    assert not sizes & set(of_main("--model", "runs/mine"))


@pytest.mark.once
def test_a_bert_is_fine_tuned_from_its_checkpoint_or_from_its_name(tmp_path):
    file = tmp_path / "file.yaml"
    assert read(file, "finetuning/hf")[0]["model"] == "bert-base-uncased"
    assert read(file, "finetuning/hf", load_path="runs/mine")[0]["model"] == "runs/mine"
    assert "model" not in read(file, "finetuning/hf", **{"model.use_pretrained": False})[0]


@pytest.mark.once
@pytest.mark.parametrize("number", [-1, None])
def test_all_checkpoints_are_kept_unless_a_number_is_given(number, of_main):
    changes = {"save_folder": "out", "save_num_checkpoints_to_keep": number}
    assert "save_total_limit" not in of_main(**changes)


@pytest.mark.once
@pytest.mark.parametrize(
    ("of", "changes", "said"),
    [
        ("main/mosaic", {}, "no save_folder: nothing is saved before the end; --save_steps 3500"),
        ("main/mosaic", {}, "algorithms.fused_layernorm: LayerNorm in autocast's dtype"),
        ("main/mosaic", {"algorithms.alibi": {}}, "algorithms.alibi: the model has it anyway"),
        ("main/mosaic", {"max_duration": "1ep"}, "the last rows of an epoch are trained on too"),
        ("main/mosaic", {"loggers.wandb.project": "mine"}, "WANDB_PROJECT and WANDB_ENTITY"),
        ("main/mosaic", {"device_train_microbatch_size": "auto"}, "device_train_microbatch_size"),
        ("main/mosaic", {"scheduler.name": "constant_with_warmup"}, "a constant rate has no other"),
        (
            "main/mosaic",
            {"save_folder": "out", "save_num_checkpoints_to_keep": 1},
            "save_num_checkpoints_to_keep: 2, the older one until the newer is complete",
        ),
        ("glue/mosaic", {}, "bf16 where the device computes it natively, and float32 in STS-B"),
        ("main/mosaic", {"load_path": "runs/mine"}, "step, optimizer and rate begin anew"),
        (
            "main/mosaic",
            {"load_path": "runs/mine", "load_weights_only": False},
            "step, optimizer and rate begin anew",
        ),
        (
            "main/mosaic",
            {"optimizer.lr": None, "mlm_probability": None},
            "without a value, so our defaults hold: train_loader.dataset.mlm_probability, "
            "optimizer.lr\n",
        ),
        ("main/mosaic", {"train_loader.dataset.shuffle": ...}, "shuffle: rows are shuffled; there"),
        ("main/mosaic", {"train_loader.dataset.shuffle": None}, "shuffle: rows are shuffled; the"),
    ],
)
def test_what_means_something_else_here_is_said_once(of, changes, said, tmp_path):
    assert read(tmp_path / "file.yaml", of, **changes)[1].count(said) == 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("of", "changes", "words"),
    [
        # Published files have these, of which the scripts say the same.
        ("main/mosaic", {"load_path": None, "data_remote": None, "run_name": None}, []),
        ("glue/hf", {"model.pretrained_checkpoint": None}, []),
        ("main/mosaic", {"algorithms": None, "save_folder": None}, []),
        ("main/mosaic", {"optimizer.lr": None}, ["--learning_rate", "1e-4"]),
        ("main/mosaic", {"load_path": "runs/mine", "load_weights_only": True}, []),
        # These scripts load nothing but weights.
        ("main/mosaic", {"model.pretrained_checkpoint": "runs/mine"}, []),
        ("finetuning/mosaic", {"load_path": "runs/mine", "load_weights_only": False}, []),
        ("main/mosaic", {}, ["--save_steps", "100"]),
    ],
)
def test_nothing_is_said_where_nothing_differs(of, changes, words, tmp_path):
    said = read(tmp_path / "file.yaml", of, *words, **changes)[1]
    assert not re.search("without a value|begin anew|shuffled|no save_folder.*100", said)


# ---- refusals ----

SHAPE = "--hidden_size --intermediate_size"
REFUSED = [
    ("main/mosaic", {"max_durations": 1}, "unknown key 'max_durations'; near are max_duration"),
    ("main/mosaic", {"model.model_config.rotary": 1}, "unknown key 'model.model_config.rotary'"),
    ("main/mosaic", {"callbacks.early_stopper": {}}, "unknown key 'callbacks.early_stopper'"),
    ("main/mosaic", {"callbacks.early_stopper": None}, "unknown key 'callbacks.early_stopper'"),
    ("main/mosaic", {"callbacks.early_stopper.n": 1}, "unknown key 'callbacks.early_stopper.n'"),
    ("main/mosaic", {"model": "mosaic_bert"}, "unknown key 'model'"),
    ("main/mosaic", {"optimizer.name": "adam"}, "adam: it is decoupled_adamw; --optim chooses"),
    ("main/mosaic", {"optimizer.betas": [0.9]}, r"betas: \[0.9\]: AdamW has two: give a list"),
    ("main/mosaic", {"optimizer.betas": 0.9}, "betas: 0.9: AdamW has two: give a list of two"),
    ("main/mosaic", {"scheduler.name": "step"}, "step is none of linear_decay_with_warmup, const"),
    ("main/mosaic", {"scheduler.t_max": "9ba"}, "t_max: 9ba: the schedule is as long as the run"),
    ("main/mosaic", {"scheduler.t_warmup": "1ep"}, "1ep: give it in ba or dur"),
    ("main/mosaic", {"max_duration": "12sec"}, "12sec is no time in ep, ba, sp, tok or dur"),
    ("main/mosaic", {"max_duration": "0.5ep"}, "ep are counted in whole numbers"),
    ("main/mosaic", {"max_duration": "1dur"}, "a run is some ep, ba, sp or tok long"),
    ("main/mosaic", {"max_duration": "0ba"}, "a run is some ep, ba, sp or tok long"),
    ("main/mosaic", {"global_train_batch_size": ...}, "the rows of a step .* --global_batch_size"),
    ("main/mosaic", {"max_duration": ...}, "the length of the run is needed: give --max_steps or"),
    (
        "finetuning/mosaic",
        {"max_duration": "9tok", **dict.fromkeys(("train_loader", "eval_loader"), {"split": "a"})},
        "the tokens of a row are needed: give --max_seq_length",
    ),
    ("glue/hf", {"scheduler.t_warmup": "9sp"}, "rows of a step are needed: give --global_batch_s"),
    ("glue/hf", {"scheduler.t_warmup": "1ep"}, "length of the run is needed: give --max_steps or"),
    ("main/mosaic", {"eval_interval": "3ep"}, "3ep: an interval in epochs is 1ep: give others in"),
    ("main/mosaic", {"precision": "amp_fp8"}, "amp_fp8: it is one of amp_bf16, amp_fp16, amp_fp32"),
    ("main/mosaic", {"algorithms.alibi_2": {}}, "algorithms: alibi_2 cannot be had in a mosaic_b"),
    (
        "main/mosaic",
        {"algorithms.gradient_clipping": {"clipping_type": "adaptive", "clipping_threshold": 1}},
        "algorithms: of gradients only the norm is clipped",
    ),
    (
        "main/mosaic",
        {"algorithms.gradient_clipping": {"clipping_type": "norm"}},
        "give clipping_type norm and a clipping_threshold, or give --max_grad_norm",
    ),
    ("main/mosaic", {"algorithms.gradient_clipping": 1}, "algorithms: expected keys with values"),
    ("main/mosaic", {"loggers.wandb": "mine"}, "loggers: expected keys with values"),
    ("main/hf", {"algorithms.fused_layernorm": {}}, "fused_layernorm cannot be had in a hf_bert"),
    ("main/hf", {"algorithms.alibi": {}}, "alibi cannot be had in a hf_bert: leave it out"),
    ("main/hf", {"model.use_pretrained": True}, "only a MosaicBERT is continued from: leave it"),
    ("main/mosaic", {"model.name": "gpt"}, "model.name: gpt: it is mosaic_bert or hf_bert"),
    (
        "main/mosaic",
        {"model.pretrained_model_name": "prajjwal1/bert-tiny"},
        f"hidden_size is not in model_config, and only BERT-Base's .* give {SHAPE}",
    ),
    ("main/mosaic", {"model.model_config.hidden_act": "relu"}, "the activation is BERT's"),
    ("main/mosaic", {"model.model_config.layer_norm_eps": 1e-6}, "so it can only be 1e-12"),
    (
        "main/mosaic",
        {"data_remote": "s3://bucket/c4"},
        "remote s3://bucket/c4 is not on this machine: copy .* --train_file FOLDER",
    ),
    ("main/mosaic", {"data_local": None}, "neither local nor remote names a folder"),
    ("main/mosaic", {"train_loader.name": "lm"}, "a loader reads documents"),
    ("main/mosaic", {"train_loader.dataset.shuffle": False}, "rows are shuffled, so it can only"),
    ("main/mosaic", {"train_loader.dataset.streams": {"a": {}}}, "--train_file FOLDER FOLDER"),
    ("main/mosaic", {"train_loader.dataset.eos_token_id": 0}, "leave it out, give --pack"),
    ("main/mosaic", {"train_loader.dataset.samples_per_epoch": 9}, "an epoch is all rows"),
    (
        "main/mosaic",
        {"eval_loader.dataset.max_seq_len": 64},
        "eval_loader.dataset.max_seq_len is 64, and here they are one: --max_seq_length chooses",
    ),
    (
        "main/mosaic",
        {"train_loader.dataset.tokenizer_name": "other"},
        "train_loader.dataset.tokenizer_name is other, and here they are one: --tokenizer_name",
    ),
    ("main/mosaic", {"train_subset_num_batches": 5}, "all rows are trained on"),
    ("main/mosaic", {"loggers": {"mlflow": {}}}, "mlflow is not wandb: --report_to chooses"),
    ("main/mosaic", {"loggers": "wandb"}, "loggers: wandb: expected keys with values"),
    ("main/mosaic", {"save_folder": "s3://b/{run_name}"}, "is no folder on this machine: give --o"),
    ("main/mosaic", {"save_folder": "x/{rank}"}, "x/{rank} is no folder on this machine"),
    (
        "main/mosaic",
        {"load_path": "ckpt/latest-rank{rank}.pt"},
        "python convert_weights.py ckpt/latest-rank0.pt FOLDER --config config.json --tokenizer "
        "bert-base-uncased; then give --model_name_or_path FOLDER",
    ),
    (
        "main/mosaic",
        {"load_path": "s3://bucket/dir/ep0-ba70000-rank0.pt"},
        "copy it to this machine; .*: python convert_weights.py ep0-ba70000-rank0.pt FOLDER",
    ),
    (
        "finetuning/hf",
        {"load_path": "a.pt"},
        "of a BERT: save it by transformers, and give --model",
    ),
    ("finetuning/mosaic", {"eval_subset_num_batches": 4}, "all rows are evaluated"),
    (
        "glue/mcloud",
        {"parameters.starting_checkpoint_load_path": "a.pt"},
        "a.pt FOLDER .* --model FOLDER",
    ),
    (
        "main/mosaic",
        {"load_path": "<checkpoint>"},
        "load_path: <checkpoint>: a placeholder: put a value there, or give --model_name_or_path",
    ),
    ("main/mosaic", {"optimizer.lr": "<lr>"}, "lr: <lr>: a placeholder: .*, or give --learning_r"),
    ("main/mosaic", {"data_local": "<c4>"}, "dataset.local: <c4>: .*, or give --train_file"),
    ("main/mosaic", {"run_name": "<me>"}, "run_name: <me>: .*, or give --output_dir"),
    ("glue/mosaic", {"optimizer": {"lr": 1}}, "unknown key 'optimizer.lr'"),
    ("glue/mosaic", {"tasks": {"wnli": {}}}, "tasks: wnli is none of mnli, qqp"),
    ("glue/mosaic", {"tasks.rte.epochs": 3}, "tasks: rte.epochs is neither seeds nor trainer_kw"),
    (
        "glue/mosaic",
        {"tasks.rte.trainer_kwargs.eval_subset_num_batches": 9},
        "tasks: trainer_kwargs.eval_subset_num_batches cannot be had: leave it out",
    ),
    (
        "glue/mosaic",
        {"tasks.rte.seeds": [1, 2]},
        r"seeds is not the same for all tasks \(mnli \[19\]; .*; rte \[1, 2\]\): train them one by",
    ),
    (
        "glue/mosaic",
        {"tasks.rte.trainer_kwargs.batch_size": 8},
        "global_batch_size is not the same for all tasks .*, first with --task mnli",
    ),
    ("main/mcloud_80gb", {"computes": {}}, "unknown key 'computes' beside parameters"),
]


@pytest.mark.once
@pytest.mark.parametrize(("of", "changes", "said"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_cannot_be_had_is_refused_by_name(of, changes, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'file.yaml'}: .*{said}"):
        read(tmp_path / "file.yaml", of, **changes)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_remote": "s3://bucket/c4"}, ["--train_file", "a", "--validation_file", "b"]),
        ({"data_remote": "s3://bucket/c4"}, ["--dataset_name", "allenai/c4"]),
        ({"data_local": "<c4>"}, ["--train_file", "a"]),
        ({"load_path": "a.pt"}, ["--model", "runs/mine"]),
        ({"load_path": "<checkpoint>"}, ["--model", "runs/mine"]),
        ({"optimizer.lr": "<lr>"}, ["--learning_rate", "0.001"]),
        ({"algorithms.gradient_clipping": {}}, ["--max_grad_norm", "1"]),
        ({"save_folder": "s3://bucket"}, ["--output_dir", "out"]),
        ({"optimizer.name": "adam"}, ["--optim", "adafactor"]),
        ({"scheduler.name": "step"}, ["--lr_scheduler_type", "linear"]),
        ({"eval_interval": "3ep"}, ["--eval_steps", "10"]),
        ({"max_duration": ...}, ["--max_steps", "10"]),
        ({"global_train_batch_size": ...}, ["--global_batch_size", "10"]),
        ({"eval_loader.dataset.max_seq_len": 64}, ["--max_seq_length", "64"]),
        ({"precision": "amp_fp8"}, ["--bf16", "true"]),
        (
            {"model.pretrained_model_name": "prajjwal1/bert-tiny"},
            ["--hidden_size", "128", "--intermediate_size", "512"],
        ),
    ],
)
def test_a_flag_stands_in_for_what_is_refused(changes, words, of_main):
    with pytest.raises(ValueError):
        of_main(**changes)
    values = of_main(*words, **changes)
    for name, value in zip(words[::2], words[1::2], strict=False):
        found = values[{"model": "model_name_or_path"}.get(name[2:], name[2:])]
        assert str(found).lower() in (value, f"{value}.0") or found == [value]
    assert values["output_dir"] and values["save_strategy"]
    assert values.get("low_precision_layernorm", True)


@pytest.mark.once
def test_a_flag_for_the_schedule_replaces_all_of_it(of_main):
    cosine = {"scheduler.name": "cosine_with_warmup", "scheduler.alpha_f": 0.1}
    for name, changes in (("constant", {}), ("linear", cosine)):
        values = of_main("--lr_scheduler_type", name, **changes)
        assert values["lr_scheduler_type"] == name and values["warmup_ratio"] == 0.06
        assert not {"lr_end", "lr_scheduler_kwargs"} & set(values)


@pytest.mark.once
@pytest.mark.parametrize("changes", [{}, {"save_folder": "out", "save_num_checkpoints_to_keep": 0}])
def test_checkpoints_are_saved_where_a_flag_says_how_often(changes, of_main):
    assert of_main(**changes)["save_strategy"] == "no"
    values = of_main("--save_steps", "100", **changes)
    assert values["save_steps"] == 100 and values.get("save_strategy", "steps") == "steps"


@pytest.mark.once
def test_the_command_that_converts_a_checkpoint_is_one(of_main):
    with pytest.raises(ValueError) as e:
        of_main(load_path="ckpt/ep0-ba70000-rank0.pt")
    words = re.search(r"convert_weights.py (.*?);", str(e.value))[1].split()
    args = convert_weights.parse_args(words)
    assert (args.source, args.tokenizer) == ("ckpt/ep0-ba70000-rank0.pt", "bert-base-uncased")
    assert str(args.config) == "config.json" and (ROOT / args.config).is_file()


@pytest.mark.parametrize("kind", KINDS, ids=lambda x: x.script)
def test_every_flag_that_a_key_becomes_exists(kind):
    of_pretraining = kind.command == "train_mlm.py"
    groups = recipe.PRETRAINING if of_pretraining else finetune.GROUPS
    known = {field.name for group in groups for field in recipe.fields(group)}
    rules = [x for row in kind.table.values() for x in (row if isinstance(row, tuple) else [row])]
    named = {rule for rule in rules if isinstance(rule, str)}
    assert named and named <= known


# ---- GLUE ----


@pytest.mark.once
def test_seeds_of_tasks_are_the_published_ones_or_given(tmp_path):
    file = tmp_path / "glue.yaml"
    values, _ = read(file, "glue/mosaic")
    assert "seeds" not in values
    # The default of the file is the first of ours.
    for name, task in TASKS.items():
        assert PUBLISHED["glue/mosaic"]["tasks"][name].get("seeds", [19]) == list(
            SEEDS[: task.seeds]
        )
    changes = {f"tasks.{name}.seeds": [1, 2] for name in TASKS}
    assert read(file, "glue/mosaic", **changes)[0]["seeds"] == [1, 2]
    one = {"tasks.rte.seeds": [1, 2]}
    assert read(file, "glue/mosaic", "--task", "rte", **one)[0]["seeds"] == [1, 2]
    values, _ = read(file, "glue/mosaic", "--task", "mnli", "cola", **one)
    assert "seeds" not in values and values["task"] == ["mnli", "cola"]
    values, _ = read(file, "glue/mosaic", "--seeds", "5", **one)
    assert values["seeds"] == [5] and values["task"] == ["all"]


@pytest.mark.once
def test_a_flag_for_what_tasks_differ_in_leaves_the_rest(tmp_path):
    tasks = {
        name: {"seeds": [1, 2], "trainer_kwargs": {"max_duration": "5ep", "batch_size": rows}}
        for name, rows in (("rte", 8), ("cola", 32))
    }
    words = ["--task", "rte", "cola", "--global_batch_size", "16"]
    values, _ = read(tmp_path / "glue.yaml", "glue/mosaic", *words, tasks=tasks)
    expected = {"seeds": [1, 2], "num_train_epochs": 5, "global_batch_size": 16}
    assert expected.items() <= values.items() and values["task"] == ["rte", "cola"]


@pytest.mark.once
def test_some_tasks_with_a_trainer_of_their_own(tmp_path):
    told = {"max_duration": "10ba", "batch_size": 8, "max_sequence_length": 64}
    told |= {"eval_interval": "5ba", "save_num_checkpoints_to_keep": 0}
    changes = {"tasks": dict.fromkeys(("rte", "mnli"), {"trainer_kwargs": told})}
    values, _ = read(tmp_path / "glue.yaml", "glue/hf", **changes, default_seed=1111)
    expected = {"max_steps": 10, "global_batch_size": 8, "max_seq_length": 64, "seeds": [1111]}
    assert (expected | {"task": ["mnli", "rte"]}).items() <= values.items()


@pytest.mark.once
def test_sts_b_stays_in_float32(tmp_path):
    """bf16 that is given would come before the task's own."""
    file = tmp_path / "glue.yaml"
    assert not {"bf16", "fp16"} & set(read(file, "glue/mosaic")[0])
    assert read(file, "glue/mosaic", precision="fp32")[0]["bf16"] is False
    with pytest.raises(ValueError, match="precision: amp_fp16: stsb is in float32: train it by it"):
        read(file, "glue/mosaic", precision="amp_fp16")
    values, _ = read(file, "glue/mosaic", "--task", "stsb", "--bf16", "false", precision="amp_fp16")
    assert values["bf16"] is False and "fp16" not in values
    assert read(file, "glue/mosaic", "--task", "cola", precision="amp_fp16")[0]["fp16"] is True


# ---- --print_recipe ----


def test_it_prints_ours_with_flags_and_what_is_given_of_a_tasks_own(tmp_path):
    file = tmp_path / "ours.yaml"
    file.write_text("learning_rate: 5.0e-4\ndecoupled_weight_decay: 1.0e-5\ntask: cola\nseeds: 3\n")
    values = yaml.safe_load(printed("ours", file, "--seeds", "4", "--model", "runs/demo"))
    # CoLA's are others than these defaults.
    defaults = {"learning_rate": 5e-4, "decoupled_weight_decay": 1e-5}
    assert values == {"model": "runs/demo", "task": ["cola"], "seeds": [4]} | defaults
    assert printed("main", *flags(max_steps=5, mlm_probability=0.3)) == "max_steps: 5\n"
    kwargs = json.dumps({"min_lr_rate": 0.1})
    text = printed("main", *flags(lr_scheduler_kwargs=kwargs))
    assert yaml.safe_load(text) == {"lr_scheduler_kwargs": kwargs}
    assert printed("main") == ""


@pytest.mark.once
def test_what_a_task_has_of_its_own_is_always_printed():
    for task in TASKS.values():
        assert set(task.recipe()) <= set(FinetuneArguments.DEFAULT_DEPENDS)


# ---- runs ----


def rows_of_index(shards):
    """For mosaicml-streaming, which does not install beside transformers 5: what write_shards
    wrote."""
    for folder, number, _ in shards:
        for text in read_json(folder, "index.json")["shards"][number]["texts"]:
            yield {"text": text}


def write_shards(folder, *parts):
    folder.mkdir(parents=True)
    shards = [{"texts": texts} for texts in parts]
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small run of the published recipe, as theirs.yaml in the current folder."""
    monkeypatch.setattr(corpus, "read_shards", rows_of_index)
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "c4" / "train", DOCUMENTS[:30], DOCUMENTS[30:])
    write_shards(tmp_path / "c4" / "val", DOCUMENTS[::7])
    words = sorted({word for text in DOCUMENTS for word in text.split()})
    write_vocab(tmp_path / "vocab.txt", *words)
    changes = {
        "data_local": "c4",
        "tokenizer_name": "vocab.txt",
        "model.pretrained_model_name": "bert-base-uncased",
        "model.model_config": TINY | {"attention_probs_dropout_prob": 0.0},
        "max_seq_len": 16,
        "max_duration": "95sp",
        "scheduler.t_warmup": "24sp",
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 4,
        "precision": "fp32",
        "train_loader.num_workers": 0,
        "eval_interval": "40sp",
        "save_folder": "ckpt/{run_name}",
        "save_interval": "640tok",
        "save_num_checkpoints_to_keep": 1,
    }
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(dump(put(PUBLISHED["main/mosaic"], changes)))
    return theirs


def test_a_run_of_the_published_recipe(tiny, tmp_path, monkeypatch, capfd):
    words = ["theirs.yaml", *flags(logging_steps=1, cpu_threads=1)]
    monkeypatch.setattr(sys, "argv", ["train_mlm.py", *words])
    train_mlm.main()
    assert capfd.readouterr().err.count("has no meaning here:") == 1
    out = tmp_path / "ckpt" / BASE
    # 95 samples are in 12 steps, of which 24 samples are 3; then linear to 2 %.
    rates = {x["step"]: x["learning_rate"] / 5e-4 for x in read_log(out) if "loss" in x}
    assert list(rates) == list(range(1, 13))
    expected = [0, 1 / 3, 2 / 3] + [1 - 0.98 * i / 9 for i in range(9)]
    assert list(rates.values()) == pytest.approx(expected, abs=1e-6)
    evaluated = [x["step"] for x in read_log(out) if "eval_loss" in x]
    assert evaluated[:2] == [5, 10]
    # Every 5 steps and at the end, of which two stay.
    assert sorted(x.name for x in out.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    config = read_json(out, "config.json")
    assert TINY.items() <= config.items() and config["low_precision_layernorm"]
    ours = tmp_path / "ours.yaml"
    ours.write_text(printed("main/mosaic", tiny))
    check_that_both_say_the_same("main/mosaic", tiny, ours)


def test_rows_are_prepared_by_the_published_recipe(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["prepare_data.py", "theirs.yaml", *flags(prepared_data="rows")]
    )
    prepare_data.main()
    facts = read_json(tmp_path, "rows", "prepared.json")
    assert facts["source"] == "train" and facts["max_seq_length"] == 16


def test_a_classifier_is_trained_by_the_published_recipe(golden, tmp_path, vocab):
    changes = {
        "tokenizer_name": str(vocab),
        "load_path": str(golden),
        "max_seq_len": 16,
        "max_duration": "2ep",
        "optimizer.lr": 1e-3,
        "precision": "fp32",
        "train_loader.num_workers": 0,
        "run_name": "mine",
    }
    file = tmp_path / "file.yaml"
    file.write_text(dump(put(PUBLISHED["finetuning/mosaic"], changes)))
    own = write_own(tmp_path, by_age())
    finetune.main([str(file), *flags(**own, cpu_threads=1)])
    settings = result_of(tmp_path / "out", seed=17)["settings"]
    expected = {"learning_rate": 1e-3, "num_train_epochs": 2, "lr_end": 0.02, "rows_per_step": 16}
    expected |= {"max_seq_length": 16, "low_precision_layernorm": False, "bf16": False}
    assert expected.items() <= settings.items()
    assert settings["weight_decay"] * settings["learning_rate"] == pytest.approx(1e-6)


def test_tasks_are_trained_by_the_published_recipe(golden, tmp_path, vocab):
    changes = {"tokenizer_name": str(vocab), "starting_checkpoint_load_path": str(golden)}
    file = tmp_path / "file.yaml"
    file.write_text(dump(put(PUBLISHED["glue/mosaic"], changes)))
    values = {"data_dir": write_glue(tmp_path / "data"), "output_dir": tmp_path / "out"}
    finetune.main([str(file), *flags(**values, task="mnli", max_steps=1, cpu_threads=1)])
    assert [x.name for x in tmp_path.glob("out/mnli/seed-*")] == ["seed-19"]
    settings = result_of(tmp_path / "out", "mnli")["settings"]
    expected = {"learning_rate": 5e-5, "rows_per_step": 48, "lr_end": 0.0, "warmup_ratio": 0.06}
    assert (expected | {"low_precision_layernorm": True}).items() <= settings.items()


def test_without_data_of_ones_own_it_is_asked_for(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(dump(PUBLISHED["finetuning/mosaic"]))
    with pytest.raises(ValueError, match=r"give either --task .* or --train_file"):
        finetune.main([str(file)])


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("glue/hf", "give --model, a folder or a Hub id"),
        ("glue/mosaic", "load_path: <checkpoint_from_pretraining>: a placeholder: .* give --model"),
    ],
)
def test_without_a_checkpoint_the_model_is_asked_for(of, said, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(dump(PUBLISHED[of]))
    with pytest.raises(ValueError, match=said):
        finetune.main([str(file)])
