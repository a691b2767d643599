# SPDX-License-Identifier: Apache-2.0
"""Which way to run MosaicBERT-Base on a CPU is fastest, and how does each compare with BERT-Base
run the same way?

Method: a setting is a model and a way. Ways are PyTorch as it is ("eager"), compiled ahead of time
("aot"), ONNX Runtime with weights of 32 and of 8 bits ("onnx", "onnx-int8"), OpenVINO, torch's own
dynamic quantization ("torch-int8", or "torch-int8-but-wo": of all layers but mlp.wo), and that of
torchao, compiled ("torchao-int8"). Weights are random, of MosaicBERT-Base, BERT-Base and
ModernBERT-Base, with MosaicBERT's vocabulary. "embeddings" is the mean of a row's last hidden
states, "fill-mask" the logits of all its tokens. What was compiled ahead of time takes no mask:
padded rows are calls of their own there, within the time, rows of one length together. Each setting
is first held against the same weights in PyTorch and float32: of four rows, the cosine of
every embedding, or of every token's logits, may miss 1 by MISS at most. Then they are timed in
turn, and the least time counts.

    python benchmarks/speed/serving.py --files runs/serving  # 20 minutes on two cores
    python benchmarks/speed/serving.py --files runs/serving --tasks fill-mask --threads 2
    python benchmarks/speed/serving.py --settings mosaic-aot bert-aot --rows 1x128 --dtypes float32
    python benchmarks/speed/serving.py --toy  # proves the script

What is compiled or exported stays in --files for the next run; empty it when the model's code has
changed. Packages that only some ways need:
pip install onnx onnxscript onnxruntime openvino torchao.

Output: one JSON line per setting and rows, appended to --output too, then a table. "over_ours" is a
setting's least time over MosaicBERT's run the same way, "over_eager" over MosaicBERT's eager one.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import torch
from transformers import AutoModelForMaskedLM

from benchmarks.int8 import torch_int8, torchao_int8
from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import FAILURES, TOY, Deadline, quantiles, record_file, samples, why
from benchmarks.speed.compare import free
from benchmarks.speed.encoders import Setting, configure, make_rows, mean
from benchmarks.speed.lengths import HALF_PADDING
from mosaic_tools import aot, onnx_export

# How far from 1 the cosine to PyTorch in float32 may be, by dtype, and for weights of 8 bits.
MISS = {"float32": 1e-6, "bfloat16": 1e-3, "int8": 1e-2}
ROWS = {
    "1x16": [16],
    "1x128": [128],
    "1x512": [512],
    "8x128": [128] * 8,
    "8x128 half padded": HALF_PADDING,
}
OUTPUTS = {"embeddings": "last_hidden_state", "fill-mask": "logits"}
COLUMNS = {
    "task": "", "threads": "", "dtype": "", "batch": "", "setting": "", "least_ms": ".1f",
    "ms": ".1f", "over_ours": ".2f", "over_eager": ".2f", "cosine": ".7f",
}  # fmt: skip


def build(name):
    """A masked language model with random weights, in float32."""
    torch.manual_seed(0)
    config = configure(Setting(name, "sdpa"))
    options = {"attn_implementation": "sdpa"} if name != "mosaic" else {}
    return AutoModelForMaskedLM.from_config(config, trust_remote_code=True, **options).eval()


# ---- ways to run a model ----
# (model, output, dtype, file) -> a function of ids and mask, (batch, seqlen) int64 each, the mask
# None for full rows, that gives the output, (batch, seqlen, ...), or, by "aot", (total, ...).
# `model` is in float32 and must stay as it is; what is made from it is kept under `file`'s name.


def plain(model, output):
    def run(ids, mask):
        return getattr(model(input_ids=ids, attention_mask=mask), output)

    return run


def eager(model, output, dtype, file):
    return plain(copy.deepcopy(model).to(dtype), output)


def ahead_of_time(model, output, dtype, file):
    folder = file.with_name(f"{file.name}-{str(dtype).removeprefix('torch.')}")
    if not (folder / aot.FILE).exists():
        folder.mkdir(exist_ok=True)
        aot.save_aot(copy.deepcopy(model).to(dtype), output, folder, longest(model))
    compiled = aot.load(folder / aot.FILE)

    def run(ids, mask):
        if mask is None:
            return compiled(ids)
        lengths = mask.sum(1).tolist()
        return torch.cat(
            [compiled(ids[rows, :length]).flatten(0, 1) for length, rows in runs(lengths)]
        )

    return run


def runs(lengths):
    """(length, slice of rows) of each run of rows of equal length."""
    start = 0
    for length, run in itertools.groupby(lengths):
        end = start + len(list(run))
        yield length, slice(start, end)
        start = end


def longest(model):
    """The longest row that the model takes, or None. ALiBi has no longest."""
    config = model.config
    return config.max_position_embeddings if config.model_type == "bert" else None


def onnx_file(model, output, file):
    target = file.with_suffix(".onnx")
    if not target.exists():
        with warnings.catch_warnings(action="ignore"):
            onnx_export.export(model, output, target)
    return target


def onnx(model, output, dtype, file):
    return onnx_runtime(onnx_file(model, output, file))


def onnx_int8(model, output, dtype, file):
    target = file.with_suffix(".int8.onnx")
    if not target.exists():
        onnx_export.quantize(onnx_file(model, output, file), target)
    return onnx_runtime(target)


def onnx_inputs(ids, mask):
    mask = torch.ones_like(ids) if mask is None else mask
    return {
        "input_ids": ids.numpy(),
        "attention_mask": mask.numpy(),
        "token_type_ids": torch.zeros_like(ids).numpy(),
    }


def onnx_runtime(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads go on looking for work while the next setting is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {x.name for x in session.get_inputs()}

    def run(ids, mask):
        inputs = onnx_inputs(ids, mask)
        return torch.from_numpy(session.run(None, {x: inputs[x] for x in names})[0])

    return run


def openvino(model, output, dtype, file):
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    core = openvino.Core()
    compiled = core.compile_model(str(onnx_file(model, output, file)), "CPU", hints)
    names = {x.any_name for x in compiled.inputs}

    def run(ids, mask):
        inputs = onnx_inputs(ids, mask)
        return torch.from_numpy(compiled({x: inputs[x] for x in names})[0])

    return run


def by_torch(model, output, dtype, file, skip="none"):
    return plain(torch_int8(model, skip), output)


def by_torchao(model, output, dtype, file):
    return plain(torch.compile(torchao_int8(model), dynamic=True), output)


# By name: the function, what it needs beside torch, and its dtypes.
FLOAT32, BOTH = ("float32",), ("float32", "bfloat16")
WAYS = {
    "eager": (eager, (), BOTH),
    "aot": (ahead_of_time, (), BOTH),
    "onnx": (onnx, ("onnxscript", "onnxruntime"), FLOAT32),
    "onnx-int8": (onnx_int8, ("onnxscript", "onnxruntime"), FLOAT32),
    "openvino": (openvino, ("onnxscript", "openvino"), BOTH),
    "torch-int8": (by_torch, (), FLOAT32),
    "torch-int8-but-wo": (functools.partial(by_torch, skip="mlp.wo"), (), FLOAT32),
    "torchao-int8": (by_torchao, ("torchao",), FLOAT32),
}
SETTINGS = [f"{model}-{way}" for model in ("mosaic", "bert") for way in WAYS] + ["modernbert-eager"]
# BERT has no such layer.
SETTINGS.remove("bert-torch-int8-but-wo")


# ---- correctness and time ----


def for_task(run, task):
    """A function of rows: embeddings (batch, dim), or logits, (batch, seqlen, vocab) or (total,
    vocab)."""

    @torch.inference_mode()
    def infer(rows):
        mask = None if rows.mask.all() else rows.mask
        found = run(rows.ids, mask)
        if task == "fill-mask":
            return found
        if found.dim() == 3:
            return mean(found, mask)
        return torch.stack([x.mean(0) for x in found.split(rows.lengths)])

    return infer


def least_cosine(found, expected, rows):
    """Of all embeddings, or of all real tokens' logits."""
    found, expected = (x[rows.mask.bool()] if x.dim() == 3 else x for x in (found, expected))
    if found.shape != expected.shape:
        raise AssertionError(f"results of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    return torch.cosine_similarity(found.double(), expected.double(), dim=-1).min().item()


def make(model, name, task, dtype, files):
    """The function of a setting, and its cosine. AssertionError: it is too far from 1."""
    way = way_of(name)
    function, packages, _ = WAYS[way]
    if missing := [x for x in packages if importlib.util.find_spec(x) is None]:
        raise ImportError(f"{', '.join(missing)} not installed")
    output = OUTPUTS[task]
    source = model if task == "fill-mask" else model.base_model
    file = files / f"{name.split('-')[0]}-{task}"
    infer = for_task(function(source, output, getattr(torch, dtype), file), task)
    # Two of them are one call, ahead of time.
    rows = make_rows([30, 17, 17, 3])
    cosine = least_cosine(infer(rows), for_task(plain(source, output), task)(rows), rows)
    allowed = MISS["int8" if "int8" in way else dtype]
    # Not the opposite, which lets NaN pass.
    if not 1 - cosine <= allowed:
        raise AssertionError(f"the least cosine is {cosine:.7f}, of {allowed:g} off 1 allowed")
    return infer, cosine


def make_all(settings, task, dtype, files, deadline):
    """dict: setting to what `make` gives, or to why there is none."""
    made, models = {}, {}
    for setting in settings:
        name = setting.split("-")[0]
        if name not in models:
            # One at a time, and not the weights of all.
            models = {name: build(name)}
        try:
            made[setting] = deadline.reason() or make(models[name], setting, task, dtype, files)
        except FAILURES as err:
            made[setting] = why(err)
    return made


def measure(made, rows, rounds, seconds, deadline):
    """Figures of each of `make_all`'s settings on these rows; "skipped" says why there are none."""
    functions, figures = {}, {}
    for setting, found in made.items():
        if reason := found if isinstance(found, str) else deadline.reason():
            figures[setting] = {"skipped": reason}
            continue
        infer, cosine = found
        try:
            # What compiles for these rows does it now.
            infer(rows), infer(rows)
        except FAILURES as err:
            figures[setting] = {"skipped": why(err)}
            continue
        functions[setting], figures[setting] = functools.partial(infer, rows), {"cosine": cosine}
    times = samples(functions, rounds, seconds=seconds)
    least = {setting: min(x) for setting, x in times.items()}
    for setting, row in figures.items():
        if setting in times:
            ms, low, high = quantiles(times[setting])
            row |= {"least_ms": least[setting], "ms": ms, "p20": low, "p80": high}
            row |= {"rounds": len(times[setting])}
            ours = {"over_ours": "mosaic-" + way_of(setting), "over_eager": "mosaic-eager"}
            row |= {key: least[setting] / least[x] for key, x in ours.items() if x in least}
    return figures


def way_of(setting):
    return setting.partition("-")[2]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--tasks", nargs="+", choices=OUTPUTS, default=["embeddings"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=BOTH, default=list(BOTH))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=30, help="of rows; 3 rounds at least")
    parser.add_argument("--minutes", type=float, default=20, help="then nothing more is timed")
    parser.add_argument("--files", type=Path, help="what is compiled and exported; else temporary")
    parser.add_argument("--output", default=record_file("serving"))
    parser.add_argument("--toy", action="store_true")
    if TOY:
        parser.set_defaults(threads=[1], rounds=2)
    args = parser.parse_args()
    batches = {name: ROWS[name] for name in args.rows}
    if TOY:
        batches = {name: [max(x // 8, 2) for x in lengths] for name, lengths in batches.items()}
    record = recorder(args.output, "onnxruntime", "openvino", "torchao")
    deadline, found = Deadline(args.minutes), []
    with tempfile.TemporaryDirectory() as temporary:
        files = args.files or Path(temporary)
        files.mkdir(parents=True, exist_ok=True)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for dtype, task in itertools.product(args.dtypes, args.tasks):
                settings = [x for x in args.settings if dtype in WAYS[way_of(x)][2]]
                made = make_all(settings, task, dtype, files, deadline)
                for batch, lengths in batches.items():
                    facts = {"task": task, "dtype": dtype, "threads": threads, "batch": batch}
                    figures = measure(made, make_rows(lengths), args.rounds, args.seconds, deadline)
                    for setting, row in figures.items():
                        found.append(facts | {"setting": setting} | row)
                        record(found[-1])
                del made
                free()
    print_table(found, COLUMNS)


if __name__ == "__main__":
    main()
