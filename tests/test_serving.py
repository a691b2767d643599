# SPDX-License-Identifier: Apache-2.0
"""Folders that we write, in other hands: sentence-transformers, torch.export, ONNX Runtime."""

import json
import re
import shutil

import datasets
import onnxruntime
import pytest
import torch
import transformers
from conftest import GOLDENS, ROOT, load_golden, run_python
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from training import write_vocab

import convert_weights
from mosaic_tools import layouts

AUTO_CLASSES = json.loads((ROOT / "config.json").read_text())["auto_map"].keys() - {"AutoConfig"}


def assert_near(candidate, expected):
    """Equal but for float32 rounding in three layers at most: 2^10 eps of the largest value."""
    assert candidate.shape == expected.shape and candidate.isfinite().all()
    largest = expected.abs().max()
    assert (candidate - expected).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * largest


# ---- sentence-transformers ----


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


# ---- torch.export and ONNX ----


def small_model(auto_class):
    """Random weights, large enough that every mask changes the output."""
    config = transformers.AutoConfig.from_pretrained(
        ROOT,
        trust_remote_code=True,
        vocab_size=64,
        hidden_size=48,
        num_attention_heads=6,
        num_hidden_layers=1,
        intermediate_size=40,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    auto_class = getattr(transformers, auto_class)
    return auto_class.from_config(config, trust_remote_code=True).eval()


def masked_batch(batch, seqlen, choices=None):
    """Inputs padded on the right, on the left and in the middle."""
    mask = torch.ones(batch, seqlen, dtype=torch.int64)
    mask[0, seqlen // 2 :] = mask[1, : seqlen // 3] = mask[-1, 2 : seqlen // 2 : 2] = 0
    ids = torch.arange(batch * seqlen).view(batch, seqlen) * 7 % 64
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    if choices:
        inputs = {
            k: torch.stack([x.roll(i, 0) for i in range(choices)], 1) for k, x in inputs.items()
        }
    return inputs


# What other libraries ask an ONNX file for.
ONNX_OUTPUTS = dict.fromkeys(AUTO_CLASSES, ["logits"]) | {
    "AutoModel": ["last_hidden_state", "pooler_output"],
    "AutoModelForQuestionAnswering": ["start_logits", "end_logits"],
}


def onnx_session(file):
    """The file in ONNX Runtime; it is the only one that its export wrote."""
    assert [x.name for x in file.parent.iterdir()] == [file.name]
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("auto_class", sorted(AUTO_CLASSES))
def test_every_head_exports_with_dynamic_batch_and_length(auto_class, tmp_path):
    """Unpadding broke torch.export: how many tokens are left depends on data."""
    model = small_model(auto_class)
    choices = 2 if "MultipleChoice" in auto_class else None
    example = masked_batch(3, 12, choices)
    dynamic = {0: torch.export.Dim("batch"), 2 if choices else 1: torch.export.Dim("seqlen")}
    program = torch.export.export(
        model, (), kwargs=example, dynamic_shapes={name: dynamic for name in example}
    )
    (tmp_path / "onnx").mkdir()
    torch.onnx.export(
        program,
        f=tmp_path / "onnx" / "model.onnx",
        dynamo=True,
        external_data=False,
        input_names=list(example),
        output_names=ONNX_OUTPUTS[auto_class],
        verbose=False,
    )
    session = onnx_session(tmp_path / "onnx" / "model.onnx")
    # In the order of the model's own.
    with torch.no_grad():
        assert list(model(**example, return_dict=True)) == ONNX_OUTPUTS[auto_class]
    for shape in [(3, 12), (5, 31), (2, 70)]:
        inputs = masked_batch(*shape, choices)
        with torch.no_grad():
            expected = model(**inputs, return_dict=True).to_tuple()
        exported = program.module()(**inputs).to_tuple()
        onnx = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        assert len(expected) == len(exported) == len(onnx) >= 1
        for x, y, z in zip(expected, exported, onnx, strict=True):
            assert_near(y, x)
            assert_near(torch.from_numpy(z), x)


def test_the_documented_export_runs_as_it_stands_and_is_what_others_read(tmp_path):
    """transformers.js and fastembed could not: the output was called where_4, in two files."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*torch.onnx.export.*?)```", page, re.S)
    model = small_model("AutoModel")
    model.save_pretrained(tmp_path)
    run_python(example.replace("runs/demo", str(tmp_path)))
    session = onnx_session(tmp_path / "onnx" / "model.onnx")
    assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [x.name for x in session.get_outputs()] == ["last_hidden_state"]
    for inputs in (masked_batch(3, 12), masked_batch(5, 31)):
        del inputs["token_type_ids"]
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        (found,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        assert_near(torch.from_numpy(found), expected)
