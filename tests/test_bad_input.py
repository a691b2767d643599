# SPDX-License-Identifier: Apache-2.0
"""Bad input to the model and to every command, in one table: each row is refused by a message that
names what is wrong and what to do, soon, and nothing is trained, uploaded, written or deleted.

What reading of data and checkpoints refuses besides is with the tests of those modules.
"""

import math
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDENS
from embeddings import PAIRS, SCORED
from finetuning import SENTENCES, by_age, write_rows
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import IDS, VOCAB, make, make_batch
from safetensors.torch import save_file
from training import DOCUMENTS, write_vocab

import convert_weights
import finetune
import prepare_data
import train_embeddings
import train_mlm
from mosaic_bert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from mosaic_bert.bert_padding import pack_batch
from mosaic_bert.configuration_bert import MosaicBertConfig
from mosaic_tools import publishing

pytest_plugins = ["finetuning", "hub"]

# ---- the model: (what is wrong, a call, what the message has) ----

BATCH = make_batch(4, 8)


def forward(cls=BertModel, training=False, sizes=(), **arguments):
    return lambda: make(cls, **dict(sizes)).train(training)(**arguments)


def ids_and(**arguments):
    return {"input_ids": IDS} | arguments


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


def of_both(mistake, arguments, *said):
    """Rows of the encoder and of a model with a head, which look at inputs each by itself."""
    return [
        (f"{cls.__name__}: {mistake}", forward(cls, **arguments), *said)
        for cls in (BertModel, BertForMaskedLM)
    ]


def of_labels(cls, *said, sizes=(), **labels):
    """Rows of evaluation and of training, whose losses differ."""
    return [
        (
            f"{cls.__name__}, {'training' if training else 'evaluation'}: "
            + ", ".join(f"{name} of shape {tuple(x.shape)}" for name, x in labels.items()),
            forward(cls, training, sizes, **BATCH, **labels),
            *said,
        )
        for training in (False, True)
    ]


def of_config(**values):
    """A configuration; transformers 5 refuses some of them by an error of its own."""
    try:
        return MosaicBertConfig(**values)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(str(error)) from error


def of_bounds(mistake, changes, *said):
    """A row of what a flattening collator says of its sequences, here of 3 and 5 tokens."""
    arguments = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "cu_seq_lens_q": BOUNDS}
    return mistake, forward(**arguments | {"max_length_q": 5} | changes), *said


BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)
MODEL = [
    *of_both("no input", {}, "exactly one of input_ids and inputs_embeds, got none"),
    *of_both("ids and embeddings", ids_and(inputs_embeds=zeros(1, 2, 64)), "one of", "got both"),
    *of_both("ids of a row alone", {"input_ids": IDS[0]}, "input_ids must have 2 axes", "(2,)"),
    *of_both("flat embeddings", {"inputs_embeds": zeros(2, 64)}, "inputs_embeds must have 3 axes"),
    *of_both("ids of floats", {"input_ids": IDS.float()}, "must be torch.int64", "float32"),
    *of_both("ids of bool", {"input_ids": IDS.bool()}, "must be torch.int64", "got torch.bool"),
    *of_both("ids in a list", {"input_ids": [[1, 1]]}, "input_ids must be a tensor, got list"),
    *of_both("types of floats", ids_and(token_type_ids=IDS * 0.0), "must be torch.int64", "float3"),
    *of_both("types in a list", ids_and(token_type_ids=[[0, 0]]), "must be a tensor, got list"),
    *of_both("a mask in a list", ids_and(attention_mask=[[1, 1]]), "must be a tensor, got list"),
    *of_both("positions in a list", ids_and(position_ids=[[0, 1]]), "must be a tensor, got list"),
    *of_both("an id too large", {"input_ids": IDS + VOCAB}, "holds 65", "0..63", "tokenizer"),
    *of_both("an id below 0", {"input_ids": IDS - 5}, "holds -4", "0..63", "tokenizer"),
    *of_both("no such type", ids_and(token_type_ids=IDS + 1), "token_type_ids holds 2", "0..1"),
    *of_both("types of a row alone", ids_and(token_type_ids=IDS[0]), "has shape (2,)", "(1, 2)"),
    *of_both("a longer mask", ids_and(attention_mask=torch.ones(1, 3)), "attention_mask has shape"),
    *of_both("a mask of two", ids_and(attention_mask=zeros(1, 1, 2, 2)), "(1, 1, 2, 2)", "(1, 2)"),
    *of_both("a mask of nan", ids_and(attention_mask=IDS * math.nan), "holds nan", "expected 1"),
    *of_both("a mask to be added", ids_and(attention_mask=IDS * -1e4), "-10000.0", "expected 1"),
    *of_both("half a token", ids_and(attention_mask=IDS / 2), "holds 0.5", "0 for padding"),
    *of_both("no columns", {"input_ids": IDS[:, :0]}, "has no tokens: its shape is (1, 0)"),
    *of_both("longer positions", ids_and(position_ids=zeros(1, 3)), "position_ids", "(1, 3)"),
    *of_both("positions of nan", ids_and(position_ids=IDS * math.nan), "must increase"),
    *of_both(
        "a packed batch and a mask",
        BATCH | {"batch": pack_batch(*BATCH.values())},
        "give batch, or attention_mask and position_ids, not both",
    ),
    *of_both(
        "a batch of other rows",
        ids_and(batch=pack_batch(torch.zeros(3, 5))),
        "from shape (3, 5), but the inputs are (1, 2)",
    ),
    *of_both("a batch of other fields", ids_and(batch={"ids": IDS}), "fields ids", "PackedBatch: "),
    *of_both("a decoder's states", ids_and(encoder_hidden_states=IDS), "must be None", "no cross-"),
    *of_both("a mask of heads to drop", ids_and(head_mask=IDS), "head_mask must be None: heads"),
    *of_labels(BertForMaskedLM, "(2, 7)", "(2, 8)", labels=zeros(2, 7)),
    *of_labels(BertForMaskedLM, "(16,)", "(2, 8)", labels=zeros(16)),
    *of_labels(BertForMaskedLM, "labels holds 64", "0..63", labels=zeros(2, 8) + VOCAB),
    *of_labels(BertForMaskedLM, "labels holds -1,", "by -100", "0..63", labels=zeros(2, 8) - 1)[:1],
    *of_labels(BertForMaskedLM, "whole numbers, got torch.float32", labels=torch.zeros(2, 8)),
    *of_labels(
        BertForTokenClassification, "whole numbers, got torch.bool", "long()",
        labels=zeros(2, 8, dtype=torch.bool),
    ),
    *of_labels(
        BertForQuestionAnswering, "whole numbers, got torch.float32", "long()",
        start_positions=torch.zeros(2), end_positions=torch.zeros(2),
    ),
    *of_labels(BertForSequenceClassification, "(3,)", "(2,)", labels=zeros(3)),
    *of_labels(BertForSequenceClassification, "(2, 3)", "(2,)", labels=zeros(2, 3)),
    *of_labels(
        BertForSequenceClassification, "labels holds 2", "0..1: load", "num_labels=",
        labels=zeros(2) + 2,
    ),
    *of_labels(
        BertForSequenceClassification, "problem_type", "several", "single_label_", labels=zeros(2),
        sizes={"problem_type": "several"},
    ),
    *of_labels(BertForTokenClassification, "(2,)", "(2, 8)", labels=zeros(2)),
    *of_labels(
        BertForQuestionAnswering, "(3,)", "(2,)", start_positions=zeros(3), end_positions=zeros(2)
    ),
    *of_labels(BertForQuestionAnswering, "both start_positions and end", start_positions=zeros(2)),
    ("a choice of none", forward(BertForMultipleChoice), "(batch, choices, seqlen)", "got None"),
    ("a flat choice", forward(BertForMultipleChoice, **BATCH), "choices, seqlen)", "got (2, 8)"),
    (
        "a flat choice, embedded",
        forward(BertForMultipleChoice, inputs_embeds=zeros(2, 3, 64)),
        "(batch, choices, seqlen, dim), got (2, 3, 64)",
    ),
    (
        "a choice that is not there",
        forward(BertForMultipleChoice, input_ids=IDS[None], labels=zeros(1) + 5),
        "labels holds 5", "0..0",
    ),
    (
        "hidden states of labelled tokens",
        forward(input_ids=IDS, batch=pack_batch(IDS, labels=IDS), output_hidden_states=True),
        "output_hidden_states needs a batch", "without labels",
    ),
    of_bounds("bounds that end early", {"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "0 to 8", "7]"),
    of_bounds("falling bounds", {"cu_seq_lens_q": torch.tensor([0, 5, 3, 8])}, "rise", "3, 8]"),
    of_bounds("bounds of rows", {"cu_seq_lens_q": BOUNDS[None]}, "shape (1, 3)", "(sequences +"),
    of_bounds("no bounds", {"cu_seq_lens_q": BOUNDS[:0]}, "shape (0,)", "(sequences + 1,)"),
    of_bounds("too short a length", {"max_length_q": 4}, "max_seqlen is 4", "sequence 5"),
    of_bounds(
        "two kinds of bounds", {"cu_seq_lens_k": torch.tensor([0, 4, 8])}, "cu_seq_lens_k", "[0, 4]"
    ),
    of_bounds("two kinds of sequences", {"seq_idx": (torch.arange(8) > 4)[None].int()}, "seq_idx"),
    of_bounds("one long sequence", {"position_ids": torch.arange(8)[None]}, "position_ids tells"),
    of_bounds(
        "a gap", {"position_ids": torch.tensor([[0, 1, 2, 0, 2, 3, 4, 5]])}, "must rise by 1"
    ),
    of_bounds("bounds and a mask", {"attention_mask": zeros(1, 8)}, "for one row without"),
    of_bounds("bounds of two rows", {"input_ids": zeros(2, 8)}, "for one row", "got 2 rows"),
    of_bounds("a length alone", {"cu_seq_lens_q": None}, "max_length_q: give position_ids too"),
    *(
        (
            f"positions {positions}",
            lambda positions=positions: pack_batch(
                torch.zeros(1, 4), position_ids=torch.tensor([positions])
            ),
            "position_ids must increase within a sequence; a 0",
        )
        for positions in ([2, 3, 1, 2], [2, 3, 3, 4], [0, 2, 1, 3], [5, 4, 3, 2], [0, 1, 2, -1])
    ),
    ("an unknown backend", lambda: make(BertModel, "flash"), "'flash' is not available", "one of"),
    (
        "an unknown backend, set later",
        lambda: make(BertModel).set_attn_implementation("paged"),
        "'paged' is not available", "one of",
    ),
    ("no layers", lambda: MosaicBertConfig(num_hidden_layers=-1), "num_hidden_layers", "1, got -1"),
    ("no vocabulary", lambda: MosaicBertConfig(vocab_size=0), "vocab_size must be at least 1, got"),
    ("no length", lambda: MosaicBertConfig(alibi_starting_size=0), "alibi_starting_size", "got 0"),
    ("half a layer", lambda: of_config(num_hidden_layers=1.5), "num_hidden_layers", "1.5"),
    ("sizes in words", lambda: of_config(vocab_size="64"), "vocab_size", "64"),
    ("a dropout of 1.5", lambda: of_config(hidden_dropout_prob=1.5), "0 to 1, got 1.5"),
    ("a dropout below 0", lambda: of_config(attention_probs_dropout_prob=-0.1), "0 to 1, got -0.1"),
    ("a dropout of nan", lambda: of_config(classifier_dropout=math.nan), "0 to 1, got nan"),
    ("an eps of nan", lambda: of_config(layer_norm_eps=math.nan), "layer_norm_eps", "or more, got"),
    ("an eps below 0", lambda: of_config(layer_norm_eps=-1.0), "layer_norm_eps", "or more, got"),
    ("weights of nan", lambda: of_config(initializer_range=math.nan), "initializer_range", "nan"),
    (
        "an unknown activation", lambda: make(BertForMaskedLM, hidden_act="gelo"),
        "'gelo' is not one of", "gelu",
    ),
    ("a version of 1", lambda: of_config(mosaic_bert_version=1), "mosaic_bert_version is 1"),
    (
        "no labels", lambda: make(BertForSequenceClassification, num_labels=0),
        "num_labels must be at least 1, got 0",
    ),
    ("65 over 4 heads", lambda: make(BertModel, hidden_size=65), "a multiple of", "got 65 and 4"),
    ("a decoder", lambda: MosaicBertConfig(is_decoder=True), "is_decoder must be False", "encoder"),
]  # fmt: skip

# ---- commands: (what is wrong, the command, what the message has) ----

TEXT = "train_mlm --output_dir out --train_file"
MLM = f"{TEXT} text.txt"
PREPARE = "prepare_data --train_file text.txt --prepared_data out"
TUNE = "finetune --model model --output_dir out"
OWN = f"{TUNE} --train_file train.jsonl --validation_file dev.jsonl"
EMBED = "train_embeddings --model model --output_dir out"
OF_PAIRS = f"{EMBED} --train_file pairs.jsonl --validation_file pairs.jsonl"
FOLDER = ("is a file, expected a folder", "choose another")
SHARE = ("at least 0 and below 1",)

ONNX = "convert_weights model out --onnx"
CONVERTER = [
    ("a source that is nowhere", "convert_weights nowhere out", "nowhere is neither a file"),
    ("a folder without weights", "convert_weights empty out", "empty holds neither model.safe"),
    ("a path into a folder", "convert_weights nowhere a/b/out", "nowhere is neither a file"),
    ("an image as weights", "convert_weights image out", "model.safetensors cannot be read"),
    ("text as weights", "convert_weights text.txt out", "text.txt cannot be read, is it complete"),
    ("a damaged .pt", "convert_weights junk.pt out", "junk.pt cannot be read, is it complete?"),
    ("weights of another model", "convert_weights other out", "no place for these", "gpt.weight"),
    ("weights in int8", "convert_weights int8 out", "torch.int8", "take those that they were made"),
    ("no config.json", "convert_weights bare out", "bare has no config.json: pass one with"),
    ("no such config", "convert_weights model out --config no.json", "no.json does not exist"),
    ("a config of text", "convert_weights model out --config text.txt", "pass one with --config"),
    ("a config that is a list", "convert_weights model out --config list.json", "expected an"),
    ("a config cut short", "convert_weights model out --config cut.json", "cut.json is not JSON"),
    ("another tokenizer", "convert_weights model out --tokenizer big.txt", "400", "only 320"),
    ("text as tokenizer", "convert_weights model out --tokenizer text.txt", "lacks [PAD]", "give"),
    ("no such tokenizer", "convert_weights model out --tokenizer none", "loaded from none"),
    ("a dtype of whole numbers", "convert_weights model out --dtype int8", "'int8'", "bfloat16"),
    ("an unknown layout", "convert_weights model out --layout gguf", "'gguf'", "'mosaic', 'jina'"),
    ("a folder with files", "convert_weights model full", "full is not empty: choose another"),
    ("a file as output", "convert_weights model text.txt", "text.txt", *FOLDER),
    ("output in a file", "convert_weights model text.txt/out", "text.txt", *FOLDER),
    ("output over the source", "convert_weights model model --overwrite", "model holds the source"),
    (
        "output around the source",
        "convert_weights image/model.safetensors image --overwrite",
        "image holds the source", "choose another",
    ),
    ("no output", "convert_weights model", "required: output_dir"),
    ("a licence of one's own", "convert_weights model out --license 'Apache 2'", "'Apache 2':"),
    ("8 bits of weights", "convert_weights model out --int8", "--int8 needs --onnx"),
    ("a task for weights", "convert_weights model out --task fill-mask", "--task needs --onnx or"),
    ("two layouts", f"{ONNX} --layout jina", "a layout of its own: leave out --layout jina"),
    ("a graph in bfloat16", f"{ONNX} --dtype bfloat16", "float32, not bfloat16", "leave out"),
    ("an unknown task", f"{ONNX} --task ner", "'ner'", "'fill-mask', 'text-classification', 'feat"),
    (
        "a task of another head", f"{ONNX} --task text-classification",
        "model has no head for --task text-classification", "for fill-mask or feature-extraction",
    ),
    ("a graph over the source", "convert_weights model model --onnx --overwrite", "model holds"),
    ("a language spelt out", "convert_weights model out --language English", "'English': give"),
]  # fmt: skip

TRAINING = [
    ("a rate below 0", f"{MLM} --learning_rate -1", "learning_rate must be at least 0", "-1.0"),
    ("a rate of nan", f"{MLM} --learning_rate nan", "learning_rate must be at least 0", "got nan"),
    ("an endless rate", f"{MLM} --learning_rate inf", "learning_rate must be", "below inf, got"),
    ("a rate in words", f"{MLM} --learning_rate fast", "--learning_rate", "invalid float", "'fast"),
    ("a rate that falls below 0", f"{MLM} --lr_end -1", "lr_end must be", *SHARE, "-1.0"),
    ("a rate that rises", f"{MLM} --lr_end 2", "lr_end must be", *SHARE, "2.0"),
    (
        "the end of a constant rate", f"{MLM} --lr_end .02 --lr_scheduler_type constant",
        "lr_end 0.02 is the end of a linear", "lr_scheduler_type is constant: leave out --lr_end",
    ),
    (
        "two ends", f"{MLM} --lr_end .02 --lr_scheduler_kwargs {{\"power\":2}}",
        "lr_end 0.02 sets lr_scheduler_kwargs", "leave out one of both",
    ),
    ("no steps", f"{MLM} --max_steps 0", "max_steps must be at least 1", "got 0"),
    ("steps below 0", f"{MLM} --max_steps -5", "max_steps must be at least 1", "got -5"),
    ("no epochs", f"{MLM} --num_train_epochs 0", "num_train_epochs must be a number above 0, got"),
    ("epochs of nan", f"{MLM} --num_train_epochs nan", "num_train_epochs must be", "0, got nan"),
    (
        "a warm-up longer than the run",
        f"{MLM} --max_steps 10 --warmup_steps 20",
        "warmup_steps is 20, more than the 10 steps", "give fewer, or --warmup_ratio",
    ),
    ("a warm-up below 0", f"{MLM} --warmup_steps -3", "warmup_steps must be at least 0, got -3"),
    ("a warm-up of more than all", f"{MLM} --warmup_ratio 6", "between 0 and 1, got 6"),
    ("a warm-up of nan", f"{MLM} --warmup_ratio nan", "warmup_ratio is a share", "got nan"),
    ("nothing masked", f"{MLM} --mlm_probability 0", "mlm_probability is a share", "got 0: the"),
    ("a percentage masked", f"{MLM} --mlm_probability 30", "between 0 and 1, got 30", "masks 0.3"),
    ("nan masked", f"{MLM} --mlm_probability nan", "mlm_probability is a share", "got nan"),
    ("all masked", f"{MLM} --eval_mlm_probability 1", "eval_mlm_probability is a share", "got 1:"),
    ("no rows", f"{MLM} --per_device_train_batch_size 0", "batch_size must be at least 1", "got 0"),
    ("no rows of all", f"{MLM} --global_batch_size -8", "global_batch_size must be at", "got -8"),
    ("no rows to evaluate", f"{MLM} --per_device_eval_batch_size 0", "must be at least 1", "got 0"),
    ("a batch that cannot be split", f"{MLM} --global_batch_size 254", "254 cannot", "252 or 255"),
    ("no micro-batches", f"{MLM} --gradient_accumulation_steps 0", "must be at least 1", "got 0"),
    (
        "micro-batches of two sizes",
        f"{MLM} --gradient_accumulation_steps 4 --global_batch_size 8",
        "leave out --gradient_accumulation_steps 4: a global_batch_size of 8 is split",
        "--per_device_train_batch_size",
    ),
    ("decay below 0", f"{MLM} --weight_decay -1", "weight_decay must be at least 0", "got -1.0"),
    ("decay of nan", f"{MLM} --decoupled_weight_decay nan", "decay must be at least 0", "got nan"),
    ("a beta of 2", f"{MLM} --adam_beta1 2", "adam_beta1 must be", *SHARE, "got 2.0"),
    ("an epsilon below 0", f"{MLM} --adam_epsilon -1", "adam_epsilon must be at least 0", "-1.0"),
    ("clipping below 0", f"{MLM} --max_grad_norm -1", "max_grad_norm must be at least 0", "-1.0"),
    ("no divergence", f"{MLM} --divergence nan", "divergence must be at least 0", "got nan"),
    ("no threads", f"{MLM} --cpu_threads 0", "cpu_threads must be at least 1", "got 0"),
    ("workers below 0", f"{MLM} --dataloader_num_workers -1", "num_workers must be at least", "-1"),
    ("no processes", f"{MLM} --preprocessing_num_workers 0", "must be at least 1", "got 0"),
    ("a seed below 0", f"{MLM} --seed -1", "seed must be at least 0 and below 4294967296", "-1"),
    ("evaluation before steps", f"{MLM} --eval_steps -1", "eval_steps must be at least 0", "-1"),
    ("nothing logged", f"{MLM} --logging_steps 0", "non-zero --logging_steps"),
    ("an unknown optimizer", f"{MLM} --optim madam", "madam", "please select one of"),
    ("an unknown schedule", f"{MLM} --lr_scheduler_type up", "invalid choice: 'up'", "'linear'"),
    ("two precisions", f"{MLM} --bf16 true --fp16 true", "fp16 and bf16", "not both"),
    ("rows of one token", f"{MLM} --max_seq_length 1", "max_seq_length is 1", "need at least 3"),
    ("a vocabulary of 3", f"{MLM} --vocab_size 3", "vocab_size must be at least 6", "got 3"),
    ("a vocabulary below bytes", f"{MLM} --train_tokenizer bpe --vocab_size 20", "262", "got 20"),
    ("a vocabulary below 0", f"{MLM} --vocab_size -1", "vocab_size must be at least 6", "got -1"),
    ("no layers", f"{MLM} --num_hidden_layers 0", "num_hidden_layers must be at least 1", "got 0"),
    ("65 over 12 heads", f"{MLM} --hidden_size 65", "hidden_size must be a multiple", "65 and 12"),
    ("a dropout of 1.5", f"{MLM} --hidden_dropout_prob 1.5", "dropout_prob must be", *SHARE, "1.5"),
    ("a dropout of nan", f"{MLM} --attention_probs_dropout_prob nan", *SHARE, "got nan"),
    ("a length of 0", f"{MLM} --alibi_starting_size 0", "alibi_starting_size must be at", "got 0"),
    ("an unknown backend", f"{MLM} --attn_implementation nope", "'nope' is not available", "sdpa"),
    ("an unknown model", f"{MLM} --model_type gpt", "invalid choice: 'gpt'", "'mosaic_bert',"),
    ("packing for a bert", f"{MLM} --model_type bert --pack true", "leave out --pack"),
    ("one checkpoint kept", f"{MLM} --save_total_limit 1", "save_total_limit must be at least 2"),
    ("neither yes nor no", f"{MLM} --pack maybe", "--pack", "got maybe", "true/false"),
    ("an empty file", f"{TEXT} empty.txt", "fill it: empty.txt"),
    ("blank lines", f"{TEXT} blank.txt", "no text is left", "give"),
    ("bytes", f"{TEXT} image/image.txt", "image.txt cannot", "UTF-8"),
    ("Latin-1", f"{TEXT} latin1.txt", "latin1.txt cannot", "UTF-8"),
    ("a folder as text", f"{TEXT} full", "full", ".jsonl"),
    ("no such file", f"{TEXT} no.txt", "there is no file no.txt"),
    ("an unknown format", f"{TEXT} cut.docx", "cut.docx: give files of one"),
    ("two formats", f"{MLM} --train_file text.txt pairs.jsonl", "one format of .txt"),
    ("no such column", f"{MLM} --text_column body", "--text_column body is not in", "columns:"),
    ("nothing held out", f"{MLM} --validation_split 0.0", "_split is a percentage, got 0.0"),
    ("held out for ever", f"{MLM} --validation_split nan", "_split is a percentage, got nan"),
    ("no documents to evaluate", f"{MLM} --max_eval_documents 0", "must be at least 1", "got 0"),
    ("two sources", f"{MLM} --dataset_name b", "give train_file or dataset_name (b), not both"),
    ("validation alone", "train_mlm --validation_file text.txt", "text.txt'] needs a train_file"),
    ("a data set without a name", "train_mlm --output_dir out --dataset_name ''", "leave it out"),
    ("rows that are not prepared", f"{MLM} --prepared_data full", "full has no prepared.json"),
    ("no such tokenizer", f"{MLM} --tokenizer_name none", "no tokenizer can be loaded from none"),
    ("a tokenizer without a name", f"{MLM} --tokenizer_name ''", "--tokenizer_name is empty"),
    (
        "two tokenizers",
        f"{MLM} --tokenizer_name vocab.txt --train_tokenizer bpe",
        "give --tokenizer_name vocab.txt or --train_tokenizer bpe, not both",
    ),
    ("no such model", f"{MLM} --model none", "no tokenizer can be loaded from none"),
    ("a model without a tokenizer", f"{MLM} --model bare", "bare"),
    ("a model of another size", f"{MLM} --model model --hidden_size 8", "model has its own shape"),
    ("another vocabulary", f"{MLM} --model model --tokenizer_name big.txt", "up to 399", "give"),
    ("no output", "train_mlm --train_file text.txt", "give --output_dir"),
    ("a folder with files", f"{MLM} --output_dir full", "output_dir full is not empty: choose"),
    ("weights to be cast", f"{MLM} --bf16_full_eval true", "leave out --bf16_full_eval: it casts"),
    (
        "steps of fewer rows than the batch",
        f"{MLM} --auto_find_batch_size true --global_batch_size 8",
        "leave out --auto_find_batch_size: a step would have fewer rows",
        "lower --per_device_train_batch_size",
    ),
    ("a file as output", f"{MLM} --output_dir text.txt", "text.txt", *FOLDER),
    ("output in a file", f"{MLM} --output_dir text.txt/out", "text.txt", *FOLDER),
    ("no such checkpoint", f"{MLM} --resume_from_checkpoint none", "none: there is no such folder"),
    ("a torn checkpoint", f"{MLM} --resume_from_checkpoint full", "full: it was not finished"),
    ("a checkpoint without a name", f"{MLM} --resume_from_checkpoint ''", "is empty: give a value"),
    ("an unknown flag", f"{MLM} --hiden_size 32", "not used by this command: --hiden_size 32"),
    ("stray words", "train_mlm --output_dir out two words", "not used by this command: two words"),
    ("no such recipe", "train_mlm no.yaml", "no.yaml cannot be read as a recipe"),
    ("a recipe that is a list", "train_mlm list.yaml", "list.yaml holds ['a', 'b']", "'key:"),
    ("a recipe that is a word", "train_mlm word.yaml", "word.yaml holds 'word'", "'key: value'"),
    ("a recipe with a tab", "train_mlm tab.yaml", "tab.yaml cannot be read", "line 2, column 1"),
    ("a key given twice", "train_mlm twice.yaml", "'seed' is given twice", "line 2"),
    ("an unknown key", "train_mlm unknown.yaml", "unknown key 'hiden_size'; see hidden_size"),
    ("a key that is a number", "train_mlm number.yaml", "number.yaml: unknown key 3; see --help"),
    ("a recipe that runs code", "train_mlm code.yaml", "code.yaml cannot be read", "os.mkdir"),
    ("a recipe in Latin-1", "train_mlm latin1.yaml", "latin1.yaml cannot be read"),
    ("a recipe with an empty name", "train_mlm empty.yaml", "--dataset_name is empty"),
    ("no name for prepared rows", "prepare_data --train_file text.txt", "give --prepared_data"),
    ("prepared rows over files", f"{PREPARE} --prepared_data full", "full is there already:"),
    ("prepared rows in a file", f"{PREPARE} --prepared_data text.txt/a", "text.txt", *FOLDER),
    ("prepared blank lines", f"{PREPARE} --train_file blank.txt", "blank.txt: no text is left"),
]  # fmt: skip

TUNING = [
    ("no task", TUNE, "give either --task", "or --train_file"),
    ("an unknown task", f"{TUNE} --task wnli", "unknown --task wnli: all, or mnli"),
    ("a task and files", f"{OWN} --task rte", "give either --task", "or --train_file"),
    ("no such data", f"{TUNE} --task rte --data_dir none", "none/rte has no train.jsonl: choose"),
    ("files and a folder", f"{OWN} --data_dir none", "leave out --data_dir none, or give --task"),
    ("training alone", f"{TUNE} --train_file train.jsonl", "both --train_file and"),
    ("three texts", f"{OWN} --text_columns a b c", "one or two, got a, b, c"),
    (
        "columns of a task",
        f"{TUNE} --task cola --label_column kind --problem regression",
        "leave out --problem, --label_column, or give --train_file",
    ),
    ("no such file", f"{OWN} --train_file none.csv", "there is no file none.csv"),
    ("text that has no labels", f"{OWN} --train_file text.txt", "text.txt: give a .csv, .json"),
    ("Latin-1", f"{OWN} --train_file latin1.csv", "latin1.csv cannot be read as csv"),
    ("a damaged file", f"{OWN} --train_file cut.json", "cut.json cannot be read as json"),
    ("one class", f"{OWN} --train_file one.jsonl", "one.jsonl has the label x only"),
    ("one score", f"{OWN} --train_file score.jsonl", "score.jsonl has the label 0.5 only"),
    ("labels that are lists", f"{OWN} --train_file lists.jsonl", "row 1: the label is ['x'], exp"),
    ("no such label column", f"{OWN} --label_column kind", "has no column kind", "--label_column"),
    ("no such text column", f"{OWN} --text_columns body", "has no column body", "--text_columns"),
    ("a text twice", f"{OWN} --text_columns text text", "--text_columns text text", "all differ"),
    ("the label as text", f"{OWN} --text_columns text label", "--label_column label must all"),
    ("labels of others", f"{OWN} --validation_file others.jsonl", "not know: tall; known are old"),
    ("names as scores", f"{OWN} --problem regression", "is 'old'", "--problem classification?"),
    ("an unknown problem", f"{OWN} --problem sort", "invalid choice: 'sort'", "'regression'"),
    ("no tokens", f"{OWN} --max_seq_length 0", "max_seq_length must be at least 3", "got 0"),
    ("a seed below 0", f"{OWN} --seeds -1", "--seeds must be from 0 to 2**32 - 1, got -1"),
    ("one seed by the other flag", f"{OWN} --seed 3", "give --seeds, one or more, in place of"),
    ("a rate of nan", f"{OWN} --learning_rate nan", "learning_rate must be at least 0", "got nan"),
    ("all smoothed", f"{OWN} --label_smoothing_factor 2", "label_smoothing", *SHARE, "2.0"),
    ("a dropout of 2", f"{OWN} --hidden_dropout_prob 2", "dropout_prob must be", *SHARE, "2.0"),
    ("another tokenizer", f"{OWN} --tokenizer_name big.txt", "ids up to 399", "give the"),
    ("an unknown backend", f"{OWN} --attn_implementation nope", "'nope' is not available", "sdpa"),
    (
        "an unknown backend, and results that are to be forgotten",
        f"{OWN} --attn_implementation nope --output_dir results --overwrite",
        "'nope' is not available", "sdpa",
    ),
    ("no model", f"{OWN} --model ''", "give --model, a folder or a Hub id"),
    ("no such model", f"{OWN} --model none", "--model 'none' is no folder of a model and no Hub"),
    ("text as a model", f"{OWN} --model text.txt", "--model 'text.txt' is no folder of a model"),
    ("a flag of pre-training", f"{OWN} --divergence 3", "not used by this command: --divergence"),
    ("a checkpoint", f"{OWN} --resume_from_checkpoint last", "same command again runs what is unf"),
    ("no output", f"{OWN} --output_dir ''", "give --output_dir, the folder"),
    ("a folder with files", f"{OWN} --output_dir full", "full is not empty", "--overwrite true"),
    ("a file as output", f"{OWN} --output_dir text.txt", "text.txt", *FOLDER),
    ("damaged results", f"{OWN} --output_dir damaged", "result.json is no result of finetune.py"),
]  # fmt: skip

EMBEDDINGS = [
    ("no model", f"{OF_PAIRS} --model ''", "give --model_name_or_path, the folder or Hub id"),
    ("no such model", f"{OF_PAIRS} --model none", "'none' is no folder of a model and no Hub id"),
    ("a module that would be lost", f"{OF_PAIRS} --model dense", "a module Dense", "give the"),
    ("modules without names", f"{OF_PAIRS} --model nameless", "lists 1, no module by path and"),
    ("another tokenizer", f"{OF_PAIRS} --tokenizer_name big.txt", "ids up to 399", "give the"),
    ("an unknown backend", f"{OF_PAIRS} --attn_implementation nope", "'nope' is not available"),
    ("columns without roles", f"{EMBED} --train_file train.jsonl", "text, label", "call them"),
    ("one pair", f"{OF_PAIRS} --train_file pair.jsonl", "has 1 pair", "at least two are needed"),
    ("scores of 0 to 5", f"{EMBED} --train_file stars.jsonl", "row 3: the score is 2", "divide"),
    ("blank texts", f"{EMBED} --train_file gaps.jsonl", "row 2: anchor is ' ', expected text"),
    ("no file that matches", f"{EMBED} --train_file 'no*.jsonl'", "there is no file no*.jsonl"),
    ("a file without a name", f"{EMBED} --train_file ''", "--train_file is empty: give a value"),
    ("a data set without a name", f"{EMBED} --dataset_name ''", "--dataset_name is empty: give"),
    ("no data for scores", f"{EMBED} --validation_file pairs.jsonl", "needs a train_file"),
    ("nothing held out", f"{EMBED} --train_file pairs.jsonl --validation_split 1", "above 1"),
    ("rows of two tokens", f"{OF_PAIRS} --max_seq_length 2", "must be at least 3", "got 2"),
    ("no pairs to evaluate", f"{OF_PAIRS} --max_eval_pairs 0", "must be at least 2", "got 0"),
    ("no pairs at once", f"{OF_PAIRS} --mini_batch_size 0", "mini_batch_size must be at", "got 0"),
    ("a row alone", f"{OF_PAIRS} --per_device_train_batch_size 1", "batch_size 1", "give 2 or"),
    ("more rows than data", f"{OF_PAIRS} --per_device_train_batch_size 13", "12 rows", "13", "low"),
    ("a split batch", f"{OF_PAIRS} --global_batch_size 8", "give --per_device_train_batch_size in"),
    ("no dimensions", f"{OF_PAIRS} --matryoshka_dims 0", "matryoshka_dims 0", "of 96 dimensions"),
    ("too many dimensions", f"{OF_PAIRS} --matryoshka_dims 64 128", "128", "of 96 dimensions"),
    ("negatives below 0", f"{OF_PAIRS} --mine_hard_negatives -1", "is -1: give 1 or more"),
    (
        "more negatives than texts",
        f"{OF_PAIRS} --mine_hard_negatives 12 --per_device_train_batch_size 4",
        "12 texts", "12 needs more",
    ),
    ("prompts of the library", f"{OF_PAIRS} --prompts a", "give --query_prompt and"),
    (
        "a prompt as long as a text",
        f"{OF_PAIRS} --max_seq_length 4 --query_prompt 'the old man reads'",
        "the prompt 'the old man reads' leaves nothing of a text of 4 tokens: shorten it",
    ),
    ("no weight", f"{OF_PAIRS} --source_weights 0", "[0.0]", "a number above 0"),
    (
        "more weights than sources",
        f"{OF_PAIRS} --source_weights 1 2 --per_device_train_batch_size 4",
        "[1.0, 2.0] for the 1 source(s)", "give as many",
    ),
    ("no steps", f"{OF_PAIRS} --max_steps 0", "max_steps must be at least 1", "got 0"),
    ("an unknown sampler", f"{OF_PAIRS} --batch_sampler fair", "fair", "please select one of"),
    ("an unknown flag", f"{OF_PAIRS} --mini_batches 8", "not used by this command: --mini_batches"),
    ("a folder with files", f"{OF_PAIRS} --output_dir full", "full is not empty: choose another"),
    ("a file as output", f"{OF_PAIRS} --output_dir text.txt", "text.txt", *FOLDER),
]  # fmt: skip

UPLOAD = "convert_weights model out --push_to_hub"
PUBLISHING = [
    ("a name without an owner", f"{UPLOAD} name", "'name' is no ORG/NAME"),
    ("a path", f"{UPLOAD} org/name/more", "'org/name/more' is no ORG/NAME"),
    ("a name with a space", f"{UPLOAD} 'org/na me'", "'org/na me'", "alphanumeric"),
    ("no name", f"{UPLOAD} ''", "'' is no ORG/NAME"),
    ("no name for a branch", f"{UPLOAD} org/name --revision ''", "revision '' is no name", "lette"),
    ("a branch with a space", f"{UPLOAD} org/name --revision 'v 1'", "revision 'v 1' is no name"),
    ("a branch of dots", f"{UPLOAD} org/name --revision a..b", "revision 'a..b' is no name"),
    ("private, and not uploaded", "convert_weights model out --private", "need --push_to_hub"),
    ("a branch, and not uploaded", "convert_weights model out --revision v1", "need --push_to_hub"),
    ("pre-trained, without an owner", f"{MLM} --push_to_hub name", "'name' is no ORG/NAME"),
    ("pre-trained, without a name", f"{MLM} --push_to_hub ''", "--push_to_hub is empty"),
    ("pre-trained, private", f"{MLM} --private true", "--private and --revision need"),
    ("pre-trained, a licence", f"{MLM} --license MIT", "'MIT': give it as the Hub abbreviates it"),
    ("pre-trained, a language", f"{MLM} --language en-US", "'en-US': give codes"),
    ("fine-tuned, a branch", f"{OWN} --push_to_hub a/b --revision 'v 1'", "'v 1' is no name of a"),
    ("two tasks", f"{TUNE} --task rte mnli --push_to_hub a/b", "give one --task of mnli, rte"),
    ("embeddings, a branch", f"{OF_PAIRS} --push_to_hub a/b --revision=-x", "'-x' is no name of a"),
    ("a folder without weights", lambda: publishing.publish("full", "org/name"), "it lacks"),
    ("no folder", lambda: publishing.publish("none", "org/name"), "none is no model", "it lacks"),
    ("a path", lambda: publishing.publish("model", "../name/x"), "'../name/x' is no ORG/NAME"),
    ("a branch", lambda: publishing.publish("model", "org/name", revision="v 1"), "'v 1' is no"),
]  # fmt: skip

AREAS = {
    "model": MODEL,
    "converter": CONVERTER,
    "training": TRAINING,
    "fine-tuning": TUNING,
    "embeddings": EMBEDDINGS,
    "publishing": PUBLISHING,
}
COMMANDS = {
    x.__name__: x for x in (convert_weights, finetune, prepare_data, train_embeddings, train_mlm)
}


def write_files(folder: Path):
    """What the commands of the table name, besides `model`."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    write_vocab(folder / "vocab.txt", *words, entries=160)
    write_vocab(folder / "big.txt", *words, entries=400)
    (folder / "empty").mkdir()
    config = (GOLDENS / "mosaic_tiny" / "config.json").read_text()
    image = b"\x89PNG\r\n\x1a\n" + bytes(200)
    files = {
        "text.txt": "\n".join(DOCUMENTS),
        "empty.txt": "",
        "blank.txt": "\n \n\n",
        "latin1.txt": "\n".join(["café à la crème"] * 9).encode("latin-1"),
        "latin1.csv": "text,label\ncafé,a\n".encode("latin-1"),
        "latin1.yaml": "model: café".encode("latin-1"),
        "full/notes.md": "mine",
        "junk.pt": b"hello",
        "image/model.safetensors": image,
        "image/image.txt": image,
        "image/config.json": config,
        "other/config.json": config,
        "int8/config.json": config,
        "dense/config.json": config,
        "dense/modules.json": '[{"path": "2", "type": "sentence_transformers.models.Dense"}]',
        "nameless/config.json": config,
        "nameless/modules.json": "[1]",
        "list.json": "[1]",
        "cut.json": "{",
        "cut.docx": "{",
        "list.yaml": "- a\n- b\n",
        "word.yaml": "word\n",
        "tab.yaml": "language:\n\t- en\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "unknown.yaml": "hiden_size: 32\n",
        "number.yaml": "3: 4\n",
        "code.yaml": "seed: !!python/object/apply:os.mkdir [out]\n",
        "empty.yaml": "dataset_name: ''\n",
        "results/results.json": "{}",
        "results/own/seed-1/result.json": "{}",
        "damaged/results.json": "{}",
        "damaged/own/seed-1/result.json": "{}",
    }
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "bare").mkdir()
    layer_norm = "bert.embeddings.LayerNorm.weight"
    save_file({"gpt.weight": torch.zeros(1)}, folder / "other" / "model.safetensors")
    for name in ("int8", "bare"):
        tensors = {layer_norm: torch.zeros(96, dtype=torch.int8 if name == "int8" else None)}
        save_file(tensors, folder / name / "model.safetensors")
    rows = {
        "train": by_age(),
        "dev": by_age()[::3],
        "one": [x | {"label": "x"} for x in by_age()],
        "score": [x | {"label": 0.5} for x in by_age()],
        "lists": [x | {"label": ["x"]} for x in by_age()],
        "others": [x | {"label": "tall"} for x in by_age()],
        "pairs": PAIRS,
        "pair": PAIRS[:1],
        "gaps": [PAIRS[0], PAIRS[1] | {"query": " "}],
        "stars": [x | {"score": i} for i, x in enumerate(SCORED)],
    }
    for name, x in rows.items():
        write_rows(folder / f"{name}.jsonl", x)


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    shutil.copytree(golden, folder / "model")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Of each file below the folder, and None of each folder."""
    paths = sorted(folder.rglob("*"))
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None for x in paths}


