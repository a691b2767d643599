# SPDX-License-Identifier: Apache-2.0
"""bert_layers: what every model class promises.

Faults of the published code are named where their tests stand.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import on_every_backend, to
from models import HEADS, VOCAB, close, make, make_batch, make_labels
from torch import nn

from mosaic_bert import bert_layers
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    Dropout,
)

# ---- padding, positions, masks ----


@on_every_backend
def test_padding_does_not_change_real_tokens(backend, device):
    model = make(BertModel, backend).to(device)
    lengths = [1, 63, 128, 129]
    batch = to(device, make_batch(*lengths, seqlen=140))
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for row, n in enumerate(lengths):
            close(together[row, :n], model(batch["input_ids"][row : row + 1, :n])[0][0])
            assert (together[row, n:] == 0).all()


@on_every_backend
def test_the_side_of_the_padding_does_not_matter(backend, device):
    model = make(BertModel, backend).to(device)
    right = to(device, make_batch(5, 9))
    left = {name: x.clone() for name, x in right.items()}
    left["input_ids"][0] = right["input_ids"][0].roll(4)
    left["attention_mask"][0] = right["attention_mask"][0].roll(4)
    with torch.no_grad():
        close(model(**left)[0][0, 4:], model(**right)[0][0, :5])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_ids_of_padding_are_never_looked_up(backend):
    model, batch = make(BertModel, backend), make_batch(3, 5)
    expected = model(**batch)[0]
    batch["input_ids"][0, 3:] = -1
    assert torch.equal(model(**batch)[0], expected)


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_rows_and_batches_without_tokens_give_numbers(cls):
    model = make(cls)
    batch = make_batch(4, 0)
    for rows in (slice(None), slice(1, 2)):
        outputs = model(**{name: x[rows] for name, x in batch.items()}, output_hidden_states=True)
        for x in (outputs[0], *outputs.hidden_states):
            assert x.isfinite().all()
        assert (outputs.hidden_states[-1][-1] == 0).all()


def test_masks_of_every_dtype_are_the_same_mask():
    model, batch = make(BertModel), make_batch(3, 5)
    expected = model(**batch)[0]
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = batch["attention_mask"].to(dtype)
        assert torch.equal(model(batch["input_ids"], mask)[0], expected)


def test_no_mask_equals_a_mask_of_ones():
    model, batch = make(BertForMaskedLM), make_batch(7, 7)
    assert torch.equal(model(batch["input_ids"])[0], model(**batch)[0])


@on_every_backend
def test_packed_sequences_do_not_see_each_other(backend, device):
    """What DataCollatorWithFlattening makes: one row, position_ids that restart, no mask."""
    model, batch = make(BertModel, backend).to(device), to(device, make_batch(6, 1, 9))
    lengths = batch["attention_mask"].sum(1).tolist()
    flat = {
        "input_ids": batch["input_ids"][batch["attention_mask"].bool()][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
    }
    with torch.no_grad():
        packed, padded = model(**flat)[0][0], model(**batch)[0]
    close(packed, padded[batch["attention_mask"].bool()])


@on_every_backend
def test_distances_come_from_position_ids(backend, device):
    """Doubled positions are doubled slopes."""
    batch = {"input_ids": make_batch(12, 12)["input_ids"].to(device)}
    model = make(BertModel, backend).to(device)
    positions = torch.arange(12, device=device)[None]
    with torch.no_grad():
        plain = model(**batch)[0]
        close(model(**batch, position_ids=positions)[0], plain)
        close(model(**batch, position_ids=positions + 5)[0], plain)
        stretched = model(**batch, position_ids=2 * positions)[0]
        assert (stretched - plain).abs().max() > 0.01
    original = bert_layers.alibi_slopes
    bert_layers.alibi_slopes = lambda heads: [2 * x for x in original(heads)]
    try:
        with torch.no_grad():
            close(model(**batch)[0], stretched)
    finally:
        bert_layers.alibi_slopes = original


def test_runs_on_meta_for_shapes_alone():
    model = make(BertForMaskedLM, "eager").to("meta")
    assert model(torch.zeros(2, 5, dtype=int, device="meta")).logits.shape == (2, 5, VOCAB)


def test_longer_inputs_than_prepared_for_just_work():
    model = make(BertModel, alibi_starting_size=8)
    longer = make(BertModel, alibi_starting_size=512)
    ids = make_batch(50)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids)[0], longer(ids)[0])


# ---- outputs ----


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_hidden_states_attentions_and_tuples(cls):
    """The published code ignored all three arguments, and its AutoModel returned a bare tuple."""
    model, batch = make(cls), make_batch(3, 6)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in outputs.hidden_states] == [(2, 6, 64)] * 3
    assert [x.shape for x in outputs.attentions] == [(2, 4, 6, 6)] * 2
    for probs in outputs.attentions:
        # Real queries attend to real keys with weight 1 in all, padding attends to nothing.
        close(probs.sum(-1), batch["attention_mask"][:, None].expand(2, 4, 6).float())
        assert (probs[0, :, :, 3:] == 0).all()
    as_tuple = model(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs.to_tuple())
    assert torch.equal(as_tuple[0], outputs[0])


@pytest.mark.parametrize("setting", ["output_hidden_states", "return_dict"])
def test_the_config_decides_what_arguments_leave_open(setting):
    model, batch = make(BertForMaskedLM), make_batch(3, 6)
    setattr(model.config, setting, not getattr(model.config, setting))
    outputs = model(**batch)
    if setting == "return_dict":
        assert isinstance(outputs, tuple)
    else:
        assert len(outputs.hidden_states) == 3


def test_hidden_states_that_the_config_asks_for_come_in_training_too():
    model, batch = make(BertForMaskedLM).train(), make_batch(3, 6)
    expected = model(**batch, labels=make_labels(batch)).loss
    model.config.output_hidden_states = True
    outputs = model(**batch, labels=make_labels(batch))
    close(outputs.loss, expected)
    assert [x.shape for x in outputs.hidden_states] == [(2, 6, 64)] * 3


def test_positional_order_is_transformers_own():
    """Published, the second argument was token_type_ids: silent nonsense."""
    model, batch = make(BertForMaskedLM), make_batch(3, 6)
    types = torch.ones_like(batch["input_ids"])
    by_name = model(**batch, token_type_ids=types)[0]
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"], types)[0], by_name)
    assert not torch.equal(model(**batch)[0], by_name)


@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_inputs_embeds_equal_ids(cls):
    """Raised in the published code."""
    model, batch = make(cls), make_batch(3, 6)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
    assert torch.equal(by_embeds, model(**batch)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_half_precision_runs_and_is_near_float32(backend, dtype):
    """A dtype error on the published code's PyTorch path."""
    batch = make_batch(9, 30)
    labels = make_labels(batch)
    exact = make(BertForMaskedLM, backend)(**batch, labels=labels)
    half = make(BertForMaskedLM, backend).to(dtype)
    outputs = half(**batch, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and outputs.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in half.parameters())
    # Rounding once per layer and weight: a few dozen eps of the largest logit.
    error = (outputs.logits.float() - exact.logits).abs().max()
    assert error <= 32 * torch.finfo(dtype).eps * exact.logits.abs().max()


