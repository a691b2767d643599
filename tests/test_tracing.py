# SPDX-License-Identifier: Apache-2.0
"""Tracers that record one run for all inputs: torch.jit.trace, the ONNX exporter built on it, and
torch.export. Padding stays in what they record, or lengths and masks of the recorded run would."""

import io

import pytest
import torch
from conftest import needs_export
from models import HEADS, close, collate, make, make_batch
from torch._subclasses import FakeTensor, FakeTensorMode

from mosaic_bert.bert_layers import BertForMaskedLM, BertForMultipleChoice, BertModel

# Tracers warn of every check on a shape.
pytestmark = pytest.mark.filterwarnings("ignore")
RECORDED = make_batch(3, 9, 7)["input_ids"]
# Another shape and other lengths, a hole and padding on the left.
BATCH = make_batch(12, 2, 5, 1, seed=3)
BATCH["attention_mask"][0, 4] = 0
BATCH["attention_mask"][1] = BATCH["attention_mask"][1].flip(0)
CLASSES = [BertModel, *HEADS]


def outputs_of(result):
    """All outputs, as a list."""
    return list(result.values()) if isinstance(result, dict) else list(result)


def assert_equal_where_real(found, expected):
    real = BATCH["attention_mask"].bool()
    assert len(found) == len(expected) >= 1
    for x, y in zip(found, expected, strict=True):
        if y.shape[:2] == real.shape:
            x, y = x[real], y[real]
        close(x, y, factor=256)


def traced(model):
    """Recorded with nothing masked."""
    inputs = (RECORDED, torch.ones_like(RECORDED))
    return torch.jit.trace(model, inputs, strict=False)


@pytest.mark.parametrize("backend", [None, "sdpa", "eager"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_trace_reads_masks_and_shapes_that_it_was_not_recorded_with(cls, backend):
    """It kept the recorded lengths: logits off by 19 of 23, without a word."""
    model = make(cls, backend)
    found = traced(model)(BATCH["input_ids"], BATCH["attention_mask"])
    assert_equal_where_real(outputs_of(found), model(**BATCH).to_tuple())


@pytest.mark.parametrize("cls", CLASSES)
def test_the_onnx_exporter_built_on_traces_keeps_the_mask(cls):
    """It dropped the mask from the inputs, or baked the lengths in."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, names, file = make(cls), list(BATCH), io.BytesIO()
    axes = {name: {0: "batch", 1: "seqlen"} for name in names}
    inputs = (RECORDED, torch.ones_like(RECORDED))
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    assert [x.name for x in session.get_inputs()] == names
    found = session.run(None, {name: x.numpy() for name, x in BATCH.items()})
    expected = model(**BATCH).to_tuple()
    assert_equal_where_real([torch.from_numpy(x) for x in found], expected)


def test_a_trace_of_a_multiple_choice_model():
    model, choices = make(BertForMultipleChoice), torch.stack([RECORDED, RECORDED.flip(1)], 1)
    trace = torch.jit.trace(model, (choices, torch.ones_like(choices)), strict=False)
    ids, mask = (x.view(2, 2, -1) for x in BATCH.values())
    (found,) = outputs_of(trace(ids, mask))
    close(found, model(ids, mask).logits, factor=256)


TRACERS = ["jit", pytest.param("export", marks=needs_export)]
POSITIONS = {
    "from 0": [0, 1, 2, 0, 1, 0, 1, 2, 3],
    "from 2": [2, 3, 4, 2, 3, 2, 3, 4, 5],
    "gaps": [0, 3, 4, 0, 7, 0, 1, 2, 9],
}


class Packed(torch.nn.Module):
    """A model of ids, mask and positions alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, positions):
        return self.model(ids, mask, position_ids=positions).last_hidden_state


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("kind", POSITIONS)
def test_traces_of_packed_rows_follow_positions(kind, tracer):
    """Only zeros began a sequence there: positions from 2 on joined all of them."""
    model, ids = Packed(make(BertModel)).eval(), make_batch(9, 9)["input_ids"]
    plain = torch.arange(9).expand(2, 9)
    mask = torch.ones_like(ids)
    if tracer == "jit":
        recorded = torch.jit.trace(model, (ids, mask, plain))
    else:
        recorded = torch.export.export(model, (ids, mask, plain)).module()
    mask = mask.clone()
    mask[0, 1], mask[1, 7:] = 0, 0
    positions = torch.tensor(POSITIONS[kind]).expand(2, 9)
    real = mask.bool()
    close(recorded(ids, mask, positions)[real], model(ids, mask, positions)[real], factor=256)


class Loss(torch.nn.Module):
    """A model's loss of ids, mask and labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, labels):
        return self.model(ids, mask, labels=labels).loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tracer", TRACERS)
def test_labels_on_padding_are_ignored_by_traces_too(tracer, training):
    """They counted: 4.82 in place of 5.02."""
    model = Loss(make(BertForMaskedLM)).train(training)
    ids, mask = BATCH.values()
    if tracer == "jit":
        recorded = torch.jit.trace(model, (ids, mask, ids))
    else:
        recorded = torch.export.export(model, (ids, mask, ids)).module()
    close(recorded(ids, mask, ids), model(ids, mask, ids), factor=256)
    assert not torch.equal(model(ids, mask, ids), model(ids, torch.ones_like(mask), ids))


def test_a_batch_packed_before_is_refused_under_a_tracer():
    """Its sequences would be those of all inputs."""
    model, inputs = make(BertForMaskedLM), collate(3, 9)
    wrapped = torch.nn.Module()
    wrapped.forward = lambda ids: model(ids, batch=inputs["batch"]).logits
    with pytest.raises(ValueError, match="give attention_mask and position_ids"):
        torch.jit.trace(wrapped, (inputs["input_ids"],))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_meta_gives_shapes_with_and_without_a_mask(cls, masked):
    """As transformers' BERT does; values of a mask are not to be had there."""
    model, batch = make(cls), {name: x.to("meta") for name, x in BATCH.items()}
    if not masked:
        del batch["attention_mask"]
    for x, y in zip(
        model.to("meta")(**batch).to_tuple(), make(cls)(**BATCH).to_tuple(), strict=True
    ):
        assert x.is_meta and x.shape == y.shape


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_fake_tensors_tell_all_shapes(cls):
    """As tools that plan memory ask for them. A mask raised, since its tokens cannot be counted."""
    model = make(cls)
    inputs = {name: x.clone() for name, x in BATCH.items()}
    if cls is BertForMultipleChoice:
        inputs = {name: x[:, None] for name, x in inputs.items()}
    expected = outputs_of(model(**inputs))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = outputs_of(model(**{name: mode.from_tensor(x) for name, x in inputs.items()}))
    assert len(found) == len(expected) >= 1
    for x, y in zip(found, expected, strict=True):
        assert isinstance(x, FakeTensor) and x.shape == y.shape and x.dtype == y.dtype
