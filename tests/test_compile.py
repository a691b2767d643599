# SPDX-License-Identifier: Apache-2.0
"""bert_layers under torch.compile: graphs, recompilations, operators; batches packed before."""

import collections
import importlib
import os
import sys
import types

import pytest
import torch
from conftest import ROOT, needs_compile, needs_triton, to
from models import HEADS, close, collate, make, make_batch, make_labels
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from mosaic_bert import bert_layers, bert_padding
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertModel,
)
from mosaic_bert.bert_padding import PackedBatch, pack_batch


def compiled_graphs(model, batches, backend="aot_eager", **options):
    """Compiles model, compares it on each batch, gradients too where it trains, and explains."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, **options)
    for batch in batches:
        expected, outputs = model(**batch), compiled(**batch)
        close(outputs[0], expected[0])
        if outputs.get("loss") is not None:
            gradients = [
                torch.autograd.grad(x.loss, list(model.parameters())) for x in (expected, outputs)
            ]
            for a, b in zip(*gradients, strict=True):
                close(b, a)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_compile
@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_without_a_mask_is_one_graph_for_all_shapes(cls):
    batches = [
        {"input_ids": make_batch(*[n] * b)["input_ids"]} for b, n in ((2, 16), (3, 24), (4, 7))
    ]
    assert compiled_graphs(make(cls), batches, fullgraph=True, dynamic=True) == 1


@needs_compile
@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_with_a_mask_breaks_once_and_never_recompiles(cls):
    """One graph behind the unpadding, and for a classifier one more behind the encoder's end."""
    lengths = ((16, 3), (9, 9), (16, 16), (5, 16), (2, 7))
    batches = [make_batch(*x, seqlen=16) for x in lengths]
    assert compiled_graphs(make(cls), batches) <= 2


@needs_compile
@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_compile_with_a_mask_makes_its_graphs_once_more_when_the_padded_shape_changes(cls):
    """By then torch knows that shapes vary; later ones cost nothing."""
    batches = [make_batch(*x) for x in ((16, 3), (9, 9, 2), (30, 7, 3, 4), (8, 5), (12, 11, 10))]
    graphs = [compiled_graphs(make(cls), batches[:n]) for n in (3, 5)]
    assert graphs[0] == graphs[1] <= 8


# Another copy of bert_padding has a class of its own.
FOREIGN = collections.namedtuple("PackedBatch", PackedBatch._fields)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "handed_over", [lambda x: x, lambda x: x._asdict(), lambda x: FOREIGN(*x)],
    ids=["PackedBatch", "dict", "foreign"],
)  # fmt: skip
def test_a_batch_packed_before_gives_what_a_mask_gives(handed_over, training):
    model = make(BertForMaskedLM).train(training)
    expected = model(**make_batch(3, 9, 5), labels=collate(3, 9, 5)["labels"])
    inputs = collate(3, 9, 5)
    outputs = model(**{**inputs, "batch": handed_over(inputs["batch"])})
    assert torch.equal(outputs.loss, expected.loss)
    assert training or torch.equal(outputs.logits, expected.logits)


def test_trainer_takes_a_batch_packed_before_as_a_dict(tmp_path):
    """It rebuilds every tuple from one iterable, which a NamedTuple refuses."""
    pytest.importorskip("accelerate")
    losses = []
    for packed in (True, False):

        def collator(rows, packed=packed):
            inputs = collate(*rows)
            if packed:
                return inputs | {"batch": inputs["batch"]._asdict()}
            return make_batch(*rows) | {"labels": inputs["labels"]}

        trainer = Trainer(
            make(BertForMaskedLM),
            TrainingArguments(
                tmp_path,
                max_steps=3,
                per_device_train_batch_size=2,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
            ),
            train_dataset=[3, 9, 12, 5, 8, 7],
            eval_dataset=[11, 4],
            data_collator=collator,
        )
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


@needs_compile
@pytest.mark.parametrize("handed_over", [tuple, dict])
def test_compile_with_a_batch_packed_before_is_one_graph(handed_over):
    """From ids to gradients, whatever the shape and the numbers of tokens, sequences and labels.

    A graph cannot wait for the device, nor make a tensor whose size only the data knows.
    """
    lengths = ((16, 3), (9, 9, 2), (5, 16, 4, 4), (12, 7), (30, 7, 9), (6, 5, 4, 3, 2))
    batches = [collate(*x) for x in lengths]
    if handed_over is dict:
        batches = [{**x, "batch": x["batch"]._asdict()} for x in batches]
    assert len({(x["labels"] != -100).sum().item() for x in batches}) > 3
    model = make(BertForMaskedLM).train()
    assert compiled_graphs(model, batches, fullgraph=True, dynamic=True) == 1
    assert compiled_graphs(model, batches, fullgraph=True) <= 3


