# SPDX-License-Identifier: Apache-2.0
"""long_retrieval.py: its two tasks have the answers that they say, what is searched is what was
read, and the script runs, resumes and records."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from conftest import run_python
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from training import RUN_IN_PLACE, flags, trained_tokenizer

from benchmarks.learning import long_retrieval, long_retrieval_results
from benchmarks.learning import retrieval_texts as texts


def article(name: int, count: int) -> str:
    """So many sentences of ten words, which name the article and their place in it."""
    return " ".join(f"Sentence {name} {i} is one of a few that belong." for i in range(count))


ARTICLES = [article(i, 400) for i in range(12)]
PASSAGE = len(texts.passages(ARTICLES[0])[0])  # sentences


def words(text: str) -> int:
    return len(text.split())


def sources(text: str) -> list[tuple[str, int]]:
    """(article, place) of each sentence."""
    found = [sentence.split()[1:3] for sentence in texts.sentences(text)]
    return [(name, int(place)) for name, place in found]


def test_the_longest_articles_are_held_out(tmp_path):
    file = tmp_path / "articles.txt"
    lengths = (3, 9, 4, 8)
    file.write_text("\n".join(article(i, x) for i, x in enumerate(lengths)) + "\n")
    short, long = texts.read_articles([str(file)], 2)
    assert [[sources(x)[0][0] for x in part] for part in (short, long)] == [["0", "2"], ["1", "3"]]
    with pytest.raises(ValueError, match="none is left beside the 4 longest"):
        texts.read_articles([str(file)], 4)


def test_a_training_anchor_is_the_sentence_after_its_passage():
    pairs = texts.training_pairs(ARTICLES, Random(0))
    assert len(pairs) == len(ARTICLES)
    for pair in pairs:
        [(name, place)] = sources(pair["anchor"])
        before = sources(pair["positive"])
        assert before[-1] == (name, place - 1) and 20 <= words(pair["positive"]) < 150


def test_a_controlled_target_begins_at_its_depth_and_is_the_only_trace_of_its_article():
    task = texts.controlled(ARTICLES, 2, 4096, words, Random(0))
    assert len(task.documents) == 2 and Counter(task.depths) == dict.fromkeys(texts.DEPTHS, 2)
    found = [sources(x) for x in task.documents]
    assert all(4096 <= words(x) < 4096 + 11 * PASSAGE for x in task.documents)
    for query, relevant, depth in zip(task.queries, task.relevant, task.depths, strict=True):
        [(name, place)] = sources(query)
        assert [sum(x == name for x, _ in document) for document in found] == [
            PASSAGE * (relevant == i) for i in range(2)
        ]
        begin = found[relevant].index((name, place - PASSAGE))
        assert depth <= 10 * begin < depth + 10 * PASSAGE
    with pytest.raises(ValueError, match="12 articles are too few for 3 documents"):
        texts.controlled(ARTICLES, 3, 4096, words, Random(0))


def test_a_natural_query_and_the_passage_around_it_are_not_in_its_article():
    task = texts.natural(ARTICLES[:3], words, Random(0))
    assert len(task.documents) == 3 and Counter(task.depths) == dict.fromkeys(texts.DEPTHS, 3)
    for query, relevant, depth in zip(task.queries, task.relevant, task.depths, strict=True):
        [(name, place)] = sources(query)
        left = sources(task.documents[relevant])
        assert name == str(relevant) and {x for x, _ in left} == {name}
        places = [x for _, x in left]
        begin = place - place % PASSAGE
        assert not set(places) & set(range(begin, begin + PASSAGE))
        before = sum(x < begin for x in places)
        assert depth <= 10 * before < depth + 10 * PASSAGE


class Counts:
    """An encoder whose vectors are how often each id is in a text."""

    device = "cpu"

    def __init__(self):
        self.tokenizer, self.rows = trained_tokenizer(), 0

    def __call__(self, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.rows += len(ids)
        counts = torch.zeros(len(ids), len(self.tokenizer))
        return {"sentence_embedding": counts.scatter_add(1, ids, mask.float())}


def unit(rows) -> np.ndarray:
    """By plain counting, what Counts makes of one text's ids."""
    counts = np.zeros(len(Counts().tokenizer))
    for token in rows:
        counts[token] += 1
    return counts / np.linalg.norm(counts)


def test_equal_rows_are_computed_once_and_batches_change_nothing():
    model, rows = Counts(), [[2, 5, 5, 3], [2, 7, 3], [2, 5, 5, 3], [2, 9, 9, 9, 9, 3]]
    for tokens in (1, 7, 100):
        model.rows = 0
        found = long_retrieval.embed(model, rows, tokens)
        assert model.rows == 3
        np.testing.assert_allclose(found, [unit(x) for x in rows], atol=1e-6)


