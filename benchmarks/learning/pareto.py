# SPDX-License-Identifier: Apache-2.0
"""Is MosaicBERT's GLUE score above BERT's at equal time and at equal FLOP, and thanks to what?

Pre-trains MosaicBERT, transformers' BERT by the same recipe (each at its best peak rate) and by its
old one, and MosaicBERT less one component each, fine-tunes them on GLUE, and draws held-out loss
and score against minutes and FLOP of pre-training. All see the same text and are held to the same
masked tokens.

    xzcat wiki.train.txt.xz | fold -s -w 560 > short.txt
    xzcat wiki.train.txt.xz | fold -s -w 2300 > long.txt
    fold -s -w 560 wiki.valid.txt | head -n 600 > held-out.txt
    python prepare_data.py --train_file short.txt --validation_file held-out.txt \
        --vocab_size 4096 --prepared_data runs/passages-128
    python prepare_data.py --train_file long.txt --validation_file held-out.txt \
        --tokenizer_name runs/passages-128 --max_seq_length 512 --prepared_data runs/passages-512
    python benchmarks/learning/pareto.py --glue glue \
        --prepared_data runs/passages-128 --prepared_long runs/passages-512

- Passages, since articles cut at 128 tokens would have no padding: 7 % of their places are.
- Each budget is a run with a linear decay of its own: one evaluated on its way has not decayed. A
  trial says how many steps fit, every seed takes as many, and what they took is measured. Ablations
  have the longest budget only.
- Minutes leave out start and evaluation. FLOP is callbacks.Throughput's: padding, and logits
  of tokens without a label, which BERT computes, do not count.
- A model's mean over seeds is compared with MosaicBERT's at equal minutes, tokens and FLOP, between
  its budgets by linear interpolation over their logarithm. A difference is claimed if it is larger
  than either's seeds have among themselves (largest - smallest), also at the least and the most
  that the model's seeds took: so are 5 % of equals, with 3 seeds and normal noise.
- Of GLUE, SST-2 and STS-B: even BERT-Mini (4 x 256, trained in full) has 0.0 in CoLA, and in MRPC
  and RTE little more than the commonest label gives (table of google-research/bert). `untrained`,
  10 steps at rate 0, is what fine-tuning alone gives.
- The old recipe is Devlin et al.'s (2019, A.2; clipping by their code) in rows of 512 positions (a
  fifth of them padding), as many positions a step as the others. Warm-up stays 6 %, not 1 %, here a
  few steps; LayerNorm and biases decay too; no NSP.

By default 27 runs of 2 minutes and 9 of 0.7, two at a time, are 30 minutes on two cores; trials,
starts, evaluations and fine-tuning, some 2 core-minutes a run, another 40. The same command
again skips what pareto.jsonl has of the same settings, device and versions. Unknown flags are
train_mlm.py's.

BERT-Base's sizes on a GPU, 10 minutes each and some for GLUE, on the first 17,000 articles (head
before fold) and 30,522 entries, so that both folders take less than 40 MB:

    python benchmarks/learning/pareto.py --glue glue --models mosaic bert bert_old --minutes 10 \
        --seeds 1 --prepared_data runs/passages-128 --prepared_long runs/passages-512 \
        --hidden_size 768 --layers 12 --bert_mlp 4 --rows 256 --finetune '' \
        --rates mosaic=5e-4 bert=5e-4 bert_old=1e-4

Adds a record a run to pareto.jsonl, draws pareto.png and prints a table. The last line is JSON: how
each model differs from MosaicBERT at the longest budget.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.learning.ablations import SWAPS, model_module
from benchmarks.learning.pareto_results import AXES, draw, summary
from benchmarks.learning.side_by_side import at_a_time, curve, run, words_of
from benchmarks.records import RESULTS, ROOT, environment, place, print_table
from mosaic_tools.prepared import begin, load_prepared, shard_files, write_shard
from mosaic_tools.recipe import DataArguments

OLD = {"model_type": "bert", "attention_probs_dropout_prob": 0.1, "mlm_probability": 0.15}
OLD |= {"adam_beta2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0}
# Flags of train_mlm.py; some names stand for a swap in ablations.py.
MODELS = {
    "mosaic": {},
    "bert": {"model_type": "bert", "attention_probs_dropout_prob": 0.0},
    "bert_old": OLD,
    "no_glu": {},
    "learned_positions": {},
    "fp32_layernorm": {"low_precision_layernorm": "false"},
    "padding_kept": {},
    "dense_logits": {},
    "masking_15": {"mlm_probability": 0.15},
    "untrained": {"learning_rate": 0.0},
}
ABLATIONS = list(MODELS)[3:-1]
# The best of learning.jsonl, at 4 x 256; ablations have MosaicBERT's unless told otherwise.
RATES = {"mosaic": 2e-3, "bert": 1e-3, "bert_old": 1e-3}
TRIAL = 60  # steps


def data_of(folder: Path) -> DataArguments:
    length = json.loads((folder / "prepared.json").read_text())["max_seq_length"]
    return DataArguments(prepared_data=str(folder), max_seq_length=length)


def long_rows(args) -> Path:
    """A prepared folder with the long rows to train on and the short ones to be evaluated on."""
    folder = args.output_dir / args.prepared_long.name
    if not folder.exists():
        train, _, tokenizer = load_prepared(data_of(args.prepared_long))
        _, validation, other = load_prepared(data_of(args.prepared_data))
        if tokenizer.get_vocab() != other.get_vocab():
            raise SystemExit(f"prepare the long rows with --tokenizer_name {args.prepared_data}")
        data = data_of(args.prepared_long)
        facts = {"source": data.source(), "max_seq_length": data.max_seq_length, "pack": data.pack}
        facts = begin(folder, tokenizer, facts | {"shards": 1}, data.max_seq_length)
        for part, rows in (("train", train), ("validation", validation)):
            (file,) = shard_files(folder, part, 1)
            tables = rows.with_format("arrow").iter(10_000)
            write_shard(file, facts, rows.features.arrow_schema, tables)
    return folder


def recipe(args, name: str, seed: int) -> dict:
    """Flags of train_mlm.py, all but those that say where and how long."""
    short, flags = data_of(args.prepared_data).max_seq_length, MODELS[name]
    length = data_of(args.prepared_long).max_seq_length if name == "bert_old" else short
    return {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
        "intermediate_size": args.hidden_size * (args.bert_mlp if "model_type" in flags else 4),
        "max_seq_length": length,
        "global_batch_size": args.rows * short // length,
        "per_device_train_batch_size": args.rows * short // length,
        "learning_rate": args.rates.get(name, args.rates["mosaic"]),
        "seed": seed,
    } | flags


def command(name: str, script: str, folder: Path, words: list, **flags) -> list:
    flags |= {"output_dir": folder, "overwrite": "true", "disable_tqdm": "true", "cpu_threads": 1}
    ablations = Path(__file__).with_name("ablations.py")
    script = [ablations, name, script] if name in SWAPS else [ROOT / script]
    return [*script, *words_of(flags), *words]


def training(args, name: str, seed: int, steps: int, folder: Path) -> list:
    """A command that pre-trains for so many steps."""
    flags = recipe(args, name, seed) | {
        "prepared_data": long_rows(args) if name == "bert_old" else args.prepared_data,
        "max_steps": steps,
        "logging_steps": steps // 10,
        "save_strategy": "no",
        # MFU is then model TFLOP/s.
        "peak_tflops": 1,
        # A loss that rises is a result too.
        "divergence": "inf",
    }
    return command(name, "train_mlm.py", folder, args.others, **flags)


def finetuning(args, name: str, seed: int, folder: Path) -> list:
    """A command that fine-tunes the model of that folder."""
    words = ["--task", *args.tasks, *shlex.split(args.finetune)]
    # Learned positions have no more.
    length = data_of(args.prepared_data).max_seq_length
    flags = {"model": folder, "data_dir": args.glue, "seeds": seed, "max_seq_length": length}
    flags |= {x: y for x, y in MODELS[name].items() if x == "low_precision_layernorm"}
    return command(name, "finetune.py", folder / "glue", words, **flags)


def steps_per_second(args, names: list[str]) -> dict[str, float]:
    """By the second half of a trial."""
    folders, speeds = {name: args.output_dir / "trial" / name for name in names}, {}
    run({name: training(args, name, 0, TRIAL, folder) for name, folder in folders.items()})
    for name, folder in folders.items():
        logs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        rows_per_second = median([x["samples_per_second"] for x in logs if "loss" in x][5:])
        speeds[name] = rows_per_second / recipe(args, name, 0)["global_batch_size"]
    return speeds


def settings(args, name: str, seed: int) -> dict:
    """What a record depends on besides its key: model, minutes and seed."""
    data = args.prepared_long if name == "bert_old" else args.prepared_data
    more = {"data": data.name, "finetune": args.finetune, "others": args.others}
    return recipe(args, name, seed) | {"tasks": args.tasks} | more


def record(args, name: str, minutes: float, seed: int, folder: Path) -> dict:
    tasks = json.loads((folder / "glue" / "results.json").read_text())["tasks"]
    scores = {task: tasks[task]["score"]["mean"] for task in args.tasks}
    found = settings(args, name, seed)
    results = curve(folder, found["global_batch_size"])[-1] | {"glue": mean(scores.values())}
    key = {"model": name, "minutes": minutes, "seed": seed}
    return key | results | {"scores": scores, "settings": found}


def finished(args) -> dict[tuple, dict]:
    """Records of these settings, this device and these versions by key."""
    file = args.results / "pareto.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    wanted = {(name, seed): settings(args, name, seed) for name, _, seed in args.plan}
    here = environment()
    ours = [
        x
        for x in records
        if x["settings"] == wanted.get((x["model"], x["seed"]))
        and place(x) == place(here)
        and all(x[key] == here[key] for key in ("torch", "transformers"))
    ]
    return {(x["model"], x["minutes"], x["seed"]): x for x in ours}


def run_all(args):
    """Adds to the records what they lack of the plan."""
    done, where = finished(args), environment()
    missing = [key for key in args.plan if key not in done]
    steps = {key[:2]: x["step"] for key, x in done.items()}
    untried = dict.fromkeys(key[0] for key in missing if key[:2] not in steps)
    for name, speed in steps_per_second(args, list(untried)).items():
        for minutes in (*args.minutes, 0):
            # Logged ten times, the last step with them.
            steps.setdefault((name, minutes), 10 * max(1, round(6 * minutes * speed)))
    for i in range(0, len(missing), at_a_time()):
        group = {k: args.output_dir / "-".join(map(str, k)) for k in missing[i:][: at_a_time()]}
        print(f"{i} of {len(missing)} runs are done, next {list(group)}", flush=True)
        run({k: training(args, k[0], k[2], steps[k[:2]], x) for k, x in group.items()})
        run({k: finetuning(args, k[0], k[2], x) for k, x in group.items()})
        with open(args.results / "pareto.jsonl", "a") as file:
            for key, folder in group.items():
                file.write(json.dumps(record(args, *key, folder) | where) + "\n")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--prepared_data", type=Path, required=True, help="of prepare_data.py")
    parser.add_argument("--prepared_long", type=Path, help="longer rows, for bert_old")
    parser.add_argument("--glue", required=True, help="folder with TASK/train.jsonl and dev.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.7, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bert_mlp", type=int, default=6, help="widths; 6: as many weights")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--rates", nargs="+", default=[], metavar="MODEL=RATE")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb"])
    quick = "--learning_rate 3e-4 --max_steps 400 --global_batch_size 32"
    parser.add_argument("--finetune", default=quick, help="its flags; '': the tasks' own recipes")
    args, args.others = parser.parse_known_args()
    args.rates = RATES | {k: float(x) for k, x in (word.split("=") for word in args.rates)}
    if unknown := set(args.rates) - set(MODELS):
        parser.error(f"--rates: {', '.join(unknown)} is none of {', '.join(MODELS)}")
    if "bert_old" in args.models and not args.prepared_long:
        parser.error("bert_old needs --prepared_long; or leave it out of --models")
    # Fills transformers' cache of code, which runs side by side would race for.
    model_module()

    longest = max(args.minutes)
    budgets = dict.fromkeys(MODELS, args.minutes) | dict.fromkeys(ABLATIONS, [longest])
    budgets["untrained"] = [0]
    keys = [(name, x, seed) for seed in args.seeds for name in args.models for x in budgets[name]]
    # The longest first: those side by side are then of one budget.
    args.plan = sorted(keys, key=lambda key: -key[1])
    run_all(args)
    records, found = finished(args), {}
    for key in args.plan:
        found.setdefault(key[:2], []).append(records[key])
    ours = [run for key, runs in found.items() if key[0] == "mosaic" for run in runs]
    rows = [summary(runs, ours) for runs in found.values()]
    draw(rows, args.results / "pareto.png")
    formats = {"model": "", "budget": "g", "seeds": "", "minutes": ".2f", "Mtokens": ".2f"}
    formats |= {"TFLOP": ".4g", "loss": ".3f"} | {f"loss, equal {x}": "" for x in AXES}
    formats |= {"GLUE": ".1%", "GLUE, equal minutes": ""} | dict.fromkeys(args.tasks, ".1%")
    print_table(rows, formats)
    last = [row for row in rows if row["budget"] == longest and row["model"] != "mosaic"]
    print(json.dumps({x["model"]: {y: x[y] for y in formats if "equal" in y} for x in last}))


if __name__ == "__main__":
    main()