def test_low_precision_layernorm_stays_in_autocasts_dtype():
    """Stock autocast upcasts LayerNorm to float32."""
    batch = make_batch(5, 9)
    seen = {}
    for low in (False, True):
        model = make(BertModel, low_precision_layernorm=low)
        norm = model.encoder.layer[0].mlp.layernorm
        norm.register_forward_hook(lambda m, x, out, low=low: seen.__setitem__(low, out.dtype))
        full = model(**batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**batch)[0].float()
        assert (half - full).abs().max() <= 32 * torch.finfo(torch.bfloat16).eps * full.abs().max()
    assert seen[True] == torch.bfloat16 and seen[False] == torch.float32
    close(model(**batch)[0], make(BertModel)(**batch)[0])


# ---- initial weights and dropout ----


def test_weights_start_as_the_recipe_says():
    """Normal with initializer_range, biases 0, LayerNorm 1 and 0."""
    model = make(BertForMaskedLM, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() > 1000:
            # Four standard errors of a standard deviation.
            assert abs(parameter.std() / 0.05 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


def test_the_mlm_heads_layernorm_has_an_eps_of_its_own():
    model = make(BertForMaskedLM, layer_norm_eps=1e-3)
    norms = {n: m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms.pop("cls.predictions.transform.LayerNorm") == 1e-12
    assert len(norms) == 5 and set(norms.values()) == {1e-3}


def test_dropout_is_where_the_published_model_has_it():
    """After the embeddings, the attention's projection and the gate; before a classifier."""
    model = make(BertForTokenClassification, dropout=0.5).train()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.append((name, tuple(x[0].shape), (y == 0).any()))
            )
    model(**make_batch(5, 3))
    layers = [
        (f"bert.encoder.layer.{i}.{part}", (8, width), True)
        for i in range(2)
        for part, width in (("attention.output.dropout", 64), ("mlp.dropout", 96))
    ]
    # Where hooks look at the embeddings, those of padding are made too.
    ends = [("bert.embeddings.dropout", (2, 5, 64), True)], [("dropout", (2, 5, 64), True)]
    assert seen == [*ends[0], *layers, *ends[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_dropout_drops_each_element_with_probability_p_and_scales_the_rest(p, dtype):
    """Elements share random words, four in each: shares are taken for each place, and for pairs."""
    torch.manual_seed(0)
    x = torch.ones(2**20 + 3, dtype=dtype, requires_grad=True)
    y = Dropout(p).train()(x)
    dropped = (y == 0).double()
    for share, expected, count in (
        *((dropped[i::4].mean(), p, 2**18) for i in range(4)),
        *((dropped[:-i].mul(dropped[i:]).mean(), p * p, 2**20) for i in (1, 2, 3, 4)),
    ):
        # Five standard deviations, and the rounding of p.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5 + 2**-17
    scale = torch.tensor(1 / (1 - round(p * 2**16) / 2**16), dtype=dtype)
    assert y.dtype == dtype and (y[y != 0] == scale).all()
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y)


def test_dropout_is_a_function_of_the_seed_and_does_nothing_in_evaluation():
    x, dropout = torch.ones(5, 7), Dropout(0.5).train()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(dropout(x))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x) and not Dropout(1.0).train()(x).any()
    assert Dropout(0.5).train()(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_threads_that_call_one_model_get_the_results_of_one(backend):
    """A forward pass leaves nothing in the model that another could read."""
    model, generator = make(BertForMaskedLM, backend), random.Random(0)
    batches = [make_batch(*generator.choices(range(60), k=3), seqlen=60) for _ in range(20)]

    def logits(i):
        with torch.no_grad():
            return model(**batches[i]).logits

    expected = [logits(i) for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        order = [i for k in range(8) for i in random.Random(k).sample(range(20), 20)]
        for i, found in zip(order, pool.map(logits, order), strict=True):
            assert torch.equal(found, expected[i])


def test_every_public_name_has_a_docstring():
    missing = [
        name
        for name, x in vars(bert_layers).items()
        if getattr(x, "__module__", None) == bert_layers.__name__
        and (isinstance(x, type) or callable(x))
        and not (x.__doc__ or "").strip()
        and not name.startswith("_")
    ]
    assert not missing
