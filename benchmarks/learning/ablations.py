# SPDX-License-Identifier: Apache-2.0
"""MosaicBERT with one of its components replaced by BERT's, or one that it does not have, to train
and to fine-tune.

    python benchmarks/learning/ablations.py no_glu train_mlm.py --output_dir runs/no-glu ...
    python benchmarks/learning/ablations.py no_glu finetune.py --model runs/no-glu ...

runs the script as it is, on a model whose parts are swapped before it is built, so that the model's
files need no switch. What it saves has a model_type of its own, mosaic_bert_no_glu, and no
auto_map, so that only this script takes the folder, under the same name.
"""

import contextlib
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.records import ROOT
from mosaic_tools import family, mlm_trainer


def no_glu(layers) -> dict:
    """BERT's MLP, half as wide again, so that it has as many weights and FLOP. Its place of dropout
    and its missing bias stay the gated one's."""

    class Mlp(layers.BertGatedLinearUnitMLP):
        def __init__(self, config):
            super().__init__(config)
            inter = 3 * config.intermediate_size // 2
            self.gated_layers = nn.Linear(config.hidden_size, inter, bias=False)
            self.wo = nn.Linear(inter, config.hidden_size)

        def forward(self, hidden_states):
            inner = self.dropout(self.act(self.gated_layers(hidden_states)))  # (total, inter)
            return self.layernorm(self.wo(inner) + hidden_states)

    return {"BertGatedLinearUnitMLP": Mlp}


def learned_positions(layers) -> dict:
    """BERT's position embeddings, added before the embeddings' LayerNorm; ALiBi's slopes are 0, and
    cost what others do.

    They are in the encoder, the first that knows where sequences begin.
    """

    class Embeddings(layers.BertEmbeddings):
        def __init__(self, config):
            super().__init__(config)
            self.LayerNorm = self.dropout = nn.Identity()

    class Encoder(layers.BertEncoder):
        def __init__(self, config):
            super().__init__(config)
            dim = config.hidden_size
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, dim)
            self.LayerNorm = layers.LayerNorm(
                dim, config.layer_norm_eps, config.low_precision_layernorm
            )
            self.dropout = layers.Dropout(config.hidden_dropout_prob)

        def forward(self, hidden_states, batch, *asked):
            total, bounds = len(hidden_states), batch.cu_seqlens.long()
            first = bounds[:-1].repeat_interleave(bounds.diff(), output_size=total)
            place = torch.arange(total, device=first.device) - first
            hidden_states = hidden_states + self.position_embeddings(place)
            return super().forward(self.dropout(self.LayerNorm(hidden_states)), batch, *asked)

    zeros = lambda heads: [0.0] * heads  # noqa: E731
    return {"BertEmbeddings": Embeddings, "BertEncoder": Encoder, "alibi_slopes": zeros}


def padding_kept(layers) -> dict:
    """Padding at the end of a row goes through all layers, as a sequence of its own: real tokens
    see what they would see without it, and an attention over it costs less than a masked one."""

    def pack_batch(tokens, attention_mask=None, position_ids=None, labels=None):
        if attention_mask is not None:
            length = attention_mask.sum(1, keepdim=True)  # (batch, 1)
            place = torch.arange(tokens.shape[1], device=tokens.device)
            position_ids = torch.where(place < length, place, place - length)
        return pack(tokens, None, position_ids, labels)

    pack = layers.pack_batch
    return {"pack_batch": pack_batch}


def dense_logits(layers) -> dict:
    """BERT's loss, of logits of all tokens, labelled or not."""

    def packed_before(*args):
        return packed(*args)._replace(labelled_indices=None)

    packed = layers.packed_before
    return {"packed_before": packed_before}


def z_loss(layers) -> dict:
    """1e-4 of the squared logarithm of softmax's denominator (Chowdhery et al. 2022, section 5), in
    training only. What this costs in time says nothing: logits are computed twice."""

    class Head(layers.BertLMPredictionHead):
        def summed_loss(self, hidden_states, labels):
            loss = super().summed_loss(hidden_states, labels)
            if not self.training:
                return loss
            log_sum = self.logits(hidden_states).float().logsumexp(-1)  # (labelled,)
            return loss + 1e-4 * log_sum.square().sum()

    return {"BertLMPredictionHead": Head}


PARTS = (no_glu, learned_positions, padding_kept, dense_logits, z_loss)
SWAPS = {f.__name__: f for f in PARTS}


def model_module():
    """The module that the scripts build the model from."""
    return sys.modules[family.model_class("AutoModelForMaskedLM").__module__]


@contextlib.contextmanager
def saved_as(name: str):
    """Configurations are saved, and read, as this ablation's, which no other code takes."""
    # transformers may keep a copy of the module for each file that imports it.
    classes = {model_module().MosaicBertConfig, type(family.our_config())}
    with contextlib.ExitStack() as swapped:
        for config_class in classes:
            to_dict = config_class.to_dict

            def without_code(self, to_dict=to_dict):
                return {key: x for key, x in to_dict(self).items() if key != "auto_map"}

            model_type = f"{config_class.model_type}_{name}"
            swapped.enter_context(mock.patch.object(config_class, "model_type", model_type))
            swapped.enter_context(mock.patch.object(config_class, "to_dict", without_code))
        yield


def run(name: str, script: str, flags: list[str]):
    """Runs the script on the ablation of that name. SystemExit: there is none."""
    if name not in SWAPS:
        raise SystemExit(f"unknown ablation {name}: {', '.join(SWAPS)}")
    with contextlib.ExitStack() as swapped:
        layers, collator = model_module(), mlm_trainer.MaskingCollator
        for part, replacement in SWAPS[name](layers).items():
            swapped.enter_context(mock.patch.object(layers, part, replacement))
        if name == "padding_kept":
            # It would leave the padding out before the model sees it.
            kept = lambda *args, unpads=False: collator(*args)  # noqa: E731
            swapped.enter_context(mock.patch.object(mlm_trainer, "MaskingCollator", kept))
        swapped.enter_context(saved_as(name))
        swapped.enter_context(mock.patch.object(sys, "argv", [script, *flags]))
        runpy.run_path(str(ROOT / script), run_name="__main__")


def main():
    if len(sys.argv) < 3:
        print(__doc__)
        raise SystemExit(None if "--help" in sys.argv else f"one of {', '.join(SWAPS)}; a script")
    run(*sys.argv[1:3], sys.argv[3:])


if __name__ == "__main__":
    main()
