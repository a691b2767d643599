# SPDX-License-Identifier: Apache-2.0
"""classifiers.py: what of a checkpoint is kept, what is drawn anew, and what is refused."""

import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import GOLDENS, ROOT, run_python
from finetuning import SENTENCES, STOCK_SIZES, by_age, classify, start, write_own
from safetensors.torch import load_file, save_file
from training import read_json, write_vocab

from mosaic_tools import classifiers, glue_tasks
from mosaic_tools.tokenization import load_tokenizer

pytest_plugins = ["finetuning"]


def built(model: Path, first: Path | None = None, **values):
    """The classifier of old and other readers that a run of `model` starts from."""
    task = glue_tasks.Task("own", ("text",), ("old", "other"))
    args = classifiers.ClassifierArguments(model=str(model), **values)
    return classifiers.build_classifier(args, str(first or model), task, load_tokenizer(model), 32)


def test_a_pretrained_layer_outside_the_encoder_is_kept(modern, tmp_path):
    """ModernBERT's head, which was drawn anew: from the MLM, and from an MNLI model."""
    expected = load_file(modern / "model.safetensors")["head.dense.weight"]
    model = built(modern)
    assert torch.equal(model.head.dense.weight, expected)
    model.save_pretrained(tmp_path)
    again = built(modern, first=tmp_path)
    assert torch.equal(again.head.dense.weight, expected)
    # Of the same shape, but for other labels.
    assert not torch.equal(again.classifier.weight, model.classifier.weight)
    assert 0 < again.classifier.weight.std() < 0.04 and not again.classifier.bias.any()


def test_only_what_gives_the_logits_is_drawn_anew(vocab, tmp_path):
    """A layer with as many outputs as there are labels was taken for it."""
    config = transformers.RobertaConfig(
        **STOCK_SIZES | {"hidden_size": 2, "num_attention_heads": 1}, pad_token_id=0
    )
    model = transformers.RobertaForSequenceClassification(config)
    torch.nn.init.ones_(model.classifier.dense.bias)
    torch.nn.init.ones_(model.classifier.out_proj.bias)
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(vocab)).save_pretrained(tmp_path)
    head = built(tmp_path, new_classifier=True).classifier
    assert torch.equal(head.dense.weight, model.classifier.dense.weight) and head.dense.bias.all()
    assert not torch.equal(head.out_proj.weight, model.classifier.out_proj.weight)
    assert 0 < head.out_proj.weight.abs().max() < 0.1 and not head.out_proj.bias.any()


def test_a_mosaicbert_is_tuned_with_layernorm_as_published(golden, stock):
    assert built(golden).config.low_precision_layernorm
    assert not built(golden, low_precision_layernorm=False).config.low_precision_layernorm
    assert not hasattr(built(stock).config, "low_precision_layernorm")


def test_a_classifier_without_weights_is_not_taken_for_a_trained_one(finetuned, tmp_path):
    folder = shutil.copytree(finetuned / "own" / "seed-19", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: classifier.weight. .*: --new_classifier true"):
        built(folder)
    assert built(folder, new_classifier=True).classifier.weight.std() > 0


def test_a_stock_modernbert_is_trained_and_its_tokenizer_gives_no_token_types(modern, tmp_path):
    own = write_own(tmp_path, by_age())
    start(model=modern, learning_rate=1e-3, max_steps=1, cpu_threads=1, **own)
    folder = own["output_dir"] / "own" / "seed-19"
    before, after = (load_file(x / "model.safetensors") for x in (modern, folder))
    trained = [x for x in before.keys() & after if not torch.equal(before[x], after[x])]
    assert "head.dense.weight" in trained and len(trained) > 10
    settings = read_json(folder, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["model_max_length"] == 32
    assert classify(folder, SENTENCES[0])[0]["label"] in ("old", "other")


def test_data_that_a_trained_classifier_does_not_know_is_refused(finetuned, tmp_path):
    folder = finetuned / "own" / "seed-19"
    own = write_own(tmp_path, [{"text": x, "label": x.split()[2]} for x in SENTENCES])
    with pytest.raises(ValueError, match=r"labels old, other, .*child, man.*--new_classifier true"):
        start(model=folder, **own)
    own = write_own(tmp_path, [{"text": x, "label": len(x) / 9} for x in SENTENCES])
    with pytest.raises(ValueError, match=r"labels old, other, the data has scores"):
        start(model=folder, **own)
    assert not own["output_dir"].exists()


def without_tokenizer(golden, folder):
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)


def with_a_small_vocabulary(golden, folder):
    without_tokenizer(golden, folder)
    write_vocab(folder / "vocab.txt", entries=405)


def without_padding(golden, folder):
    without_tokenizer(golden, folder)
    ids = {"[UNK]": 0, "man": 1, "woman": 2, "child": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)


def without_a_layer(golden, folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: x for name, x in weights.items() if "layer.1." not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_layer_of_another_shape(golden, folder):
    weights = load_file(folder / "model.safetensors")
    name = next(x for x in weights if "layer.1." in x and x.endswith("bias"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def in_jinas_layout(golden, folder):
    shutil.copy(GOLDENS / "jina_v2_tiny" / "config.json", folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "(?s)no tokenizer can be loaded from .*--tokenizer_name"),
        (with_a_small_vocabulary, "ids up to 404, .* a vocabulary of 320: give the --tokenizer_"),
        (without_padding, "has no padding token.*--tokenizer_name"),
        (without_a_layer, "missing: bert.encoder.layer.1.att.* and 3 more$"),
        (
            with_a_layer_of_another_shape,
            r"differ in shape: bert.encoder.layer.1.*, expected \(96,\)",
        ),
        (in_jinas_layout, "in Jina's layout: python convert_weights.py"),
        (lambda golden, folder: shutil.rmtree(folder), "no folder of a model and no Hub id"),
    ],
    ids=["tokenizer", "vocabulary", "padding", "layer", "shape", "jina", "nothing"],
)
def test_a_model_that_lacks_something_is_refused(golden, tmp_path, damage, message):
    shutil.copytree(golden, tmp_path / "model")
    damage(golden, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        start(model=tmp_path / "model", cpu_threads=1, **write_own(tmp_path, by_age()))


def test_models_of_the_hub_are_told_apart_by_their_commit(tmp_path):
    """transformers 5.23 does not say it with the config: results of two models were one's."""
    commits = {"a": "1" * 40, "b": "2" * 40}
    for name, commit in commits.items():
        folder = tmp_path / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text('{"model_type": "bert"}')
    code = (
        "from mosaic_tools.classifiers import ClassifierArguments\n"
        "for name in ('org/a', 'org/b'):\n    print(ClassifierArguments(model=name).version())"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    assert run_python(code, **environment).split() == list(commits.values())
