# SPDX-License-Identifier: Apache-2.0
"""Numbers at the edges of their dtype, and rows with next to nothing in them: finite and right, or
not finite in their own row alone."""

import itertools

import pytest
import torch
from conftest import CPU_BACKENDS
from models import VOCAB, close, make, make_batch, make_labels
from reference import Oracle, alibi_attention, slopes

from mosaic_bert import bert_layers
from mosaic_bert.bert_padding import PackedBatch, pack_batch
from mosaic_bert.configuration_bert import AUTO_MAP

HEADS = [name.split(".")[1] for auto, name in AUTO_MAP.items() if auto != "AutoConfig"]
# Triton's interpreter computes products of bf16 wrongly.
ON_CPU = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtype in itertools.product(
        CPU_BACKENDS, [torch.float32, torch.float16, torch.bfloat16]
    )
    if (backend, dtype) != ("triton", torch.bfloat16)
]
on_every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
in_every_dtype = pytest.mark.parametrize("backend, dtype", ON_CPU)
# Fewer: padding is removed before heads and backends, and the interpreter is slow.
of_all_heads = pytest.mark.parametrize(
    "head, backend, dtype",
    [(head, "sdpa", dtype) for head in HEADS for dtype in (torch.float32, torch.float16)]
    + [(head, "eager", torch.bfloat16) for head in HEADS]
    + [("BertModel", backend, torch.float32) for backend in CPU_BACKENDS if backend != "sdpa"],
    ids=lambda x: str(x).removeprefix("torch."),
)


def build(head, backend, dtype=torch.float32, **values):
    """A model whose biases are not 0 as they are at first."""
    model = make(getattr(bert_layers, head), backend, **values)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


# ---- rows of no token, and of one ----


def labels_for(head, mask):
    """Labels of every row and token, whether they are real or not."""
    if head == "BertForQuestionAnswering":
        place = torch.zeros(len(mask), dtype=torch.int64)
        return {"start_positions": place, "end_positions": place}
    if head in ("BertForMaskedLM", "BertForTokenClassification"):
        return {"labels": torch.ones_like(mask)}
    rows = 1 if head == "BertForMultipleChoice" else len(mask)
    return {"labels": torch.zeros(rows, dtype=torch.int64)}


def run(model, batch, **labels):
    if type(model).__name__ == "BertForMultipleChoice":  # one question, whose choices are the rows
        batch = {name: x[None] for name, x in batch.items()}
    return model(**batch, **labels)


def of_rows(head, outputs):
    """(batch, ...): what the head says of each row."""
    if head == "BertForQuestionAnswering":
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    if head == "BertModel":
        return outputs.last_hidden_state
    return outputs.logits[0, :, None] if head == "BertForMultipleChoice" else outputs.logits


@of_all_heads
def test_rows_without_a_token_are_as_documented_and_change_no_other(head, backend, dtype):
    model, batch = build(head, backend, dtype), make_batch(0, 5, 0, 1, 7)
    filled = batch["attention_mask"].any(1)
    with torch.no_grad():
        found = of_rows(head, run(model, batch))
        alone = of_rows(head, run(model, {name: x[filled] for name, x in batch.items()}))
        nothing = torch.zeros(1, 64, dtype=dtype)
        if head in ("BertForSequenceClassification", "BertForMultipleChoice"):
            expected = model.classifier(model.bert.pooler(nothing[None]))
        elif head in ("BertModel", "BertForMaskedLM"):
            expected = torch.zeros_like(found[0])
        else:
            layer = "classifier" if head == "BertForTokenClassification" else "qa_outputs"
            expected = getattr(model, layer)(nothing)
    assert found.isfinite().all()
    torch.testing.assert_close(found[~filled], expected.expand_as(found[~filled]))
    # Products of another shape in "eager" and in heads that see all rows.
    exact = head == "BertModel" and backend != "eager"
    torch.testing.assert_close(found[filled], alone, **{"rtol": 0, "atol": 0} if exact else {})


@pytest.mark.parametrize("lengths", [[0, 0], [1, 1, 1], [1]], ids=str)
@of_all_heads
def test_batches_of_next_to_nothing_have_finite_losses_and_gradients(head, backend, dtype, lengths):
    model = build(head, backend, dtype).train()
    batch = make_batch(*lengths, seqlen=max(1, 2 - len(lengths)))
    labels = labels_for(head, batch["attention_mask"])
    outputs = run(model, batch, **labels if head != "BertModel" else {})
    loss = outputs.pooler_output.sum() if head == "BertModel" else outputs.loss
    loss.backward()
    assert loss.isfinite() and all(x.isfinite().all() for x in outputs.to_tuple())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())
    if head == "BertForMaskedLM" and not sum(lengths):
        assert loss == 0


# ---- extreme scores ----


