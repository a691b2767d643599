# SPDX-License-Identifier: Apache-2.0
"""How far from float32 is a model in half precision, by its size and the length of its rows?

Method: a model computes the same rows in float32 and in each half precision. Compared are

    hidden      the error of the last hidden states, its norm over theirs
    embedding   1 - cosine of a row's mean over its tokens, averaged over the rows
    guesses     share of masked tokens whose likeliest word is another one
    KL          of the distributions at masked tokens, float32's from the other's, in nats

"bf16" and "fp16" are weights of that dtype. "autocast" has weights in float32 and computes in bf16,
and LayerNorm in bf16 as well, where `low_precision_layernorm` is on, or in float32. "largest" is
the largest number that enters or leaves a linear layer in float32; fp16 ends at 65,504. Rows are
full, as many as have 2,048 tokens together, at least one; 30 % of the tokens are masked. BERT,
which has 512 positions, shows what any encoder loses. Random weights are as before training, when
all words are nearly as likely and guesses change easily.

    python benchmarks/half_precision.py                        # random weights, 12 and 24 layers
    python benchmarks/half_precision.py --models mosaic-large --lengths 8192 --settings bf16
    python benchmarks/half_precision.py --folder runs/demo     # trained; its text is the demo's
    python benchmarks/half_precision.py --toy                  # proves the script, on a CPU

Output: one JSON line per model, length and setting, appended to --output too, then a table.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForMaskedLM, AutoTokenizer

from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import DEVICE, TOY, record_file
from benchmarks.speed.encoders import CLS, FIRST_WORD, MASK, SEP, VOCAB, Setting, configure
from mosaic_tools.embedded_text import embedded_passages

LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
MODELS = {
    "mosaic-base": ("mosaic", {}),
    "mosaic-large": ("mosaic", LARGE),
    "bert-base": ("bert", {}),
    "bert-large": ("bert", LARGE),
}
# Dtype of the weights, and whether LayerNorm takes autocast's, None being without autocast.
SETTINGS = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast-bf16-norm": (torch.float32, True),
    "autocast-fp32-norm": (torch.float32, False),
}
TOKENS, LENGTHS = (64, [16, 128]) if TOY else (2048, [128, 512, 2048, 8192])
COLUMNS = {
    "model": "", "seqlen": ",", "setting": "", "hidden": ".2e", "embedding": ".1e",
    "guesses": ".2%", "KL": ".1e", "largest": ",.0f",
}  # fmt: skip


def random_model(name: str):
    """A model of random weights, drawn as before training."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(
        configure(Setting(kind, "sdpa"), **sizes), trust_remote_code=True
    )


def random_words(count: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(count,) ids, and the ids of [CLS], [SEP] and [MASK]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator), (CLS, SEP, MASK)


def words_of_text(folder: str, count: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """The same of text that the demo's model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = " ".join(embedded_passages()[1])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    # Over again, where a row is longer than all of it.
    return ids.repeat(-(-count // len(ids)))[:count], special


def make_rows(words, special, seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and whether they are masked, (batch, seqlen) both: words between [CLS] and [SEP]."""
    cls, sep, mask = special
    rows = words.view(-1, seqlen - 2)
    chosen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    ids = nn.functional.pad(rows.masked_fill(chosen, mask), (1, 1), value=cls)
    ids[:, -1] = sep
    return ids, nn.functional.pad(chosen, (1, 1))


@torch.no_grad()
def outputs(model, ids, masked, autocast: bool = False):
    """Last hidden states (batch, seqlen, dim), and logits at masked tokens (n, vocab)."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.base_model(ids).last_hidden_state
        return hidden, model.cls(hidden[masked])


def in_setting(model, name: str):
    """A copy of a float32 model; None if it has no such setting."""
    dtype, low_precision = SETTINGS[name]
    model = copy.deepcopy(model).to(dtype)
    norms = [x for x in model.modules() if hasattr(x, "low_precision")]
    if low_precision and not norms:
        return None
    for norm in norms:
        norm.low_precision = bool(low_precision)
    return model


def drift(found, expected) -> dict[str, float]:
    """The figures of `outputs`, of two of them."""
    hidden, right = (x[0].double() for x in (found, expected))
    cosine = cosine_similarity(hidden.mean(1), right.mean(1), dim=1).mean()
    others, nats = 0, 0.0
    # A few rows at a time: in float64 they are large.
    for a, b in zip(found[1].split(256), expected[1].split(256), strict=True):
        others += (a.argmax(1) != b.argmax(1)).sum().item()
        a, b = a.double().log_softmax(1), b.double().log_softmax(1)
        nats += (b.exp() * (b - a)).sum().item()
    count = len(expected[1])
    return {
        "hidden": ((hidden - right).norm() / right.norm()).item(),
        "embedding": 1 - cosine.item(),
        "guesses": others / count,
        "KL": nats / count,
    }


class Largest:
    """The largest absolute number that enters or leaves a linear layer of the model."""

    def __init__(self, model):
        self.seen = 0.0
        layers = [x for x in model.modules() if isinstance(x, nn.Linear)]
        self.hooks = [x.register_forward_hook(self.look) for x in layers]

    def look(self, layer, inputs, output):
        self.seen = max(self.seen, *(x.abs().max().item() for x in (*inputs, output)))

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def measure(name: str, model, words_of, lengths, settings, record) -> list[dict]:
    """A row for each length that the model can read, and each of the settings that it has."""
    model, found = model.to(DEVICE).eval(), []
    longest = model.config.max_position_embeddings if model.config.model_type == "bert" else None
    for seqlen in lengths:
        if longest and seqlen > longest:
            continue
        words, special = words_of(max(1, TOKENS // seqlen) * (seqlen - 2))
        rows = [x.to(DEVICE) for x in make_rows(words, special, seqlen)]
        largest = Largest(model)
        expected = outputs(model, *rows)
        largest.remove()
        for setting in settings:
            if candidate := in_setting(model, setting):
                autocast = SETTINGS[setting][1] is not None
                figures = drift(outputs(candidate, *rows, autocast), expected)
                row = {"model": name, "seqlen": seqlen, "setting": setting, "rows": len(rows[0])}
                found.append(row | figures | {"largest": largest.seen})
                record(found[-1])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--folder", help="a trained model with its tokenizer, in place of --models")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", default=record_file("half_precision"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    record, found = recorder(args.output), []
    if args.folder:
        model = AutoModelForMaskedLM.from_pretrained(
            args.folder, trust_remote_code=True, dtype=torch.float32
        )
        models = {Path(args.folder).name: lambda: model}
        words_of = functools.partial(words_of_text, args.folder)
    else:
        models = {name: lambda name=name: random_model(name) for name in args.models}
        words_of = random_words
    for name, build in models.items():
        found += measure(name, build(), words_of, args.lengths, args.settings, record)
    print_table(found, COLUMNS)


if __name__ == "__main__":
    main()