def test_chunks_are_those_that_are_read(monkeypatch):
    monkeypatch.setattr(long_retrieval, "CHUNK", 8)
    monkeypatch.setattr(long_retrieval, "LENGTHS", (8, 16, 32))
    model = Counts()
    documents = [
        "the old man reads " * 8,
        "a small book",
        "the young child reads a green book " * 9,
    ]
    queries = ["green book", "the old man"]
    task = texts.Task(documents, queries, [2, 0], [0, 0])
    found = dict(long_retrieval.search(model, task, (8, 32)))

    def ids(text):
        return model.tokenizer(text)["input_ids"]

    def cut(text, length):
        return [*ids(text)[: length - 1], ids(text)[-1]] if len(ids(text)) > length else ids(text)

    asked = np.stack([unit(ids(x)) for x in queries])
    for length in (8, 32):
        expected = asked @ np.stack([unit(cut(x, length)) for x in documents]).T
        np.testing.assert_allclose(found["whole", length], expected, atol=1e-6)
    for length in (16, 32):
        # Six tokens of text in a chunk, beside the first and the last.
        chunks = [
            [unit([ids(x)[0], *part, ids(x)[-1]]) for part in pieces[: length // 8]]
            for x in documents
            for inner in [ids(x)[1:-1]]
            for pieces in [[inner[i : i + 6] for i in range(0, len(inner), 6)]]
        ]
        assert [len(x) for x in chunks] == [min(length // 8, x) for x in (6, 1, 11)]
        nearest = [[max(query @ x for x in of) for of in chunks] for query in asked]
        np.testing.assert_allclose(found["chunks, nearest", length], nearest, atol=1e-6)
        means = [np.sum(x, axis=0) for x in chunks]
        expected = asked @ np.stack([x / np.linalg.norm(x) for x in means]).T
        np.testing.assert_allclose(found["chunks, mean", length], expected, atol=1e-6)


def test_bm25_reads_no_further_than_the_length():
    tokenizer = trained_tokenizer()
    documents = ["the old man " * 90 + "green book", "a wise woman " * 90, "a small child " * 90]
    task = texts.Task(documents, ["green book"], [0], [0])
    found = {
        length: scores[0] for (_, length), scores in long_retrieval.search_words(tokenizer, task)
    }
    assert [bool(x.any()) for x in found.values()] == [False, True, True, True, True]
    assert found[512].argmax() == 0


def test_ndcg_is_that_of_sentence_transformers():
    similarities = np.random.default_rng(0).standard_normal((40, 30))
    relevant = [i % 30 for i in range(40)]
    ids = [str(i) for i in range(40)]
    evaluator = InformationRetrievalEvaluator(
        {x: x for x in ids},
        {x: x for x in ids[:30]},
        {x: {str(y)} for x, y in zip(ids, relevant, strict=True)},
    )
    results = [
        [{"corpus_id": x, "score": y} for x, y in zip(ids, row, strict=False)]
        for row in similarities
    ]
    expected = evaluator.compute_metrics(results)["ndcg@k"][10]
    found = long_retrieval.ndcg(similarities, relevant)
    assert found.mean() == pytest.approx(expected) and 0.1 < expected < 0.5
    # What tells no document from another finds none.
    assert not long_retrieval.ndcg(np.zeros((2, 30)), [0, 3]).any()


def test_tables_average_over_seeds_and_depths(capsys, tmp_path):
    def record(model, seed, method, *values):
        rows = [
            {"method": method, "length": length, "ndcg": {"0": x, "256": x + 0.2}}
            for length, x in zip((256, 512), values, strict=True)
        ]
        return {"model": model, "seed": seed, "results": {"natural": rows}}

    records = [
        record("mosaic_bert", 1, "whole", 0.1, 0.3),
        record("mosaic_bert", 2, "whole", 0.2, 0.3),
        record("bm25", None, "BM25", 0.5, 0.6),
    ]
    assert long_retrieval_results.print_tables(records) == {"natural": [0.2, 0.1]}
    lines = [line.split()[-5:] for line in capsys.readouterr().out.splitlines()]
    assert ["256", "0.150", "0.350", "0.250", "0.100"] in lines
    assert ["512", "0.600", "0.800", "0.700", "0.000"] in lines
    long_retrieval_results.draw(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_toy_run_records_draws_and_trains_once(tmp_path):
    lines = ARTICLES + [article(100 + i, 30) for i in range(200)]
    (tmp_path / "articles.txt").write_text("\n".join(lines) + "\n")
    argv = [
        *flags(articles="articles.txt", output_dir="out", results=".", seeds=1, hidden_size=64),
        *flags(layers=1, vocab_size=150, steps=2, batch=8, held_out=12, count=2, longest=3),
    ]
    said = run_python(
        f"""
{RUN_IN_PLACE}
from benchmarks.learning import long_retrieval, side_by_side

long_retrieval.run = side_by_side.run = run
for _ in range(2):
    print("AGAIN")
    sys.argv[1:] = {argv}
    long_retrieval.main()
""",
        tmp_path,
    )
    _, *runs = said.split("AGAIN")
    # The data, two encoders, two embedding models; nothing.
    assert [x.count("RUN") for x in runs] == [5, 0]
    file = tmp_path / "long_retrieval.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [x["model"] for x in records] == ["mosaic_bert", "bert", "bm25"] * 2
    # The same weights find the same.
    assert [x["results"] for x in records[:3]] == [x["results"] for x in records[3:]]
    for task in ("controlled", "natural"):
        assert [len(x["results"][task]) for x in records[:3]] == [5 + 8, 2 + 8, 5]
    assert (tmp_path / "long_retrieval.png").is_file()
