# SPDX-License-Identifier: Apache-2.0
"""Can the data keep a GPU busy? What making rows takes, and what a loader's worker delivers.

Of documents cut at 128, cut at 512 and packed at 512, in one process:

    whole     the tokenizer called with whole documents and told to cut them, as scripts do
    prepare   shards, as prepare_data.py makes them
    stream    rows of a stream, shuffled
    prepared  rows of shards, masked and unpadded, as a loader's worker does for train_mlm.py
    streamed  those of a stream, likewise

Rates are non-padding tokens by seconds of CPU time on one core, so that other processes matter
less; medians of five. Then a consumer takes batches from one worker at a fixed pace, by sleeping,
as a GPU does that is so fast: which share of the time does it wait? That is wall-clock time.

    python benchmarks/speed/data.py --train_file wiki.txt --tokenizer vocab.txt

Output: one JSON line per row length and pace, appended to benchmarks/results/data.jsonl, then two
tables.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Before the tokenizer and torch are loaded: one core.
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.records import RESULTS, print_table, recorder
from mosaic_tools.corpus import load_files
from mosaic_tools.encoding import Encoder, encode, features
from mosaic_tools.masking import MaskingCollator
from mosaic_tools.prepared import read_part, write_shard
from mosaic_tools.preparing import Maker
from mosaic_tools.recipe import DataArguments
from mosaic_tools.shuffling import EndlessStream
from mosaic_tools.tokenization import existing_tokenizer

WAYS = ("whole", "prepare", "stream", "prepared", "streamed")
SETTINGS = [(128, False), (512, False), (512, True)]
# Of a stream, in rows: full long before the documents end, which they do sooner than elsewhere.
BUFFER = 500
# Million tokens a second.
PACES = (0.25, 0.5, 1, 2, 4)


def median_rate(function, repeats: int) -> float:
    """Million tokens a second of CPU time; `function` returns how many tokens it made."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        tokens = function()
        rates.append(tokens / (time.process_time() - began) / 1e6)
    return round(statistics.median(rates), 3)


class Ways:
    """The ways of making rows, each a function that returns the tokens it made.

    Args:
        documents: with a column "text".
        folder: for a shard.
    """

    def __init__(self, documents, tokenizer, args: DataArguments, folder: Path):
        self.documents, self.tokenizer, self.args = documents, tokenizer, args
        self.file = folder / "train-00000-of-00001.arrow"
        schema = features(tokenizer, args).arrow_schema
        self.make = Maker(documents, Encoder(tokenizer, args), "text", schema, [], {})
        self.collate = MaskingCollator(tokenizer, 0.3, seed=0, unpads=True)

    def whole(self) -> int:
        tokens = 0
        for batch in self.documents.iter(1000):
            rows = self.tokenizer(
                batch["text"],
                truncation=True,
                max_length=self.args.max_seq_length,
                return_overflowing_tokens=self.args.pack,
            )["input_ids"]
            tokens += sum(map(len, rows))
        return tokens

    def prepare(self) -> int:
        made = []
        tables = self.make.tables(self.documents, lambda documents, tokens: made.append(tokens))
        write_shard(self.file, {}, self.make.schema, tables)
        return sum(made)

    def prepared_rows(self):
        return read_part([self.file])

    def prepared(self, batch_size: int = 64) -> int:
        rows, tokens = self.prepared_rows(), 0
        for start in range(0, len(rows), batch_size):
            batch = rows.__getitems__(list(range(start, min(start + batch_size, len(rows)))))
            tokens += tokens_of(self.collate(batch))
        return tokens

    def streamed_rows(self):
        rows = encode(self.documents.to_iterable_dataset(), self.args, self.tokenizer)
        return EndlessStream(rows, BUFFER, seed=0)

    def stream(self) -> int:
        return sum(len(row["input_ids"]) for row in self.streamed_rows().one_epoch())

    def streamed(self, batch_size: int = 64) -> int:
        rows, tokens = self.streamed_rows().one_epoch(), 0
        while batch := list(itertools.islice(rows, batch_size)):
            tokens += tokens_of(self.collate(batch))
        return tokens


def tokens_of(batch: dict) -> int:
    return int(batch["batch"]["cu_seqlens"][-1])


def wait_share(rows, collate, pace: float, seconds: float) -> float:
    """Of the time of a consumer of `pace` million tokens a second, the share in which it waits for
    the one worker of a loader. The first batches are left out, for which every run waits."""
    batches = iter(DataLoader(rows, 64, collate_fn=collate, num_workers=1))
    for _ in range(2 * BUFFER // 64):
        next(batches, None)
    began = time.perf_counter()
    waited = 0.0
    while (since := time.perf_counter()) < began + seconds:
        if (batch := next(batches, None)) is None:
            break
        waited += time.perf_counter() - since
        time.sleep(tokens_of(batch) / (pace * 1e6))
    return round(waited / (time.perf_counter() - began), 3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--documents", type=int, default=4000, help="so many of the file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of each consumer; 0: none")
    parser.add_argument("--output", default=RESULTS / "data.jsonl", help="where records go")
    args = parser.parse_args()

    datasets.disable_progress_bars()
    tokenizer = existing_tokenizer(args.tokenizer, None)
    documents = load_files([args.train_file], streaming=False)
    documents = documents.select(range(min(args.documents, len(documents))))
    about = {"documents": len(documents), "tokenizer_entries": len(tokenizer)}
    packages = ("tokenizers", "datasets", "pyarrow")
    record, rates, waits = recorder(args.output, *packages), [], []
    for seqlen, packed in SETTINGS:
        data = DataArguments(max_seq_length=seqlen, pack=packed)
        name = {"rows": f"{'packed' if packed else 'cut'} at {seqlen}"}
        with tempfile.TemporaryDirectory() as folder:
            ways = Ways(documents, tokenizer, data, Path(folder))
            rates.append(name | {x: median_rate(getattr(ways, x), args.repeats) for x in WAYS})
            record(rates[-1] | about)
            for pace in PACES if args.seconds else ():
                row = name | {"consumer": pace}
                for kind in ("prepared", "streamed"):
                    rows = getattr(ways, f"{kind}_rows")()
                    row[f"{kind}_wait_share"] = wait_share(rows, ways.collate, pace, args.seconds)
                waits.append(row)
                record(row | about)
    print_table(rates, {"rows": ""} | dict.fromkeys(WAYS, ".3f"))
    shares = ("prepared_wait_share", "streamed_wait_share")
    print_table(waits, {"rows": "", "consumer": ""} | dict.fromkeys(shares, ".0%"))


if __name__ == "__main__":
    main()
