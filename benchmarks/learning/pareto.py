# SPDX-License-Identifier: Apache-2.0
"""Is MosaicBERT's GLUE score above BERT's at equal time and at equal FLOP, and thanks to what?

Pre-trains MosaicBERT, transformers' BERT by the same recipe (each at its best peak rate) and by its
old one, and MosaicBERT less one component each, fine-tunes them on GLUE, and draws held-out loss
and scores against minutes and FLOP of pre-training. All see the same text and are held to the same
masked tokens.

    xzcat wiki.train.txt.xz books.train.txt.xz > train.txt
    fold -s -w 560 train.txt > short.txt
    fold -s -w 2300 train.txt > long.txt
    cat wiki.valid.txt books.valid.txt | fold -s -w 560 | awk 'NR % 4 == 1' > passages.txt
    head -n 600 passages.txt > valid.txt
    python prepare_data.py --train_file short.txt --validation_file valid.txt \
        --vocab_size 8192 --prepared_data runs/passages-128
    python prepare_data.py --train_file long.txt --validation_file valid.txt \
        --tokenizer_name runs/passages-128 --max_seq_length 512 --prepared_data runs/passages-512
    python benchmarks/learning/pareto.py --glue glue --models mosaic bert bert_old untrained \
        --prepared_data runs/passages-128 --prepared_long runs/passages-512

- Passages, since articles cut at 128 tokens would have no padding: 8 % of their places are.
- All budgets of a model and seed are on one trunk, which keeps its rate after a warm-up, a fifth of
  the shortest budget. The last 15 % of each are a branch off it in which the rate decays to 0, as
  1 - sqrt (Haegele et al. 2024). `bert_old` and `linear_decay` have a run for each budget, whose
  rate decays linearly after 6 % of it. Longer budgets are multiples of the shortest. A trunk can be
  lengthened later; another shortest budget is another curve, and trained anew.
- Trials come first, side by side: let nothing else run then. They say what a step costs, on a CPU
  in the process's own CPU time (cpu_clock.py), and how many fit a budget, of which every seed takes
  as many. Minutes are steps by the trial. What a run itself took, with whatever ran beside it, is
  recorded as `seconds`. Start and evaluation do not count. A model that has records needs no trial.
- FLOP is callbacks.Throughput's: padding, and logits of tokens without a label, which BERT
  computes, do not count.
- Fine-tuning has one rate for each run and task: of --finetune_rates the one that is best, after
  the longest budget, for 500 rows held out of the training data. Scores are of GLUE's own
  validation rows, one for each of --finetune_seeds.
- A model's mean over seeds is compared with MosaicBERT's at equal minutes, tokens and FLOP. Those
  are on a line between its budgets, over the cost's logarithm, where they are at most 2.2 times
  apart; it is drawn on by at most a quarter of the cost.
  A difference is claimed if it is larger than either's seeds have among themselves
  (largest - smallest), also at the least and the most that the model's seeds took: so are 5 % of
  equals, with 3 seeds and normal noise.
- `untrained`, 10 steps at rate 0, is what fine-tuning alone gives. A score is above it by the same
  rule; with fewer than 3 seeds of pre-training, by the spread over those of fine-tuning only.
- With --cola, acceptability.py's area under the ROC curve too, for which nothing is fine-tuned.
- The old recipe is Devlin et al.'s (2019, A.2; clipping by their code) in rows of 512 positions (a
  fifth of them padding), as many positions a step as the others. Warm-up stays 6 %, not 1 %, here a
  few steps; LayerNorm and biases decay too; no NSP.
- `masking_falls` masks 30 % on the trunk, and in its trial, and 15 % while the rate decays.

Each core has a run at a time. The same command again goes on where it was, and skips what
pareto.jsonl has of the same settings, device and versions; scores may come later, while the folders
are there. Unknown flags are train_mlm.py's.
Without names after --tasks nothing is fine-tuned, as to find the best rate:

    python benchmarks/learning/pareto.py ... --tasks --minutes 5 --seeds 1 --models mosaic bert \
        --rates mosaic=1e-3 bert=5e-4

BERT-Base's sizes on a GPU, 11 minutes each and some for GLUE, on the first 17,000 articles (head
before fold) and 30,522 entries, so that both folders take less than 40 MB:

    python benchmarks/learning/pareto.py --glue glue --models mosaic bert --minutes 5 10 \
        --seeds 1 --prepared_data runs/passages-128 --prepared_long runs/passages-512 \
        --hidden_size 768 --layers 12 --bert_mlp 4 --rows 256 --finetune '' --finetune_rates 5e-5 \
        --rates mosaic=5e-4 bert=5e-4

Adds a record for each run and budget to pareto.jsonl, and prints a table. Draws pareto.png if
there are tasks or --cola, and ablations.png if there are changed MosaicBERTs. The last line is
JSON: how each model differs from MosaicBERT at the longest budget.
"""

