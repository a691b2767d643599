# SPDX-License-Identifier: Apache-2.0
"""runs.py: which runs are planned, what a finished one counts for, and the table of results."""

import json
import math
import shutil
from pathlib import Path

import pytest
from finetuning import QUICK, by_age, result_of, start, write_own
from training import flags, read_json

import finetune
from mosaic_tools import classifiers, labelled_data, runs
from mosaic_tools.glue_tasks import TASKS
from mosaic_tools.tokenization import load_tokenizer

pytest_plugins = ["finetuning"]


def test_the_record_has_mean_and_spread_over_seeds(glue):
    record = read_json(glue.out, "results.json")
    assert set(record["tasks"]) == {"mnli", "rte", "cola", "stsb"}
    for name, task in record["tasks"].items():
        scores = [result_of(glue.out, name, seed)["score"] for seed in (1, 2)]
        assert task["score"]["mean"] == pytest.approx(sum(scores) / 2)
        assert task["score"]["std"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
        assert [run["score"] for run in task["runs"]] == scores
    assert {"accuracy", "accuracy_mm"} < set(record["tasks"]["mnli"]["metrics"])


def test_the_table_has_the_model_cards_columns():
    scores = {name: {"score": runs.summary([0.5, 0.6])} for name in reversed(TASKS)}
    head, _, row = runs.table(scores).splitlines()
    assert head == ("| MNLI-(m/mm) | QQP | QNLI | SST-2 | CoLA | STS-B | MRPC | RTE | Average |")
    assert row == "|" + " 55.00 ± 7.07 (n = 2) |" * 8 + " 55.00 |"
    assert runs.table({"rte": {"score": runs.summary([0.5])}}).endswith("| 50.00 |")


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
    made = runs.digest(settings)
    assert rte == {f"mnli/seed-2, {made}"}
    found = {
        glue.out / "mnli" / f"seed-{seed}": {"task": "mnli", "kept": True, "settings": settings}
        for seed in (1, 2)
    }
    assert starts("2", "1", finished=found)[0] == rte
    assert starts("2", "1", tasks=["rte"], finished=found)[0] == rte
    found[glue.out / "mnli" / "seed-2"]["kept"] = False
    assert starts("2", "1", finished=found)[0] == rte
    assert starts("2", "1", tasks=["rte"], finished=found)[0] == {f"mnli/seed-1, {made}"}
    # One that was made anew otherwise is another start, and so as JSON has its settings.
    read = json.loads(json.dumps(settings, default=str))
    assert runs.digest(read) == made != runs.digest(read | {"learning_rate": 1e-3})


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


def test_an_evaluation_reads_every_row_and_f1_is_of_the_tasks_second_label(
    stock, tmp_path, monkeypatch
):
    """Training's --dataloader_drop_last held for evaluations too. F1 was of id 1, whatever label a
    model had there."""
    seen, metrics = [], finetune.metrics

    def counted(predictions, labels, positive):
        seen.append((len(labels), positive))
        return metrics(predictions, labels, positive)

    monkeypatch.setattr(finetune, "metrics", counted)
    own = write_own(tmp_path, by_age())
    short = {"max_steps": 1, "cpu_threads": 1, "per_device_eval_batch_size": 5}
    start(model=stock, **short, **own, dataloader_drop_last=True)
    model = own["output_dir"] / "own" / "seed-19"
    config = read_json(model, "config.json")
    assert config["id2label"] == {"0": "old", "1": "other"}
    config |= {"id2label": {"0": "other", "1": "old"}, "label2id": {"other": 0, "old": 1}}
    (model / "config.json").write_text(json.dumps(config))
    start(model=model, **short, **own | {"output_dir": tmp_path / "again"})
    assert list(dict.fromkeys(seen)) == [(8, 1), (8, 0)]


@pytest.mark.parametrize("changed", ["learning_rate", "data_seed", "data", "weights"])
def test_results_of_other_settings_are_not_taken_for_those_asked_for(
    glue, stock, tmp_path, changed
):
    command = list(glue.command)
    if changed == "learning_rate":
        command += flags(learning_rate=1e-5)
    elif changed == "data_seed":
        command += flags(data_seed=7)
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


def test_an_output_folder_with_other_files_is_refused_and_kept(golden, tmp_path):
    own = write_own(tmp_path, by_age())
    own["output_dir"].mkdir()
    (own["output_dir"] / "precious").write_text("kept")
    with pytest.raises(ValueError, match="is not empty and has no results.json.*--overwrite true"):
        start(model=golden, **own)
    assert [file.name for file in own["output_dir"].iterdir()] == ["precious"]
