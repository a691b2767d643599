# SPDX-License-Identifier: Apache-2.0
"""configuration_bert.py: config.json, configurations of other copies of the code and of stock BERT,
versions, and what is refused."""

import inspect
import json

import pytest
import torch
import transformers
from conftest import ROOT, run_python
from models import make

from mosaic_bert import bert_layers, configuration_bert
from mosaic_bert.configuration_bert import MosaicBertConfig


@pytest.fixture
def saved(tmp_path):
    """A folder as we write it, with the code."""
    make(bert_layers.BertModel).save_pretrained(tmp_path)
    return tmp_path


def test_config_json_is_mosaic_bert_base_and_names_every_class_that_exists():
    config = transformers.AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    # transformers 5.0 leaves the decoder untied on meta.
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes.pop("cls.predictions.decoder.weight", None)
    assert sum(sizes.values()) == 137_400_384
    layers = inspect.getmodule(type(model))
    named = set(json.loads((ROOT / "config.json").read_text())["auto_map"].values())
    classes = {x for x in vars(layers) if x == "BertModel" or x.startswith("BertFor")}
    assert named == {f"bert_layers.{x}" for x in classes} | {"configuration_bert.MosaicBertConfig"}


def test_a_configuration_of_another_copy_of_the_code_is_used_as_it_is(saved):
    """It was rebuilt as if it were stock: validated again, and without what was set on it."""
    config = transformers.AutoConfig.from_pretrained(saved, trust_remote_code=True)
    assert not isinstance(config, MosaicBertConfig)
    # What stock accepts, in this order, on every transformers.
    config.problem_type = "single_label_classification"
    config.num_labels = 1
    config.note = object()
    model = bert_layers.BertForSequenceClassification(config)
    assert model.config is config and model.config.note is config.note
    assert model.classifier.out_features == 1


def test_a_configuration_of_an_older_copy_gets_defaults(saved):
    config = transformers.AutoConfig.from_pretrained(saved, trust_remote_code=True)
    del config.sparse_prediction, config.low_precision_layernorm
    assert bert_layers.BertModel(config).config.sparse_prediction is True
    assert config.low_precision_layernorm is False


def test_a_stock_configuration_is_converted_whole(saved):
    config = transformers.BertConfig.from_pretrained(saved, num_hidden_layers=1)
    config.problem_type = "single_label_classification"
    config.num_labels = 1
    config.note = ["kept"]
    model = bert_layers.BertForSequenceClassification(config)
    assert isinstance(model.config, MosaicBertConfig) and model.config.note == ["kept"]
    assert model.config.num_hidden_layers == model.config.num_labels == 1
    # MosaicBERT's own default is 0.
    assert model.config.attention_probs_dropout_prob == config.attention_probs_dropout_prob
    assert type(config) is transformers.BertConfig


def test_a_checkpoint_says_which_version_of_the_code_saved_it(saved):
    written = json.loads((saved / "config.json").read_text())
    beside_the_model = json.loads((ROOT / "config.json").read_text())
    assert written["mosaic_bert_version"] == configuration_bert.VERSION
    assert beside_the_model["mosaic_bert_version"] == configuration_bert.VERSION


@pytest.mark.parametrize(
    "version, remarks", [("0.0.9", 0), ("0.1.0", 0), ("0.1.1", 1), ("0.10.0", 1), ("2.0.0.dev1", 1)]
)
def test_code_older_than_the_checkpoint_is_remarked_on(monkeypatch, version, remarks):
    said = []
    monkeypatch.setattr(configuration_bert, "VERSION", "0.1.0")
    monkeypatch.setattr(configuration_bert.logger, "warning", said.append)
    config = MosaicBertConfig(mosaic_bert_version=version)
    assert len(said) == remarks and all(version in x and "0.1.0" in x for x in said)
    # What this code saves is of its own version.
    assert config.mosaic_bert_version == "0.1.0"


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="got 64 and 5"):
        MosaicBertConfig(hidden_size=64, num_attention_heads=5)
    for name in ("alibi_starting_size", "vocab_size", "hidden_size", "type_vocab_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MosaicBertConfig(**{name: 0})
    with pytest.raises(ValueError, match="is_decoder must be False"):
        MosaicBertConfig(is_decoder=True)


@pytest.mark.parametrize(
    "name, most",
    [("num_hidden_layers", 1000), ("vocab_size", 2**31 - 1), ("num_labels", 2**18)],
)
def test_sizes_without_end_are_refused(name, most):
    """Layers were built until the memory was full."""
    for size in (most + 1, 10**18):
        with pytest.raises(ValueError, match=f"{name} must be at most {most}, got {size}"):
            MosaicBertConfig(**{name: size})
    assert getattr(MosaicBertConfig(**{name: most}), name) == most


def test_a_config_changed_after_it_was_made_is_checked_by_the_model():
    config = MosaicBertConfig(alibi_starting_size=128)
    assert config.max_position_embeddings == 128
    config.alibi_starting_size = 2048
    with torch.device("meta"):
        assert bert_layers.BertModel(config).config.max_position_embeddings == 2048
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="got 768 and 5"):
        bert_layers.BertModel(config)


def test_the_configuration_is_read_without_torch():
    """As tokenizers and ONNX runtimes do."""
    code = """
import sys, types
sys.modules["torch"] = None
package = types.ModuleType("mosaic_bert")
package.__path__ = [sys.argv[1]]
sys.modules["mosaic_bert"] = package
from mosaic_bert.configuration_bert import MosaicBertConfig
print(MosaicBertConfig(hidden_size=96).hidden_size)
"""
    assert run_python(code, ROOT).split() == ["96"]
