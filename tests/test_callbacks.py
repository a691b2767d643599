# SPDX-License-Identifier: Apache-2.0
"""callbacks.py: what is counted, and against which clock. The others are in test_restart.py,
where runs are killed for real."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM

from mosaic_bert.bert_layers import BertForMaskedLM as MosaicBertForMaskedLM
from mosaic_bert.configuration_bert import MosaicBertConfig
from mosaic_tools import callbacks
from mosaic_tools.callbacks import Throughput

SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def test_flop_of_the_base_model_are_those_of_its_matrices():
    """The figures of the published sizes, counted on the meta device: 113.2 M weights in the layers
    and 24.0 M in the head (a mixed batch of 128 tokens, 30 % of them labelled)."""
    with torch.device("meta"):
        model = MosaicBertForMaskedLM(MosaicBertConfig(vocab_size=30528))
    flop = Throughput(model, None).flop
    per_token = flop @ torch.tensor([1.0, 128, 0.3], dtype=torch.float64)
    expected = 3 * (2 * 113.2464e6 + 4 * 128 * 768 * 12 + 0.3 * 2 * (768 * 30528 + 768**2))
    assert per_token.item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(params=["ours", "stock"])
def model(request):
    if request.param == "ours":
        return MosaicBertForMaskedLM(MosaicBertConfig(**SIZES))
    return BertForMaskedLM(BertConfig(**SIZES))


def batch_of(lengths, seqlen, labels):
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    marked = torch.full((len(lengths), seqlen), -100)
    marked[0, :labels] = 5
    return {"attention_mask": mask, "labels": marked}


def test_figures_count_tokens_rows_and_flop_between_two_reports(model, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 23.0, 30.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(model, peak_tflops=1e-6)
    throughput.on_train_begin(None, None, None)
    throughput.count(batch_of([8, 4], seqlen=8, labels=3))
    throughput.on_step_end(None, None, None)
    # Evaluating took from 12 to 20, which is no training.
    throughput.on_evaluate(None, None, None)
    throughput.count(batch_of([6, 2], seqlen=6, labels=2))
    throughput.on_step_end(None, None, None)

    figures = throughput.report(Accelerator(cpu=True))
    seconds = (12 - 10) + (23 - 20)
    assert figures["tokens_per_second"] == 20 / seconds
    assert figures["samples_per_second"] == 4 / seconds
    assert figures["mean_length"] == 5
    assert figures["padding_share"] == pytest.approx(1 - 20 / 28)
    layers = sum(p.numel() for name, p in model.bert.encoder.named_parameters() if p.dim() == 2)
    flop = 3 * (2 * layers * 20 + 4 * 3 * 16 * (64 + 16 + 36 + 4) + 2 * (16 * 16 + 16 * 320) * 5)
    assert figures["mfu"] == pytest.approx(flop / seconds / 1e6)
    assert throughput.report(Accelerator(cpu=True)) == {}


def test_packed_sequences_are_counted_one_by_one(model):
    throughput = Throughput(model, None)
    inputs = batch_of([8, 8], seqlen=8, labels=1)
    del inputs["attention_mask"]
    inputs["batch"] = {"cu_seqlens": torch.tensor([0, 3, 8, 16])}
    throughput.count(inputs)
    assert throughput.counted.tolist() == [16, 9 + 25 + 64, 1]
    assert (throughput.places, throughput.rows, throughput.sequences) == (16, 2, 3)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("Tesla T4", None)]
)
def test_the_peak_of_a_known_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert callbacks.known_peak(torch.device("cuda")) == peak
    assert callbacks.known_peak(SimpleNamespace(type="cpu")) is None


def test_waiting_is_the_time_until_batches_come_and_no_other(model, monkeypatch):
    clock = iter([1.0, 1.0, 4.0, 6.0, 7.0, 9.0, 11.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(model, None)
    throughput.on_train_begin(None, None, None)
    # It begins at 1, has the first batch at 4, asks again at 6, has the second at 7 and is done
    # with it at 9; the step ends at 11.
    for _ in throughput.waiting_for([0, 1]):
        throughput.count(batch_of([8, 4], seqlen=8, labels=3))
    throughput.on_step_end(None, None, None)
    figures = throughput.report(Accelerator(cpu=True))
    assert figures["data_wait_share"] == pytest.approx((3 + 1) / 10)
    assert throughput.waited == 0
