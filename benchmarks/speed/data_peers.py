# SPDX-License-Identifier: Apache-2.0
"""How fast do others' tools make and deliver the same rows, on one core?

Runs a file of theirs as it is, which you fetch: transformers' examples/pytorch/language-modeling/
run_mlm.py, or mosaicml/examples' examples/benchmarks/bert/src/text_data.py of pull request 440
(that of the main branch needs an older mosaicml-streaming). Measured as in data.py: non-padding
tokens by seconds of CPU time, medians in a warm process. "prepare" is tokenizing; "deliver" is
reading rows, masking and padding them, in batches of 64 without workers. Rows are compared with
the tokenizer's first.

    python benchmarks/speed/data_peers.py --run_mlm run_mlm.py \\
        --train_file wiki.valid.txt --tokenizer vocab.txt
    peer/bin/python benchmarks/speed/data_peers.py --mosaic text_data.py \\
        --train_file wiki.valid.txt --tokenizer vocab.txt

run_mlm.py needs `pip install evaluate`, MosaicML's file an environment of its own: `pip install
mosaicml-streaming==0.13.0 transformers==4.57.6 datasets==4.4.1 omegaconf accelerate`.
Output: a line of JSON, appended to --output too.
"""

import argparse
import hashlib
import os
import runpy
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if __name__ == "__main__":
    # Before the tokenizer and torch are loaded: one core, and no GPU.
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import datasets
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.records import RESULTS, recorder
from mosaic_tools.corpus import load_files
from mosaic_tools.tokenization import existing_tokenizer

BATCH, MASKED = 64, 0.3
# A small model, since it is made, though not trained.
RUN_MLM = f"""
    --model_type bert --config_overrides hidden_size=32,num_hidden_layers=1,num_attention_heads=2
    --use_cpu --report_to none --log_level error --overwrite_cache
    --mlm_probability {MASKED} --per_device_train_batch_size {BATCH}
"""


def delivered(loader, repeats: int) -> list[float]:
    """Tokens a second of CPU time, of all threads, that a loader delivers."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        masks = [batch["attention_mask"] for batch in loader]
        seconds = time.process_time() - began
        rates.append(sum(int(mask.sum()) for mask in masks) / seconds)
    return rates


def check(rows: list[list[int]], tokenizer, texts: list[str], seqlen: int):
    """ValueError unless rows are the texts, cut at `seqlen`."""
    expected = tokenizer(texts, truncation=True, max_length=seqlen)["input_ids"]
    if not expected or rows != expected:
        raise ValueError(f"the peer's {len(rows)} rows are not the {len(expected)} texts' ids")


def run_once(args, words: list[str]) -> tuple[list[list[int]], list[float], list[float]]:
    """Rows that run_mlm.py makes, seconds that this takes, and rates of its Trainer's loader.

    Each of its calls of `map` is made `repeats` times. It does not train; of its last call, which
    is to write a model card, we take the Trainer.
    """
    seconds, made, rates, original = [0.0] * args.repeats, [], [], datasets.DatasetDict.map

    def timed_map(documents, *arguments, **options):
        for i in range(args.repeats):
            began = time.process_time()
            rows = original(documents, *arguments, **options)
            seconds[i] += time.process_time() - began
        made.append(rows)
        return rows

    def deliver(trainer, **facts):
        trainer.train_dataset = made[-1]["train"]
        rates.extend(delivered(trainer.get_train_dataloader(), args.repeats))

    with (
        mock.patch.object(datasets.DatasetDict, "map", timed_map),
        mock.patch.object(transformers.Trainer, "create_model_card", deliver),
        mock.patch.object(sys, "argv", [args.run_mlm, *words]),
    ):
        runpy.run_path(args.run_mlm, run_name="__main__")
    # The first documents are held out.
    rows = [ids for part in ("validation", "train") for ids in made[-1][part]["input_ids"]]
    return rows, seconds, rates


def run_mlm(args, tokenizer, texts: list[str], folder: str) -> dict[str, list[float]]:
    """Rates of tokenizing with `datasets.map`, in this process, and of the Trainer's loader."""
    rates = {}
    for seqlen, kind in ((128, "cut"), (512, "cut"), (512, "concatenated")):
        words = ["--train_file", args.train_file, "--tokenizer_name", folder, *shlex.split(RUN_MLM)]
        words += ["--cache_dir", f"{folder}/cache", "--output_dir", f"{folder}/model"]
        words += ["--max_seq_length", str(seqlen), *["--line_by_line"] * (kind == "cut")]
        rows, seconds, loaded = run_once(args, words)
        if kind == "cut":
            check(rows, tokenizer, texts, seqlen)
        elif {len(ids) for ids in rows} != {seqlen}:
            raise ValueError(f"rows of other lengths than {seqlen}")
        tokens = sum(map(len, rows))
        rates[f"prepare, {kind} at {seqlen}"] = [tokens / spent for spent in seconds]
        rates[f"deliver, {kind} at {seqlen}"] = loaded
    return rates


