# SPDX-License-Identifier: Apache-2.0
"""Every command that loads a checkpoint takes all of it, or names what is missing or left over."""

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import GOLDENS, ROOT, load_golden
from safetensors.torch import load_file, save_file
from training import DOCUMENTS, SIZES, flags, read_json, run, trained_tokenizer

import convert_weights
from mosaic_tools import classifiers, family, mlm_trainer
from mosaic_tools.glue_tasks import Task
from mosaic_tools.recipe import ModelArguments

WORDS = trained_tokenizer()
LAYER = "bert.encoder.layer.1"


def continued(source, **values):
    args = ModelArguments(model_name_or_path=str(source), **values)
    return mlm_trainer.continued_model(args, WORDS, 16)


def classified(source, **values):
    args = classifiers.ClassifierArguments(model=str(source), **values)
    task = Task("own", ("text",), ("old", "other"))
    return classifiers.build_classifier(args, str(source), task, WORDS, 16)


def converted(source, out=None):
    out = out or source.parent / "converted"
    convert_weights.main([str(source), str(out)])
    return out


COMMANDS = [continued, classified, converted]
by_every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda f: f.__name__)


def write(folder, weights, name="mosaic_tiny", **config):
    """A checkpoint folder with a golden's config and changes to it."""
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((GOLDENS / name / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mlm_weights(name="mosaic_tiny"):
    """Of a published checkpoint as it is, without pooler."""
    return torch.load(GOLDENS / name / "pytorch_model.bin", weights_only=True)


def encoder_weights():
    """As DNABERT-S has them: with a pooler, without a head and a prefix."""
    weights = load_golden("mosaic_tiny")[1]
    return {k.removeprefix("bert."): x for k, x in weights.items() if k.startswith("bert.")}


@pytest.fixture
def stock(tmp_path):
    """transformers' own BERT for masked words."""
    sizes = SIZES | {"max_position_embeddings": 16}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(
        tmp_path / "bert"
    )
    return tmp_path / "bert"


# ---- what is taken ----


def test_what_is_loaded_is_reported_once(capfd):
    """transformers' report named a tied decoder as missing."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    try:
        classified(GOLDENS / "mosaic_tiny")
        assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    finally:
        transformers.logging.set_verbosity(verbosity)
    out, err = capfd.readouterr()
    assert out.count("classifier.weight") == 1 and "MISSING" not in out + err


@pytest.mark.parametrize("name", ["mosaic_tiny", "dnabert2_tiny"])
@pytest.mark.parametrize("command", [continued, classified], ids=lambda f: f.__name__)
def test_published_checkpoints_are_taken_whole(command, name):
    weights, model = mlm_weights(name), command(GOLDENS / name)
    assert family.is_ours(model.config)
    found = model.state_dict()
    taken = {x for x in weights if x in found and torch.equal(found[x], weights[x])}
    heads = {x for x in weights if x.startswith("cls.")}
    assert taken == (set(weights) if command is continued else set(weights) - heads)
    assert model.config.tie_word_embeddings
    if command is continued:
        # transformers 5.0 left a decoder that is stored untied.
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_pooler_that_masked_words_do_not_need_is_left_over_aloud(tmp_path, capsys):
    weights = load_golden("mosaic_tiny")[1]
    source = write(tmp_path / "source", {k: x for k, x in weights.items() if "classif" not in k})
    continued(source)
    said = capsys.readouterr().out
    assert f"{source}: not taken from it: bert.pooler.dense.bias, bert.pooler.dense.weight" in said


def test_counters_of_old_transformers_are_no_weights(tmp_path):
    counter = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    source = write(tmp_path / "source", mlm_weights() | counter)
    for command in COMMANDS:
        command(source)


def test_a_new_classifier_and_its_pooler_are_said_to_be_new(capsys):
    classified(GOLDENS / "mosaic_tiny")
    said = capsys.readouterr().out
    new = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
    assert f"new, not in the checkpoint: {new}; not taken from it: cls.predictions." in said


# ---- heads ----


def test_an_encoder_gets_an_mlm_head_only_if_told_so(tmp_path, capsys):
    source = write(tmp_path / "source", encoder_weights())
    with pytest.raises(
        ValueError, match="missing: cls.predictions.*lacks the MLM head: --new_head true trains"
    ):
        continued(source)
    model, weights = continued(source, new_head=True), load_golden("mosaic_tiny")[1]
    said = capsys.readouterr().out
    assert "new, not in the checkpoint: cls.predictions.decoder.bias, cls." in said
    assert "not taken from it: pooler.dense.bias, pooler.dense.weight" in said
    found = model.state_dict()
    encoder = [x for x in found if x.startswith("bert.")]
    assert len(encoder) > 30 and all(torch.equal(found[x], weights[x]) for x in encoder)
    # transformers 5.0 saved others: LayerNorm.gamma.
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == set(mlm_weights()) - {family.DECODER}


def test_a_classifier_is_pretrained_on_with_a_new_head_only_if_told_so(tmp_path):
    weights = {k: x for k, x in load_golden("mosaic_tiny")[1].items() if not k.startswith("cls.")}
    source = write(tmp_path / "source", weights)
    with pytest.raises(ValueError, match="no place for: classifier.bias, classifier.weight; miss"):
        continued(source)
    assert continued(source, new_head=True).cls is not None


def test_a_new_head_excuses_nothing_in_the_encoder(tmp_path):
    weights = encoder_weights()
    del weights["encoder.layer.1.mlp.wo.bias"]
    source = write(tmp_path / "source", weights)
    for command, told in ((continued, {"new_head": True}), (classified, {"new_classifier": True})):
        with pytest.raises(ValueError, match=f": missing: {LAYER}.mlp.wo.bias$"):
            command(source, **told)


# ---- what is refused ----


def test_a_stock_bert_is_refused_by_its_names(stock):
    """Training went on from it, with half of the tensors random."""
    names = (
        "bert.embeddings.position_embeddings.weight, .* and [0-9]+ more; missing: .*gated_layers"
    )
    reason = f"is no MosaicBERT: its names tell of a stock BERT.*no place for: {names}"
    for command in (continued, converted):
        with pytest.raises(ValueError, match=reason):
            command(stock)
    # finetune.py takes it for what it is, unless its config says otherwise.
    assert type(classified(stock)).__module__.startswith("transformers.")
    config = json.loads((stock / "config.json").read_text()) | {"alibi_starting_size": 16}
    (stock / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        classified(stock)


def test_qk_norm_is_refused_by_its_names(tmp_path):
    weights = mlm_weights() | {f"{LAYER}.attention.self.layer_norm_q.bias": torch.zeros(96)}
    source = write(tmp_path / "source", weights)
    for command in COMMANDS:
        with pytest.raises(ValueError, match="a BERT with QK norm.*layer_norm_q.bias"):
            command(source)


def test_jinas_layout_is_for_the_converter_by_config_or_by_names(tmp_path):
    weights, qkv = mlm_weights(), f"{LAYER}.attention.self.Wqkv.weight"
    parts = weights.pop(qkv).chunk(3)
    names = [qkv.replace("Wqkv", part) for part in ("query", "key", "value")]
    apart = weights | {name: x.clone() for name, x in zip(names, parts, strict=True)}
    by_name = write(tmp_path / "names", apart)
    by_config = write(tmp_path / "config", apart, "jina_v2_tiny")
    for command in (continued, classified):
        for source in (by_name, by_config):
            with pytest.raises(ValueError, match="Jina's layout: python convert_weights.py"):
                command(source)
    folder = converted(by_config)
    assert torch.equal(continued(folder).state_dict()[qkv], torch.cat(parts))


@by_every_command
def test_a_missing_a_left_over_and_a_misshapen_tensor_are_named(command, tmp_path):
    name = f"{LAYER}.mlp.wo.bias"
    missing, more, other = mlm_weights(), mlm_weights(), mlm_weights()
    del missing[name]
    more["bert.encoder.layer.7.mlp.wo.bias"] = torch.zeros(96)
    other[name] = torch.zeros(95)
    for i, (weights, message) in enumerate(
        [
            (missing, f": missing: {name}$"),
            (more, ": no place for: bert.encoder.layer.7.mlp.wo.bias$"),
            (other, rf": config and source differ in shape: {name}.* \(96,\)"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            command(write(tmp_path / str(i), weights))


@by_every_command
def test_many_names_are_counted(command, tmp_path):
    source = write(tmp_path / "source", {k: x for k, x in mlm_weights().items() if LAYER not in k})
    with pytest.raises(ValueError, match=rf"missing: {LAYER}(.*, ){{7}}.* and 3 more"):
        command(source)


def test_a_left_over_head_is_named_in_pretraining(tmp_path):
    source = write(tmp_path / "source", mlm_weights() | {"cls.other.weight": torch.zeros(2, 96)})
    for command in (continued, converted):
        with pytest.raises(ValueError, match=r": no place for: cls.other.weight$"):
            command(source)


def test_what_is_left_over_in_a_stock_encoder_is_named(stock):
    weights = load_file(stock / "model.safetensors")
    weights["bert.encoder.layer.5.output.dense.bias"] = torch.zeros(64)
    save_file(weights, stock / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=": no place for: bert.encoder.layer.5.output.dense.bias$"):
        classified(stock)


def test_a_classifier_that_is_trained_on_must_be_whole(tmp_path):
    folder = tmp_path / "classifier"
    classified(GOLDENS / "mosaic_tiny").save_pretrained(folder)
    classified(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.pooler.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: bert.pooler.dense.bias. It lacks the pooler"):
        classified(folder)


def test_a_decoder_that_differs_from_what_it_is_tied_to_is_refused(tmp_path):
    """transformers 5 kept it, under a config that ties it, and 4.57 dropped it."""
    weights = mlm_weights()
    weights[family.DECODER] = weights[family.DECODER] + 1
    source = write(tmp_path / "tied", weights)
    for command in (continued, converted):
        with pytest.raises(ValueError, match="differs from .*: write .tie_word_embeddings.: false"):
            command(source)
    untied = write(tmp_path / "untied", weights, tie_word_embeddings=False)
    found = continued(untied).state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.* is no folder of a model and no Hub id"):
        continued(tmp_path / "nowhere")


# ---- ablations ----


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """Learned positions in place of ALiBi, trained for two steps."""
    cwd = tmp_path_factory.mktemp("ablation")
    (cwd / "text.txt").write_text("\n".join(DOCUMENTS))
    values = SIZES | {"train_file": "text.txt", "output_dir": "out", "max_steps": 2}
    values |= {"validation_split": 20, "max_seq_length": 16, "cpu_threads": 1}
    script = ROOT / "benchmarks" / "learning" / "ablations.py"
    run(cwd, script, "learned_positions", "train_mlm.py", *flags(**values))
    return cwd / "out"


def test_an_ablation_is_not_taken_for_a_mosaicbert(ablation):
    """It reloaded as one, and its logits were off by 7."""
    config = read_json(ablation, "config.json")
    assert config["model_type"] == "mosaic_bert_learned_positions" and "auto_map" not in config
    for auto_class in (transformers.AutoConfig, transformers.AutoModelForMaskedLM):
        with pytest.raises(ValueError, match="mosaic_bert_learned_positions"):
            auto_class.from_pretrained(ablation, trust_remote_code=True)
    for command in COMMANDS:
        with pytest.raises(ValueError, match="'mosaic_bert_learned_positions', expected 'mosaic_b"):
            command(ablation)


def test_an_ablation_reads_its_own_folder_and_no_other(ablation, tmp_path):
    shutil.copytree(ablation, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    values = {"train_file": "text.txt", "max_steps": 1, "learning_rate": 0, "cpu_threads": 1}
    values |= {"validation_split": 20, "max_seq_length": 16, "model_name_or_path": "model"}
    script = ROOT / "benchmarks" / "learning" / "ablations.py"
    train = [script, "learned_positions", "train_mlm.py"]
    run(tmp_path, *train, *flags(**values, output_dir="out"))
    before, after = (load_file(x / "model.safetensors") for x in (ablation, tmp_path / "out"))
    assert before.keys() == after.keys() and "bert.encoder.position_embeddings.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = [read_json(x, "eval_results.json")["eval_loss"] for x in (ablation, tmp_path / "out")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    published = converted(GOLDENS / "mosaic_tiny", tmp_path / "published")
    shutil.copy(ablation / "tokenizer.json", published)
    shutil.copy(ablation / "tokenizer_config.json", published)
    other = flags(**values | {"model_name_or_path": published}, output_dir="other")
    log = run(tmp_path, *train, *other, fails=True)
    assert re.search("'mosaic_bert', expected 'mosaic_bert_learned_positions'", log)
