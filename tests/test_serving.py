# SPDX-License-Identifier: Apache-2.0
"""Folders that we write, in the hands of sentence-transformers."""

import json
import shutil

import datasets
import pytest
import torch
import transformers
from conftest import GOLDENS, load_golden
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from training import write_vocab

import convert_weights
from mosaic_tools import layouts


def assert_near(candidate, expected):
    """Equal but for float32 rounding in three layers at most: 2^10 eps of the largest value."""
    assert candidate.shape == expected.shape and candidate.isfinite().all()
    largest = expected.abs().max()
    assert (candidate - expected).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * largest


@pytest.fixture(scope="module", params=["MosaicBERT", "DNABERT-2", "Jina"])
def converted(request, tmp_path_factory):
    """A folder with tokenizer, converted from a source that is prepared for 1,024 tokens."""
    golden = GOLDENS / ("dnabert2_tiny" if request.param == "DNABERT-2" else "mosaic_tiny")
    source = tmp_path_factory.mktemp("source") / request.param
    shutil.copytree(golden, source)
    config = json.loads((golden / "config.json").read_text()) | {"alibi_starting_size": 1024}
    if request.param == "Jina":
        weights = {k: x for k, x in load_golden(golden.name)[1].items() if k.startswith("bert.enc")}
        weights |= {k: x for k, x in load_golden(golden.name)[1].items() if "bert.emb" in k}
        weights = layouts.from_ours(weights, "Jina, encoder only")
        torch.save(weights, source / "pytorch_model.bin")
        config = json.loads((GOLDENS / "jina_v2_tiny" / "config.json").read_text())
        config["max_position_embeddings"] = 1024
    (source / "config.json").write_text(json.dumps(config))
    write_vocab(source / "vocab.txt", entries=config["vocab_size"])
    folder = source.parent / "converted"
    convert_weights.main([str(source), str(folder)])
    return folder


def test_sentence_transformers_takes_the_mean_of_all_tokens_past_512_too(converted):
    """Its limit is the config's max_position_embeddings, which published configs leave at 512."""
    encoder = SentenceTransformer(str(converted), trust_remote_code=True)
    texts = ["w5 w6 w7", "w8 w9 " * 400]
    embeddings = encoder.encode(texts, convert_to_tensor=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
    model = transformers.AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    for text, embedding, length in zip(texts, embeddings, (5, 802), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, length)
        with torch.no_grad():
            assert_near(embedding, model(**inputs).last_hidden_state[0].mean(0))


def test_sentence_transformers_trains_saves_and_reloads(converted, tmp_path):
    encoder = SentenceTransformer(str(converted), trust_remote_code=True)
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 13)]
    before = encoder.encode(texts, convert_to_tensor=True)
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(
            str(tmp_path / "runs"),
            max_steps=2,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(encoder),
    )
    assert trainer.train().training_loss > 0
    trained = encoder.eval().encode(texts, convert_to_tensor=True)
    assert not torch.allclose(trained, before, rtol=1e-2)
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert_near(again.encode(texts, convert_to_tensor=True), trained)
