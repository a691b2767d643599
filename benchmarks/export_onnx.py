# SPDX-License-Identifier: Apache-2.0
"""How long does ONNX Runtime take for the exported encoder, beside our own CPU path?

Method: MosaicBERT-Base (encoder, no pooler, random weights, float32) is exported once with dynamic
batch and length; for each batch, outputs are compared first, then both run in turn and the medians
stand side by side. An exported graph keeps padding, ours leaves it out.

    python benchmarks/export_onnx.py [--threads 1] [--rounds 15] [--layers 12]

Prints a line for each batch, appended to results/export_onnx.jsonl too: milliseconds of both, with
20 and 80 % quantiles, and ours / ONNX Runtime's.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from records import RESULTS, ROOT, environment
from transformers import AutoConfig, AutoModel

# (name, seqlen, tokens of each of 8 rows)
BATCHES = [
    ("full", 128, [128] * 8),
    ("half padding", 128, [128, 112, 80, 64, 48, 32, 32, 16]),
    ("half padding, long", 512, [512, 448, 320, 256, 192, 128, 128, 64]),
]


def make_inputs(seqlen: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Padded on the right, each (batch, seqlen)."""
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 30_000, mask.shape) * mask, "attention_mask": mask}


def export(model, file: Path):
    """Writes the model as ONNX, for any batch and length."""
    example = make_inputs(12, [12, 5])
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    shapes = {name: sizes for name in example}
    program = torch.export.export(model, (), kwargs=example, dynamic_shapes=shapes)
    torch.onnx.export(program, f=file, dynamo=True, input_names=list(example), verbose=False)


def quantiles(seconds: list[float]) -> list[float]:
    """Median, 20 and 80 %, in milliseconds."""
    points = torch.tensor(seconds).quantile(torch.tensor([0.5, 0.2, 0.8]))
    return [round(1e3 * x, 1) for x in points.tolist()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, num_hidden_layers=args.layers)
    model = AutoModel.from_config(config, trust_remote_code=True, add_pooling_layer=False).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder, "model.onnx"))
        session = onnxruntime.InferenceSession(
            Path(folder, "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    facts = environment("onnxruntime") | {
        "device": f"{platform.machine()} CPU, {args.threads} thread(s)",
        "layers": args.layers,
        "rounds": args.rounds,
    }
    for name, seqlen, lengths in BATCHES:
        inputs = make_inputs(seqlen, lengths)
        arrays = {key: x.numpy() for key, x in inputs.items()}
        runs = {
            "ours_ms": lambda inputs=inputs: model(**inputs).last_hidden_state,
            "onnxruntime_ms": lambda arrays=arrays: torch.from_numpy(session.run(None, arrays)[0]),
        }
        times = {key: [] for key in runs}
        with torch.no_grad():
            ours, theirs = (run() for run in runs.values())
            # Rounding of float32, 2^10 eps of the largest value, as in the tests.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ours.abs().max().item() / 2**13)
            for _ in range(args.rounds):
                for key, run in runs.items():
                    began = time.perf_counter()
                    run()
                    times[key].append(time.perf_counter() - began)
        medians = {key: quantiles(x) for key, x in times.items()}
        ratio = round(medians["ours_ms"][0] / medians["onnxruntime_ms"][0], 2)
        row = {"batch": name, "shape": [8, seqlen], "tokens": sum(lengths), **medians}
        line = json.dumps(row | {"ours/onnxruntime": ratio} | facts)
        print(line)
        with open(RESULTS / "export_onnx.jsonl", "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
