# SPDX-License-Identifier: Apache-2.0
"""embedding_trainer.py: the encoder is the checkpoint's, the loss is sentence-transformers' own,
batches hold no text twice and come from one source, and the evaluation counts what it says."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from conftest import run_python
from embeddings import PAIRS, RUN, SCORED, train, write_data
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoModel, AutoTokenizer

from mosaic_tools.embedding_trainer import (
    EmbedderArguments,
    EmbeddingArguments,
    EmbeddingTrainer,
    baselines,
    build_embedder,
    build_evaluator,
    build_loss,
    check_sources,
    describe_loss,
    prompts_of_columns,
    tfidf,
    with_negatives,
)
from mosaic_tools.pairs import PairArguments, as_pairs

pytest_plugins = ["finetuning"]

TEXTS = [x["passage"] for x in PAIRS]
ROWS = as_pairs("pairs", datasets.Dataset.from_list(PAIRS))
STS = as_pairs("scored", datasets.Dataset.from_list(SCORED))


def embedder_of(source, **values):
    data = PairArguments(max_seq_length=16, query_prompt="the ")
    return build_embedder(EmbedderArguments(model_name_or_path=str(source), **values), data)


@pytest.mark.parametrize("name", ["golden", "stock", "modern"])
def test_an_embedding_is_the_mean_of_the_checkpoints_hidden_states(name, request):
    folder = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"add_pooling_layer": False} if name == "golden" else {}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()
    texts = [*TEXTS[:3], "the book"]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        # transformers 4 hands out token types to a ModernBERT, which takes none.
        hidden = model(inputs["input_ids"], inputs["attention_mask"])[0]
    mask = inputs["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    embedder = embedder_of(folder).eval()
    torch.testing.assert_close(torch.from_numpy(embedder.encode(texts)), expected)
    assert getattr(embedder[0].model, "pooler", None) is None


def features(embedder, rows):
    names = [x for x in rows.column_names if x != "score"]
    return [embedder.tokenize(list(rows[name])) for name in names]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_whole_batch(golden, symmetric):
    """In mini-batches of 5 rows, by the cached loss; and plainly, by the library's."""
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    grads = []
    for cached in (True, False):
        embedder = embedder_of(golden, mini_batch_size=5, symmetric=symmetric).eval()
        if cached:
            args = EmbedderArguments(mini_batch_size=5, symmetric=symmetric)
            function = build_loss(ROWS, embedder, args, gather=False)
        else:
            function = MultipleNegativesRankingLoss(embedder, **both if symmetric else {})
        loss = function(features(embedder, ROWS), None)
        loss.backward()
        weight = embedder[0].model.encoder.layer[0].attention.self.Wqkv.weight
        grads.append((loss.detach(), weight.grad))
    assert grads[0][0] > 0.1 and grads[0][1].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_scored_pairs_have_cosent_and_dimensions_matryoshka(golden):
    embedder = embedder_of(golden).eval()
    loss = build_loss(STS, embedder, EmbedderArguments(), gather=False)
    labels = torch.tensor(STS["score"][:])
    found = loss(features(embedder, STS), labels)
    assert found == CoSENTLoss(embedder)(features(embedder, STS), labels) and found > 0
    # Dimensions beyond the last that is given were not trained.
    args = EmbedderArguments(matryoshka_dims=[16])
    loss = build_loss(ROWS, embedder, args, gather=False)
    assert describe_loss(ROWS, args).endswith(", of the first 16 dimensions and of all")
    assert isinstance(loss, MatryoshkaLoss) and list(loss.matryoshka_dims) == [96, 16]
    with pytest.raises(ValueError, match="matryoshka_dims 97: .* has embeddings of 96 dimensions"):
        embedder_of(golden, matryoshka_dims=[16, 97])


def arguments(folder, **values):
    given = {x: y for x, y in RUN.items() if x in ("per_device_train_batch_size", "max_steps")}
    given |= {"output_dir": str(folder), "bf16": False, "use_cpu": True}
    return EmbeddingArguments(**given | values)


