# SPDX-License-Identifier: Apache-2.0
"""bert_layers: gradient checkpointing, and parameters sharded over processes (FSDP2)."""

import collections
import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, run_python
from models import close, make, make_batch, make_labels
from transformers.modeling_layers import GradientCheckpointingLayer

from mosaic_bert.bert_layers import (
    BertForMaskedLM,
)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_each_layer_once_more_and_changes_no_gradient(reentrant):
    """Raised in the published code. Layers are transformers' GradientCheckpointingLayer, which
    tools look for that switch it layer by layer."""
    batch = make_batch(5, 9)
    grads, runs = [], collections.Counter()
    for checkpointing in (False, True):
        model = make(BertForMaskedLM).train()
        # As reentrant checkpointing needs; it also shows the embeddings' padding to its hook.
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for i, layer in enumerate(model.bert.encoder.layer):
            assert isinstance(layer, GradientCheckpointingLayer)
            key = checkpointing, i
            layer.mlp.register_forward_pre_hook(lambda *_, key=key: runs.update([key]))
        model(**batch, labels=make_labels(batch)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert runs == {(False, 0): 1, (False, 1): 1, (True, 0): 2, (True, 1): 2}
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_can_be_switched_layer_by_layer():
    model, runs = make(BertForMaskedLM).train(), collections.Counter()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.bert.encoder.layer[0].gradient_checkpointing = False
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    batch = make_batch(5, 9)
    model(**batch, labels=make_labels(batch)).loss.backward()
    assert runs == {0: 1, 1: 2}


TRAIN_TWO_STEPS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_checkpointing import train_two_steps
train_two_steps(sys.argv[2], rank=int(sys.argv[3]), world=2)
"""


def train_two_steps(folder, rank=0, world=1):
    """Saves losses and parameters. With world > 1, process `rank` holds a share of the parameters
    and takes its share of each batch's rows."""
    model = make(BertForMaskedLM).train()
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            # Or one process would wait half an hour for another that failed.
            timeout=datetime.timedelta(seconds=60),
        )
        for module in (*model.bert.encoder.layer, model):
            torch.distributed.fsdp.fully_shard(module)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for lengths in ((9, 5, 12, 3), (4, 12, 2, 8)):
        batch = make_batch(*lengths)
        batch["labels"] = make_labels(batch)
        # Gradients are averaged over processes.
        count = (batch["labels"] != -100).sum() / world
        rows = {name: x.chunk(world)[rank] for name, x in batch.items()}
        loss = model(**rows, num_items_in_batch=count).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    state = model.state_dict()
    if world > 1:
        torch.distributed.all_reduce(losses)
        losses /= world
        state = {name: x.full_tensor() for name, x in state.items()}
        torch.distributed.destroy_process_group()
    if rank == 0:
        torch.save({"losses": losses, **state}, f"{folder}/{world}.pt")


def test_fully_shard_trains_as_one_process_does(tmp_path):
    """Two processes; the decoder stays tied, and its loss gets whole weights."""
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(run_python, TRAIN_TWO_STEPS, ROOT / "tests", tmp_path, i) for i in (0, 1)
        ]
        for rank in ranks:
            rank.result()
    train_two_steps(tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys() and one["losses"].shape == (2,)
    for name, x in one.items():
        close(two[name], x)