def attend(backend, qkv, cu_seqlens, positions=None):
    """(total, 3, heads, head_dim) of one sequence -> (total, heads, head_dim)."""
    batch = PackedBatch(1, len(qkv), None, cu_seqlens, len(qkv), positions)
    all_slopes = torch.tensor(bert_layers.alibi_slopes(qkv.shape[2]))
    return bert_layers.ATTENTION_BACKENDS[backend](qkv, all_slopes, batch, 0.0)[0]


def assert_attends_as_float64(backend, qkv, positions=None):
    """Scores that are off by d move probabilities by a factor of e ** 2d at most. d is an eps of
    float32 for each term of a score. Probabilities and what they weigh are rounded to qkv's dtype.
    """
    cu_seqlens = torch.tensor([0, len(qkv)], dtype=torch.int32)
    heads, head_dim = qkv.shape[2:]
    found = attend(backend, qkv, cu_seqlens, positions)
    expected, _ = alibi_attention(qkv, cu_seqlens, slopes(heads), positions)
    query, key, value = qkv.double().abs().permute(1, 2, 0, 3)
    farthest = len(qkv) if positions is None else positions.max()
    largest = (query @ key.mT).max() * head_dim**-0.5 + farthest / 2
    scores = (head_dim + 3) * torch.finfo(torch.float32).eps * largest
    allowed = torch.expm1(2 * scores) + 2 * torch.finfo(qkv.dtype).eps
    assert found.dtype == qkv.dtype and found.isfinite().all()
    assert (found.double() - expected).abs().max() <= allowed * value.max()


@pytest.mark.parametrize("size", [10, 100, 1000])
@in_every_dtype
def test_scores_of_any_size_are_told_apart(backend, dtype, size):
    """Of some 400, 40,000 and 4,000,000. "eager" rounded them to half precision, and was off by
    more than a tenth; in fp16 those over 65,504 made it nan."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(40, 3, 4, 8, generator=generator)
    qkv[:, :2] *= size
    for autocast in {False, dtype != torch.float32}:
        with torch.autocast("cpu", dtype, enabled=autocast):
            assert_attends_as_float64(backend, qkv.to(dtype))


@in_every_dtype
def test_extreme_scores_have_finite_gradients(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = (300 * torch.randn(40, 3, 4, 8, generator=generator)).to(dtype).requires_grad_()
    attend(backend, qkv, torch.tensor([0, 40], dtype=torch.int32)).float().mean().backward()
    assert qkv.grad.isfinite().all() and qkv.grad.any()


@in_every_dtype
def test_places_8000_tokens_away_are_told_apart(backend, dtype):
    """Where a first token hates itself, its attention is decided among neighbours far away. In bf16
    the bias of the steepest head is the same for 32 of them."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.zeros(65, 3, 4, 8)
    qkv[:, 2] = torch.randn(65, 4, 8, generator=generator)
    qkv[0, 0], qkv[0, 1] = 50, -50  # a score of -7,071
    positions = torch.cat([torch.zeros(1), torch.arange(8128, 8192)]).int()
    for autocast in {False, dtype != torch.float32}:
        with torch.autocast("cpu", dtype, enabled=autocast):
            assert_attends_as_float64(backend, qkv.to(dtype), positions)


def test_positions_that_int32_cannot_tell_apart_are_refused():
    """Distances were cut to 32 bits, and 0, 1, 2 ** 32 + 2 was read as 0, 1, 2; fractions were cut
    off, and 0, 0.5, 0.9 was three times the same place."""
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    for wrong in ([0, 1, 2**31], [0, 1, 2**32 + 2], [0, 0.5, 0.9]):
        with pytest.raises(ValueError, match=r"whole numbers, at most 2\*\*31 - 1 apart"):
            pack_batch(tokens, None, torch.tensor([wrong]))
    far = pack_batch(tokens, None, torch.tensor([[2**40, 2**40 + 1, 2**40 + 2**31 - 1]]))
    assert far.positions.tolist() == [0, 1, 2**31 - 1]


def test_more_places_than_int32_counts_are_refused():
    """The bounds fell: -131072, -65536, 0."""
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="2,147,483,648 places"):
        pack_batch(tokens.expand(2**16, 2**15))
    assert pack_batch(tokens.expand(2**15, 2**15)).cu_seqlens[-1] == 2**30


# ---- extreme logits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_loss_of_large_logits_is_right(dtype):
    """Logits up to 50,000, fp16's range being 65,504. A loss moves at most twice as far as they do:
    an eps for each term of their sums in float32, and one to round them."""
    generator = torch.Generator().manual_seed(0)
    hidden = (400 * torch.randn(9, 8, generator=generator)).to(dtype)
    weight = (8 * torch.randn(VOCAB, 8, generator=generator)).to(dtype)
    labels = torch.arange(9)
    exact = hidden.double() @ weight.double().T
    assert 20_000 < exact.abs().max() < 50_000
    loss, *gradients = bert_layers.linear_cross_entropy(
        hidden, weight, torch.zeros(VOCAB, dtype=dtype), labels, True
    )
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    terms = (hidden.double().abs() @ weight.double().abs().T).max()
    rounding = 9 * torch.finfo(torch.float32).eps * terms
    rounding += torch.finfo(dtype).eps * exact.abs().max()
    assert loss.dtype == torch.float32 and (loss - expected).abs() <= 2 * len(labels) * rounding
    assert all(x.isfinite().all() and x.any() for x in gradients)