def trainer_of(golden, sources, args):
    embedder = embedder_of(golden)
    losses = {x: build_loss(y, embedder, EmbedderArguments(), False) for x, y in sources.items()}
    return EmbeddingTrainer(embedder, args, sources, loss=losses)


def test_an_epoch_has_as_many_batches_as_its_schedule(golden, tmp_path):
    """With sentence-transformers 5.7 training ended early where many pairs share an answer."""
    answers = [0] * 8 + [*range(1, 5)]
    rows = [x | {"passage": PAIRS[i]["passage"]} for x, i in zip(PAIRS, answers, strict=True)]
    source = as_pairs("pairs", datasets.Dataset.from_list(rows))
    trainer = trainer_of(golden, {"pairs": source}, arguments(tmp_path))
    loader = trainer.get_train_dataloader()
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert sum(1 for _ in loader) == len(loader) > 0


def test_batches_hold_no_text_twice_and_are_of_one_source(golden, tmp_path):
    # Every row twice, of which only one can be in a batch.
    sources = {"twice": datasets.concatenate_datasets([ROWS, ROWS]), "scored": STS}
    args = arguments(tmp_path)
    args.prompts = prompts_of_columns(sources, {"query": "the ", "document": "a "})
    trainer = trainer_of(golden, sources, args)
    seen, decode = [], trainer.model.tokenizer.batch_decode
    for batch in trainer.get_train_dataloader():
        seen.append(batch["dataset_name"])
        scored = seen[-1] == "scored"
        columns = ("sentence1", "sentence2") if scored else ("anchor", "positive")
        texts = [decode(batch[f"{x}_input_ids"], skip_special_tokens=True) for x in columns]
        assert len(texts[0]) == 4 and ("label" in batch) == scored
        assert len({*texts[0], *texts[1]}) == 8 or scored
        # "the the old man", and "a the old man"; scored pairs have no prompts.
        starts = [{x.split()[0] + x.split()[1] for x in column} for column in texts]
        assert scored or starts == [{"thethe"}, {"athe"}]
        assert not scored or all(not x.startswith(("thethe", "athe")) for x in starts[0])
    assert seen.count("twice") == 6 and seen.count("scored") == 5


def batches_of(loader, epoch):
    loader.set_epoch(epoch)
    return [tuple(x) for x in loader.batch_sampler]


def test_two_devices_have_parts_of_one_batch(golden, tmp_path, monkeypatch):
    """Of different sources they waited for each other for ever: one compared pairs with those of
    both, and the other had scored pairs. Epochs differ with every transformers."""
    monkeypatch.setattr(EmbeddingArguments, "world_size", 2)
    sources = {"twice": datasets.concatenate_datasets([ROWS, ROWS]), "scored": STS}
    loader = trainer_of(golden, sources, arguments(tmp_path)).get_train_dataloader()
    shards = [BatchSamplerShard(loader.batch_sampler, 2, i, split_batches=True) for i in (0, 1)]
    loaders = [DataLoaderShard(loader.dataset, batch_sampler=x) for x in shards]
    texts, epochs = sources["twice"]["anchor"][:], []
    for epoch in (0, 1):
        # One after the other, since here they share a generator.
        batches = list(zip(*(batches_of(x, epoch) for x in loaders), strict=True))
        for parts in batches:
            assert [len(x) for x in parts] == [4, 4]
            rows = [*parts[0], *parts[1]]
            assert len({row < len(texts) for row in rows}) == 1
            assert rows[0] >= len(texts) or len({texts[row] for row in rows}) == 8
        epochs.append(batches)
    assert len(epochs[0]) == 3 + 2 and epochs[0] != epochs[1]


