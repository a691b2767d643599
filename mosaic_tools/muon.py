# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of a BERT's layers and AdamW for the rest, as one torch optimizer."""

import re

import torch

# Weights that are several matrices, one below the other: queries, keys and values; gate and value.
STACKED = {"Wqkv": 3, "gated_layers": 2}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices of a model's layers, torch.optim.AdamW for the rest.

    To schedules, accelerate, GradScaler and checkpoints an optimizer like any other: its groups and
    its state are of whole parameters. A step lends them, as they are then, to torch's optimizers,
    to Muon cut into matrices.

    Args:
        model: a MosaicBERT or transformers' BERT, with any head.
        muon: learning rate, weight decay and the like of torch.optim.Muon.
        adamw: those of torch.optim.AdamW.
    """

    def __init__(self, model: torch.nn.Module, muon: dict, adamw: dict):
        weights, parts, rest = split(model)
        of_muon = torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **muon)
        of_adamw = torch.optim.AdamW(rest, **adamw)
        # AdamW's first: Trainer logs the rate of the first group.
        groups = [*of_adamw.param_groups, of_muon.param_groups[0] | {"parts": parts}]
        super().__init__(groups, {})
        # Schedules that end above zero read the rate from here.
        self.defaults = of_adamw.defaults

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            optimizer = self.muon(group) if "parts" in group else self.adamw(group)
            optimizer.step()
        return loss

    def adamw(self, group: dict) -> torch.optim.Optimizer:
        """AdamW for a group of ours."""
        adamw = torch.optim.AdamW([group])
        adamw.state = self.state
        return adamw

    def muon(self, group: dict) -> torch.optim.Optimizer:
        """Muon for the matrices that a group of ours has now, with their gradients and momenta."""
        momenta = {}
        for weight, parts in zip(group["params"], group["parts"], strict=True):
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            stacks = (weight.detach(), weight.grad, state["momentum_buffer"])
            for matrix, grad, momentum in zip(*(x.chunk(parts) for x in stacks), strict=True):
                matrix.grad = grad
                momenta[matrix] = {"momentum_buffer": momentum}
        muon = torch.optim.Muon([group | {"params": list(momenta)}])
        muon.state = momenta
        return muon


def split(model: torch.nn.Module) -> tuple[list, list[int], list]:
    """(weights of the layers, of how many matrices each is made, all other parameters).

    Raises:
        ValueError: the model has no layers of a BERT.
    """
    weights, parts, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and re.search(r"\bencoder\.layer\.\d+\.", name):
            weights.append(parameter)
            parts.append(STACKED.get(name.split(".")[-2], 1))
        else:
            rest.append(parameter)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no encoder.layer with weights to train")
    return weights, parts, rest