def mosaic(args, tokenizer, texts: list[str], folder: str) -> dict[str, list[float]]:
    """Rates of a loader that tokenizes texts of shards, and pads every row to `seqlen`.

    Adapted around the file: torchvision, which mosaicml-streaming imports for images, is a stub,
    since its wheels work with some builds of torch only; and `_pad_token`, of which the file asks
    whether it is None, is set, since transformers 4.57 no longer has it.
    """
    sys.modules["torchvision.datasets"] = SimpleNamespace(VisionDataset=object)
    sys.modules["torchvision.transforms.functional"] = SimpleNamespace(to_tensor=None)
    text_data = SimpleNamespace(**runpy.run_path(args.mosaic))
    from omegaconf import OmegaConf
    from streaming import MDSWriter

    with MDSWriter(columns={"text": "str"}, out=f"{folder}/shards/train") as writer:
        for text in texts:
            writer.write({"text": text})
    rates = {}
    for seqlen in (128, 512):
        kind = {"name": folder, "kwargs": {"model_max_length": seqlen}}
        theirs = text_data.build_tokenizer(OmegaConf.create(kind))
        theirs._pad_token = theirs.pad_token
        rows = {"local": f"{folder}/shards", "split": "train", "shuffle": True}
        rows |= {"max_seq_len": seqlen, "mlm_probability": MASKED}
        options = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
        options |= {"name": "text", "dataset": rows, "drop_last": False, "pin_memory": False}
        loader = text_data.build_text_dataloader(OmegaConf.create(options), theirs, BATCH)
        padded = [loader.dataset[i] for i in range(len(texts))]
        rows = [row["input_ids"][: sum(row["attention_mask"])] for row in padded]
        check(rows, tokenizer, texts, seqlen)
        rates[f"prepare and deliver, cut at {seqlen}"] = delivered(loader, args.repeats)
    return rates


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--run_mlm", metavar="FILE", help="run_mlm.py")
    peer.add_argument("--mosaic", metavar="FILE", help="text_data.py of pull request 440")
    parser.add_argument("--train_file", required=True, help="a document a line, named *.txt")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default=RESULTS / "data_peers.jsonl")
    args = parser.parse_args()

    record = recorder(args.output, "tokenizers", "datasets", "mosaicml-streaming")
    measure, file, peer = mosaic, args.mosaic, "MosaicML's text_data.py, pull request 440"
    if args.run_mlm:
        measure, file, peer = run_mlm, args.run_mlm, "transformers' run_mlm.py"
    datasets.disable_progress_bars()
    tokenizer = existing_tokenizer(args.tokenizer, None)
    texts = [text for text in load_files([args.train_file], False)["text"] if text.strip()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        rates = measure(args, tokenizer, texts, folder)
    facts = {"peer": peer, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    facts |= {"documents": len(texts), "tokenizer_entries": len(tokenizer)}
    medians = {name: round(statistics.median(x) / 1e6, 3) for name, x in rates.items()}
    record(facts | {"repeats": args.repeats} | medians)


if __name__ == "__main__":
    main()