class OneDevice(TorchDispatchMode):
    """Fails on operators that mix devices, as a copy from the CPU does, which a GPU waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, outputs))
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        # A single number on the CPU is handed to the kernel, unless it is copied.
        devices = {x.device for x in tensors if x.dim() or "copy" in func.name()}
        assert len(devices) <= 1, f"{func.name()} mixes {devices}"
        return outputs


NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel wants CUDA tensors"
)


@needs_triton
@NEEDS_INTERPRETER
@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)], ids=str)
def test_a_step_with_a_batch_packed_before_never_waits_for_the_device(monkeypatch, count):
    """On tensors without data, so that looking at any raises."""
    # Which raises for meta.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = make(BertForMaskedLM, "triton").to("meta").train()
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(to_meta, collate(5, 140))
    # Builds its tensor on the CPU, unseen by OneDevice.
    monkeypatch.setattr(torch, "tensor", lambda *x, **y: pytest.fail("copies from the CPU"))
    with OneDevice():
        model(**inputs, num_items_in_batch=count).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    # What is done for a mask would have raised.
    mask = torch.ones(2, 140, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="[mM]eta"):
        bert_padding._find_sequences(inputs["input_ids"], mask, None, None, False)


@pytest.mark.gpu
def test_a_step_with_a_batch_packed_before_never_waits_for_a_gpu():
    model = make(BertForMaskedLM, "triton").to("cuda").train()
    to_gpu = lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(to_gpu, collate(5, 140))
    model(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_compile
@pytest.mark.parametrize(
    "device, attention, backend",
    [
        ("cpu", "sdpa", "aot_eager"),
        pytest.param("cpu", "triton", "aot_eager", marks=[needs_triton, NEEDS_INTERPRETER]),
        pytest.param("cuda", "triton", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_compile_in_training_never_recompiles_as_tokens_and_labels_change(
    device, attention, backend
):
    lengths = ((16, 3), (9, 9), (16, 16), (5, 16), (12, 7))
    batches = [make_batch(*x, seqlen=16) for x in lengths]
    batches = [{**x, "labels": make_labels(x)} for x in batches]
    assert all((x["labels"] != -100).sum() > 1 for x in batches)
    model = make(BertForMaskedLM, attention).to(device).train()
    assert compiled_graphs(model, [to(device, x) for x in batches], backend) == 1


@needs_compile
@needs_triton
@NEEDS_INTERPRETER
def test_rows_of_any_length_take_at_most_four_graphs(monkeypatch):
    """The first max_seqlen has its own; then up to 128, up to SKIP_ABOVE, and beyond."""
    monkeypatch.setattr(sys.modules["mosaic_bert.flash_attn_triton"], "SKIP_ABOVE", 256)
    batches = [make_batch(n, 3, seqlen=260) for n in (40, 100, 60, 140, 257)]
    with torch.no_grad():
        assert compiled_graphs(make(BertModel, "triton"), batches) == 4


@needs_compile
def test_the_compiled_attention_operator_is_sound():
    torch.manual_seed(0)
    qkv = torch.randn(12, 3, 2, 8, requires_grad=True)
    batch = pack_batch(torch.zeros(2, 8), torch.tensor([[1] * 8, [1] * 4 + [0] * 4]))
    for positions in (None, torch.arange(12, dtype=torch.int32).square()):
        for dropout_p in (0.0, 0.5):
            options = (batch.cu_seqlens, torch.tensor([0.5, 0.25]), positions, dropout_p)
            arguments = (qkv, *options, torch.tensor([7]))
            torch.library.opcheck(bert_layers.sdpa_varlen_op, arguments)


def test_the_operator_leaves_other_random_numbers_alone():
    qkv, cu_seqlens = torch.randn(4, 3, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    bert_layers.sdpa_varlen_op(qkv, cu_seqlens, torch.ones(1), None, 0.5, torch.tensor([7]))
    assert torch.equal(torch.rand(3), expected)


def test_the_operator_refuses_to_drop_where_it_could_not_repeat_it():
    drawn = bert_layers.drawn_from(torch.tensor([7]), torch.device("xpu"))
    with pytest.raises(ValueError, match="repeat attention dropout on xpu: use .*'eager'"), drawn:
        pass


@needs_compile
def test_the_operators_gradient_drops_what_its_forward_dropped():
    torch.manual_seed(0)
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    batch = pack_batch(torch.zeros(2, 4), torch.tensor([[1] * 4, [1] * 3 + [0]]))

    def attend(qkv):
        slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
        seed = torch.tensor([7])
        return bert_layers.sdpa_varlen_op(qkv, batch.cu_seqlens, slopes, None, 0.5, seed)

    assert torch.equal(attend(qkv), attend(qkv))
    assert torch.autograd.gradcheck(attend, qkv)


@needs_compile
def test_compile_with_attention_dropout_is_one_graph():
    """Every published MosaicBERT config has a rate of 0.1."""
    model = make(BertForMaskedLM, attention_probs_dropout_prob=0.1).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ((16, 3), (9, 9), (16, 16), (5, 16), (12, 7), (13, 7), (8, 8)):
        batch = make_batch(*lengths, seqlen=16)
        compiled(**batch, labels=make_labels(batch)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_two_copies_of_the_code_work_side_by_side():
    """One process may load two repositories; an operator's name belongs to one definition only."""
    copy = types.ModuleType("another_repository")
    copy.__path__ = [str(ROOT)]
    sys.modules["another_repository"] = copy
    other = importlib.import_module("another_repository.bert_layers")
    assert other is not bert_layers
    batch = make_batch(5, 3)
    for module in (bert_layers, other, bert_layers):
        model = make(module.BertModel)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(**batch)[0], model(**batch)[0])
