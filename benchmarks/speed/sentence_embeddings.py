# SPDX-License-Identifier: Apache-2.0
"""How fast are embeddings as users of sentence-transformers see them, and does the memory of their
training stay flat when the batch grows?

Method: build_embedder makes SentenceTransformers with random weights, on a CPU of 4 layers x 512,
on a GPU of base size. Texts are random words, as many tokens as C4's (lengths.py), cut at 512.
Before any clock starts, a model's vectors of texts together must be those of each alone. Models
have the same texts in turn; padding takes time, and does not count as tokens.

- encode: SentenceTransformer.encode of 1,000 texts, tokenization included, in the batches of 32
  that it makes of all of them, by length. They are dealt to eight parts, encoded one by one.
- train: forward twice, backward and fused AdamW of the loss of train_embeddings.py, on 128 pairs,
  32 texts at once, tokenized before. bf16 is by autocast, as Trainer has it.
- memory: what a step of ours allocates at most (clocks.py), the batch growing, texts of 16 tokens:
  32 at once by a model of that size, 128 at once by one of base size.

    python benchmarks/speed/sentence_embeddings.py
    python benchmarks/speed/sentence_embeddings.py --toy  # proves the script, on a CPU

Output: one JSON line per figure, appended to --output too, then a table. "ratio" is the time over
that of the first setting: the median of those of the rounds, with 20 and 80 % quantiles.
"""

import argparse
import ctypes
import itertools
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
from transformers import AutoModel

from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import DEVICE, TOY, peak_bytes, quantiles, record_file, samples
from benchmarks.speed.compare import build, free
from benchmarks.speed.encoders import SETTINGS, TOLERANCE, VOCAB, configure, to_device
from benchmarks.speed.lengths import c4_lengths
from benchmarks.speed.memory import M_MMAP_THRESHOLD, THRESHOLD
from mosaic_tools import embedding_trainer as trainer
from mosaic_tools.devices import native_bf16
from mosaic_tools.pairs import PairArguments
from mosaic_tools.tokenization import SPECIAL_TOKENS

# jina-embeddings-v2-small's; BERT has as many weights in its MLPs without a gate.
SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
INTERMEDIATE = {"mosaic": 2048, "modernbert": 2048, "bert": 3072}
# Texts of a batch, parts of encode, pairs of a step, tokens where texts are cut.
BATCH, PARTS, PAIRS, CUT = (4, 3, 8, 64) if TOY else (32, 8, 128, 512)
# Of the steps whose memory is measured: tokens of a text; by the model's size, texts at once and
# pairs.
SHORT, GROWING = 16, {"small": (BATCH, (256, 1024, 4096)), "base": (128, (256, 4096))}
if TOY:
    SHORT, GROWING = 8, {"small": (BATCH, (8, 16))}
# All of as many letters, by which encode sorts.
WORDS = [f"w{i:05}" for i in range(len(SPECIAL_TOKENS), VOCAB)]
COLUMNS = {
    "task": "", "dtype": "", "setting": "", "size": "", "pairs": ",", "tokens": ",",
    "tokens_per_s": ",.0f", "ratio": ".3f", "p20": ".3f", "p80": ".3f", "peak_bytes": ",",
}  # fmt: skip