import argparse
import hashlib
import json
import shlex
import sys
import threading
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.learning.ablations import SWAPS, model_module
from benchmarks.learning.pareto_results import (
    AT_ALL_BUDGETS,
    AXES,
    draw,
    draw_differences,
    summary,
)
from benchmarks.learning.side_by_side import curve, each_on_a_core, words_of
from benchmarks.records import RESULTS, ROOT, environment, place, print_table
from mosaic_tools.checkpoints import what_is_torn
from mosaic_tools.prepared import begin, load_prepared, shard_files, write_shard
from mosaic_tools.recipe import DataArguments

HERE = Path(__file__).parent
OLD = {"model_type": "bert", "attention_probs_dropout_prob": 0.1, "mlm_probability": 0.15}
OLD |= {"adam_beta2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0}
# Flags of train_mlm.py; some names stand for a swap in ablations.py.
MODELS = {
    "mosaic": {},
    "bert": {"model_type": "bert", "attention_probs_dropout_prob": 0.0},
    "bert_old": OLD,
    "muon_no_dropout": {"optim": "muon", "hidden_dropout_prob": 0.0},
    "no_glu": {},
    "learned_positions": {},
    "fp32_layernorm": {"low_precision_layernorm": "false"},
    "padding_kept": {},
    "dense_logits": {},
    "masking_15": {"mlm_probability": 0.15},
    "masking_falls": {"mlm_probability": 0.15},
    "muon": {"optim": "muon"},
    "z_loss": {},
    "no_dropout": {"hidden_dropout_prob": 0.0},
    "clipping": {"max_grad_norm": 1.0},
    "linear_decay": {},
    "untrained": {"learning_rate": 0.0},
}
# What a trunk has otherwise than its branches.
ON_TRUNK = {"masking_falls": {"mlm_probability": 0.3}}
# Of these each budget is a run of its own.
WITHOUT_TRUNK = ("bert_old", "linear_decay", "untrained")
# The best of pareto.jsonl's at 4 x 256, and untried what others have from these: bert_old BERT's,
# muon_no_dropout Muon's, the rest MosaicBERT's.
RATES = {"mosaic": 1e-3, "bert": 1e-3, "bert_old": 1e-3, "muon": 2e-3, "muon_no_dropout": 2e-3}
# Steps of a trial; parts that a budget is cut into, the last DECAY of them its decay.
TRIAL, PARTS, DECAY = 60, 20, 3
# Rows of a task's training data that a rate is chosen by, at most a half.
HELD_OUT = 500


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


def of_training(args, name: str, seed: int) -> dict:
    """What pre-training depends on besides the budget."""
    data = args.prepared_long if name == "bert_old" else args.prepared_data
    found = recipe(args, name, seed) | {"data": data.name, "others": args.others}
    found |= {f"{x}_on_trunk": y for x, y in ON_TRUNK.get(name, {}).items()}
    return found if name == "untrained" else found | {"shortest": args.minutes[0]}


def of_finetuning(args) -> dict:
    """What the scores depend on besides."""
    keys = ("finetune", "finetune_rates", "finetune_seeds") if args.tasks else ()
    return {key: getattr(args, key) for key in keys}


def digest(found: dict) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]


def folder_of(args, name: str, seed: int) -> Path:
    """Where a run is, of just these settings."""
    return args.output_dir / f"{name}-{seed}-{digest(of_training(args, name, seed))}"


def budgets_of(args, name: str) -> list[float]:
    """Minutes of a model's budgets, the longest last."""
    if name == "untrained":
        return [0]
    return args.minutes if name in AT_ALL_BUDGETS else args.minutes[-1:]


# ---- pre-training ----


def command(name: str, script: str, words: list, **flags) -> list:
    clock = [] if torch.cuda.is_available() else [HERE / "cpu_clock.py"]
    script = [HERE / "ablations.py", name, script] if name in SWAPS else [ROOT / script]
    flags |= {"disable_tqdm": "true", "cpu_threads": 1}
    return [*clock, *script, *words_of(flags), *words]


