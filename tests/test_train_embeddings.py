# SPDX-License-Identifier: Apache-2.0
"""train_embeddings.py on tiny models: what it learns and writes, who can read that, interruptions,
and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from conftest import MODEL_FILES
from datasets import Dataset
from embeddings import PAIRS, RUN, SCORED, train, write_data
from finetuning import SENTENCES, write_rows
from hub import FILES_OF_OLD_TOKENIZERS, TOKENIZER_FILES
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from training import ACCELERATE, ROOT, flags, read_json, read_log, run

import convert_weights
import train_embeddings
from mosaic_tools.callbacks import StopOnSigterm
from mosaic_tools.checkpoints import newest_checkpoint
from mosaic_tools.embedding_trainer import build_evaluator

pytest_plugins = ["finetuning", "hub"]
# In words of the tiny vocabulary: unknown ones would be the same token.
PROMPTS = {"query_prompt": "the: ", "document_prompt": "book: "}
PARTS = {
    *("model.safetensors", "config.json", "README.md", "training.png", "modules.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *(MODEL_FILES + tuple(TOKENIZER_FILES)),
}


def losses(folder):
    return [entry["loss"] for entry in read_log(folder) if "loss" in entry]


@pytest.fixture(scope="module")
def trained(golden, tmp_path_factory):
    """A run with prompts and a second source of scored pairs."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder)
    scored = write_rows(folder / "scored.jsonl", SCORED)
    words = ["--train_file", data.pop("train_file"), scored]
    words += ["--validation_file", data.pop("validation_file"), scored]
    with pytest.MonkeyPatch.context() as patch:
        values = data | PROMPTS | {"model_name_or_path": golden, "max_steps": 40}
        train(patch, *words, "--symmetric", **values, license="mit", language="en")
    return folder / "out"


def test_it_learns_what_belongs_together(trained):
    entries = read_log(trained)
    before, after = (entries[i] for i in (0, -1))
    assert before["step"] == 0 and after["step"] == 40
    assert after["eval_cosine_ndcg@10"] > before["eval_cosine_ndcg@10"] + 0.1
    assert after["eval_spearman_cosine"] > before["eval_spearman_cosine"] + 0.1


def test_the_card_has_figures_of_before_and_after_and_an_example_that_runs(trained):
    card = (trained / "README.md").read_text()
    data, entries = ModelCard(card).data, read_log(trained)
    assert (data.library_name, data.pipeline_tag) == (
        "sentence-transformers",
        "sentence-similarity",
    )
    found = {x.metric_name: x.metric_value for x in data.eval_results}
    for when, entry in (("before", entries[0]), ("after", entries[-1])):
        assert found[f"nDCG@10 {when} training"] == entry["eval_cosine_ndcg@10"]
        assert found[f"MRR@10 {when} training"] == entry["eval_cosine_mrr@10"]
        assert found[f"Recall@10 {when} training"] == entry["eval_cosine_recall@10"]
        assert found[f"Spearman correlation {when} training"] == entry["eval_spearman_cosine"]
    line = next(x for x in card.splitlines() if x.startswith("| nDCG@10, held out |"))
    value = r"[01]\.\d{3} "
    said = [f"{value}{x}" for x in ("after training", "before", "random weights", "TF-IDF")]
    assert re.search(", ".join(said), line)
    assert "| started from | golden |" in card and "license: mit" in card
    assert "| CachedMultipleNegativesRankingLoss, both directions; CoSENTLoss |" in card
    # Both parts are of the same texts here.
    assert re.search(r"\| held out \| \d+ rows; of their (\d+) texts training has \1 too \|", card)
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(example.replace('"."', repr(str(trained))))


def test_the_folder_loads_everywhere_with_the_same_vectors(trained, tmp_path):
    model = SentenceTransformer(str(trained), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == model.tokenizer.model_max_length == 16
    # The forms that sentence-transformers 3 reads.
    kinds = [x["type"] for x in read_json(trained, "modules.json")]
    assert kinds == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
    ]
    texts = [x["passage"] for x in PAIRS]
    vectors = model.encode(texts)
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert (again.encode(texts) == vectors).all() and vectors.std() > 0
    names = set(load_file(trained / "model.safetensors"))
    assert not any("pooler" in x or "cls" in x for x in names)
    convert_weights.main([str(trained), str(tmp_path / "jina"), "--layout", "jina"])
    assert read_json(tmp_path, "jina", "config.json")["architectures"] == ["JinaBertModel"]
    assert read_json(tmp_path, "jina", "modules.json") == read_json(trained, "modules.json")