def test_sources_have_batches_by_their_weights(golden, tmp_path):
    """Of 3 and 5 batches, by 3 to 1: 6, which start over in another order, and 2."""
    sources = {"pairs": ROWS, "scored": STS}
    loader = trainer_of(golden, sources, arguments(tmp_path, source_weights=[3, 1]))
    loader = loader.get_train_dataloader()
    epochs = [batches_of(loader, epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and len(loader) == 8
    seen = []
    for batches in epochs:
        pairs = [x for x in batches if max(x) < len(ROWS)]
        assert len(pairs) == 6 and len({frozenset(x) for x in pairs}) > 3
        assert all(min(x) >= len(ROWS) for x in batches if x not in pairs) and len(batches) == 8
        seen.append({frozenset(x) for x in pairs})
        # Two passes: each reads every row.
        assert sorted(sum(pairs[:3], ())) == sorted(sum(pairs[3:], ())) == list(range(len(ROWS)))
    assert seen[0] != seen[1]


def test_each_epoch_has_other_batches(golden, tmp_path):
    """With sentence-transformers 5.7 only the order of sources was another."""
    loader = trainer_of(golden, {"pairs": ROWS, "scored": STS}, arguments(tmp_path))
    loader = loader.get_train_dataloader()
    first, second = ({frozenset(x) for x in batches_of(loader, epoch)} for epoch in (0, 1))
    assert first != second


def test_a_source_of_little_weight_has_a_batch(golden, tmp_path):
    args = arguments(tmp_path, source_weights=[1e-3, 1])
    loader = trainer_of(golden, {"pairs": ROWS, "scored": STS}, args).get_train_dataloader()
    assert sum(max(x) < len(ROWS) for x in batches_of(loader, 0)) == 1 and len(loader) == 9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source_weights": [1, 0]}, r"source_weights are \[1, 0\]: each must be a number above 0"),
        ({"source_weights": [float("nan")]}, "each must be a number above 0"),
        (
            {"source_weights": [1, 2], "multi_dataset_batch_sampler": "round_robin"},
            "give --source_weights or --multi_dataset_batch_sampler, not both",
        ),
        ({"source_weights": [1]}, r"are \[1\] for the 2 source\(s\) pairs, scored: give as many"),
    ],
)
def test_weights_that_do_not_fit_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_sources({"pairs": ROWS, "scored": STS}, arguments(tmp_path, **values))


def test_a_batch_must_fit_the_data_without_a_text_twice(tmp_path, monkeypatch):
    twice = datasets.concatenate_datasets([ROWS, ROWS])

    def check(rows, devices, **sources):
        monkeypatch.setattr(EmbeddingArguments, "world_size", devices)
        check_sources(sources, arguments(tmp_path, per_device_train_batch_size=rows))

    check(12, 1, pairs=ROWS)
    check(4, 2, pairs=ROWS, scored=STS)
    check(6, 2, twice=twice)
    for rows, batch, devices in ((ROWS, 13, 1), (ROWS, 7, 2), (twice, 13, 1), (twice, 7, 2)):
        with pytest.raises(ValueError, match=f"a batch of {batch * devices} on {devices} device"):
            check(batch, devices, pairs=rows)


def test_mined_negatives_are_texts_of_other_pairs(golden):
    found = with_negatives({"pairs": ROWS}, 2, embedder_of(golden).eval(), 8)["pairs"]
    assert found.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert len(found) == len(ROWS)
    positives = dict(zip(ROWS["anchor"], ROWS["positive"], strict=True))
    for row in found:
        assert row["positive"] == positives[row["anchor"]]
        negatives = {row["negative_1"], row["negative_2"]}
        assert len(negatives) == 2 and negatives <= set(TEXTS) - {row["positive"]}
    with pytest.raises(ValueError, match="pairs has the columns anchor, positive, negative_1, neg"):
        with_negatives({"pairs": found}, 1, None, 8)
    with pytest.raises(ValueError, match="pairs has 12 texts: --mine_hard_negatives 12 needs more"):
        with_negatives({"pairs": ROWS}, 12, None, 8)


