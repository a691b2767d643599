# SPDX-License-Identifier: Apache-2.0
"""How long does a long text take on a CPU, beside BERT and ModernBERT? (memory.py has its memory.)

Method: encoders.py builds each base model with random weights and checks it. One full row of each
length is embedded; settings are timed in turn, and the least of --rounds counts, from 4,096 tokens
on of two, without a call before them. "mosaic" leaves out what lies beyond ALiBi's reach,
"mosaic-all-keys" nothing. How far heads reach depends on the weights: random ones are made larger
until no score can exceed --scores, 10 by default, as in the small models that were trained here.
BERT reads 512 tokens at most; its learned positions are used over and over, so that it can be
timed.

    python benchmarks/speed/long_inputs.py                        # some 8 minutes on two cores
    python benchmarks/speed/long_inputs.py --scores 20 --settings mosaic mosaic-all-keys
    python benchmarks/speed/long_inputs.py --settings mosaic --lengths 32768 --rounds 1
    python benchmarks/speed/long_inputs.py --toy                  # proves the script

Output: one JSON line per setting and length, appended to --output too, a table, and with the
records of all runs the figure long_inputs.png.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
from matplotlib.figure import Figure

from benchmarks.plot import finish, newest
from benchmarks.records import RESULTS, print_table, recorder
from benchmarks.speed.clocks import TOY, first_call, record_file, samples
from benchmarks.speed.encoders import SETTINGS, Encoder, Setting, make_rows

ALL_KEYS = "mosaic-all-keys"
SETTINGS["mosaic"] = SETTINGS[ALL_KEYS] = Setting("mosaic", "sdpa", packed=True)
COLUMNS = {"seqlen": ",", "setting": "", "ms": ",.0f", "ratio": ".2f"}
LABELS = {
    "mosaic": "MosaicBERT, keys within reach", ALL_KEYS: "MosaicBERT, all keys",
    "bert": "BERT, beyond its 512 positions", "modernbert": "ModernBERT",
}  # fmt: skip


class LongEncoder(Encoder):
    """An encoder of one long row. `scores`: the most that ours can be, see `sharpen`."""

    def __init__(self, name, dtype, scores):
        super().__init__(name, dtype, "embeddings")
        self.layers = sys.modules[type(self.model).__module__]
        self.long = math.inf if name == ALL_KEYS else 16 if TOY else self.layers.LONG
        if self.setting.model == "mosaic":
            self.sharpen(scores)

    def sharpen(self, scores):
        """Queries and keys become larger, until the mean of the heads' bounds of scores, as
        `alibi_reach` takes them, is `scores` in each layer."""
        rows = make_rows([40 if TOY else 1024])

        def scale(module, inputs, output):
            query, key, _ = output.unflatten(-1, (3, heads, -1)).unbind(1)
            key = key - key.mean(0)
            bound = query.norm(dim=-1).amax(0) * key.norm(dim=-1).amax(0) * key.shape[-1] ** -0.5
            factor = math.sqrt(scores / bound.mean().item())
            rows = 2 * module.in_features
            module.weight.data[:rows] *= factor
            module.bias.data[:rows] *= factor

        heads = self.model.config.num_attention_heads
        for layer in self.model.base_model.encoder.layer:
            hook = layer.attention.self.Wqkv.register_forward_hook(scale)
            with torch.no_grad():
                self.model.base_model(rows.ids)
            hook.remove()

    def function(self, rows):
        embed = super().function(rows)

        def infer():
            if self.setting.model == "mosaic":
                self.layers.LONG = self.long
            return embed()

        return infer


def measure(encoders, lengths, rounds, facts):
    """A row for each length and setting, with the least time; ratio is that over ours."""
    for seqlen in lengths:
        rows = make_rows([seqlen])
        functions = {name: encoder.function(rows) for name, encoder in encoders.items()}
        few = rounds if seqlen < 4096 else min(rounds, 2)
        if few > 2:
            for function in functions.values():
                first_call(function)
        times = {name: min(x) for name, x in samples(functions, few).items()}
        for name, ms in times.items():
            row = facts | {"setting": name, "seqlen": seqlen, "rounds": few, "ms": ms}
            yield row | ({"ratio": ms / times["mosaic"]} if "mosaic" in times else {})


def draw(folder):
    """long_inputs.png: seconds against the length, of the newest record of each case."""
    records = newest(folder, "long_inputs", "ms", "scores", "setting", "seqlen")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (setting, label) in enumerate(LABELS.items()):
        found = sorted(
            (seqlen, record["ms"] / 1e3)
            for (scores, name, seqlen, _), record in records.items()
            if name == setting and scores == 10
        )
        if found:
            axes.loglog(*zip(*found, strict=True), marker=".", label=label, color=f"C{i}")
    ticks = sorted({seqlen for _, _, seqlen, _ in records})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize="small")
    axes.minorticks_off()
    axes.set_xlabel("tokens in the row")
    axes.set_ylabel("seconds")
    finish(figure, Path(folder) / "long_inputs.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = ["mosaic", ALL_KEYS, "bert", "modernbert"]
    lengths = [32, 64] if TOY else [512, 1024, 2048, 4096, 8192]
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths)
    parser.add_argument("--scores", type=float, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=record_file("long_inputs"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record, dtype = recorder(args.output), getattr(torch, args.dtype)
    facts = {"dtype": args.dtype, "scores": args.scores, "threads": args.threads}
    encoders = {name: LongEncoder(name, dtype, args.scores) for name in args.settings}
    found = []
    for row in measure(encoders, args.lengths, args.rounds, facts):
        found.append(row)
        record(row)
    print_table(found, COLUMNS)
    if not TOY:
        draw(RESULTS)


if __name__ == "__main__":
    main()
