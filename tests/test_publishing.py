# SPDX-License-Identifier: Apache-2.0
"""publishing.py: what would be sent to the Hub, what never is, an upload that fails, and cards."""

import json
import os
import re
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from conftest import GOLDENS, MODEL_FILES, run_python
from hub import FILES_OF_OLD_TOKENIZERS, TOKEN, TOKENIZER_FILES
from huggingface_hub import EvalResult, ModelCard
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.models import Dense, Normalize, Router
from training import write_vocab

import convert_weights
from mosaic_tools import cards, publishing

pytest_plugins = ["hub"]


@pytest.fixture
def vocab(tmp_path):
    return write_vocab(tmp_path / "vocab.txt", entries=320)


def convert(vocab, out, *flags):
    arguments = (GOLDENS / "mosaic_tiny", out, "--tokenizer", vocab, *flags)
    convert_weights.main([str(x) for x in arguments])


def contents(folder):
    return {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_convert_weights_sends_the_whole_model_in_one_commit(hub, vocab, tmp_path, capsys):
    convert(vocab, tmp_path / "out", "--push_to_hub", "org/name")
    assert hub.calls == ["create_repo", "upload_folder None"]
    wanted = {"model.safetensors", "config.json", "README.md", *MODEL_FILES, *TOKENIZER_FILES}
    assert set(hub.sent) - FILES_OF_OLD_TOKENIZERS == wanted
    auto_map = json.loads(hub.sent["config.json"])["auto_map"]
    # No "other/name--": the code is the repository's own.
    assert {x.split(".")[0] + ".py" for x in auto_map.values()} <= set(MODEL_FILES)
    assert "# org/name" in hub.sent["README.md"].decode()
    printed = capsys.readouterr()
    assert "https://huggingface.co/org/name/commit/1" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in x for x in hub.sent.values())


def test_what_an_earlier_upload_left_of_other_weights_is_named(hub, vocab, tmp_path, capsys):
    """Clients went on reading the old graph, and transformers put the old adapter on."""
    stale = ["adapter_config.json", "onnx/model.onnx", "modules.json"]
    hub.there += [*stale, "model.safetensors", "notes.md"]
    convert(vocab, tmp_path / "out", "--push_to_hub", "org/name")
    said = capsys.readouterr().out
    assert f"org/name still has {', '.join(sorted(stale))} of an earlier upload" in said
    assert not {"notes.md", ".gitattributes", "model.safetensors"} & set(re.split("[ ,]+", said))


def test_a_graph_is_not_put_over_a_model_for_pytorch(hub, vocab, tmp_path):
    """Its config made a stock BERT of random layers of what everyone loaded from there."""
    folder = tmp_path / "out"
    convert(vocab, folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").touch()
    for file in (*folder.glob("*.py"), folder / "model.safetensors"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {}}))
    for name in ("model.safetensors", "pytorch_model.bin"):
        hub.there = [name]
        with pytest.raises(ValueError, match="org/name has a model for PyTorch.*nothing was upl"):
            publishing.publish(folder, "org/name")
    assert not hub.sent
    hub.there = ["config.json", "onnx/model.onnx"]
    publishing.publish(folder, "org/name")
    assert "onnx/model.onnx" in hub.sent


def test_a_branch_and_a_private_repository(hub, vocab, tmp_path):
    flags = ("--push_to_hub", "org/name", "--private", "--revision", "v2")
    convert(vocab, tmp_path / "out", *flags)
    assert hub.calls == ["create_repo", "create_branch v2", "upload_folder v2"]
    assert hub.repositories == {"org/name": True}


def test_nothing_private_goes_to_a_repository_that_is_public(hub, vocab, tmp_path):
    """The Hub ignores `private` for a repository that exists."""
    convert(vocab, tmp_path / "out")
    hub.repositories["org/name"] = False
    with pytest.raises(ValueError, match="org/name exists and is public: nothing was uploaded"):
        publishing.publish(tmp_path / "out", "org/name", private=True)
    assert hub.sent == {} and hub.calls == ["create_repo"]


