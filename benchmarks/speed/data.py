# SPDX-License-Identifier: Apache-2.0
"""Can the data keep a GPU busy? What preparing takes, and what a loader's worker delivers.

Tokenizes documents as prepare_data.py does, in one process, cut and packed; then reads rows back,
masks and unpads them as a loader's worker does for train_mlm.py. Rates are non-padding tokens by
seconds of CPU time on one core, so that other processes matter less; medians of five.

    python benchmarks/speed/data.py --train_file wiki.valid.txt --tokenizer vocab.txt

Appends to benchmarks/results/data.jsonl; the last line printed is that record.
"""

import argparse
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.records import RESULTS, environment
from mosaic_tools.corpus import load_files
from mosaic_tools.encoding import encode
from mosaic_tools.masking import MaskingCollator
from mosaic_tools.recipe import DataArguments
from mosaic_tools.tokenization import existing_tokenizer


def rate(tokens: int, function) -> float:
    """Million tokens a second of CPU time, the median of five."""
    seconds = []
    for _ in range(5):
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)
    return round(tokens / statistics.median(seconds) / 1e6, 3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()

    # Results of an earlier run would be read from the cache instead of made.
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = existing_tokenizer(args.tokenizer, None)
    documents = load_files([args.train_file], streaming=False)
    record = {**environment(), "documents": len(documents), "tokenizer_entries": len(tokenizer)}
    for seqlen, packed in ((128, False), (512, False), (512, True)):
        data = DataArguments(max_seq_length=seqlen, pack=packed, preprocessing_num_workers=1)
        rows = encode(documents, data, tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            # Read by memory map, as a prepared folder is.
            rows.save_to_disk(folder)
            rows = datasets.load_from_disk(folder)
            tokens = sum(map(len, rows["input_ids"]))
            collate = MaskingCollator(tokenizer, 0.3, seed=0, unpads=True)

            def deliver(rows=rows, collate=collate):
                order = range(len(rows))
                for start in range(0, len(rows), args.batch_size):
                    collate(rows.__getitems__(order[start : start + args.batch_size]))

            name = f"{'packed' if packed else 'cut'} at {seqlen}"
            record[f"prepare, {name}"] = rate(
                tokens, lambda data=data: encode(documents, data, tokenizer)
            )
            record[f"worker, {name}"] = rate(tokens, deliver)
    for name, value in record.items():
        if name.startswith(("prepare", "worker")):
            print(f"{name:<24}{value:>8.3f} M tokens/s")
    with open(RESULTS / "data.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
