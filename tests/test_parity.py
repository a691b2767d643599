# SPDX-License-Identifier: Apache-2.0
"""The published code's outputs, reproduced: `tests/goldens` holds what it gave in float32 on a CPU.

The bound is derived, not chosen: a float64 oracle says what is right, the recorded output shows how
far PyTorch in float32 is from it, and ours may be twice as far (three times for gradients), plus 2
eps of the largest value.
"""

import shutil

import pytest
import torch
from conftest import GOLDENS, PLACES, check_goldens, load_golden, on_every_backend, to
from reference import Oracle, assert_as_close

from mosaic_bert import bert_layers
from mosaic_bert.configuration_bert import MosaicBertConfig

BATCHES = ["right_padded", "full", "left_padded", "holes"]


def build(cls, config, weights, backend, device, **options):
    config = MosaicBertConfig(
        **{k: v for k, v in config.items() if k != "model_type"}, num_labels=3
    )
    config._attn_implementation = backend
    model = cls(config, **options).eval()
    own = model.state_dict()
    prefix = "bert." if cls is bert_layers.BertModel else ""
    model.load_state_dict({name: weights[prefix + name] for name in own})
    return model.to(device)


def inputs(golden, batch):
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: golden[f"{batch}.{name}"] for name in names}


@pytest.mark.parametrize("batch", BATCHES)
@on_every_backend
def test_logits_and_every_hidden_state_equal_the_published_ones(backend, device, batch):
    config, weights, golden = load_golden("mosaic_tiny")
    model = build(bert_layers.BertForMaskedLM, config, weights, backend, device)
    x = inputs(golden, batch)
    real = x["attention_mask"].bool()
    with torch.no_grad():
        ours, oracle = (
            model(**to(device, x), output_hidden_states=True),
            Oracle(weights, config)(**x),
        )
    assert len(ours.hidden_states) == config["num_hidden_layers"] + 1
    for i in range(1, config["num_hidden_layers"] + 1):
        assert_as_close(
            ours.hidden_states[i].cpu()[real],
            golden[f"{batch}.hidden_unpadded.{i}"],
            oracle["states"][i],
        )
    assert_as_close(ours.logits.cpu()[real], golden[f"{batch}.logits"][real], oracle["logits"])


@pytest.mark.parametrize("batch", BATCHES)
@on_every_backend
@pytest.mark.parametrize("training", [False, True], ids=["dense", "sparse_prediction"])
def test_loss_and_gradients_equal_the_published_ones(backend, device, batch, training):
    """In training too, where the end of the last layer and the logits are computed for labelled
    tokens only."""
    config, weights, golden = load_golden("mosaic_tiny")
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build(bert_layers.BertForMaskedLM, config, weights, backend, device).train(training)
    x, labels = inputs(golden, batch), golden[f"{batch}.labels"]
    oracle = Oracle(weights, config)
    ours = model(**to(device, x), labels=labels.to(device))
    expected = oracle(**x, labels=labels)
    assert ("logits" not in ours) == training

    # A cross-entropy moves by at most twice what a logit moves, so the logits' distance bounds the
    # loss's.
    real = x["attention_mask"].bool()
    plain = golden[f"{batch}.logits"][real].double()
    eps = torch.finfo(torch.float32).eps
    theirs = (plain - expected["logits"]).abs().max()
    allowed = 2 * theirs + 2 * eps * expected["logits"].abs().max()
    loss = ours.loss.double().cpu()
    assert abs(loss - expected["loss"]) <= 2 * allowed
    assert abs(loss - golden[f"{batch}.loss"].double()) <= 2 * (allowed + theirs)

    ours.loss.backward()
    expected["loss"].backward()
    recorded = [name for name in golden if name.startswith(f"{batch}.grad.")]
    assert len(recorded) == 4
    for name in recorded:
        parameter = name.removeprefix(f"{batch}.grad.")
        gradient = model.get_parameter(parameter).grad.cpu()
        assert_as_close(gradient, golden[name], oracle.weights[parameter].grad, factor=3)


