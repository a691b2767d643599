# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits by torch's own quantize_dynamic, and the figures of benchmarks/learning/
quantized.py."""

import copy
import io
import json
import math
import re
import shutil

import pytest
import torch
from conftest import GOLDENS, ROOT, run_python
from models import HEADS, make, make_batch, make_labels
from torch import nn
from training import write_vocab

import convert_weights
from benchmarks.learning import quantized
from mosaic_bert.bert_layers import BertForMaskedLM, BertModel

try:
    from torch.ao.quantization import quantize_dynamic
except ImportError:
    pytest.skip("this torch has no quantize_dynamic", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (23, 1, 9, 40)
# Of the norm. Weights have steps of 1/127 of the largest, activations of 1/127 of their range. That
# gives 5 to 10 per cent in two layers of so large weights; a wrong scale or row gives all.
BOUND = 0.2


def int8(model):
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def first_output(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def relative_error(found, expected):
    assert found.shape == expected.shape and found.numel() and found.isfinite().all()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_an_int8_model_is_near_float32_in_a_padded_batch(cls):
    model, batch = make(cls), make_batch(*LENGTHS)
    candidate = int8(model)
    assert not any(type(x) is nn.Linear for x in candidate.modules())
    found = first_output(candidate, batch)
    assert 0 < relative_error(found, first_output(model, batch)) < BOUND
    if found.dim() == 3 and cls is not BertModel:
        assert found.shape[:2] == batch["input_ids"].shape


def test_layers_left_out_by_name_stay_in_float32():
    """As the pages advise: the inputs of mlp.wo are products, which one scale suits badly."""
    model, batch = make(BertModel), make_batch(*LENGTHS)
    linear = {name for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    layers = {name for name in linear if not name.endswith("mlp.wo")}
    candidate = quantize_dynamic(model, layers, dtype=torch.qint8)
    left = {name for name, x in candidate.named_modules() if type(x) is nn.Linear}
    assert left == {"encoder.layer.0.mlp.wo", "encoder.layer.1.mlp.wo"}
    assert 0 < relative_error(first_output(candidate, batch), first_output(model, batch)) < BOUND


def test_padding_does_not_change_an_int8_row():
    """The activations' scale is one for all tokens, which padding would widen."""
    model, row = int8(make(BertForMaskedLM)), make_batch(9)
    padded = make_batch(9, seqlen=40)
    padded["input_ids"][:, :9] = row["input_ids"]
    assert torch.equal(first_output(model, padded)[:, :9], first_output(model, row))


def test_neighbours_change_an_int8_row_but_little():
    """Documented: torch and ONNX Runtime have one scale of activations for the whole batch. Were
    each row its own, the page would have to say so."""
    model, batch = int8(make(BertModel)), make_batch(*LENGTHS)
    together = first_output(model, batch)[2, :9]
    alone = first_output(model, {name: x[2:3, :9] for name, x in batch.items()})[0]
    assert 0 < relative_error(alone, together) < BOUND


def test_an_int8_state_dict_goes_to_disk_and_back():
    """Without unpickling, and to the same bits; float32 models refuse it."""
    model, batch, file = make(BertForMaskedLM), make_batch(*LENGTHS), io.BytesIO()
    candidate = int8(model)
    torch.save(candidate.state_dict(), file)
    file.seek(0)
    weights = torch.load(file, weights_only=True)
    again = int8(make(BertForMaskedLM, seed=1))
    assert not torch.equal(first_output(again, batch), first_output(candidate, batch))
    again.load_state_dict(weights)
    assert torch.equal(first_output(again, batch), first_output(candidate, batch))
    with pytest.raises(RuntimeError, match="Missing key"):
        make(BertForMaskedLM).load_state_dict(weights)


def test_save_pretrained_of_an_int8_model_raises_and_leaves_no_weights(tmp_path):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        int8(make(BertForMaskedLM)).save_pretrained(tmp_path)
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]


def test_the_tie_to_the_embeddings_ends_without_touching_them():
    model = make(BertForMaskedLM)
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words
    before, candidate = words.clone(), int8(model)
    assert torch.equal(candidate.bert.embeddings.word_embeddings.weight, before)
    assert model.cls.predictions.decoder.weight is words and torch.equal(words, before)
    # Nor can transformers tie them again, which would leave the head in float32 silently.
    with pytest.raises(KeyError):
        candidate.tie_weights()


def test_an_int8_head_gives_logits_with_its_loss_in_training_mode():
    """The loss that makes none reads the head's weight, which is packed."""
    model, batch = make(BertForMaskedLM), make_batch(*LENGTHS)
    labels = make_labels(batch)
    candidate = int8(model)
    outputs = candidate.train()(**batch, labels=labels)
    assert outputs.logits.shape == ((labels != -100).sum(), model.config.vocab_size)
    expected = model.train()(**batch, labels=labels).loss
    assert abs(outputs.loss - expected) < 0.1 * expected
    # In evaluation the same loss, and logits of all tokens.
    whole = candidate.eval()(**batch, labels=labels)
    assert whole.logits.shape == (*labels.shape, model.config.vocab_size)
    assert abs(whole.loss - expected) < 0.1 * expected


def test_an_int8_model_has_no_gradients_and_torch_warns():
    model, batch = int8(make(BertForMaskedLM)).train(), make_batch(*LENGTHS)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        model(**batch, labels=make_labels(batch)).loss.backward()
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizing_half_precision_ends_in_an_error(dtype):
    """Not in wrong numbers: transformers 5 loads a checkpoint in the dtype it was saved in."""
    model, batch = make(BertModel), make_batch(*LENGTHS)
    half = copy.deepcopy(model).to(dtype)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        first_output(int8(half), batch)
    found = first_output(int8(half.float()), batch)
    assert 0 < relative_error(found, first_output(model, batch)) < BOUND


def test_the_documented_call_runs_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*quantize_dynamic.*?)```", page, re.S)
    source = shutil.copytree(GOLDENS / "mosaic_tiny", tmp_path / "source")
    sizes = json.loads((source / "config.json").read_text())
    write_vocab(source / "vocab.txt", entries=sizes["vocab_size"])
    convert_weights.main([str(source), str(tmp_path / "model")])
    kinds = """
print(*(name for name, x in embedder.named_modules() if type(x) is torch.nn.Linear))
quantized = torch.ao.nn.quantized.dynamic.Linear
print(sum(isinstance(x, quantized) for x in embedder.modules()))
"""
    printed = run_python(example.replace("runs/demo", str(tmp_path / "model")) + kinds)
    shape, left, count = printed.splitlines()
    layers = sizes["num_hidden_layers"]
    assert shape == f"({sizes['hidden_size']},)" and int(count) == 3 * layers
    assert len(left.split()) == layers and all(x.endswith("mlp.wo") for x in left.split())


# ---- the benchmark's figures ----


def test_ndcg_counts_places_and_takes_ties_for_worse():
    documents = torch.eye(12, dtype=torch.float64)
    assert quantized.ndcg(documents, documents) == 1
    # Each finds its neighbour first, and its own second.
    queries = documents + 2 * documents.roll(1, 0)
    assert quantized.ndcg(queries, documents) == pytest.approx(1 / math.log2(3))
    # Embeddings that are all alike find nothing: all 12 share a place past the tenth.
    assert quantized.ndcg(torch.ones(12, 3), torch.ones(12, 3)) == 0