def test_an_anchor_is_never_its_own_negative(golden):
    """Of pairs in both orders it was the nearest text, and not the positive."""
    turned = ROWS.rename_columns({"anchor": "positive", "positive": "anchor"})
    rows = datasets.concatenate_datasets([ROWS, turned.select_columns(["anchor", "positive"])])
    found = with_negatives({"pairs": rows}, 2, embedder_of(golden).eval(), 8)["pairs"]
    assert found.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert len(found) == 24
    for row in found:
        assert len(set(row.values())) == 4


def test_the_evaluation_ranks_held_out_texts(golden):
    """By words alone: a text is first, one second, and one not among the ten that share a word."""
    texts = [f"epsilon w{i}" for i in range(12)]
    pairs = [("alpha beta", "alpha beta"), ("alpha", "alpha beta gamma"), ("epsilon w0", "delta")]
    pairs += [(text.split()[1], text) for text in texts]
    rows = dict(zip(("anchor", "positive"), zip(*pairs, strict=True), strict=True))
    evaluator = build_evaluator({"pairs": datasets.Dataset.from_dict(rows)}, 8, [])
    found = tfidf(evaluator.evaluators[0])
    assert found["eval_cosine_mrr@10"] == pytest.approx((13 + 0.5) / 15)
    assert found["eval_cosine_recall@10"] == pytest.approx(14 / 15)
    ndcg = (13 + 1 / torch.tensor(3.0).log2().item()) / 15
    assert found["eval_cosine_ndcg@10"] == pytest.approx(ndcg)
    embedder = embedder_of(golden).eval()
    before = {x: y.clone() for x, y in embedder.state_dict().items()}
    state = torch.get_rng_state()
    found = baselines(embedder, evaluator, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(y, before[x]) for x, y in embedder.state_dict().items())
    by_chance = found["random weights"]
    assert by_chance != {f"eval_{x}": y for x, y in evaluator(embedder).items()}
    assert 0 < by_chance["eval_cosine_ndcg@10"] < 1


def test_scored_pairs_are_evaluated_by_rank(golden):
    evaluator = build_evaluator({"scored": STS}, 8, [])
    assert -1 <= evaluator(embedder_of(golden).eval())["spearman_cosine"] <= 1
    assert baselines(None, evaluator, seed=1) == {}


def test_first_dimensions_are_evaluated_beside_the_whole(golden):
    embedder, sources = embedder_of(golden).eval(), {"pairs": ROWS, "scored": STS}
    whole = build_evaluator(sources, 8, [])
    found = build_evaluator(sources, 8, [4])(embedder)
    expected = whole(embedder)
    embedder.truncate_dim = 4
    parts = {f"dim_4_{name}": x for name, x in whole(embedder).items() if name in found}
    del parts["dim_4_sequential_score"]
    assert found == parts | expected
    assert found["dim_4_spearman_cosine"] != found["spearman_cosine"] == found["sequential_score"]


def test_texts_without_words_have_no_figure_by_words():
    rows = datasets.Dataset.from_dict({"anchor": ["-", "+"], "positive": ["!", "?"]})
    assert tfidf(build_evaluator({"pairs": rows}, 8, []).evaluators[0]) == {}
    rows = datasets.Dataset.from_dict({"anchor": ["a b", "c"], "positive": ["b a", "c d"]})
    assert tfidf(build_evaluator({"pairs": rows}, 8, []).evaluators[0])["eval_cosine_mrr@10"] == 1


def test_the_encoder_has_what_the_arguments_say(golden):
    config = embedder_of(golden, low_precision_layernorm=False)[0].model.config
    assert config.low_precision_layernorm is False and config.attention_probs_dropout_prob == 0
    assert embedder_of(golden)[0].model.config.low_precision_layernorm is True
    data = PairArguments(max_seq_length=3000)
    embedder = build_embedder(EmbedderArguments(model_name_or_path=str(golden)), data)
    config = embedder[0].model.config
    assert config.alibi_starting_size == config.max_position_embeddings == 3000
    assert embedder.max_seq_length == 3000