def test_the_prompts_are_saved_and_used(trained):
    model = SentenceTransformer(str(trained), trust_remote_code=True, device="cpu")
    assert model.prompts == {"query": "the: ", "document": "book: "}
    texts = ["the old man", "a book"]
    for encode, prompt in ((model.encode_query, "the: "), (model.encode_document, "book: ")):
        assert (encode(texts) == model.encode([prompt + x for x in texts])).all()
        assert (encode(texts) != model.encode(texts)).any()
    assert (model.encode_query(texts) != model.encode_document(texts)).any()


def test_mteb_finds_what_our_evaluation_does(trained, tmp_path):
    """The example of the docs, on pairs that are hard enough for figures between 0 and 1."""
    rows = {"anchor": SENTENCES, "positive": SENTENCES[::-1]}
    file = tmp_path / "pairs.jsonl"
    Dataset.from_dict(rows).to_json(file)
    page = (ROOT / "docs" / "embeddings.md").read_text()
    example = re.search(r"## With mteb.*?```python\n(.*?)```", page, re.DOTALL)[1]
    for name, place in (("pairs.jsonl", file), ("runs/embeddings-demo", trained)):
        example = example.replace(name, str(place))
    exec(example, names := {})
    model, evaluator = names["model"], build_evaluator({"pairs": Dataset.from_dict(rows)}, 8, [])
    found = evaluator(model)
    for name in ("ndcg", "mrr", "recall"):
        figure = found[f"cosine_{name}@10"]
        assert 0 < figure < 1
        assert names["scores"][f"{name}_at_10"] == pytest.approx(figure, abs=1e-5)
    model.prompts = {"query": "", "document": ""}
    assert evaluator(model)["cosine_ndcg@10"] != found["cosine_ndcg@10"]


def test_cross_encoders_start_from_it(trained, tmp_path):
    options = {"trust_remote_code": True, "device": "cpu"}
    ranker = CrossEncoder(str(trained), num_labels=1, **options)
    encoder = load_file(trained / "model.safetensors")
    start = ranker.model.bert.state_dict()
    assert all(torch.equal(start[x], y) for x, y in encoder.items()) and len(encoder) > 20
    pairs = [("a book", "the man"), ("the man", "the man")]
    before = ranker.predict(pairs)
    inputs = ranker.tokenizer(*zip(*pairs, strict=True), padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD(ranker.model.parameters(), lr=1)
    ranker.model(**inputs, labels=torch.tensor([[0.0], [1.0]])).loss.backward()
    optimizer.step()
    after = ranker.predict(pairs)
    ranker.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), **options).predict(pairs)
    assert (again == after).all() and (after != before).all()


def test_sparse_encoders_start_from_it(trained, tmp_path):
    options = {"trust_remote_code": True, "device": "cpu"}
    model = SparseEncoder(str(trained), **options)
    texts = ["a book", "the man"]
    before = model.encode(texts).to_dense()
    embeddings = model(model.tokenize(texts))["sentence_embedding"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    embeddings.square().sum().backward()
    optimizer.step()
    after = model.encode(texts).to_dense()
    model.save_pretrained(str(tmp_path))
    again = SparseEncoder(str(tmp_path), **options).encode(texts).to_dense()
    assert torch.equal(again, after) and not torch.equal(after, before)


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(golden, tmp_path, monkeypatch):
    data = write_data(tmp_path) | {"model_name_or_path": golden}
    words = ["--train_file", data.pop("train_file"), write_rows(tmp_path / "more.jsonl", SCORED)]
    words += ["--source_weights", 3, 1]
    # Batches of both sources, the first of which starts over; epochs of eight steps, dropout.
    values = data | {"max_steps": 11, "save_strategy": "steps", "save_steps": 5}
    train(monkeypatch, *words, **values)
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    (out / "checkpoint-10" / "complete.json").unlink()
    (out / "checkpoint-11" / "complete.json").unlink()
    train(monkeypatch, *words, **values, resume_from_checkpoint="last")
    assert losses(out) == losses(whole) and len(losses(out)) == 11
    found, expected = (load_file(x / "model.safetensors") for x in (out, whole))
    assert all(torch.equal(found[x], y) for x, y in expected.items())
    before = [x for x in read_log(out) if "eval_cosine_ndcg@10" in x]
    assert [x["step"] for x in before] == [0, 11]

    # Once more, as after an error in what follows the last step: Trainer would take another.
    train(monkeypatch, *words, **values, resume_from_checkpoint="last")
    assert newest_checkpoint(out)[0].name == "checkpoint-11" and losses(out) == losses(whole)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[x], y) for x, y in expected.items())