def make_texts(lengths, seed=0):
    """Texts of random words, with [CLS] and [SEP] of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(WORDS), (length - 2,), generator=generator) for length in lengths]
    return [" ".join(WORDS[i] for i in draw.tolist()) for draw in draws]


def count_tokens(texts):
    """What a model reads of them."""
    return sum(min(len(text.split()) + 2, CUT) for text in texts)


class Embedder:
    """A SentenceTransformer of a setting, with random weights.

    Args:
        dtype: for the task "step", of training, that of autocast, else of the weights.
        small: whether it is of SMALL's size, else of base size.
        batch: texts that a step takes at once.

    Raises:
        AssertionError: it is wrong, see `check`.
    """

    def __init__(
        self, name, dtype: torch.dtype, task: str, small: bool = DEVICE == "cpu", batch: int = BATCH
    ):
        setting = SETTINGS[name]
        sizes = SMALL | {"intermediate_size": INTERMEDIATE[setting.model]}
        torch.manual_seed(0)
        config = configure(setting, **sizes if small else {})
        with tempfile.TemporaryDirectory() as folder:
            AutoModel.from_config(config, trust_remote_code=True).save_pretrained(folder)
            vocab = Path(folder, "vocab.txt")
            vocab.write_text("\n".join(SPECIAL_TOKENS + WORDS))
            # Not the interpreted kernel in a toy run.
            attention = None if setting.model == "mosaic" else setting.attention
            args = trainer.EmbedderArguments(folder, str(vocab), attn_implementation=attention)
            self.model = trainer.build_embedder(args, PairArguments(max_seq_length=CUT)).to(DEVICE)
        if task == "step":
            # Trainer's way: the second forward pass is within the backward pass.
            autocast = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)
            self.model.forward = autocast(self.model.forward)
            loss = trainer.CachedMultipleNegativesRankingLoss
            self.loss = loss(self.model, mini_batch_size=batch)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        else:
            self.model.to(dtype)
        self.check(TOLERANCE[dtype])
        self.model.train(task == "step")

    def encode(self, texts, batch_size=BATCH):
        options = {"convert_to_tensor": True, "show_progress_bar": False}
        return self.model.encode(texts, batch_size=batch_size, **options)

    def check(self, tolerance):
        """AssertionError unless texts have their tokens, and together the vectors of each alone."""
        texts = make_texts(c4_lengths(BATCH, 2 * CUT, seed=1))
        found, expected = self.model.preprocess(texts)["attention_mask"].sum(), count_tokens(texts)
        if found != expected:
            raise AssertionError(f"{found} tokens, not {expected}")
        together, alone = (self.encode(texts, size).float() for size in (BATCH, 1))
        error = ((together - alone).norm() / alone.norm()).item()
        # Not the opposite, which lets NaN pass.
        if not error <= tolerance:
            raise AssertionError(f"vectors of texts together are off by {error:.2g} of their size")

    def step(self, texts):
        """A function that takes a step on pairs, each of two texts that follow each other."""
        features = [to_device(self.model.preprocess(x)) for x in (texts[::2], texts[1::2])]

        def step():
            self.loss(features, None).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


def in_turn(functions, tokens, seconds=math.inf):
    """A row of figures for each function; or for the reason in its place, why it is skipped.

    Args:
        tokens: of each round; fewer rounds, but at least 3, once `seconds` have passed.
    """
    skipped = {name: x for name, x in functions.items() if isinstance(x, str)}
    yield from ({"setting": name, "skipped": reason} for name, reason in skipped.items())
    functions = {name: x for name, x in functions.items() if name not in skipped}
    times = samples(functions, len(tokens), seconds=seconds)
    for name, ms in times.items():
        first = next(iter(times.values()))
        ratio, low, high = quantiles([x / y for x, y in zip(ms, first, strict=True)])
        row = {"rounds": len(ms), "tokens": sum(tokens[: len(ms)]), "seconds": sum(ms) / 1e3}
        row |= {"tokens_per_s": row["tokens"] / row["seconds"]}
        yield {"setting": name} | row | {"ratio": ratio, "p20": low, "p80": high}


def functions_of(settings, dtype, task, make):
    """dict: name to what `make` makes of the setting's Embedder, or to why there is none."""
    built = build(settings, dtype, task, Embedder)
    return {name: x if isinstance(x, str) else make(x) for name, x in built.items()}


def dealt(texts):
    """Parts of the texts, each with its share of the batches that encode makes of all of them."""
    texts = sorted(texts, key=len, reverse=True)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return [list(itertools.chain(*batches[i::PARTS])) for i in range(PARTS)]


def encode(args, dtype):
    parts = dealt(make_texts(c4_lengths(args.texts, 2**20)))

    def in_parts(embedder):
        turn = itertools.cycle(parts)
        return lambda: embedder.encode(next(turn))

    tokens = list(map(count_tokens, parts))
    yield from in_turn(functions_of(args.settings, dtype, "encode", in_parts), tokens, args.seconds)


def train(args, dtype):
    texts = make_texts(c4_lengths(2 * PAIRS, CUT))
    functions = functions_of(args.trained, dtype, "step", lambda embedder: embedder.step(texts))
    yield from in_turn(functions, [count_tokens(texts)] * args.rounds)


def memory(args, dtype):
    libc = ctypes.CDLL(None)
    if DEVICE == "cpu":
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    for size in args.sizes:
        batch, growing = GROWING[size]
        embedder = Embedder("mosaic", dtype, "step", size == "small", batch)
        # Makes the optimizer's states, and what libraries keep for the shapes.
        embedder.step(make_texts([SHORT] * 2 * batch))()
        for pairs in growing:
            step = embedder.step(make_texts([SHORT] * 2 * pairs))
            if DEVICE == "cpu":
                libc.malloc_trim(0)
            row = {"setting": "mosaic", "size": size, "pairs": pairs, "tokens": 2 * SHORT * pairs}
            yield row | {"peak_bytes": peak_bytes(step)}


TASKS = {x.__name__: x for x in (encode, train, memory)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bf16 = native_bf16(DEVICE == "cpu")[0] and not TOY
    dtypes, settings = ["float32", *["bfloat16"] * bf16], ["mosaic", "bert", "modernbert"]
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=settings, help="of encode"
    )
    parser.add_argument(
        "--trained", nargs="+", choices=SETTINGS, default=settings[:2], help="settings of train"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--dtypes", nargs="+", default=dtypes, help="all for encode, else the last")
    parser.add_argument("--texts", type=int, default=30 if TOY else 1000)
    parser.add_argument("--sizes", nargs="+", choices=GROWING, default=GROWING, help="of memory")
    parser.add_argument("--rounds", type=int, default=3, help="of train")
    parser.add_argument("--seconds", type=float, default=90, help="of encode; 3 parts at least")
    parser.add_argument("--output", default=record_file("sentence_embeddings"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    record, rows = recorder(args.output, "sentence-transformers"), []
    for task in args.tasks:
        for dtype in args.dtypes if task == "encode" else args.dtypes[-1:]:
            facts = {"task": task, "dtype": dtype, "threads": torch.get_num_threads()}
            for row in TASKS[task](args, getattr(torch, dtype)):
                record(facts | row)
                rows.append(facts | row)
            free()
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
