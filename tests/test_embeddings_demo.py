# SPDX-License-Identifier: Apache-2.0
"""What docs/embeddings.md says that the embeddings demo reached, against records of its runs."""

import json
from statistics import mean

import pytest
import yaml
from training import ROOT

RECIPE = yaml.safe_load((ROOT / "recipes" / "embeddings-demo.yaml").read_text())
LINES = (ROOT / "benchmarks" / "results" / "embeddings.jsonl").read_text().splitlines()
# Those of other recipes say what was tried before.
RECORDS = [x for x in map(json.loads, LINES) if x.get("recipe") == RECIPE]
ROWS = {
    "after": "after training",
    "tfidf": "TF-IDF, by words alone",
    "random_weights": "random weights",
    "before": "before training, by masked language modelling only",
}


def test_the_recipe_is_recorded_with_three_seeds():
    assert sorted(x["seed"] for x in RECORDS) == [1, 2, 3]


def test_the_mean_is_ahead_of_tfidf_by_more_than_seeds_differ():
    found = [x["after"]["ndcg@10"] for x in RECORDS]
    assert mean(found) - RECORDS[0]["tfidf"]["ndcg@10"] > max(found) - min(found)


@pytest.mark.parametrize("other", ["tfidf", "random_weights", "before"])
def test_the_worst_seed_is_ahead_of(other):
    worst = min(x["after"]["ndcg@10"] for x in RECORDS)
    assert worst > max(x[other]["ndcg@10"] for x in RECORDS)


@pytest.mark.parametrize("key", ROWS)
def test_the_docs_have_the_recorded_figures(key):
    figures = [f"{x[key]['ndcg@10']:.3f}" for x in sorted(RECORDS, key=lambda x: x["seed"])]
    row = f"| {' | '.join([ROWS[key], *figures])} |"
    assert row in (ROOT / "docs" / "embeddings.md").read_text().splitlines()