def test_sigterm_saves_and_ends(golden, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(StopOnSigterm, "agreed", lambda *_: asked.append(1) or len(asked) == 2)
    train(monkeypatch, **write_data(tmp_path), model_name_or_path=golden)
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 2, which is saved: repeat the command with" in said
    assert (tmp_path / "out" / "checkpoint-2" / "complete.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_hard_negatives_are_mined_and_trained_with(golden, tmp_path, monkeypatch, capsys):
    values = {"model_name_or_path": golden, "mine_hard_negatives": 2, "max_steps": 2}
    values |= {"per_device_train_batch_size": 2}
    train(monkeypatch, *["--matryoshka_dims", 32, 96], **write_data(tmp_path), **values)
    said = capsys.readouterr().out
    assert "data: train.jsonl: 1_train: 12 rows of anchor, positive, negative_1, negative_2" in said
    assert "loss: CachedMultipleNegativesRankingLoss, of the first 32, 96 dimensions" in said
    assert 0 < losses(tmp_path / "out")[0] < 20
    first, last = (read_log(tmp_path / "out")[i] for i in (0, -1))
    name, card = "eval_dim_32_cosine_ndcg@10", (tmp_path / "out" / "README.md").read_text()
    said = f"{last[name]:.3f} after training, {first[name]:.3f} before"
    assert f"nDCG@10, held out, first 32 dimensions | {said} |" in card
    # There are no more than 96.
    assert "first 96" not in card and not any("dim_96" in x for x in last)


def test_two_processes_train_on_sources_of_both_kinds(golden, tmp_path):
    """They waited for each other for ever, where each had a batch of another kind."""
    data = write_data(tmp_path) | {"model_name_or_path": golden}
    words = ["--train_file", data.pop("train_file"), write_rows(tmp_path / "more.jsonl", SCORED)]
    words += ["--source_weights", 1, 1]
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    values = flags(**RUN | data | {"max_steps": 4})
    said = run(tmp_path, *ACCELERATE, *config, ROOT / "train_embeddings.py", *words, *values)
    assert "2_more: 23 rows of sentence1, sentence2, score, 50% of the batches" in said
    assert "run: 4 steps of 8 rows" in said and "nDCG@10, held out: " in said
    assert len(losses(tmp_path / "out")) == 4
    assert {x for x in PARTS if not (tmp_path / "out" / x).exists()} == set()


def test_two_processes_compare_each_row_with_those_of_both(golden, tmp_path, monkeypatch):
    """Eight rows on one device, and four on each of two, are the same batch."""
    encoder = shutil.copytree(golden, tmp_path / "encoder")
    config = read_json(encoder, "config.json") | {"hidden_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(config))
    file = write_rows(tmp_path / "rows.jsonl", PAIRS[:8])
    values = {"model_name_or_path": encoder, "train_file": file, "validation_file": file}
    values |= {"max_steps": 1, "symmetric": True}
    one = {"output_dir": tmp_path / "one", "per_device_train_batch_size": 8}
    train(monkeypatch, **values | one)
    config = flags(config_file=ROOT / "recipes" / "accelerate" / "cpu.yaml", num_processes=2)
    two = flags(**RUN | values | {"output_dir": tmp_path / "two"})
    run(tmp_path, *ACCELERATE, *config, ROOT / "train_embeddings.py", *two)
    # The log has four decimals; of four rows alone it is ln 2 less or so.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)


def test_the_finished_folder_is_published(golden, tmp_path, monkeypatch, hub, capsys):
    values = write_data(tmp_path) | {"model_name_or_path": golden, "max_steps": 2}
    train(monkeypatch, **values, push_to_hub="org/name")
    assert set(hub.sent) - FILES_OF_OLD_TOKENIZERS == PARTS
    assert "https://huggingface.co/org/name/commit/1" in capsys.readouterr().out


def test_the_demo_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "recipes" / "embeddings-demo.yaml"
    monkeypatch.setattr("sys.argv", ["train_embeddings.py", str(recipe), "--cpu_threads", "1"])
    with pytest.raises(ValueError, match="'runs/demo' is no folder of a model and no Hub id"):
        train_embeddings.main()
