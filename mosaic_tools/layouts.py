# SPDX-License-Identifier: Apache-2.0
"""Layouts of checkpoints in the wild: their names of tensors, and the way to ours and back."""

import torch
from torch import Tensor

from mosaic_tools.family import BUFFERS, listed

# Layouts in the wild: prefixes of names there, and here. From right to left it is the way back.
WITH_PREFIX = {"bert.": "bert.", "cls.": "cls.", "classifier.": "classifier."}
WITHOUT_PREFIX = {
    "embeddings.": "bert.embeddings.",
    "encoder.": "bert.encoder.",
    "pooler.": "bert.pooler.",
}
LAYOUTS = {
    "MosaicBERT": WITH_PREFIX,
    "encoder only": WITHOUT_PREFIX,
    "Composer": {f"model.{name}": name for name in WITH_PREFIX},
    "Jina": WITH_PREFIX,
    "Jina, encoder only": WITHOUT_PREFIX,
}
# Parts of our names, and what Jina has there: several tensors, ours are these one after the other.
JINA_NAMES = {
    ".attention.self.Wqkv.": [f".attention.self.{x}." for x in ("query", "key", "value")],
    "cls.predictions.decoder.bias": ["cls.predictions.bias"],
}
# What the first BERT called them, as transformers 5.0 still does in what it loaded and saves.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def to_ours(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The source's layout, and its tensors by our names. ValueError: a name that no layout has, or
    whole numbers."""
    tensors = {name: x for name, x in tensors.items() if not name.endswith(BUFFERS)}
    for theirs, ours in OLD_NAMES.items():
        tensors = {name.replace(theirs, ours): x for name, x in tensors.items()}
    is_jina = any(".attention.self.query." in name for name in tensors)
    layout = max(
        (x for x in LAYOUTS if x.startswith("Jina") == is_jina),
        key=lambda x: sum(name.startswith(tuple(LAYOUTS[x])) for name in tensors),
    )
    if strange := [name for name in tensors if not name.startswith(tuple(LAYOUTS[layout]))]:
        raise ValueError(
            f"no place for these tensors of the source ({layout} layout): {listed(strange)}"
        )
    if whole := [name for name, x in tensors.items() if not x.is_floating_point()]:
        raise ValueError(
            f"{listed(whole)} of the source are {tensors[whole[0]].dtype}, as quantized weights "
            "are: take those that they were made of"
        )
    tensors = rename(tensors, LAYOUTS[layout])
    return layout, join(tensors) if is_jina else tensors


def from_ours(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    if layout.startswith("Jina"):
        tensors = split(tensors)
    return rename(tensors, {ours: theirs for theirs, ours in LAYOUTS[layout].items()})


def join(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins what Jina keeps apart. ValueError: the joint is there too, and differs."""
    tensors = dict(tensors)
    for ours, parts in JINA_NAMES.items():
        for first in [name for name in tensors if parts[0] in name]:
            names = [first.replace(parts[0], part) for part in parts]
            shapes = [tensors[x].shape for x in names if x in tensors]
            # What is left apart has no place, and will be listed.
            if shapes == [shapes[0]] * len(names) and shapes[0]:
                joint = torch.cat([tensors.pop(x) for x in names])
                name = first.replace(parts[0], ours)
                if name in tensors and not torch.equal(tensors[name], joint):
                    raise ValueError(f"{name} differs from {', '.join(names)}")
                tensors[name] = joint
    return tensors


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `join`."""
    apart = {}
    for name, tensor in tensors.items():
        ours = next((x for x in JINA_NAMES if x in name), None)
        if ours is None:
            apart[name] = tensor
            continue
        parts = JINA_NAMES[ours]
        pieces = tensor.unflatten(0, (len(parts), -1))
        for part, piece in zip(parts, pieces, strict=True):
            apart[name.replace(ours, part)] = piece
    return apart


def rename(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next(x for x in prefixes if name.startswith(x))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed
