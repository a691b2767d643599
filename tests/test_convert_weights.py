# SPDX-License-Identifier: Apache-2.0
"""convert_weights.py: every layout in, one layout out, bit for bit; and what it refuses."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDENS, MODEL_FILES, ROOT, load_golden, run_python
from safetensors.torch import load_file, save_file
from training import write_vocab

import convert_weights
from mosaic_tools import family, layouts

MLM = GOLDENS / "mosaic_tiny" / "config.json"
DECODER = "cls.predictions.decoder.weight"


def run(*arguments):
    convert_weights.main([str(x) for x in arguments])


def write_source(folder, weights, config):
    """A checkpoint folder as on the Hub."""
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_composer(file, weights):
    """A Composer checkpoint, with the numpy random state that a plain weights_only load refuses."""
    state = {"model": {f"model.{name}": x for name, x in weights.items()}, "algorithms": []}
    random = {"python": (3, (1, 2), None), "numpy": np.random.RandomState(0).get_state()}
    torch.save({"state": state, "rng": [random]}, file)
    return file


def mlm_weights(name="mosaic_tiny"):
    head = ("bert.pooler", "classifier")
    return {k: v for k, v in load_golden(name)[1].items() if not k.startswith(head)}


def encoder_weights(pooler=False):
    """With the prefix, which without_prefix takes off."""
    weights = load_golden("mosaic_tiny")[1]
    names = ("bert.embeddings", "bert.encoder", "bert.pooler")[: 3 if pooler else 2]
    return {k: v for k, v in weights.items() if k.startswith(names)}


def without_prefix(weights):
    return {name.removeprefix("bert."): x for name, x in weights.items()}


def classification_weights():
    return {k: v for k, v in load_golden("mosaic_tiny")[1].items() if not k.startswith("cls.")}


def apart(weights):
    """The weights by Jina's names, as its checkpoints have them: q, k and v apart, no decoder."""
    theirs = {}
    for name, x in weights.items():
        if "Wqkv" in name:
            for i, part in enumerate(("query", "key", "value")):
                rows = x[i * len(x) // 3 : (i + 1) * len(x) // 3]
                theirs[name.replace("Wqkv", part)] = rows.clone()
        elif name != DECODER:
            theirs[name.replace("predictions.decoder.bias", "predictions.bias")] = x.clone()
    return theirs


def write_jina(folder, weights, config="jina_v2_tiny"):
    """A checkpoint folder in Jina's layout, with the golden's config."""
    folder.mkdir()
    shutil.copy(GOLDENS / config / "config.json", folder)
    save_file(weights, folder / "model.safetensors")
    return folder


def assert_holds(folder, weights):
    """The folder's tensors are these, bit for bit; the tied decoder is not stored."""
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(weights) - {DECODER}
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


def load(auto_class, folder):
    return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def vocab(tmp_path):
    return write_vocab(tmp_path / "vocab" / "vocab.txt", "a", "sentence", ".", entries=320)


# ---- what goes in comes out ----


def test_a_folder_from_the_hub(tmp_path):
    run(GOLDENS / "mosaic_tiny", tmp_path / "out")
    assert_holds(tmp_path / "out", mlm_weights())
    files = {x.name for x in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md", *MODEL_FILES}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = json.loads((ROOT / "config.json").read_text())
    assert config["auto_map"] == ours["auto_map"] and config["model_type"] == "mosaic_bert"
    assert config["architectures"] == ["BertForMaskedLM"]
    # Tools cut text at max_position_embeddings, which published configs leave at 512.
    assert config["alibi_starting_size"] == config["max_position_embeddings"] == 32
    source = json.loads(MLM.read_text())
    for name in ("hidden_size", "vocab_size", "attention_probs_dropout_prob", "pad_token_id"):
        assert config[name] == source[name]


@pytest.mark.parametrize("tied", [True, False], ids=["decoder stored", "decoder left out"])
def test_safetensors_with_and_without_the_tied_decoder(tmp_path, tied):
    weights = mlm_weights()
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MLM, source)
    stored = {k: v.clone() for k, v in weights.items() if tied or k != DECODER}
    save_file(stored, source / "model.safetensors")
    run(source, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def test_a_composer_checkpoint(tmp_path):
    """Saved with numpy 2's names; numpy 1's are in the next test."""
    run(write_composer(tmp_path / "ep0.pt", mlm_weights()), tmp_path / "out", "--config", MLM)
    assert_holds(tmp_path / "out", mlm_weights())


def test_a_composer_checkpoint_of_numpy_1(tmp_path):
    file = write_composer(tmp_path / "ep0.pt", mlm_weights())
    archive = file.read_bytes()
    assert b"numpy._core" in archive
    shutil.unpack_archive(file, tmp_path / "open", "zip")
    (data,) = (tmp_path / "open").glob("*/data.pkl")
    data.write_bytes(data.read_bytes().replace(b"cnumpy._core.multi", b"cnumpy.core.multi"))
    shutil.make_archive(str(tmp_path / "ep1"), "zip", tmp_path / "open")
    run(tmp_path / "ep1.zip", tmp_path / "out", "--config", MLM)
    assert_holds(tmp_path / "out", mlm_weights())


def test_a_sequence_classification_checkpoint(tmp_path):
    weights = classification_weights()
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    run(source, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)
    model = load("AutoModelForSequenceClassification", tmp_path / "out")
    assert model.config.num_labels == 3 and len(model.config.id2label) == 3


def test_labels_keep_their_names(tmp_path):
    names = {"0": "no", "1": "maybe", "2": "yes"}
    config = json.loads(MLM.read_text()) | {"id2label": names}
    run(write_source(tmp_path / "source", classification_weights(), config), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["id2label"] == names


def test_dnabert_2_gets_the_pad_id_that_its_config_lacks(tmp_path):
    run(GOLDENS / "dnabert2_tiny", tmp_path / "out")
    assert_holds(tmp_path / "out", mlm_weights("dnabert2_tiny"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 3


def test_another_config_without_pad_id_gets_0(tmp_path):
    config = json.loads(MLM.read_text())
    del config["pad_token_id"]
    run(write_source(tmp_path / "source", mlm_weights(), config), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize("differs", [True, False], ids=["differs", "as the embeddings"])
def test_an_untied_decoder_is_kept_and_reloads_bit_for_bit(tmp_path, differs):
    """It was dropped. torch.save keeps one that was tied as one, which it must not stay."""
    weights = mlm_weights()
    if differs:
        weights[DECODER] = weights[DECODER] + 1
    config = json.loads(MLM.read_text()) | {"tie_word_embeddings": False}
    run(write_source(tmp_path / "source", weights, config), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(weights)
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    model = load("AutoModelForMaskedLM", tmp_path / "out")
    decoder, embeddings = model.cls.predictions.decoder.weight, model.get_input_embeddings().weight
    assert decoder is not embeddings and torch.equal(decoder, weights[DECODER])
    assert torch.equal(embeddings, weights["bert.embeddings.word_embeddings.weight"])


def test_an_untied_decoder_that_is_not_there_is_missing(tmp_path):
    weights = {name: x for name, x in mlm_weights().items() if name != DECODER}
    config = json.loads(MLM.read_text()) | {"tie_word_embeddings": False}
    with pytest.raises(ValueError, match=f"does not fit BertForMaskedLM: missing: {DECODER}$"):
        run(write_source(tmp_path / "source", weights, config), tmp_path / "out")


def test_jinas_layout_has_no_place_for_an_untied_decoder_but_takes_its_encoder(tmp_path, vocab):
    weights = mlm_weights() | {DECODER: mlm_weights()[DECODER] + 1}
    config = json.loads(MLM.read_text()) | {"tie_word_embeddings": False}
    source = write_source(tmp_path / "source", weights, config)
    to_jina = tmp_path / "jina", "--layout", "jina", "--tokenizer", vocab
    with pytest.raises(ValueError, match=f"no place for {DECODER}.*add_pooling_layer=False"):
        run(source, *to_jina)
    assert not (tmp_path / "jina").exists()
    run(source, tmp_path / "ours")
    encoder = transformers.AutoModel.from_pretrained(
        tmp_path / "ours", trust_remote_code=True, add_pooling_layer=False
    )
    encoder.save_pretrained(tmp_path / "encoder")
    run(tmp_path / "encoder", *to_jina)
    run(tmp_path / "jina", tmp_path / "back")
    assert_holds(tmp_path / "back", without_prefix(encoder_weights()))


def test_the_first_names_of_layernorms_weights_are_read(tmp_path):
    """transformers 5.0 saves under them what it loaded."""
    old = {"weight": "gamma", "bias": "beta"}
    weights = {
        re.sub(r"(?<=LayerNorm\.)\w+$", lambda found: old[found[0]], name): x
        for name, x in mlm_weights().items()
    }
    assert sum(name.endswith(("gamma", "beta")) for name in weights) == 10
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    run(source, tmp_path / "out")
    assert_holds(tmp_path / "out", mlm_weights())


def test_only_the_checkpoint_itself_is_read(tmp_path):
    """Averaged or half-precision copies beside it are other models."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MLM, source)
    weights = {name: x.clone() for name, x in mlm_weights().items()}
    save_file(weights, source / "model.safetensors")
    save_file(
        {k: torch.zeros_like(x) for k, x in weights.items()}, source / "model_ema.safetensors"
    )
    run(source, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def write_shards(source, weights):
    """A checkpoint folder in two shards, and which of them each tensor is in."""
    source.mkdir(parents=True)
    shutil.copy(MLM, source)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({k: weights[k].clone() for k in weights if files[k] == file}, source / file)
    write_index(source, files)
    return files


def write_index(source, weight_map):
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined_by_their_index(tmp_path):
    source, weights = tmp_path / "source", mlm_weights()
    write_shards(source, weights)
    run(source, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def test_a_source_in_the_hubs_cache_is_read_by_its_links(tmp_path):
    """Files of a snapshot are links to blobs outside of it, but in the same repository's cache."""
    source, weights = tmp_path / "source", mlm_weights()
    write_shards(source, weights)
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    code = "import sys, convert_weights; convert_weights.main(sys.argv[1:])"
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    run_python(code, "org/tiny", tmp_path / "out", **cache)
    assert_holds(tmp_path / "out", weights)


OUTSIDE = "outside.safetensors"


@pytest.mark.parametrize(
    "name",
    [f"../{OUTSIDE}", f"sub/../../{OUTSIDE}", "/absolute", "..", "", ".", "sub/part.safetensors"]
    + [f"..\\{OUTSIDE}", "C:part.safetensors", "\\\\host\\part", 7, ["x"], None],
    ids=str,
)
def test_an_index_that_leads_out_of_its_folder_is_not_followed(tmp_path, name):
    """It read any file that it named: a download could have others' weights taken in."""
    source, weights = tmp_path / "source", mlm_weights()
    files = write_shards(source, weights)
    (source / "sub").mkdir()
    save_file({k: x.clone() for k, x in weights.items()}, tmp_path / OUTSIDE)
    shutil.copy(tmp_path / OUTSIDE, source / "sub" / "part.safetensors")
    name = str(tmp_path / OUTSIDE) if name == "/absolute" else name
    write_index(source, files | {next(iter(files)): name})
    message = f"lists {name!r}, which is no name of a file beside it"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", ["shard", "index", "whole file"])
def test_a_link_out_of_the_source_is_not_followed(tmp_path, linked):
    source = tmp_path / "source"
    files = write_shards(source, mlm_weights())
    name = {"shard": files[DECODER], "index": "model.safetensors.index.json"}.get(linked)
    if name is None:
        name = "model.safetensors"
        save_file({k: x.clone() for k, x in mlm_weights().items()}, source / name)
    (source / name).rename(tmp_path / OUTSIDE)
    (source / name).symlink_to(tmp_path / OUTSIDE)
    with pytest.raises(ValueError, match=f"'{name}' leads out of"):
        run(source, tmp_path / "out")


def test_shards_that_are_not_there_are_named(tmp_path):
    source = tmp_path / "source"
    missing = write_shards(source, mlm_weights())[DECODER]
    (source / missing).unlink()
    with pytest.raises(ValueError, match=f"lists files that are not there: {missing}"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("weight_map", [None, {}, ["model.safetensors"]], ids=str)
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    write_shards(tmp_path / "source", mlm_weights())
    write_index(tmp_path / "source", weight_map)
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        run(tmp_path / "source", tmp_path / "out")


def test_exports_of_the_model_that_is_replaced_go_with_it(tmp_path):
    """They would be published and served beside other weights."""
    out = tmp_path / "out"
    run(GOLDENS / "mosaic_tiny", out)
    old = ["onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin"]
    old += ["modules.json", "config_sentence_transformers.json"]
    for name in old:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("of the old model")
    run(GOLDENS / "mosaic_tiny", out, "--overwrite")
    assert (out / "model.safetensors").is_file()
    assert not any((out / name).exists() for name in old)


def test_dnabert_s_has_no_prefix_and_no_head(tmp_path):
    config, weights, _ = load_golden("dnabert2_tiny")
    bare = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
    bare |= {"pooler.dense.weight": torch.randn(64, 64), "pooler.dense.bias": torch.randn(64)}
    config |= {"architectures": ["BertModel"], "pad_token_id": 0}
    run(write_source(tmp_path / "source", bare, config), tmp_path / "out")
    assert_holds(tmp_path / "out", bare)
    assert torch.equal(
        load("AutoModel", tmp_path / "out").pooler.dense.bias, bare["pooler.dense.bias"]
    )


def test_there_are_as_many_layouts_as_are_documented():
    assert list(layouts.LAYOUTS) == [
        *("MosaicBERT", "encoder only", "Composer", "Jina", "Jina, encoder only"),
    ]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_the_table_read_backwards_is_its_inverse(layout):
    weights = load_golden("mosaic_tiny")[1]
    if layout.endswith("encoder only"):
        weights = {k: v for k, v in weights.items() if k.startswith("bert.")}
    theirs = layouts.from_ours(weights, layout)
    assert set(theirs) != set(weights) or layout == "MosaicBERT"
    found, back = layouts.to_ours(theirs)
    assert found == layout and set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_casts_every_tensor(tmp_path, dtype):
    run(GOLDENS / "dnabert2_tiny", tmp_path / "out", "--dtype", dtype)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    expected = mlm_weights("dnabert2_tiny")
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))


def test_without_dtype_the_sources_is_kept(tmp_path):
    weights = {name: x.half() for name, x in mlm_weights().items()}
    run(write_source(tmp_path / "source", weights, json.loads(MLM.read_text())), tmp_path / "out")
    assert_holds(tmp_path / "out", weights)
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["cls.predictions.decoder.bias"].dtype
        == torch.float16
    )


def test_heads_that_the_source_lacks_are_named(tmp_path, capsys):
    run(GOLDENS / "mosaic_tiny", tmp_path / "out")
    assert "Not in the source: pooler, classifier" in capsys.readouterr().out


# ---- Jina's layout ----


@pytest.mark.parametrize("kind", ["MLM", "prefix", "no prefix"])
def test_jinas_layout_is_read(tmp_path, kind):
    """With counters and a second decoder bias, which old transformers saved too."""
    weights = mlm_weights() if kind == "MLM" else encoder_weights()
    theirs = apart(weights) | {"bert.embeddings.position_ids": torch.arange(512)[None]}
    if kind == "MLM":
        theirs["cls.predictions.decoder.bias"] = theirs["cls.predictions.bias"].clone()
    elif kind == "no prefix":
        theirs = without_prefix(theirs)
    run(write_jina(tmp_path / "source", theirs), tmp_path / "out")
    assert_holds(tmp_path / "out", weights if kind == "MLM" else without_prefix(weights))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["alibi_starting_size"] == config["max_position_embeddings"] == 8192
    assert config["model_type"] == "mosaic_bert" and "attn_implementation" not in config


def test_a_model_in_jinas_layout_gives_mosaicberts_outputs(tmp_path):
    run(write_jina(tmp_path / "source", apart(mlm_weights())), tmp_path / "jina")
    run(GOLDENS / "mosaic_tiny", tmp_path / "mosaic")
    _, _, golden = load_golden("mosaic_tiny")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: golden[f"right_padded.{name}"] for name in names}
    jina, mosaic = (
        load("AutoModelForMaskedLM", tmp_path / x)(**inputs).logits for x in ("jina", "mosaic")
    )
    real = inputs["attention_mask"].bool()
    assert torch.equal(jina, mosaic)
    # Rounding in float32, of three layers: test_parity.py has the bound.
    assert torch.allclose(jina[real], golden["right_padded.logits"][real], atol=1e-3)


@pytest.mark.parametrize("kind", ["MLM", "encoder", "encoder with pooler"])
def test_there_and_back_again_is_bitwise(tmp_path, vocab, kind):
    weights = mlm_weights() if kind == "MLM" else encoder_weights(pooler=kind != "encoder")
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    run(source, tmp_path / "jina", "--layout", "jina", "--tokenizer", vocab)
    if kind != "MLM":
        weights = without_prefix(weights)
    saved, expected = load_file(tmp_path / "jina" / "model.safetensors"), apart(weights)
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    run(tmp_path / "jina", tmp_path / "back")
    assert_holds(tmp_path / "back", weights)
    first, back = (json.loads((x / "config.json").read_text()) for x in (source, tmp_path / "back"))
    for name in (*convert_weights.SHARED_FIELDS, "alibi_starting_size"):
        assert back[name] == first[name]


def test_a_folder_for_servers_has_what_they_look_for(tmp_path, vocab):
    """Read in the sources of TEI, vLLM and llama.cpp."""
    out = tmp_path / "out"
    run(GOLDENS / "mosaic_tiny", out, "--tokenizer", vocab)
    run(GOLDENS / "mosaic_tiny", out, "--tokenizer", vocab, "--layout", "jina", "--overwrite")
    config = json.loads((out / "config.json").read_text())
    golden = json.loads((GOLDENS / "jina_v2_tiny" / "config.json").read_text())
    differ = {name for name in config if config[name] != golden.get(name)}
    assert differ == {
        "_name_or_path",
        "architectures",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
    }
    # llama.cpp and vLLM dispatch on the one, TEI on the other.
    assert config["architectures"] == ["JinaBertModel"]
    assert config["_name_or_path"] == "jinaai/jina-bert-implementation"
    assert config["max_position_embeddings"] == 32
    modules = json.loads((out / "modules.json").read_text())
    assert [x["path"] for x in modules] == ["", "1_Pooling"]
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == 96
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "BertTokenizer"
    card = (out / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "convert_hf_to_gguf.py" in card
    # And back, in the same place: what servers read would be read beside the new files.
    run(GOLDENS / "mosaic_tiny", out, "--tokenizer", vocab, "--overwrite")
    assert not list(out.glob("**/modules.json")) + list(out.glob("1_Pooling/*"))


# ---- tokenizer and card ----


@pytest.mark.parametrize("as_folder", [False, True], ids=["vocab.txt", "folder"])
def test_the_tokenizer_is_one_that_every_transformers_reads_with_token_types(
    tmp_path, vocab, as_folder
):
    """transformers 5 writes a class name that 4 does not know; 5.0 then omits token_type_ids."""
    run(
        GOLDENS / "mosaic_tiny",
        tmp_path / "out",
        "--tokenizer",
        vocab.parent if as_folder else vocab,
    )
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "BertTokenizer"
    assert settings["model_max_length"] == 32
    assert settings["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("A", "w9")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer("A sentence.")["input_ids"] == [2, 5, 6, 7, 3]


def test_the_tokenizers_pad_id_is_the_models(tmp_path, vocab):
    entries = vocab.read_text().split("\n")
    vocab.write_text("\n".join([entries[5], *entries[1:5], entries[0], *entries[6:]]))
    run(GOLDENS / "mosaic_tiny", tmp_path / "out", "--tokenizer", vocab)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 5


def test_the_sources_own_tokenizer_is_taken_but_never_its_code(tmp_path, vocab):
    """Nobody was asked to trust the source."""
    source = write_source(tmp_path / "source", mlm_weights(), json.loads(MLM.read_text()))
    shutil.copy(vocab, source)
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    auto_map = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (source / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    run(source, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").exists()
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "org/name"):
        with pytest.raises(ValueError, match=f"no tokenizer can be loaded from {name}"):
            run(GOLDENS / "mosaic_tiny", tmp_path / "out", "--tokenizer", name)


def test_the_model_card_of_a_folder_without_tokenizer_runs_too(tmp_path):
    run(GOLDENS / "dnabert2_tiny", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.S)
    shape = run_python(example.replace('"."', repr(str(tmp_path / "out"))))
    assert shape.strip() == "torch.Size([1, 3, 160])"
    assert str(GOLDENS.parent) not in card


@pytest.mark.parametrize("kind", ["MLM", "classifier", "encoder"])
def test_the_model_cards_examples_run(tmp_path, vocab, kind):
    out, weights = tmp_path / "out", load_golden("mosaic_tiny")[1]
    unwanted = {
        "MLM": ("classifier", "bert.pooler"),
        "classifier": "cls.",
        "encoder": ("cl", "cls"),
    }
    weights = {name: x for name, x in weights.items() if not name.startswith(unwanted[kind])}
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    run(source, out, "--tokenizer", vocab)
    front, text = (out / "README.md").read_text().split("---\n")[1:3]
    assert "library_name: transformers" in front and "custom_code" in front
    assert "| not in the source | " in text
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == {"MLM": 2, "classifier": 1, "encoder": 1}[kind]
    for example in examples:
        assert run_python(example.replace('"."', repr(str(out)))).strip()


@pytest.mark.parametrize(
    "front, stated",
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [\n---\n", None),
        ("no front matter", None),
        (None, None),
    ],
    ids=["stated", "broken", "none", "no card"],
)
def test_the_card_states_the_sources_licence(tmp_path, front, stated):
    source = write_source(tmp_path / "source", mlm_weights(), json.loads(MLM.read_text()))
    if front is not None:
        (source / "README.md").write_text(front)
    run(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("license: mit" in card) == (stated == "mit")
    assert f"| licence of the weights | {stated or 'not stated'} |" in card


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, vocab):
    vocab.write_text(vocab.read_text() + "\nmore\nand more")
    with pytest.raises(ValueError, match="the tokenizer has 322 entries, the model only 320"):
        run(GOLDENS / "mosaic_tiny", tmp_path / "out", "--tokenizer", vocab)


# ---- what is refused ----


def test_tensors_without_a_place_and_places_without_a_tensor_are_listed(tmp_path):
    weights = mlm_weights()
    weights["cls.seq_relationship.weight"] = torch.zeros(2, 96)
    del weights["bert.encoder.layer.1.mlp.wo.bias"]
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    with pytest.raises(
        ValueError, match="no place for: cls.seq_relationship.weight; missing: bert.enc"
    ) as error:
        run(source, tmp_path / "out")
    assert "layer.1.mlp.wo.bias" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("attention.self.layer_norm_q.weight", "QK norm .jina-bert-v2-qk-post-norm, the arch"),
        ("intermediate.dense.weight", "a stock BERT, without ALiBi and gate"),
    ],
)
def test_kin_are_refused_by_name(tmp_path, name, reason):
    weights = apart(mlm_weights()) | {f"bert.encoder.layer.0.{name}": torch.zeros(96, 96)}
    source = write_jina(tmp_path / "source", weights, "jina_qk_post_norm_tiny")
    with pytest.raises(ValueError, match=f"is no MosaicBERT: its names tell of .*{reason}"):
        run(source, tmp_path / "out")


def test_another_gate_is_refused(tmp_path):
    """Jina's code has a ReGLU too, under the same names."""
    source = write_jina(tmp_path / "source", apart(mlm_weights()))
    config = json.loads((source / "config.json").read_text()) | {"feed_forward_type": "reglu"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="feed_forward_type is 'reglu'"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["query", "value"])
def test_an_incomplete_attention_is_refused(tmp_path, part):
    weights = apart(mlm_weights())
    del weights[f"bert.encoder.layer.1.attention.self.{part}.bias"]
    with pytest.raises(ValueError, match=r"missing: bert.encoder.layer.1.*Wqkv.bias"):
        run(write_jina(tmp_path / "source", weights), tmp_path / "out")


def test_two_decoder_biases_that_differ_are_refused(tmp_path):
    weights = apart(mlm_weights())
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"] + 1
    with pytest.raises(ValueError, match="decoder.bias differs from cls.predictions.bias"):
        run(write_jina(tmp_path / "source", weights), tmp_path / "out")


def test_jinas_layout_is_refused_for_what_servers_cannot_use(tmp_path, vocab):
    weights, config = classification_weights(), json.loads(MLM.read_text())
    source = write_source(tmp_path / "source", weights, config)
    with pytest.raises(ValueError, match="no BertForSequenceClassification in Jina's layout"):
        run(source, tmp_path / "out", "--layout", "jina", "--tokenizer", vocab)
    with pytest.raises(ValueError, match="servers need a tokenizer"):
        run(GOLDENS / "mosaic_tiny", tmp_path / "out", "--layout", "jina")
    assert not (tmp_path / "out").exists()


def test_names_of_no_layout_are_listed_but_not_by_the_hundred(tmp_path):
    weights = {f"transformer.h.{i}.weight": torch.zeros(1) for i in range(200)}
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    with pytest.raises(ValueError, match="no place .* transformer.h.0.weight.* and 192 more"):
        run(source, tmp_path / "out")


def test_label_names_that_do_not_fit_the_classifier_are_refused(tmp_path):
    config = json.loads(MLM.read_text()) | {"id2label": {"0": "no", "1": "yes"}}
    source = write_source(tmp_path / "source", classification_weights(), config)
    with pytest.raises(ValueError, match="config names 2 labels, the classifier has 3"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "holds a list, expected an object"),
        ("{", "is not JSON"),
        ('{"hidden_size": 96, "num_attention_heads": 5}', "config is not MosaicBERT's: .*96 and 5"),
    ],
)
def test_configs_that_describe_no_model_are_refused(tmp_path, text, message):
    source = write_source(tmp_path / "source", mlm_weights(), {})
    (source / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out")


def test_an_empty_checkpoint_is_refused(tmp_path):
    source = write_source(tmp_path / "source", {}, json.loads(MLM.read_text()))
    with pytest.raises(ValueError, match="holds no tensors"):
        run(source, tmp_path / "out")


def test_a_config_of_another_size_is_refused_with_the_shapes(tmp_path):
    config = json.loads(MLM.read_text()) | {"intermediate_size": 128}
    source = write_source(tmp_path / "source", mlm_weights(), config)
    with pytest.raises(ValueError, match=r"gated_layers.weight \(256, 96\) and \(320, 96\)"):
        run(source, tmp_path / "out")


def test_an_untied_decoder_is_refused_where_the_config_ties_it(tmp_path):
    weights = mlm_weights()
    weights[DECODER] = weights[DECODER] + 1
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    with pytest.raises(
        ValueError, match='decoder.weight .* differs from .*: write "tie_word_embeddings": false'
    ):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    """They were converted, and everything that the model said was nan."""
    weights = mlm_weights()
    name = "bert.encoder.layer.0.mlp.wo.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = value
    source = write_source(tmp_path / "source", weights, json.loads(MLM.read_text()))
    with pytest.raises(ValueError, match=f"nan or infinity in {name}: .* take an earlier"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The commands that train load it otherwise.
    config = family.as_ours(family.config_values(str(source)), str(source))
    with pytest.raises(ValueError, match=f"nan or infinity in {name}"):
        family.load(family.model_class("AutoModelForMaskedLM"), str(source), config)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 1000, 500_000])
def test_a_torn_file_is_named(tmp_path, name, size):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MLM, source)
    if name == "pytorch_model.bin":
        torch.save(mlm_weights(), source / name)
    else:
        save_file({k: v.clone() for k, v in mlm_weights().items()}, source / name)
    (source / name).write_bytes((source / name).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name} cannot be read, is it complete"):
        run(source, tmp_path / "out")


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere.pt does not exist"):
        run(tmp_path / "nowhere.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="org/name is neither .* nor can it be had from the Hub"):
        run("org/name", tmp_path / "out")
    with pytest.raises(ValueError, match="ep0.pt has no config.json: pass one with --config"):
        run(write_composer(tmp_path / "ep0.pt", mlm_weights()), tmp_path / "out")


def test_a_folder_may_have_the_name_of_the_hub_id_that_it_is_made_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nor can it be had from the Hub"):
        run("org/name", "org/name")


def test_nothing_is_overwritten_unless_asked_for(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="is not empty: choose another folder, or pass --overwrite"
    ):
        run(GOLDENS / "mosaic_tiny", out)
    assert [x.name for x in out.iterdir()] == ["notes.txt"]
    run(GOLDENS / "mosaic_tiny", out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="is a file"):
        run(GOLDENS / "mosaic_tiny", out / "notes.txt")


def test_overwriting_leaves_nothing_of_a_former_model(tmp_path, vocab):
    """Its tokenizer would be loaded beside the new weights."""
    run(GOLDENS / "mosaic_tiny", tmp_path / "out", "--tokenizer", vocab)
    former = ("pytorch_model.bin", "onnx/model.onnx", "onnx/model.onnx_data", "model.onnx")
    former += ("openvino/openvino_model.xml", "openvino/openvino_model.bin")
    former += ("adapter_config.json", "modules.json", "router_config.json")
    for name in former:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"old")
    run(GOLDENS / "dnabert2_tiny", tmp_path / "out", "--overwrite")
    files = {x.name for x in (tmp_path / "out").rglob("*") if x.is_file()}
    assert files == {"model.safetensors", "config.json", "README.md", *MODEL_FILES}


def test_overwriting_keeps_what_is_no_models(tmp_path):
    """Files of similar names were deleted; of a folder, after the old weights were gone."""
    out = tmp_path / "out"
    run(GOLDENS / "mosaic_tiny", out)
    mine = ("probe.safetensors", "token_counts.json", "pytorch_model_fsdp_0/x.distcp")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"mine")
    run(GOLDENS / "mosaic_tiny", out, "--overwrite")
    assert all((out / name).read_bytes() == b"mine" for name in mine)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs another file system")
def test_a_folder_on_another_disk_is_written(tmp_path):
    """The old model was deleted, and the new one could not be moved there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        out = tmp_path / "out"
        out.symlink_to(other)
        run(GOLDENS / "mosaic_tiny", out)
        run(GOLDENS / "mosaic_tiny", out, "--overwrite")
        assert {"model.safetensors", "config.json"} <= set(os.listdir(other))
        assert not [x for x in os.listdir(other) if x.startswith(".")]


def test_an_adapter_beside_the_weights_is_not_lost(tmp_path):
    source = shutil.copytree(GOLDENS / "mosaic_tiny", tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter beside its weights.*merge_and_unload"):
        run(source, tmp_path / "out")


def test_a_model_of_multiple_choice_is_no_classifier_of_one_label(tmp_path):
    values = json.loads(MLM.read_text())
    model_class = family.model_class("AutoModelForMultipleChoice")
    model = model_class(family.as_ours(values, "source"))
    model.save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMultipleChoice"]
    with pytest.raises(ValueError, match="servers read no BertForMultipleChoice"):
        run(tmp_path / "source", tmp_path / "jina", "--layout", "jina")


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path):
    out = tmp_path / "out"
    run(GOLDENS / "mosaic_tiny", out)
    before = {x.name: x.read_bytes() for x in out.iterdir()}
    source = write_source(
        tmp_path / "source", {"bert.x": torch.zeros(1)}, json.loads(MLM.read_text())
    )
    with pytest.raises(ValueError, match="no place for"):
        run(source, out, "--overwrite")
    assert {x.name: x.read_bytes() for x in out.iterdir()} == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out", "source"]


def test_the_command_line_prints_errors_without_a_traceback(tmp_path):
    command = [sys.executable, ROOT / "convert_weights.py", tmp_path / "no.pt", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("no.pt does not exist")


def test_the_folder_of_this_code_is_not_written_to():
    """With --overwrite its model files would be removed."""
    with pytest.raises(ValueError, match="holds this code, which would be lost"):
        run(GOLDENS / "mosaic_tiny", ROOT, "--overwrite")
    assert (ROOT / "bert_layers.py").is_file()


def test_what_was_compiled_of_former_weights_is_removed(tmp_path):
    out = tmp_path / "out"
    run(GOLDENS / "mosaic_tiny", out)
    for name in ("model.pt2", "mosaic_aot.py"):
        (out / name).write_text("of before")
    run(GOLDENS / "mosaic_tiny", out, "--overwrite")
    assert not list(out.glob("model.pt2")) and not list(out.glob("mosaic_aot.py"))