def training(args, name: str, seed: int, folder: Path, steps: int, log: int, **flags) -> list:
    """A command that pre-trains for so many steps, and logs so often."""
    flags = recipe(args, name, seed) | {
        "prepared_data": long_rows(args) if name == "bert_old" else args.prepared_data,
        "output_dir": folder,
        "max_steps": steps,
        "logging_steps": log,
        "save_strategy": "no",
        # MFU is then model TFLOP/s.
        "peak_tflops": 1,
        # A loss that rises is a result too.
        "divergence": "inf",
        **flags,
    }
    return command(name, "train_mlm.py", args.others, **flags)


def seconds_of_a_step(args, name: str, execute) -> float:
    """By the second half of a trial."""
    folder = folder_of(args, name, 0)
    if not (folder / "eval_results.json").exists():
        flags = {"overwrite": "true"} | ON_TRUNK.get(name, {})
        execute(training(args, name, 0, folder, TRIAL, TRIAL // 10, **flags))
    logs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    rows_per_second = median([x["samples_per_second"] for x in logs if "loss" in x][5:])
    return recipe(args, name, 0)["global_batch_size"] / rows_per_second


def cost_of(args, name: str, done: list[dict], execute) -> tuple[int, float]:
    """Steps of a PARTS-th of the shortest budget, and seconds of a step: as in records, or by a
    trial. Steps of longer budgets are multiples, so that the trunk has a checkpoint where each
    decays."""
    if name == "untrained":
        return 0, 0.0
    for x in done:
        if x["model"] == name:
            part = x["step"] // PARTS // times(args, x["minutes"])
            return part, x["seconds_by_trial"] / x["step"]
    seconds = seconds_of_a_step(args, name, execute)
    return max(1, round(60 * args.minutes[0] / seconds / PARTS)), seconds


def times(args, minutes: float) -> int:
    """How many times as long as the shortest budget."""
    return round(minutes / args.minutes[0])


def pretrain(args, name: str, seed: int, part: int, execute) -> dict[float, Path]:
    """A folder with the trained model for each budget."""
    folder = folder_of(args, name, seed)
    folders = {minutes: folder / f"{minutes:g}" for minutes in budgets_of(args, name)}
    parts = {x: part * times(args, x) for x in folders}  # steps of a PARTS-th
    branches = {x: (PARTS - DECAY) * steps for x, steps in parts.items()}
    trunk, warm_up = folder / "trunk", {"warmup_steps": max(1, PARTS * part // 5)}
    if name not in WITHOUT_TRUNK:
        steps = max(branches.values())
        if any(what_is_torn(trunk / f"checkpoint-{x}") for x in branches.values()):
            flags = {"lr_scheduler_type": "constant_with_warmup", "save_strategy": "steps"}
            flags |= {"save_steps": (PARTS - DECAY) * part, "resume_from_checkpoint": "last"}
            flags |= warm_up | ON_TRUNK.get(name, {})
            execute(training(args, name, seed, trunk, steps, part, **flags))
    for minutes, where in folders.items():
        if (where / "eval_results.json").exists():
            continue
        flags = {"overwrite": "true"}
        if name not in WITHOUT_TRUNK:
            decay = {"num_decay_steps": DECAY * parts[minutes], "decay_type": "1-sqrt"}
            flags |= {"lr_scheduler_type": "warmup_stable_decay"} | warm_up
            flags |= {"lr_scheduler_kwargs": json.dumps(decay)}
            flags |= {"resume_from_checkpoint": trunk / f"checkpoint-{branches[minutes]}"}
        steps = PARTS * parts[minutes] or 10
        execute(training(args, name, seed, where, steps, part or 1, **flags))
    return folders


# ---- fine-tuning ----


def finetuning(args, name: str, model: Path, folder: Path, task: str, **flags) -> list:
    """A command that fine-tunes the model."""
    # Learned positions have no more.
    length = data_of(args.prepared_data).max_seq_length
    flags = {"data_dir": args.glue, "max_seq_length": length} | flags
    flags |= {x: y for x, y in MODELS[name].items() if x == "low_precision_layernorm"}
    words = ["--task", task, *shlex.split(args.finetune)]
    return command(name, "finetune.py", words, model=model, output_dir=folder, **flags)


def scores_of(folder: Path, task: str) -> list[float]:
    """One for each seed."""
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    return [run["score"] for run in tasks[task]["runs"]]


def to_choose_by(args) -> Path:
    """A folder of tasks like --glue, whose validation rows are of the training data."""
    folder = args.output_dir / "to-choose-by"
    for task in args.tasks:
        rows = (Path(args.glue) / task / "train.jsonl").read_text().splitlines()
        count = min(HELD_OUT, len(rows) // 2)
        held = {i * len(rows) // count for i in range(count)}
        parts = {"dev": held, "train": set(range(len(rows))) - held}
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part, chosen in parts.items():
            lines = "".join(rows[i] + "\n" for i in sorted(chosen))
            (folder / task / f"{part}.jsonl").write_text(lines)
    return folder


def best_rate(args, name: str, model: Path, task: str, execute) -> float:
    """The one with the best score of rows held out of the training data."""
    rates, found = args.finetune_rates, {}
    if len(rates) == 1:
        return rates[0]
    for rate in rates:
        folder = model / digest(of_finetuning(args)) / f"{task}-{rate:g}"
        flags = {"data_dir": args.to_choose_by, "learning_rate": rate, "seeds": 0}
        execute(finetuning(args, name, model, folder, task, **flags))
        (found[rate],) = scores_of(folder, task)
    return max(rates, key=found.get)


def finetune(args, name: str, model: Path, rates: dict[str, float], execute) -> dict:
    """For each task the scores of --finetune_seeds."""
    scores = {}
    for task, rate in rates.items():
        folder = model / digest(of_finetuning(args)) / task
        command = finetuning(args, name, model, folder, task, learning_rate=rate)
        execute([*command, "--seeds", *args.finetune_seeds])
        scores[task] = scores_of(folder, task)
    return scores


def acceptability(args, name: str, model: Path, execute) -> dict:
    """acceptability.py's answer; none of what transformers cannot load."""
    if not args.cola or name in SWAPS:
        return {}
    file = model / "cola.json"
    execute([HERE / "acceptability.py", model, args.cola, "--output", file])
    return {"cola_auc": json.loads(file.read_text())["auc"]}


# ---- all ----


def recorded(args) -> list[dict]:
    """Records of these runs, this device and these versions, however they were fine-tuned."""
    file = args.results / "pareto.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    wanted = {(name, seed): of_training(args, name, seed) for name, _, seed in args.plan}
    here = environment()
    return [
        x
        for x in records
        if x["settings"] == wanted.get((x["model"], x["seed"]))
        # Older ones have what the runs themselves took, which is not compared.
        and "seconds_by_trial" in x
        and place(x) == place(here)
        and all(x[key] == here[key] for key in ("torch", "transformers"))
    ]


def results(args) -> dict[tuple, dict]:
    """By key, what a run's records say together: scores of this fine-tuning only."""
    found = {}
    for x in recorded(args):
        run = found.setdefault((x["model"], x["minutes"], x["seed"]), x | {"scores": {}})
        if args.tasks and x["finetuning"] == of_finetuning(args):
            run["scores"] |= x["scores"]
        run |= {"cola_auc": x["cola_auc"]} if "cola_auc" in x else {}
    return found


def finished(args) -> list[tuple]:
    """Keys of the runs that have all scores that are asked for."""
    return [
        key
        for key, run in results(args).items()
        if set(args.tasks) <= set(run["scores"])
        and (not args.cola or key[0] in SWAPS or "cola_auc" in run)
    ]


def run_all(args):
    """Adds to the records what they lack of the plan."""
    # Fills transformers' cache of code, which runs side by side would race for.
    model_module()
    done, where, one_writes = recorded(args), environment(), threading.Lock()
    there = finished(args)
    missing = [key for key in args.plan if key not in there]
    runs = list(dict.fromkeys((name, seed) for name, _, seed in missing))
    if any(name == "bert_old" for name, _ in runs):
        # Before two runs would write it at once.
        long_rows(args)
    args.to_choose_by = to_choose_by(args) if len(args.finetune_rates) > 1 else None
    names, costs = list(dict.fromkeys(name for name, _ in runs)), {}

    def try_out(name, execute):
        costs[name] = cost_of(args, name, done, execute)

    def produce(run, execute):
        name, seed = run
        part, seconds = costs[name]
        folders = pretrain(args, name, seed, part, execute)
        *_, longest = folders.values()
        rates = {x: best_rate(args, name, longest, x, execute) for x in args.tasks}
        # The longest first: what it scores says most, should the run be broken off.
        for minutes, folder in reversed(folders.items()):
            if (name, minutes, seed) not in missing:
                continue
            record = {"model": name, "minutes": minutes, "seed": seed}
            record |= curve(folder, recipe(args, name, seed)["global_batch_size"])[-1]
            record["seconds_by_trial"] = round(record["step"] * seconds, 1)
            record |= {"scores": finetune(args, name, folder, rates, execute)}
            record |= {"finetune_rates": rates} | acceptability(args, name, folder, execute)
            record["settings"] = of_training(args, name, seed)
            record |= {"finetuning": of_finetuning(args)} | where
            with one_writes, open(args.results / "pareto.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    each_on_a_core(try_out, names)
    each_on_a_core(produce, runs)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--prepared_data", type=Path, required=True, help="of prepare_data.py")
    parser.add_argument("--prepared_long", type=Path, help="longer rows, for bert_old")
    parser.add_argument("--glue", help="folder with TASK/train.jsonl and dev.jsonl")
    parser.add_argument("--cola", type=Path, help="CoLA's dev.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bert_mlp", type=int, default=6, help="widths; 6: as many weights")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--rates", nargs="+", default=[], metavar="MODEL=RATE")
    parser.add_argument("--tasks", nargs="*", default=["sst2", "stsb"])
    parser.add_argument("--finetune_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--finetune_seeds", type=int, nargs="+", default=[1, 2, 3])
    quick = "--max_steps 400 --global_batch_size 32"
    parser.add_argument("--finetune", default=quick, help="its flags; '': the tasks' own recipes")
    parser.add_argument("--draw_only", action="store_true", help="of what is in pareto.jsonl")
    args, args.others = parser.parse_known_args()
    args.rates = RATES | {k: float(x) for k, x in (word.split("=") for word in args.rates)}
    if unknown := set(args.rates) - set(MODELS):
        parser.error(f"--rates: {', '.join(unknown)} is none of {', '.join(MODELS)}")
    if "bert_old" in args.models and not args.prepared_long:
        parser.error("bert_old needs --prepared_long; or leave it out of --models")
    if args.tasks and not args.glue:
        parser.error("--tasks need --glue, or give --tasks without a name")
    args.minutes = sorted(args.minutes)
    least = args.minutes[0]
    if odd := [x for x in args.minutes if abs(x / least - round(x / least)) > 1e-6]:
        parser.error(f"--minutes: {odd[0]:g} is no multiple of the shortest, {least:g}")
    args.plan = [
        (name, x, seed)
        for seed in args.seeds
        for name in args.models
        for x in budgets_of(args, name)
    ]
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.draw_only:
        run_all(args)
    records, found = results(args), {}
    for key in args.plan:
        if key in records:
            found.setdefault(key[:2], []).append(records[key])
    if not found:
        raise SystemExit(
            f"{args.results / 'pareto.jsonl'} has no record of these settings, versions and device"
        )
    if lacking := sum(key not in records for key in args.plan):
        print(f"{len(args.plan) - lacking} of {len(args.plan)} runs are recorded")
    ours = [run for key, runs in found.items() if key[0] == "mosaic" for run in runs]
    floor = next((runs for key, runs in found.items() if key[0] == "untrained"), [])
    rows = [summary(runs, ours, floor) for runs in found.values()]
    if args.tasks or args.cola:
        draw(rows, args.tasks, args.results / "pareto.png")
    changed = [row for row in rows if row["model"] not in ("mosaic", "bert", "bert_old")]
    draw_differences(changed, ours, args.results / "ablations.png")
    formats = {"model": "", "budget": "g", "seeds": "", "minutes": ".2f", "Mtokens": ".2f"}
    formats |= {"TFLOP": ".4g", "loss": ".3f"} | {f"loss, equal {x}": "" for x in AXES}
    for task in args.tasks:
        formats |= {task: ".1%", f"{task}, spread": "", f"{task}, equal minutes": ""}
        formats |= {f"{task}, above the floor": ""}
    print_table(rows, formats | {"cola_auc": ".3f"})
    longest = [row for row in rows if row["budget"] == args.minutes[-1]]
    last = [row for row in longest if row["model"] != "mosaic"]
    print(json.dumps({x["model"]: {y: x[y] for y in formats if "equal" in y} for x in last}))


if __name__ == "__main__":
    main()