def test_a_model_with_more_than_the_mean_is_refused(golden, tmp_path):
    for module in (Dense(96, 8), Pooling(96, pooling_mode="cls")):
        base = embedder_of(golden)
        modules = [base[0], module] if isinstance(module, Pooling) else [*base, module]
        kind = type(module).__name__
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / kind))
        with pytest.raises(ValueError, match=f"has a module {kind} that is not the mean"):
            embedder_of(tmp_path / kind)


def test_what_is_missing_is_named(golden, tmp_path):
    with pytest.raises(ValueError, match="give --model_name_or_path"):
        embedder_of("")
    with pytest.raises(ValueError, match="nowhere"):
        embedder_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give --query_prompt and --document_prompt in place of"):
        EmbeddingArguments(output_dir="out", prompts="query: ")
    with pytest.raises(ValueError, match="in place of --global_batch_size"):
        EmbeddingArguments(output_dir="out", global_batch_size=8)


def test_without_sentence_transformers_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['sentence_transformers'] = None; sys.path.insert(0, '.')\n"
        "try:\n    import train_embeddings\nexcept ImportError as error:\n    print(error)"
    )
    said = run_python(code)
    assert said == "train_embeddings.py needs: pip install 'sentence-transformers >= 5.7'\n"


def test_a_model_is_a_sentence_transformer_with_the_prompts(golden):
    embedder = embedder_of(golden)
    assert isinstance(embedder, SentenceTransformer)
    assert embedder.prompts == {"query": "the ", "document": ""} and embedder.max_seq_length == 16


def test_prompts_that_are_not_given_are_the_models(golden, tmp_path):
    """A third stage lost those of the second."""
    embedder_of(golden).save(str(tmp_path))
    args = EmbedderArguments(model_name_or_path=str(tmp_path))
    for given, expected in (({}, "the "), ({"query_prompt": ""}, ""), ({"query_prompt": "q"}, "q")):
        prompts = build_embedder(args, PairArguments(**given, document_prompt="d")).prompts
        assert prompts == {"query": expected, "document": "d"}


def test_vectors_of_length_1_stay_so(golden, tmp_path):
    """A second stage lost the module, and dot products in an index were no cosines any more."""
    embedder = embedder_of(golden)
    assert [type(x).__name__ for x in embedder] == ["Transformer", "Pooling"]
    embedder.append(Normalize())
    embedder.save(str(tmp_path / "source"))
    embedder = embedder_of(tmp_path / "source")
    trained = SimpleNamespace(model=embedder, processing_class=embedder.tokenizer)
    embedder[0].model.save_pretrained(tmp_path / "out")
    EmbeddingTrainer.finish_folder(trained, tmp_path / "out")
    saved = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    lengths = saved.encode(TEXTS, convert_to_tensor=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(len(TEXTS)), rtol=1e-6, atol=0)


def test_several_processes_have_no_smaller_last_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(EmbeddingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="dataloader_drop_last false: .* to 2 processes"):
        EmbeddingArguments(output_dir=str(tmp_path), dataloader_drop_last=False)
    assert EmbeddingArguments(output_dir=str(tmp_path)).dataloader_drop_last


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(golden, tmp_path, monkeypatch, logging_steps):
    """It trained on, and wrote a model of nan with a card that gave it an nDCG@10 of 0.55; and so
    where no step is logged."""
    values = write_data(tmp_path) | {"learning_rate": 1e30, "max_grad_norm": 0}
    with pytest.raises(FloatingPointError, match="the loss is nan. Try a lower --learning_rate"):
        train(monkeypatch, model=golden, logging_steps=logging_steps, max_steps=3, **values)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_no_checkpoint_has_weights_that_are_not_finite(golden, tmp_path, monkeypatch):
    """Where no step was logged between, it passed for complete, and every later run began there."""
    values = {"learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(FloatingPointError, match="nan or infinity in .*checkpoint-1. Repeat"):
        train(monkeypatch, model=golden, logging_steps=100, **values, **write_data(tmp_path))
    weights = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())