def test_jinas_layout_is_sent_with_its_pooling_and_without_code(hub, vocab, tmp_path):
    convert(vocab, tmp_path / "out", "--layout", "jina", "--push_to_hub", "org/name")
    wanted = {"model.safetensors", "config.json", "README.md", *TOKENIZER_FILES}
    wanted |= {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert set(hub.sent) - FILES_OF_OLD_TOKENIZERS == wanted


def write(folder, *names, content="content"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_what_training_leaves_in_the_folder_stays_there(hub, vocab, tmp_path):
    """Optimizer states are large, and pickles and secrets nobody's business."""
    out = tmp_path / "out"
    convert(vocab, out)
    expected = {x.name for x in out.iterdir()}
    names = ("model.safetensors", "config.json", "optimizer.pt", "global/README.md")
    write(out / "checkpoint-10", *names, content=TOKEN)
    left = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin")
    left += ("trainer_state.json", "all_results.json", "log.jsonl", "pytorch_model.bin")
    left += ("events.out.tfevents.1", "runs/events.out.tfevents.1", "unseen.png", "notes.txt")
    # Pickles where others look for files of theirs, and data that no README shows.
    left += ("onnx/optimizer.pt", "onnx/model.pkl", "openvino/pytorch_model.bin")
    left += ("2_Dense/pytorch_model.bin", "step-7-process-0.safetensors")
    # Nobody's import.
    left += ("upload.py", "1_Pooling/notes.py")
    write(out, *left, ".env", "token", content=TOKEN)
    publishing.publish(out, "org/name")
    assert set(hub.sent) == expected


def test_exports_are_sent_with_their_weights(hub, vocab, tmp_path):
    """Other libraries read them instead of our weights: they were left behind."""
    out = tmp_path / "out"
    convert(vocab, out)
    expected = {x.name for x in out.iterdir()}
    exports = {f"onnx/{x}" for x in ("model.onnx", "model.onnx_data", "model.onnx.data")}
    exports |= {"onnx/model_quantized.onnx", "openvino/openvino_model.xml"}
    exports |= {"openvino/openvino_model.bin", "LICENSE", "chat_template.jinja"}
    exports |= {"adapter_config.json", "adapter_model.safetensors", "pictures/a-1.png"}
    write(out, *exports, "onnx/pytorch_model.bin", "openvino/other.bin", "pictures/b.png")
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(f"{card}\n![Loss](pictures/a-1.png) ![x](../vocab.txt.png)\n")
    write(tmp_path, "vocab.txt.png")
    publishing.publish(out, "org/name")
    assert set(hub.sent) == expected | exports


def encoder(folder, kind):
    """What sentence-transformers makes of a folder, by modules in folders of their own."""
    if kind == "SPLADE":
        return SparseEncoder(str(folder), trust_remote_code=True, device="cpu")

    def dense():
        return list(SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"))

    torch.manual_seed(0)
    modules = [Router.for_query_document(dense(), dense())]
    if kind == "Dense":
        modules = [*dense(), Dense(96, 8), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize("kind", ["SPLADE", "Dense"])
def test_sentence_transformers_reads_what_was_sent_as_what_it_saved(hub, vocab, tmp_path, kind):
    """A published SPLADE model had lost its pooling: only mean pooling's own files were sent."""
    convert(vocab, tmp_path / "out")
    before = encoder(tmp_path / "out", kind)
    before.save_pretrained(str(tmp_path / "saved"))
    publishing.publish(tmp_path / "saved", "org/name")
    for name, content in hub.sent.items():
        (tmp_path / "sent" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sent" / name).write_bytes(content)
    after = type(before)(str(tmp_path / "sent"), trust_remote_code=True, device="cpu")
    texts = ["w5 w6 w7", "w8 w9"]
    x, y = (model.encode(texts, convert_to_tensor=True) for model in (before, after))
    x, y = (z.to_dense() if z.is_sparse else z for z in (x, y))
    assert x.shape == (2, 320 if kind == "SPLADE" else 8)
    assert x.isfinite().all() and x.abs().max() > 0
    assert torch.equal(x, y)


def test_both_models_of_a_router_are_sent(hub, vocab, tmp_path):
    """sentence-transformers itself loads them only where their code lies in the main folder too."""
    convert(vocab, tmp_path / "out")
    encoder(tmp_path / "out", "Router").save_pretrained(str(tmp_path / "saved"))
    publishing.publish(tmp_path / "saved", "org/name")
    assert set(hub.sent) == {
        x.relative_to(tmp_path / "saved").as_posix() for x in contents(tmp_path / "saved")
    }
    assert sum(x.endswith("Transformer/model.safetensors") for x in hub.sent) == 2
    (weights,) = (tmp_path / "saved").glob("query*Transformer/model.safetensors")
    weights.unlink()
    with pytest.raises(ValueError, match="it lacks query_0_Transformer/model.safetensors"):
        publishing.publish(tmp_path / "saved", "org/name")


def test_a_part_that_is_there_as_a_pickle_only_is_missed(hub, vocab, tmp_path):
    convert(vocab, tmp_path / "out")
    encoder(tmp_path / "out", "Dense").save_pretrained(str(tmp_path / "saved"))
    weights = tmp_path / "saved" / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="it lacks 2_Dense/model.safetensors"):
        publishing.publish(tmp_path / "saved", "org/name")
    write(tmp_path / "out", "adapter_config.json", "adapter_model.bin")
    with pytest.raises(ValueError, match="it lacks adapter_model.safetensors"):
        publishing.publish(tmp_path / "out", "org/name")
    assert hub.calls == []


def module(path):
    return json.dumps([{"idx": 0, "name": "0", "path": path, "type": "some.Module"}])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("modules.json", module("../other"), "'../other' leads out of"),
        ("modules.json", module("1_Pooling/../../other"), "leads out of"),
        ("modules.json", module("/etc"), "'/etc' leads out of"),
        ("modules.json", module("..\\other"), "leads out of"),
        ("modules.json", module("C:other"), "leads out of"),
        ("modules.json", module(1), "1 leads out of"),
        ("modules.json", module("linked"), "'linked' leads out of"),
        ("modules.json", module("1_SpladePooling"), "it lacks 1_SpladePooling"),
        ("modules.json", "[1]", "modules.json lists no modules by path and type"),
        ("modules.json", "{}", "modules.json holds a dict, expected a list"),
        ("modules.json", "[", "modules.json is not JSON"),
        ("router_config.json", '{"structure": {}, "types": {"../a": "x"}}', "'../a' leads out of"),
    ],
)
def test_modules_outside_the_folder_are_refused(hub, vocab, tmp_path, name, content, message):
    out = tmp_path / "out"
    convert(vocab, out)
    write(tmp_path / "other", "config.json", content=TOKEN)
    (out / "linked").symlink_to(tmp_path / "other")
    (out / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        publishing.publish(out, "org/name")
    assert hub.calls == []


@pytest.mark.parametrize(
    "auto_map, wrong",
    [
        ([1], "1"),
        (7, "7"),
        ("x.py", None),
        ({"AutoModel": "../../x.B"}, "'../../x.B'"),
        ({"AutoModel": [None, {}]}, "{}"),
        ({"AutoModel": "bert_layers"}, "'bert_layers'"),
    ],
)
def test_an_auto_map_that_names_no_classes_is_refused(hub, vocab, tmp_path, auto_map, wrong):
    out = tmp_path / "out"
    convert(vocab, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    message = "it lacks x.py" if wrong is None else f"auto_map names {wrong}, expected MODULE.CLASS"
    with pytest.raises(ValueError, match=re.escape(message)):
        publishing.publish(out, "org/name")
    assert hub.calls == []


def test_a_link_that_leads_out_is_not_sent(hub, vocab, tmp_path):
    out = tmp_path / "out"
    convert(vocab, out)
    write(tmp_path, "secret", content=TOKEN)
    (out / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="'added_tokens.json' leads out of"):
        publishing.publish(out, "org/name")
    assert hub.calls == []


def as_in_the_hubs_cache(folder, repository):
    """The folder's files as links from a snapshot to blobs, the snapshot's path returned."""
    snapshot = repository / "snapshots" / ("0" * 40)
    for file in [x for x in folder.rglob("*") if x.is_file()]:
        blob = repository / "blobs" / f"{abs(hash(file)):x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_sent(hub, vocab, tmp_path):
    """All its files are links, which lead out of it, but not of the repository's cache."""
    out = tmp_path / "out"
    convert(vocab, out, "--layout", "jina")
    snapshot = as_in_the_hubs_cache(out, tmp_path / "models--org--name")
    publishing.publish(snapshot, "org/name")
    assert set(hub.sent) == {x.relative_to(out).as_posix() for x in contents(out)}


def test_all_shards_are_sent_or_nothing(hub, vocab, tmp_path):
    out = tmp_path / "out"
    convert(vocab, out)
    model = transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
    (out / "model.safetensors").unlink()
    model.save_pretrained(out, max_shard_size="100kB")
    shards = {x.name for x in out.glob("model-*.safetensors")}
    assert len(shards) > 2
    publishing.publish(out, "org/name")
    assert {*shards, "model.safetensors.index.json"} <= set(hub.sent)
    missing = sorted(shards)[1]
    (out / missing).unlink()
    with pytest.raises(ValueError, match=f"lists files that are not there: {missing}"):
        publishing.publish(out, "org/name")


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required"),
        ConnectionError(f"could not send 'authorization: Bearer {TOKEN}'"),
        RuntimeError("the network is down"),
    ],
    ids=["not logged in", "quotes the token", "unforeseen"],
)
def test_a_failing_upload_leaves_the_folder_intact_and_says_what_to_do(
    hub, vocab, tmp_path, capsys, error
):
    hub.error, out = error, tmp_path / "out"
    with pytest.raises(OSError, match="was not uploaded to org/name, and is as it was") as found:
        convert(vocab, out, "--push_to_hub", "org/name")
    assert type(error).__name__ in str(found.value) and "hf auth login" in str(found.value)
    # Nor is it in what a traceback would print.
    assert TOKEN not in str(found.value) + capsys.readouterr().out
    assert found.value.__cause__ is None and found.value.__suppress_context__
    before = contents(out)
    model = transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
    assert model(torch.tensor([[2, 5, 3]])).logits.shape == (1, 3, 320)

    hub.error = None
    (again,) = [x for x in str(found.value).splitlines() if "python -c" in x]
    exec(again.split('"')[1])
    assert set(hub.sent) == {x.relative_to(out).as_posix() for x in before}
    assert contents(out) == before


@pytest.mark.parametrize("missing", ["README.md", "config.json", "model.safetensors", "bert_"])
def test_an_incomplete_folder_is_not_sent(hub, vocab, tmp_path, missing):
    out = tmp_path / "out"
    convert(vocab, out)
    for file in out.glob(f"{missing}*"):
        file.unlink()
    name = "bert_layers.py" if missing == "bert_" else missing
    with pytest.raises(ValueError, match=f"is no model to publish: it lacks {name}"):
        publishing.publish(out, "org/name")
    assert hub.calls == []


PLAIN = """
import sys, types
import transformers, transformers.utils.hub as hub
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

def create_repo(*args, **options):
    return types.SimpleNamespace(repo_id="org/name", url=None)

def create_commit(*args, operations, **options):
    print("commit", *(x.path_in_repo for x in operations))

def no_card_yet(*args, **options):
    raise EntryNotFoundError("README.md")

ModelCard.load, ModelCard.validate = no_card_yet, lambda *args, **options: None
for fake in (create_repo, create_commit):
    # transformers 4 and 5.0 call functions, later ones methods.
    setattr(hub, fake.__name__, fake)
    setattr(HfApi, fake.__name__, fake)
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub("org/name")
"""


def test_plain_push_to_hub_sends_weights_code_config_and_card(mosaic):
    printed = run_python(PLAIN, mosaic, HF_TOKEN=TOKEN)
    (commit,) = [x.split() for x in printed.splitlines() if x.startswith("commit")]
    assert set(commit[1:]) == {"README.md", "config.json", "model.safetensors", *MODEL_FILES}
    assert TOKEN not in printed


# ---- cards ----


def card_of(folder):
    """(metadata, text) of a card, whose metadata huggingface_hub reads and checks."""
    card = ModelCard.load(folder / "README.md")
    return card.data, card.text


def test_a_card_says_what_the_hub_filters_by(vocab, tmp_path):
    flags = ("--license", "cc-by-4.0", "--language", "no", "en")
    convert(vocab, tmp_path / "out", *flags)
    data, text = card_of(tmp_path / "out")
    assert data.license == "cc-by-4.0" and data.pipeline_tag == "fill-mask"
    # Not what YAML makes of a bare no.
    assert data.language == ["no", "en"]
    assert "arxiv:2312.17482" in data.tags and "https://arxiv.org/abs/2312.17482" in text
    assert "| language | no, en |" in text and "| licence of the weights | cc-by-4.0 |" in text
    for title in ("Intended use", "Limits and bias", "LoRA", "Citation"):
        assert f"\n## {title}\n" in text
    assert "@inproceedings{portes2023mosaicbert," in text


def test_what_is_not_known_stays_out_of_a_card_and_it_says_so(vocab, tmp_path):
    convert(vocab, tmp_path / "out")
    data, text = card_of(tmp_path / "out")
    assert data.license is None and data.language is None and data.eval_results is None
    assert "| language | not stated |" in text and "| licence of the weights | not stated |" in text
    front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert not re.search("license|language|model-index|model_name", front)


def test_a_served_folders_card_has_the_same_but_for_training(vocab, tmp_path):
    convert(vocab, tmp_path / "out", "--layout", "jina", "--language", "en")
    data, text = card_of(tmp_path / "out")
    assert data.pipeline_tag == "feature-extraction" and data.language == ["en"]
    assert "arxiv:2312.17482" in data.tags
    # Its matrices have Jina's names, and transformers 5 does not load it.
    assert "Wqkv" not in text and "## Citation" in text


def test_results_reach_the_hubs_index_of_models(vocab, tmp_path):
    folder = tmp_path / "out"
    convert(vocab, folder)
    results = [
        EvalResult("fill-mask", "custom", "text.txt", metric_type="loss", metric_value=1.5),
        EvalResult("fill-mask", "custom", "text.txt", metric_type="accuracy", metric_value=0.25),
    ]
    cards.write_card(folder, "name", "Summary.", {}, eval_results=results)
    data, _ = card_of(folder)
    assert data.model_name == "name"
    assert [(x.metric_type, x.metric_value) for x in data.eval_results] == [
        ("loss", 1.5),
        ("accuracy", 0.25),
    ]


def test_a_cards_embeddings_are_the_mean_of_each_texts_own_tokens(vocab, tmp_path):
    folder = tmp_path / "out"
    entries = vocab.read_text().split("\n")
    entries[5:12] = ["a", "sentence", ".", "and", "longer", "one", "b"]
    vocab.write_text("\n".join(entries))
    convert(vocab, folder)
    examples = re.findall(r"```python\n(.*?)```", card_of(folder)[1], re.S)
    (example,) = [x for x in examples if "embeddings" in x]
    found = {}
    exec(example.replace('"."', repr(str(folder))), found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert len(found["embeddings"]) == 2
    for text, embedding in zip(
        ["A sentence.", "And a longer one."], found["embeddings"], strict=True
    ):
        inputs = tokenizer(text, return_tensors="pt")
        assert (inputs["input_ids"] != tokenizer.unk_token_id).all()
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0].mean(0)
        assert torch.allclose(embedding, expected, atol=2**10 * torch.finfo(torch.float32).eps)
    assert not torch.allclose(*found["embeddings"], atol=0.1)


def test_loras_targets_are_all_matrices_of_the_layers(vocab, tmp_path):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "out"
    convert(vocab, folder)
    (targets,) = re.findall(r"`target_modules=(\[.*?\])`", card_of(folder)[1])
    model = transformers.AutoModel.from_pretrained(
        folder, trust_remote_code=True, add_pooling_layer=False
    )
    matrices = {n for n, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=json.loads(targets)))
    ours = {x.removesuffix(".lora_A") for x, _ in adapted.base_model.model.named_modules()}
    assert matrices and {x for x in matrices if x in ours} == matrices
    lora = {n for n, _ in adapted.named_modules() if n.endswith("lora_A")}
    assert len(lora) == len(matrices)


def test_a_licence_stated_by_its_link_is_taken_over_and_replaced_whole(vocab, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "mosaic_tiny", source)
    front = "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: de"
    (source / "README.md").write_text(f"---\n{front}\n---\n")
    for flags, wanted in [
        ((), {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
        (("--license", "mit"), {"license": "mit"}),
    ]:
        out = tmp_path / "-".join(("out", *flags))
        convert_weights.main([str(source), str(out), "--tokenizer", str(vocab), *flags])
        data = card_of(out)[0].to_dict()
        assert {k: x for k, x in data.items() if k.startswith("license")} == wanted
        assert data["language"] == "de"