def run(command: str):
    """A command line in this process."""
    name, *argv = shlex.split(command)
    main = COMMANDS[name].main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *argv])
        main(argv) if name == "finetune" else main()


class Hanging(BaseException):
    """No `except Exception` takes it for an error of its own."""


@pytest.fixture
def time_limit():
    """Ends what hangs, after a minute."""

    def end(*_):
        raise Hanging

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Trained(BaseException):
    """Training began."""


def train(*_, **__):
    raise Trained


def said_by(call, capsys) -> str:
    """The message of what is refused, by a ValueError or by argparse, which prints and exits."""
    try:
        with pytest.raises((ValueError, SystemExit)) as refused:
            call()
    finally:
        printed = capsys.readouterr().err
    return printed if refused.type is SystemExit else str(refused.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        pytest.param(call, said, id=f"{area}: {mistake}")
        for area, rows in AREAS.items()
        for mistake, call, *said in rows
    ],
)
@pytest.mark.usefixtures("time_limit")
def test_it_is_refused_by_name_and_nothing_is_left_behind(
    call, said, request, tmp_path, monkeypatch, capsys
):
    if "[model: " in request.node.name:
        message = said_by(call, capsys)
    else:
        # To make one takes longer than most of what is refused.
        hub = request.getfixturevalue("hub") if "[publishing: " in request.node.name else None
        folder = shutil.copytree(request.getfixturevalue("files"), tmp_path / "files")
        before = contents(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(transformers.Trainer, "train", train)
        message = said_by((lambda: run(call)) if isinstance(call, str) else call, capsys)
        assert contents(folder) == before and not (hub and hub.calls)
    for words in said:
        assert words in message, message