@pytest.mark.parametrize("training", [True, False], ids=["without logits", "with logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_label_that_is_thought_impossible_has_a_finite_loss(dtype, training):
    """Its logit is 50,000 below the others."""
    model, batch = make(bert_layers.BertForMaskedLM).to(dtype).train(training), make_batch(9)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 3] = 7
    with torch.no_grad():
        model.cls.predictions.decoder.bias[7] = -50_000
    loss = model(**batch, labels=labels).loss
    loss.backward()
    oracle = Oracle(model.state_dict(), model.config.to_dict())
    expected = oracle(**batch, token_type_ids=torch.zeros_like(labels), labels=labels)["loss"]
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 2 * torch.finfo(dtype).eps * expected
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- subnormal weights ----


@pytest.mark.parametrize("size, dtype", [(1e-40, torch.float32), (1e-7, torch.float16)], ids=str)
@on_every_backend
def test_subnormal_weights_are_kept_and_counted(backend, size, dtype, tmp_path):
    """All of one layer, and among the others every second number."""
    model, batch = make(bert_layers.BertForMaskedLM, backend), make_batch(9, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                part = parameter if "layer.1." in name else parameter[:, ::2]
                part.copy_(size * part.sign())
    model.to(dtype).save_pretrained(tmp_path)
    loaded = bert_layers.BertForMaskedLM.from_pretrained(
        tmp_path, dtype="auto", attn_implementation=backend
    )
    state = loaded.state_dict()
    for name, x in model.state_dict().items():
        assert x.dtype == dtype and torch.equal(x, state[name]), name
    # Not a 0 where the processor flushes them.
    assert (state["bert.encoder.layer.1.mlp.wo.weight"] != 0).all()
    with torch.no_grad():
        found = loaded(**batch).logits[batch["attention_mask"].bool()]
        oracle = Oracle(model.state_dict(), model.config.to_dict())
        types = torch.zeros_like(batch["input_ids"])
        expected = oracle(**batch, token_type_ids=types)["logits"]
    if dtype == torch.float32:
        close(found, expected.float())
    else:
        # An eps for each of the sums of two layers and the head, which are near 1.
        allowed = 3 * 10 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
        assert (found - expected).abs().max() <= allowed


# ---- beyond a dtype's range ----


@in_every_dtype
def test_what_is_not_finite_stays_in_its_row(backend, dtype):
    """Some rows are equally long: "sdpa" takes them at once. Others end with padding."""
    model = make(bert_layers.BertForMaskedLM, backend, num_hidden_layers=1).to(dtype)
    batch = make_batch(7, 20, 20, 1, 0)
    with torch.no_grad():
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).clone()
        embeds[1, 3, 5], embeds[3, 0, 0] = float("nan"), float("inf")
        found = model(inputs_embeds=embeds, **batch).logits
    for row, kept in enumerate(batch["attention_mask"].bool()):
        poisoned = row in (1, 3)
        assert torch.equal(found[row], expected[row]) != poisoned
        assert not poisoned or found[row, kept].isnan().all()
        assert not found[row, ~kept].any()


def overflowing(dtype):
    """A model whose gated product is some 300,000 for id 0 and small for others, and rows of which
    the second has id 0."""
    model = make(bert_layers.BertForMaskedLM, num_hidden_layers=1)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[:, 0] = words[0] = 0
        words[0, 0] = 1
        gated = model.bert.encoder.layer[0].mlp.gated_layers.weight
        gated[0] = gated[96] = 0
        gated[0, 0] = gated[96, 0] = 800
    ids = torch.arange(1, 16).view(3, 5)
    ids[1, 2] = 0
    return model.to(dtype), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_product_beyond_fp16s_range_is_not_finite_in_its_row_alone(dtype):
    """As in any encoder in fp16, nothing stops there. The same weights are fine in bf16."""
    model, ids = overflowing(dtype)
    products = []
    wo = model.bert.encoder.layer[0].mlp.wo
    wo.register_forward_pre_hook(lambda _, x: products.append(x[0].abs().amax(1).view(3, 5)))
    with torch.no_grad():
        finite = model(ids).logits.isfinite().flatten(1).all(1)
    assert products[0][1, 2] > 65_504 and products[0][[0, 2]].max() < 65_504
    assert finite.tolist() == [True, dtype != torch.float16, True]


def test_training_gives_a_loss_that_is_not_finite_beyond_fp16s_range():
    """Which is what the commands that train stop at."""
    model, ids = overflowing(torch.float16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert not model.train()(ids, labels=make_labels(batch, share=1.0)).loss.isfinite()
