# SPDX-License-Identifier: Apache-2.0
"""Copies of a model whose linear layers have weights of 8 bits, by torch itself and by torchao."""

import copy
import warnings

from torch import nn


def torch_int8(model: nn.Module, skip: str = "none", per_channel: bool = False) -> nn.Module:
    """
    Args:
        model: in float32, in evaluation mode.
        skip: linear layers whose name ends like this stay in float32.
        per_channel: a scale for each row of a weight, in place of one for all of it.
    """
    from torch.ao import quantization

    config = quantization.default_dynamic_qconfig
    if per_channel:
        config = quantization.per_channel_dynamic_qconfig
    linear = (name for name, x in model.named_modules() if isinstance(x, nn.Linear))
    layers = {name: config for name in linear if not name.endswith(skip)}
    with warnings.catch_warnings():
        # It is deprecated.
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(model, layers)


def torchao_int8(
    model: nn.Module, config: str = "Int8DynamicActivationInt8WeightConfig"
) -> nn.Module:
    """`config`: the name of one of torchao's, by default with a scale for each token."""
    from torchao import quantization

    model = copy.deepcopy(model)
    quantization.quantize_(model, getattr(quantization, config)())
    return model
