# SPDX-License-Identifier: Apache-2.0
"""Configuration of MosaicBERT: stock BERT's fields and the few that MosaicBERT adds.

The class is not called `BertConfig`, since transformers compares configuration classes by name and
would build a stock BERT from it. `BertConfig` stays as an alias: it is the name in every published
`auto_map`.
"""

import copy
import math
import re
from numbers import Integral

from transformers import BertConfig as StockBertConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of this code. A checkpoint's folder holds a copy of it, and its config.json says of which version.
VERSION = "0.1.0"
# The classes of this package, for folders that are written by it.
AUTO_MAP = {
    "AutoConfig": "configuration_bert.MosaicBertConfig",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
    "AutoModelForTokenClassification": "bert_layers.BertForTokenClassification",
    "AutoModelForQuestionAnswering": "bert_layers.BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "bert_layers.BertForMultipleChoice",
}
MAX_LABELS = 2**18
# Fields that are no sizes, and the most that each can be.
NUMBERS = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 1
) | dict.fromkeys(("layer_norm_eps", "initializer_range"), math.inf)


def is_newer(version: str, than: str) -> bool:
    """Whether a version such as "0.10.1" comes after another."""
    numbers = [[int(x) for x in re.findall(r"\d+", text)] for text in (version, than)]
    return numbers[0] > numbers[1]


class MosaicBertConfig(StockBertConfig):
    """Describes a MosaicBERT model.

    Args:
        alibi_starting_size: longest input, in tokens, that the checkpoint is prepared for. It
            allocates nothing and limits nothing: ALiBi reads longer inputs as they are. Tools that
            need a number to cut text at take it from `max_position_embeddings`, which is raised to
            it; the model itself has no position embeddings.
        attention_probs_dropout_prob: dropout on attention probabilities, 0 in MosaicBERT's recipe.
        low_precision_layernorm: under autocast, LayerNorm takes and returns autocast's dtype.
            Without it autocast runs LayerNorm in float32. It changes nothing outside autocast.
        sparse_prediction: in training with labels, `BertForMaskedLM` computes the end of the last
            layer and the loss for labelled tokens only, some thousand at a time, and returns no
            `logits`. Asking for hidden states turns it off for that call.
        mosaic_bert_version: of the code that saved the checkpoint. Saved again, it is this code's.
        **kwargs: fields of `transformers.BertConfig`. `hidden_act` is the activation of the MLM
            head; the gated MLP always uses the exact GELU. `position_embedding_type` is accepted,
            since published files carry it, and unused. `tie_word_embeddings=False` gives the MLM
            head's decoder a weight of its own.

    Raises:
        ValueError: sizes that no model can have; see `complete`.
    """

    model_type = "mosaic_bert"
    # So that saving writes the code too, however the class was imported.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        *,
        alibi_starting_size=512,
        attention_probs_dropout_prob=0.0,
        low_precision_layernorm=False,
        sparse_prediction=True,
        mosaic_bert_version=VERSION,
        **kwargs,
    ):
        kwargs.setdefault("max_position_embeddings", alibi_starting_size)
        # transformers makes a name for each, which would fill memory without end.
        if isinstance(labels := kwargs.get("num_labels"), Integral) and labels > MAX_LABELS:
            raise ValueError(f"num_labels must be at most {MAX_LABELS}, got {labels}")
        super().__init__(attention_probs_dropout_prob=attention_probs_dropout_prob, **kwargs)
        self.alibi_starting_size = alibi_starting_size
        self.low_precision_layernorm = low_precision_layernorm
        self.sparse_prediction = sparse_prediction
        self.mosaic_bert_version = mosaic_bert_version
        self.complete()

    def complete(self):
        """Fills in what is missing, refuses sizes of no model, and lets max_position_embeddings
        reach alibi_starting_size.

        Models call it too, since fields may be set after the configuration is made, and with
        configurations of other copies of this file, which may be older.

        Raises:
            ValueError: a size below 1 or of no model, a rate outside of 0 to 1, an activation that
                is no name, a hidden_size that is no multiple of num_attention_heads, or a decoder.
        """
        for name in ("alibi_starting_size", "low_precision_layernorm", "sparse_prediction"):
            if not hasattr(self, name):
                setattr(self, name, getattr(MosaicBertConfig(), name))
        if not getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)
        saved_by = getattr(self, "mosaic_bert_version", VERSION)
        if not isinstance(saved_by, str):
            raise ValueError(f"mosaic_bert_version is {saved_by!r}, expected {VERSION!r} or so")
        if is_newer(saved_by, VERSION):
            logger.warning(
                f"this checkpoint was saved by version {saved_by} of its code, which is newer than "
                f"this one, {VERSION}: take the .py files that came with it"
            )
        self.mosaic_bert_version = VERSION
        sizes = ("alibi_starting_size", "num_hidden_layers", "num_attention_heads", "hidden_size")
        for name in (*sizes, "intermediate_size", "vocab_size", "type_vocab_size"):
            # A damaged or hostile file would otherwise build layers, or fill memory, without end.
            size, most = getattr(self, name), 1000 if name == "num_hidden_layers" else 2**31 - 1
            if not isinstance(size, Integral) or isinstance(size, bool):
                raise ValueError(f"{name} must be a whole number, got {size!r}")
            if not 1 <= size <= most:
                bound = "at least 1" if size < 1 else f"at most {most}"
                raise ValueError(f"{name} must be {bound}, got {size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        for name, most in NUMBERS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and 0 <= value <= most and math.isfinite(value)
            if not (number or value is None and name == "classifier_dropout"):
                bound = "0 or more" if most == math.inf else f"from 0 to {most}"
                raise ValueError(f"{name} must be a number, {bound}, got {value!r}")
        if not isinstance(self.hidden_act, str):
            raise ValueError(f"hidden_act must be a name such as 'gelu', got {self.hidden_act!r}")
        # Fields of stock BERT that some release may no longer have.
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name, False):
                raise ValueError(f"{name} must be False: MosaicBERT is an encoder")
        self.max_position_embeddings = max(self.max_position_embeddings, self.alibi_starting_size)

    @classmethod
    def from_stock(cls, config):
        """A MosaicBertConfig with all that a `transformers.BertConfig` has, not validated again."""
        converted = cls()
        own = {k: v for k, v in vars(config).items() if k not in ("model_type", "auto_map")}
        vars(converted).update(copy.deepcopy(own))
        converted.auto_map = getattr(config, "auto_map", None) or converted.auto_map
        return converted


BertConfig = MosaicBertConfig