@pytest.mark.parametrize("batch", BATCHES)
@on_every_backend
def test_pooler_and_classifier_equal_the_published_ones(backend, device, batch):
    """Published, a row that begins with padding is pooled from zeros: tanh of the pooler's bias."""
    config, weights, golden = load_golden("mosaic_tiny")
    x = inputs(golden, batch)
    real = x["attention_mask"].bool()
    with torch.no_grad():
        model = build(bert_layers.BertModel, config, weights, backend, device)
        pooled = model(**to(device, x)).pooler_output.cpu()
        model = build(bert_layers.BertForSequenceClassification, config, weights, backend, device)
        logits = model(**to(device, x)).logits.cpu()
        first = torch.zeros(*real.shape, config["hidden_size"], dtype=torch.float64)
        first[real] = Oracle(weights, config)(**x)["states"][-1]
        w = {name: x.double() for name, x in weights.items()}
        oracle = torch.tanh(
            first[:, 0] @ w["bert.pooler.dense.weight"].T + w["bert.pooler.dense.bias"]
        )
        oracle_logits = oracle @ w["classifier.weight"].T + w["classifier.bias"]
    assert_as_close(pooled, golden[f"{batch}.pooler_output"], oracle)
    assert_as_close(logits, golden[f"{batch}.seqcls_logits"], oracle_logits)


@pytest.mark.parametrize("batch", BATCHES)
@on_every_backend
def test_last_hidden_state_is_padded_with_zeros_as_published(backend, device, batch):
    config, weights, golden = load_golden("mosaic_tiny")
    x = inputs(golden, batch)
    real = x["attention_mask"].bool()
    with torch.no_grad():
        model = build(
            bert_layers.BertModel, config, weights, backend, device, add_pooling_layer=False
        )
        ours = model(**to(device, x)).last_hidden_state.cpu()
        oracle = Oracle(weights, config)(**x)["states"][-1]
    assert_as_close(ours[real], golden[f"{batch}.last_hidden_state"][real], oracle)
    assert (ours[~real] == 0).all() and (golden[f"{batch}.last_hidden_state"][~real] == 0).all()


@on_every_backend
def test_dnabert_2_equals_the_published_outputs(backend, device):
    config, weights, golden = load_golden("dnabert2_tiny")
    model = build(bert_layers.BertForMaskedLM, config, weights, backend, device)
    x = {name: golden[name] for name in ("input_ids", "attention_mask")}
    x["token_type_ids"] = torch.zeros_like(x["input_ids"])
    real = x["attention_mask"].bool()
    with torch.no_grad():
        ours, oracle = (
            model(**to(device, x), output_hidden_states=True),
            Oracle(weights, config)(**x),
        )
    assert_as_close(
        ours.hidden_states[-1].cpu()[real], golden["last_hidden_state"][real], oracle["states"][-1]
    )
    assert_as_close(ours.logits.cpu()[real], golden["logits"][real], oracle["logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend, device", PLACES[1:])
def test_half_precision_is_as_close_to_float64_as_eager_on_a_cpu_is(backend, device, dtype):
    """The published code cannot run in half precision."""
    if dtype == torch.bfloat16 and (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter computes bf16 products wrongly")
    config, weights, golden = load_golden("mosaic_tiny")
    oracle = Oracle(weights, config)
    places = (backend, device), ("eager", "cpu")
    models = [build(bert_layers.BertForMaskedLM, config, weights, *place) for place in places]
    for batch in BATCHES:
        x = inputs(golden, batch)
        real = x["attention_mask"].bool()
        with torch.no_grad():
            ours, plain = (
                model.to(dtype)(**to(model.device, x)).logits.cpu()[real] for model in models
            )
            assert_as_close(ours, plain, oracle(**x)["logits"])


def test_a_changed_or_an_added_golden_is_noticed(tmp_path):
    folder = shutil.copytree(GOLDENS, tmp_path / "goldens")
    check_goldens(folder)
    (folder / "mosaic_tiny" / "bert_layers.py").touch()
    with pytest.raises(AssertionError):
        check_goldens(folder)
    (folder / "mosaic_tiny" / "bert_layers.py").unlink()
    with open(folder / "mosaic_tiny" / "config.json", "a") as file:
        file.write(" ")
    with pytest.raises(AssertionError):
        check_goldens(folder)
