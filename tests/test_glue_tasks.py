# SPDX-License-Identifier: Apache-2.0
"""glue_tasks.py: recipes as published, metrics counted by hand, and their names on the Hub."""

import math

import numpy as np
import pytest
from finetuning import card_of, result_of
from huggingface_hub import ModelCard
from training import read_json

from mosaic_tools import glue_tasks, runs
from mosaic_tools.devices import native_bf16
from mosaic_tools.glue_tasks import TASKS

pytest_plugins = ["finetuning"]


# Learning rate, epochs, rows of a step, decoupled weight decay, whether it starts from the model of
# MNLI, and what is averaged: of mosaicml/examples at daddaeff7a, written down by hand.
PUBLISHED = {
    "mnli": (5e-5, 3, 48, 5e-6, False, ("accuracy", "accuracy_mm")),
    "qqp": (3e-5, 5, 16, 3e-6, False, ("accuracy", "f1")),
    "qnli": (1e-5, 10, 16, 1e-6, False, ("accuracy",)),
    "sst2": (3e-5, 3, 16, 3e-6, False, ("accuracy",)),
    "cola": (5e-5, 10, 32, 5e-6, False, ("matthews",)),
    "stsb": (3e-5, 10, 32, 3e-6, True, ("spearman",)),
    "mrpc": (8e-5, 10, 32, 8e-6, True, ("accuracy", "f1")),
    "rte": (1e-5, 3, 16, 1e-5, True, ("accuracy",)),
}
PUBLISHED_SEEDS = {
    **dict.fromkeys(("mnli", "qqp", "qnli"), (19,)),
    "sst2": (19, 8364, 717),
    "cola": (19, 8364, 717, 10536),
    **dict.fromkeys(("stsb", "mrpc", "rte"), (19, 8364, 717, 10536, 90166)),
}


def test_there_are_the_eight_tasks_in_the_order_of_the_table():
    assert list(TASKS) == list(PUBLISHED) and len(PUBLISHED) == len(PUBLISHED_SEEDS) == 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_decays_by_as_much_at_its_peak_as_published(name):
    task = TASKS[name]
    learning_rate, epochs, batch, decay, from_mnli, score = PUBLISHED[name]
    args = runs.FinetuneArguments(**task.recipe())
    assert args.learning_rate == learning_rate and args.num_train_epochs == epochs
    assert args.rows_per_step() == batch
    assert args.weight_decay * args.learning_rate == pytest.approx(decay)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert args.get_warmup_steps(100) == 6
    assert (args.lr_scheduler_type, args.lr_end, args.max_grad_norm) == ("linear", 0, 0)
    assert glue_tasks.SEEDS[: task.seeds] == PUBLISHED_SEEDS[name]
    assert (task.from_mnli, task.score) == (from_mnli, score)
    assert args.bf16 == (name != "stsb" and native_bf16(args.use_cpu)[0])


def test_metrics_are_those_counted_by_hand():
    # Of class 1: 2 right, 1 guessed wrongly, 1 missed; of class 0: 1 right.
    guesses, labels = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    found = glue_tasks.metrics(np.eye(2)[guesses], labels, positive=1)
    assert found["accuracy"] == pytest.approx(3 / 5)
    f1 = {1: 2 * 2 / (2 * 2 + 1 + 1), 0: 2 * 1 / (2 * 1 + 1 + 1)}
    assert found["f1"] == pytest.approx(f1[1])
    assert glue_tasks.metrics(np.eye(2)[guesses], labels, 0)["f1"] == pytest.approx(f1[0])
    # A model that knows a third label; and the mean.
    assert glue_tasks.metrics(np.eye(3)[guesses], labels, 1)["f1"] == pytest.approx(f1[1])
    mean = glue_tasks.metrics(np.eye(2)[guesses], labels)["f1"]
    assert mean == pytest.approx((f1[0] + f1[1]) / 2)
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
