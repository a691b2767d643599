# SPDX-License-Identifier: Apache-2.0
"""The ablations change what they name, and pareto.py runs, skips what is done, and claims only what
seeds bear out."""

import json
import math
import os
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_python
from matplotlib.figure import Figure
from training import DOCUMENTS, RUN_IN_PLACE, SIZES, flags, run, write_vocab
from transformers import BertTokenizerFast

from benchmarks.learning import ablations, acceptability, pareto, pareto_results, side_by_side
from mosaic_bert import bert_layers
from mosaic_bert.configuration_bert import MosaicBertConfig
from mosaic_tools.checkpoints import mark_complete

# A row of 9 tokens, one of 5 with padding.
IDS = torch.tensor([[2, 9, 8, 7, 6, 5, 12, 11, 3], [2, 13, 14, 15, 3, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def build(monkeypatch):
    """A tiny MosaicBERT with fixed weights, after an ablation or none."""

    def build(name=None):
        if name:
            for part, replacement in ablations.SWAPS[name](bert_layers).items():
                monkeypatch.setattr(bert_layers, part, replacement)
        torch.manual_seed(0)
        config = MosaicBertConfig(**SIZES, max_position_embeddings=16, initializer_range=0.3)
        return bert_layers.BertForMaskedLM(config).eval()

    return build


def assert_same(found, expected):
    """Equal but for the order of float32 sums of some 64 terms."""
    most = 64 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=most)


def weights(model) -> int:
    return sum(x.numel() for x in model.parameters() if x.dim() == 2)


@torch.inference_mode()
def test_without_glu_the_mlp_is_berts_with_as_many_weights(build):
    stock, model = build(), build("no_glu")
    assert weights(model) == weights(stock)
    mlp, x = model.bert.encoder.layer[0].mlp, torch.randn(5, SIZES["hidden_size"])
    inner = torch.nn.functional.gelu(x @ mlp.gated_layers.weight.T)
    expected = mlp.layernorm(inner @ mlp.wo.weight.T + mlp.wo.bias + x)
    assert_same(mlp(x), expected)


@torch.inference_mode()
def test_learned_positions_are_all_that_tells_the_order_of_tokens(build):
    model = build("learned_positions")
    order = torch.tensor([0, 3, 1, 2, 4, 5, 6, 7, 8])
    table = model.bert.encoder.position_embeddings.weight
    assert not torch.allclose(model(IDS[:1, order]).logits, model(IDS[:1]).logits[:, order])
    table.copy_(table[:1].expand_as(table))
    assert_same(model(IDS[:1, order]).logits, model(IDS[:1]).logits[:, order])


@torch.inference_mode()
@pytest.mark.parametrize("name", ablations.SWAPS)
def test_padding_does_not_change_what_an_ablation_makes_of_tokens(build, name):
    model = build(name)
    alone = model(IDS[1:, :5]).logits[0]
    assert_same(model(IDS, MASK).logits[1, :5], alone)


@torch.inference_mode()
def test_kept_padding_goes_through_the_layers_and_changes_no_token(build):
    stock = build()(IDS, MASK).logits
    model, seen = build("padding_kept"), []
    model.bert.encoder.layer[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert_same(model(IDS, MASK).logits[MASK == 1], stock[MASK == 1])
    assert len(seen[0]) == IDS.numel()


@pytest.mark.parametrize(
    "theirs, ours, expected",
    [
        ([5.0, 5.1, 5.2], [4.5, 4.6, 4.7], "worse"),
        ([4.5, 4.6, 4.7], [5.0, 5.1, 5.2], "better"),
        # Means are 0.2 apart, and so are theirs among themselves.
        ([5.0, 5.1, 5.2], [4.9, 4.9, 4.9], "same"),
        ([5.0, 5.1], [4.0, 4.1], None),
    ],
)
def test_a_difference_is_claimed_beyond_the_spread_over_seeds(theirs, ours, expected):
    assert pareto_results.claim(theirs, ours, lower_is_better=True) == expected
    swap = {"worse": "better", "better": "worse"}
    assert pareto_results.claim(theirs, ours) == swap.get(expected, expected)


def test_what_ours_has_at_equal_cost_is_between_its_budgets():
    runs = [
        {"seed": seed, "minutes": i, "seconds": 30 * 2**i + seed, "eval_loss": 6 - i + seed / 10}
        for i in (0, 1)
        for seed in (-1, 0, 1)
    ]

    def at(seconds, runs=runs):
        return pareto_results.ours_at(seconds, "seconds", "eval_loss", runs)

    assert at(30 * 2**0.5) == pytest.approx([5.4, 5.5, 5.6])
    assert at(65)[1] < 5
    assert at(23) == at(76) == []
    # Of seeds that a budget lacks.
    assert at(30 * 2**0.5, runs[:-1]) == pytest.approx([5.4, 5.5], abs=0.03)
    assert at(40, runs[:3]) == at(40, []) == at(40, [runs[0], *runs[4:]]) == []
    # A longer budget that has one seed takes none from the shorter ones.
    longer = [*runs, {"seed": 0, "minutes": 2, "seconds": 120, "eval_loss": 4}]
    assert at(30 * 2**0.5, longer) == pytest.approx([5.4, 5.5, 5.6])
    assert at(60 * 2**0.5, longer) == pytest.approx([4.5])
    # Nothing is known between budgets that are far apart.
    far = [*runs[:3], *({**run, "seconds": run["seconds"] * 1.2} for run in runs[3:])]
    assert at(50, far) == [] and at(32, far) == [] and len(at(30, far)) == 3

    def compared(loss, *seconds):
        theirs = [{"seconds": x, "eval_loss": loss} for x in seconds]
        return pareto_results.compared(theirs, runs, "seconds", "eval_loss")

    halfway = 30 * 2**0.5
    assert compared(5.8, halfway, halfway, halfway) == "+0.300 worse"
    assert compared(5.8, halfway, halfway) == "+0.300 unclaimed"
    # What ours has where the slowest was is unknown.
    assert compared(4.8, 55, 70, 85).endswith(" unclaimed")
    # One of them was no slower than where ours has as much.
    assert compared(5.8, halfway - 10, halfway, halfway + 10) == "+0.300 same"


def test_dense_logits_are_of_all_tokens_and_have_the_same_loss(build):
    labels = torch.where(IDS == 8, IDS, -100)
    batch = bert_layers.pack_batch(IDS, MASK, None, labels)
    losses, seen = [], []
    for name in (None, "dense_logits"):
        model = build(name)
        model.training = True  # but its layers are not: no dropout
        model.cls.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        losses.append(model(IDS, labels=labels, batch=batch).loss)
    assert seen == [1, MASK.sum()]
    assert_same(losses[1], losses[0])


def test_a_z_loss_is_of_softmaxs_denominator_and_in_training_only(build):
    labels = torch.where(IDS == 8, IDS, -100)
    stock, model = build(), build("z_loss")
    plain, logits = stock(IDS, labels=labels).loss, stock(IDS).logits[labels != -100]
    assert model(IDS, labels=labels).loss == plain
    # Its layers are not in training: no dropout.
    model.training = model.cls.predictions.training = True
    expected = plain + 1e-4 * (logits.double().exp().sum(-1).log() ** 2).mean()
    assert_same(model(IDS, labels=labels).loss, expected.float())
    assert model(IDS, labels=labels).loss > plain


def test_the_old_recipe_sees_as_many_positions_a_step(tmp_path):
    for name, length in (("short", 128), ("long", 512)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepared.json").write_text(json.dumps({"max_seq_length": length}))
    args = SimpleNamespace(
        prepared_data=tmp_path / "short",
        prepared_long=tmp_path / "long",
        hidden_size=128,
        layers=2,
        bert_mlp=6,
        rows=32,
        rates=pareto.RATES,
    )
    found = {name: pareto.recipe(args, name, 1) for name in pareto.MODELS}
    places = {x["max_seq_length"] * x["global_batch_size"] for x in found.values()}
    assert places == {32 * 128}
    assert found["bert_old"]["mlm_probability"] == found["masking_15"]["mlm_probability"] == 0.15
    rates = {name: flags["learning_rate"] for name, flags in found.items()}
    others = {"muon": 2e-3, "muon_no_dropout": 2e-3, "untrained": 0}
    assert rates == dict.fromkeys(pareto.MODELS, 1e-3) | others


def test_scores_are_compared_over_all_seeds_and_the_floors(monkeypatch):
    def run(model, minutes, seed, *scores):
        costs = {
            "seconds_by_trial": 60.0 * minutes,
            "tokens": 1e6 * minutes,
            "flop": 1e12 * minutes,
        }
        key = {"model": model, "minutes": minutes, "seed": seed}
        return key | costs | {"eval_loss": 5.0, "scores": {"sst2": list(scores)}}

    floor = [run("untrained", 0, 1, 0.5, 0.6, 0.7)]
    ours = [run("mosaic", x, 1, 0.7 + x / 10, 0.8 + x / 10, 0.8 + x / 10) for x in (1, 2)]
    row = pareto_results.summary(ours[:1], ours, floor)
    assert row["sst2"] == pytest.approx(0.8667, abs=1e-3) and len(row["all sst2"]) == 3
    assert row["sst2, spread"] == "80.0% to 90.0%"
    # 0.27 above, of seeds up to 0.2 apart.
    assert row["sst2, above the floor"] == "better" and row["sst2, equal minutes"] is None
    # Of three seeds of pre-training it is the means that count, which are closer together.
    wide = [run("mosaic", 1, i, 0.45 + x, 0.95 + x) for i, x in enumerate((0, 0.01, 0.02))]
    floors = [run("untrained", 0, i, 0.4 + x, 0.8 + x) for i, x in enumerate((0, 0.01, 0.02))]
    assert pareto_results.summary(wide, ours, floors)["sst2, above the floor"] == "better"
    assert pareto_results.summary(wide[:2], ours, floors)["sst2, above the floor"] == "same"
    theirs = [run("bert", 2, 1, 0.7, 0.9, 0.8)]
    row = pareto_results.summary(theirs, ours, floor)
    assert row["sst2, above the floor"] == "same"
    assert row["sst2, equal minutes"] == "-0.167 unclaimed"


def test_rates_are_chosen_by_training_rows_that_are_not_trained_on(tmp_path, monkeypatch):
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    rows = [f'{{"sentence": "{i}"}}' for i in range(2_000)]
    (tmp_path / "glue" / "sst2" / "train.jsonl").write_text("\n".join(rows))
    args = SimpleNamespace(glue=tmp_path / "glue", output_dir=tmp_path / "out", tasks=["sst2"])
    folder = pareto.to_choose_by(args) / "sst2"
    parts = {x: (folder / f"{x}.jsonl").read_text().splitlines() for x in ("train", "dev")}
    assert len(parts["dev"]) == 500 and sorted(parts["train"] + parts["dev"]) == sorted(rows)

    args = SimpleNamespace(tasks=["a", "b"], finetune_rates=[1e-4, 1e-3], to_choose_by=folder)
    args.finetune, args.finetune_seeds, args.cola = "", [1], None
    monkeypatch.setattr(pareto, "finetuning", lambda *words, **flags: flags["learning_rate"])
    found = {1e-4: {"a": [0.5], "b": [0.7]}, 1e-3: {"a": [0.6], "b": [0.1]}}
    tried = []
    monkeypatch.setattr(pareto, "scores_of", lambda _, task: found[tried[-1]][task])
    rates = {x: pareto.best_rate(args, "mosaic", folder, x, tried.append) for x in args.tasks}
    assert rates == {"a": 1e-3, "b": 1e-4} and tried == [1e-4, 1e-3] * 2


def test_masking_falls_where_the_rate_does(tmp_path, monkeypatch):
    plain = ("prepared_data", "prepared_long", "others", "tasks")
    args = SimpleNamespace(**dict.fromkeys(plain, Path("data")), output_dir=tmp_path, minutes=[5])
    monkeypatch.setattr(pareto, "folder_of", lambda *_: tmp_path)
    monkeypatch.setattr(pareto, "recipe", lambda _, name, __: pareto.MODELS[name])
    monkeypatch.setattr(pareto, "command", lambda *_, **flags: flags["mlm_probability"])
    seen = []
    pareto.pretrain(args, "masking_falls", 1, 100, seen.append)
    assert seen == [0.3, 0.15]


@pytest.mark.parametrize(
    "name, trunks, budgets",
    [
        ("mosaic", 1, [5, 20]),
        ("bert_old", 0, [5, 20]),
        ("muon", 1, [20]),
        ("linear_decay", 0, [20]),
    ],
)
def test_budgets_share_a_trunk_and_decay_at_their_end(tmp_path, monkeypatch, name, trunks, budgets):
    plain = ("prepared_data", "prepared_long", "others", "tasks")
    args = SimpleNamespace(**dict.fromkeys(plain, Path("data")), output_dir=tmp_path)
    args.minutes = [5, 20]
    monkeypatch.setattr(pareto, "folder_of", lambda *_: tmp_path)
    monkeypatch.setattr(
        pareto, "training", lambda _, __, ___, folder, steps, log, **x: (folder.name, steps, log, x)
    )
    seen = []
    folders = pareto.pretrain(args, name, 1, 100, seen.append)
    assert {x: folder.name for x, folder in folders.items()} == {x: str(x) for x in budgets}
    assert [x[:2] for x in seen[trunks:]] == [(str(x), 400 * x) for x in budgets]
    if not trunks:
        assert not any("lr_scheduler_type" in run for *_, run in seen)
        return
    # 17 of 20 parts, and the warm-up is 4 of the shortest budget's.
    assert seen[0][:3] == ("trunk", 6_800, 100)
    assert seen[0][3]["save_steps"] == 1_700 and seen[0][3]["warmup_steps"] == 400
    for (*_, log, branch), x in zip(seen[1:], budgets, strict=True):
        begins, decay = 340 * x, 60 * x
        assert log == 100 and branch["warmup_steps"] == 400
        assert branch["resume_from_checkpoint"] == tmp_path / "trunk" / f"checkpoint-{begins}"
        found = json.loads(branch["lr_scheduler_kwargs"])
        assert found == {"num_decay_steps": decay, "decay_type": "1-sqrt"}


def test_an_interrupted_curve_goes_on_from_its_own_checkpoints(tmp_path, monkeypatch):
    plain = ("prepared_data", "prepared_long", "others", "tasks")
    args = SimpleNamespace(**dict.fromkeys(plain, Path("data")), output_dir=tmp_path)
    args.minutes = [5, 10]
    monkeypatch.setattr(pareto, "folder_of", lambda *_: tmp_path)
    monkeypatch.setattr(pareto, "training", lambda _, __, ___, folder, *____, **_____: folder)
    # The trunk has gone further.
    for steps in (1700, 3400, 6800):
        (tmp_path / "trunk" / f"checkpoint-{steps}").mkdir(parents=True)
        mark_complete(tmp_path / "trunk" / f"checkpoint-{steps}")
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "eval_results.json").touch()
    seen = []
    pareto.pretrain(args, "mosaic", 1, 100, seen.append)
    assert seen == [tmp_path / "5"]
    (tmp_path / "trunk" / "checkpoint-3400" / "complete.json").unlink()
    seen.clear()
    pareto.pretrain(args, "mosaic", 1, 100, seen.append)
    assert seen == [tmp_path / "trunk", tmp_path / "5"]


def test_what_is_trained_does_not_depend_on_how_it_is_evaluated(tmp_path):
    (tmp_path / "prepared.json").write_text(json.dumps({"max_seq_length": 128}))
    args = SimpleNamespace(
        **{"prepared_data": tmp_path, "prepared_long": tmp_path, "others": [], "rates": {}},
        **{"hidden_size": 64, "layers": 1, "bert_mlp": 6, "rows": 8, "minutes": [5, 10]},
        **{"tasks": ["sst2"], "finetune": "", "finetune_rates": [1e-4], "finetune_seeds": [1]},
        **{"cola": None, "output_dir": tmp_path},
    )
    args.rates = pareto.RATES
    before = pareto.folder_of(args, "mosaic", 1)
    # Nor on how long it is trained afterwards.
    args.tasks, args.cola, args.minutes = ["sst2", "stsb"], Path("dev.jsonl"), [5, 10, 20]
    assert pareto.folder_of(args, "mosaic", 1) == before
    args.minutes = [10, 20]
    assert pareto.folder_of(args, "mosaic", 1) != before


def test_a_run_has_its_loss_from_any_record_and_scores_of_the_same_fine_tuning(
    tmp_path, monkeypatch
):
    here = {"device": "Chip", "cpu_instructions": [], "torch": "2", "transformers": "5"}
    monkeypatch.setattr(pareto, "environment", lambda: here)
    monkeypatch.setattr(pareto, "of_training", lambda args, name, seed: {"seed": seed})
    args = SimpleNamespace(results=tmp_path, plan=[("mosaic", 5, 1)], tasks=["sst2"], cola=None)
    args.finetune, args.finetune_rates, args.finetune_seeds = "--max_steps 4", [1e-4], [1]
    run = {"model": "mosaic", "minutes": 5, "seed": 1, "settings": {"seed": 1}, "eval_loss": 4.0}
    run |= here | {"seconds_by_trial": 300.0}
    of_these = pareto.of_finetuning(args)
    plain = {"finetuning": {}, "scores": {}}
    tuned = {"finetuning": of_these, "scores": {"sst2": [0.8]}}
    longer = {"finetuning": of_these | {"finetune": "--max_steps 8"}, "scores": {"sst2": [0.9]}}
    old = {"finetuning": of_these, "scores": {"sst2": [0.7]}, "seconds_by_trial": None}

    def written(*records):
        lines = [json.dumps({k: v for k, v in (run | x).items() if v is not None}) for x in records]
        (tmp_path / "pareto.jsonl").write_text("\n".join(lines))
        found = pareto.results(args).get(("mosaic", 5, 1))
        return found and (found["scores"], found.get("cola_auc")), bool(pareto.finished(args))

    assert written(old) == (None, False)
    assert written(old, longer) == (({}, None), False)
    for records in ((plain, tuned), (tuned, plain), (longer, tuned, plain)):
        assert written(*records) == (({"sst2": [0.8]}, None), True)
    args.cola = "dev.jsonl"
    assert written(tuned) == (({"sst2": [0.8]}, None), False)
    assert written(tuned, plain | {"cola_auc": 0.6}) == (({"sst2": [0.8]}, 0.6), True)
    args.tasks, args.cola = [], None
    assert written(tuned) == (({}, None), True)


def test_budgets_that_are_no_multiples_are_refused(monkeypatch, capsys):
    words = "--prepared_data x --tasks --minutes 7.5 5 10 --models mosaic"
    monkeypatch.setattr("sys.argv", ["pareto.py", *words.split()])
    with pytest.raises(SystemExit):
        pareto.main()
    assert "--minutes: 7.5 is no multiple of the shortest, 5" in capsys.readouterr().err


SLEEPS = """
import time
from mosaic_tools import callbacks

clock = callbacks.time.perf_counter
began = clock()
time.sleep(0.3)
slept = clock() - began
while clock() - began < 0.05:
    pass
print("SLEPT" if slept < 0.05 else "COUNTED", time.perf_counter is not clock)
"""


def test_the_clock_counts_what_the_process_computes(tmp_path):
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    script = ROOT / "benchmarks" / "learning" / "cpu_clock.py"
    assert "SLEPT True" in run(tmp_path, script, tmp_path / "sleeps.py")


def test_each_item_has_a_core_of_its_own(tmp_path, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    writes = "import os, sys; print(os.sched_getaffinity(0), file=open(sys.argv[1], 'w'))"

    def work(name, execute):
        execute(["-c", writes, tmp_path / f"{name}-1"])
        execute(["-c", writes, tmp_path / f"{name}-2"])

    side_by_side.each_on_a_core(work, ["a", "b", "c"])
    found = {x.name: x.read_text().strip() for x in tmp_path.iterdir()}
    assert all(found[f"{name}-1"] == found[f"{name}-2"] for name in "abc") and len(found) == 6
    assert set(found.values()) <= {str({core}) for core in cores}
    with pytest.raises(SystemExit, match="failed: a"):
        side_by_side.run({"a": ["-c", "raise SystemExit(1)"]})


@torch.inference_mode()
def test_a_sentence_scores_what_its_tokens_have_where_each_is_masked(build, tmp_path):
    words = dict.fromkeys(" ".join(DOCUMENTS).split())
    tokenizer = BertTokenizerFast(str(write_vocab(tmp_path / "vocab.txt", *words)))
    model = build()
    sentences = ["the old reader", "a", *DOCUMENTS[:3]]
    expected = []
    for sentence in sentences:
        ids = tokenizer(sentence)["input_ids"]
        found = []
        for i in range(1, len(ids) - 1):
            masked = [*ids[:i], tokenizer.mask_token_id, *ids[i + 1 :]]
            logits = model(torch.tensor([masked])).logits[0, i].double()
            found.append((logits[ids[i]] - logits.logsumexp(0)).item())
        expected.append(sum(found) / len(found))
    for rows in (3, 256):
        found = acceptability.score(model, tokenizer, sentences, rows)
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def figures(monkeypatch):
    """Those that pareto_results.py draws."""
    drawn = []
    monkeypatch.setattr(
        pareto_results, "Figure", lambda **x: drawn.append(Figure(**x)) or drawn[-1]
    )
    return drawn


def test_the_figure_has_what_is_known_of_each_model(tmp_path, figures):
    run = {"seed": 1, "seconds_by_trial": 60.0, "tokens": 10**6, "flop": 1e12, "scores": {}}
    runs = [
        run | {"model": "mosaic", "eval_loss": 4.0, "minutes": 1, "cola_auc": 0.6},
        run | {"model": "bert", "eval_loss": 5.0, "minutes": 1, "scores": {"sst2": [0.7, 0.8]}},
        run | {"model": "untrained", "eval_loss": 9.0, "minutes": 0, "cola_auc": 0.5},
    ]
    rows = [pareto_results.summary([x], runs[:1], runs[2:]) for x in runs]
    pareto_results.draw(rows, ["sst2", "stsb"], tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 1000
    panels = figures[0].axes[:3]
    assert len(figures[0].axes) == 6
    heights = {
        panel.get_ylabel(): [y for line in panel.lines for y in set(line.get_ydata())]
        for panel in panels
    }
    labels = (pareto_results.LABELS[x] for x in ("loss", "sst2", "cola_auc"))
    found = [[round(y, 3) for y in heights[x]] for x in labels]
    assert [set(x) for x in found] == [{4.0, 5.0}, {0.7, 0.75, 0.8}, {0.6, 0.5}]
    named = [x.get_text() for x in figures[0].legends[0].texts]
    assert named == ["MosaicBERT", "BERT, same recipe", "no pre-training"]
    pareto_results.draw(rows[1:2], [], tmp_path / "loss.png")
    assert len(figures[1].axes) == 2


def test_the_figure_of_differences_has_a_dot_for_each_seed(tmp_path, figures):
    # At 2 minutes MosaicBERT has 5.0 and 5.2; at 2^0.5, halfway to what it has at 1, 5.6.
    losses = {("mosaic", 1): (6.0, 6.2), ("mosaic", 2): (5.0, 5.2)}
    losses |= {("no_glu", 2): (5.7, 5.9), ("muon", 2): (4.9, 4.8)}
    cost = {("no_glu", 2): 2**0.5}
    runs = {
        (model, minutes): [
            {"model": model, "minutes": minutes, "seed": seed, "eval_loss": loss, "scores": {}}
            | {"seconds_by_trial": 60.0 * cost.get((model, minutes), minutes)}
            | {"tokens": 10**6 * minutes, "flop": 1e12 * minutes}
            for seed, loss in enumerate(found)
        ]
        for (model, minutes), found in losses.items()
    }
    ours = runs["mosaic", 1] + runs["mosaic", 2]
    rows = [pareto_results.summary(x, ours, []) for x in runs.values()]
    pareto_results.draw_differences(rows, ours, tmp_path / "differences.png")
    assert (tmp_path / "differences.png").stat().st_size > 1000
    minutes, tokens = figures[0].axes
    assert [x.get_text() for x in minutes.get_yticklabels()] == ["no GLU", "Muon"]

    def dots(panel):
        return [line.get_xdata() for line in panel.lines if line.get_marker() == "o"]

    for panel, no_glu in ((minutes, [0.1, 0.3]), (tokens, [0.6, 0.8])):
        for found, expected in zip(dots(panel), (no_glu, [-0.2, -0.3]), strict=True):
            assert found == pytest.approx(expected)


@pytest.mark.slow
def test_a_toy_run_records_draws_and_is_not_repeated(tmp_path):
    # Rows of 12 tokens, some of which are padding, enough of them that no batch is without a mask:
    # transformers' BERT has a loss of nan there.
    texts = [*DOCUMENTS, *(f"{x} and {x}" for x in DOCUMENTS)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    rows = [json.dumps({"sentence": x, "label": int(" old " in x)}) for x in DOCUMENTS]
    for split in ("train", "dev"):
        (tmp_path / "glue" / "sst2" / f"{split}.jsonl").write_text("\n".join(rows))
    text = {"train_file": "text.txt", "validation_split": 20}
    preparing = [
        flags(**text, max_seq_length=12, prepared_data="short", vocab_size=80),
        flags(**text, max_seq_length=24, prepared_data="long", tokenizer_name="short"),
    ]
    others = ("bert_old", "learned_positions", "padding_kept", "dense_logits", "untrained")
    words = [
        *flags(prepared_data="short", prepared_long="long", glue="glue", output_dir="out"),
        *flags(results=".", tasks="sst2", hidden_size=64, layers=1, rows=16),
        *("--finetune", "--max_steps 2", "--finetune_seeds", 1, 2, "--finetune_rates", 1e-4, 1e-3),
        *("--adam_beta1", 0.8, "--seeds", 1, "--minutes", 1e-4, 2e-4),
        *("--models", "mosaic", *others),
    ]
    said = run_python(
        f"""
{RUN_IN_PLACE}
from benchmarks.learning import pareto

for words in {[[str(x) for x in words] for words in preparing]}:
    run({{"": [{str(ROOT / "prepare_data.py")!r}, *words]}})

def in_turn(work, items):
    for item in items:
        work(item, lambda words: run({{"": words}}))

pareto.TRIAL, pareto.each_on_a_core = 10, in_turn
draw = ["--draw_only", "--seeds", "1", "3"]
for more in ([], [], ["--models", "mosaic", "--seeds", "1", "2"], draw):
    print("AGAIN")
    sys.argv[1:] = {[str(x) for x in words]} + more
    pareto.main()
""",
        tmp_path,
    )
    _, *runs = said.split("AGAIN")
    # Trials; trunks; budgets; fine-tuning at two rates, and at the best of each budget.
    once = (5, 4, 2 + 2 + 3 + 1, 2 * 6, 2 + 2 + 3 + 1)
    assert [x.count("RUN") for x in runs] == [sum(once), 0, 1 + 2 + 2 + 2, 0]
    records = [json.loads(line) for line in (tmp_path / "pareto.jsonl").read_text().splitlines()]
    assert len(records) == 8 + 2 and (tmp_path / "pareto.png").is_file()
    for record in records:
        assert math.isfinite(record["eval_loss"]) and record["flop"] > 0 and record["seconds"] > 0
        assert record["settings"]["others"] == ["--adam_beta1", "0.8"]
        trial = next((tmp_path / "out").glob(f"{record['model']}-0-*/log.jsonl"), None)
        assert (trial is None) == (record["model"] == "untrained")
        logs = map(json.loads, trial.read_text().splitlines()) if trial else []
        speeds = [x["samples_per_second"] for x in logs if "loss" in x][5:]
        rows = record["settings"]["global_batch_size"]
        expected = record["step"] * rows / statistics.median(speeds) if trial else 0
        assert record["seconds_by_trial"] == pytest.approx(expected, abs=0.06)
        assert len(record["scores"]["sst2"]) == 2
    steps = {x["minutes"]: x["step"] for x in records if x["model"] == "mosaic"}
    assert steps == {1e-4: 20, 2e-4: 40}
    # Among them padding_kept and dense_logits, which draw dropout for more tokens.
    assert len({record["eval_loss"] for record in records}) == 10
    # Of what is there, as the second time.
    assert runs[3].splitlines()[-1] == runs[1].splitlines()[-1]
    assert "8 of 16 runs are recorded" in runs[3]
    differences = json.loads(runs[0].splitlines()[-1])
    assert set(differences) == set(others) - {"untrained"}
