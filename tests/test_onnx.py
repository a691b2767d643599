# SPDX-License-Identifier: Apache-2.0
"""Folders that `convert_weights.py --onnx` writes, in ONNX Runtime; and torch.onnx.export itself of
heads that it has no task for. What other clients make of them, tests/clients.py compares."""

import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import GOLDENS, ROOT, needs_export, run_python
from hub import TOKENIZER_FILES
from models import close
from training import write_vocab

import convert_weights
from mosaic_tools import onnx_export
from mosaic_tools.publishing import POOLING_FILES, PROMPTS, takes_the_mean, write_pooling

pytestmark = needs_export
pytest_plugins = ["hub"]
# Sums over some hundred weights, in another order, in two layers.
FACTOR = 256
TEXTS = ["w5 w6 w7", "w8 w9 " * 30, "w10"]


def small_model(auto_class, **values):
    """Random weights, large enough that every mask changes the output, and prepared for 16 tokens.
    Its folder is mostly weights."""
    config = transformers.AutoConfig.from_pretrained(
        ROOT,
        trust_remote_code=True,
        vocab_size=4000,
        hidden_size=120,
        num_attention_heads=6,
        num_hidden_layers=2,
        intermediate_size=400,
        initializer_range=0.1,
        alibi_starting_size=16,
        max_position_embeddings=16,
        **values,
    )
    torch.manual_seed(0)
    auto_class = getattr(transformers, auto_class)
    return auto_class.from_config(config, trust_remote_code=True).eval()


def save(model, folder):
    model.save_pretrained(folder)
    write_vocab(folder / "vocab.txt", "a", "sentence", ".", entries=4000)
    return folder


def export(source, folder, *flags):
    convert_weights.main([str(source), str(folder), "--onnx", *flags])
    return folder


@pytest.fixture(scope="module")
def mlm(tmp_path_factory):
    """A model, its folder, and what is exported of it."""
    model = small_model("AutoModelForMaskedLM")
    source = save(model, tmp_path_factory.mktemp("mlm") / "source")
    return model, source, export(source, source.parent / "onnx", "--int8")


@pytest.fixture(scope="module")
def embedder(mlm):
    """The same of its encoder, which has prompts."""
    model, source, _ = mlm
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    (source / "config_sentence_transformers.json").write_text(json.dumps(settings))
    flags = ("--int8", "--task", "feature-extraction")
    return model.bert, source, export(source, source.parent / "embedder", *flags)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    model = small_model("AutoModelForSequenceClassification", id2label=labels)
    source = save(model.bfloat16(), tmp_path_factory.mktemp("classifier") / "source")
    return model.float(), source, export(source, source.parent / "onnx")


EXPORTED = ["mlm", "embedder", "classifier"]


@pytest.fixture(params=EXPORTED)
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def graph_of_nothing(monkeypatch):
    """For tests of a folder's other files: a graph takes seconds to make."""
    monkeypatch.setattr(onnx_export, "export", lambda model, output, file: file.write_bytes(b""))


def masked_batch(batch, seqlen):
    """Inputs padded on the right, on the left and in the middle, one row each, and one full."""
    mask = torch.ones(batch, seqlen, dtype=torch.int64)
    if batch > 3:
        mask[0, seqlen // 2 :] = mask[1, : seqlen // 3] = mask[2, 2 : seqlen // 2 : 2] = 0
    ids = torch.arange(batch * seqlen).view(batch, seqlen) * 7 % 4000
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(session, inputs):
    found = session.run(None, {name: np.asarray(x) for name, x in inputs.items()})
    return [torch.from_numpy(x) for x in found]


def files_of(folder):
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


# ---- the graph ----


def test_it_gives_what_the_model_gives_at_every_size_and_padding(exported):
    """Also on text longer than the model is prepared for, and zeros at padding."""
    model, _, folder = exported
    graph = session(folder / "onnx" / "model.onnx")
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    assert [x.name for x in graph.get_inputs()] == inputs
    (output,) = graph.get_outputs()
    bare = type(model).__name__ == "BertModel"
    assert output.name == ("last_hidden_state" if bare else "logits")
    for shape in [(1, 1), (1, 16), (4, 12), (5, 31), (4, 200)]:
        inputs = masked_batch(*shape)
        with torch.no_grad():
            expected = model(**inputs)[0]
        (found,) = run(graph, inputs)
        close(found, expected, FACTOR)
        if expected.dim() == 3:
            assert not found[inputs["attention_mask"] == 0].any()


def test_the_bias_is_built_once_for_all_layers(exported):
    """Each layer built its own, of every row and head, and another mask."""
    model, _, folder = exported
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    maker = {name: node for node in graph.node for name in node.output}
    scores = [maker[x.input[0]] for x in graph.node if x.op_type == "Softmax"]
    assert len(scores) == model.config.num_hidden_layers == 2
    assert [x.op_type for x in scores] == ["Add", "Add"]
    assert len(set(scores[0].input) & set(scores[1].input)) == 1
    assert [x.op_type for x in graph.node].count("Abs") == 1


def test_its_operators_are_those_that_runtimes_have_fast_code_for(exported):
    """GELU and LayerNorm in one each, as browsers' runtimes know them; each matrix with its bias.

    ONNX Runtime would join sums and LayerNorm of three axes to SkipLayerNormalization, which takes
    ten times as long on a CPU."""
    model, _, folder = exported
    file = onnx.load(folder / "onnx" / "model.onnx")
    assert [(x.domain, x.version) for x in file.opset_import] == [("", 20)]
    kinds = [x.op_type for x in file.graph.node]
    modules = [type(x).__name__ for x in model.modules()]
    assert kinds.count("LayerNormalization") == modules.count("LayerNorm") >= 5
    assert kinds.count("Gelu") == sum("GELU" in x for x in modules) >= 2
    assert kinds.count("Gemm") == modules.count("Linear") >= 8
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder.parent / "optimized.onnx")
    onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
    optimized = onnx.load(folder.parent / "optimized.onnx")
    assert "SkipLayerNormalization" not in {x.op_type for x in optimized.graph.node}


def test_files_are_whole_and_tell_nothing_of_this_machine(mlm):
    """Nodes carried the stack that they were traced from."""
    _, _, folder = mlm
    for name in ("model.onnx", "model_quantized.onnx"):
        file = onnx.load(folder / "onnx" / name)
        onnx.checker.check_model(file)
        assert not any(x.metadata_props or x.doc_string for x in file.graph.node)
        assert str(ROOT).encode() not in (folder / "onnx" / name).read_bytes()


# ---- 8 bits ----


def test_quantized_embeddings_take_a_quarter_and_are_near(embedder):
    """Weights of 7 bits and inputs of 8 are off by 1 or 2 % in each product, which may add up to
    6 % over two layers: a cosine of 1 - 0.06^2 / 2."""
    _, _, folder = embedder
    full, small = (folder / "onnx" / x for x in ("model.onnx", "model_quantized.onnx"))
    assert 0.25 < small.stat().st_size / full.stat().st_size < 0.3
    inputs = masked_batch(5, 31)
    mask = inputs["attention_mask"][..., None]
    expected, found = (
        torch.nn.functional.normalize((run(session(x), inputs)[0] * mask).sum(1), dim=-1)
        for x in (full, small)
    )
    cosines = found @ expected.T
    assert cosines.diagonal().min() > 0.998
    # Others are far.
    assert cosines.fill_diagonal_(0).max() < 0.95


def test_quantized_logits_of_a_decoder_tied_to_the_embeddings_are_near(mlm):
    """The quantizer transposed the decoder where it lay, and ids were looked up in that."""
    _, _, folder = mlm
    inputs = masked_batch(5, 31)
    expected, found = (
        run(session(folder / "onnx" / x), inputs)[0] for x in ("model.onnx", "model_quantized.onnx")
    )
    real = inputs["attention_mask"].bool()
    cosines = torch.nn.functional.cosine_similarity(found[real], expected[real], dim=-1)
    assert cosines.min() > 0.99 and not found[~real].any()


# ---- the folder ----


def test_the_folder_has_what_clients_read_and_neither_weights_nor_code(mlm, embedder, classifier):
    common = {"README.md", "config.json", "onnx/model.onnx", *TOKENIZER_FILES}
    int8 = {"onnx/model_quantized.onnx"}
    pooling = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert files_of(mlm[2]) >= common | int8
    assert files_of(embedder[2]) >= common | int8 | pooling
    for _, _, folder in (mlm, embedder, classifier):
        rest = files_of(folder) - common - int8 - pooling
        # Which transformers 4 writes too, and prompts.
        assert rest <= {"vocab.txt", "special_tokens_map.json", PROMPTS}


def test_clients_read_a_stock_berts_config_and_find_no_weights_for_it(exported):
    """With weights beside it transformers would draw layers at random, with a warning only."""
    model, _, folder = exported
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is transformers.BertConfig and not hasattr(config, "auto_map")
    assert config.architectures[0] == type(model).__name__
    assert config.max_position_embeddings == model.config.alibi_starting_size == 16
    assert config.id2label == model.config.id2label
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, name) == getattr(model.config, name)
    with pytest.raises(OSError, match="model.safetensors"):
        transformers.AutoModel.from_pretrained(folder)


def test_its_tokenizer_cuts_where_the_model_is_prepared_for_no_more(exported):
    _, _, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs["input_ids"].shape == (3, 16)


def test_prompts_of_an_embedding_model_come_along(embedder):
    _, _, folder = embedder
    settings = json.loads((folder / PROMPTS).read_text())
    assert settings == {"prompts": {"query": "query: "}, "default_prompt_name": None}


def test_the_cards_example_runs_in_the_folder(exported, monkeypatch, capsys):
    _, _, folder = exported
    card = (folder / "README.md").read_text()
    (example,) = re.findall("```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(folder)
    exec(example, {})
    assert capsys.readouterr().out.strip()
    assert "onnx" in card and "custom_code" not in card and "PEFT" not in card


@pytest.mark.usefixtures("graph_of_nothing")
def test_it_replaces_a_converted_folder_and_is_replaced_by_one(mlm, tmp_path):
    """Code and weights of the one would stay beside the other's config."""
    _, source, _ = mlm
    out = tmp_path / "out"
    convert_weights.main([str(source), str(out)])
    assert {"bert_layers.py", "model.safetensors"} <= files_of(out)
    converted = files_of(out)
    export(source, out, "--overwrite")
    assert not any(x.endswith((".py", ".safetensors")) for x in files_of(out))
    convert_weights.main([str(source), str(out), "--overwrite"])
    assert files_of(out) == converted


@pytest.mark.usefixtures("graph_of_nothing")
def test_it_is_uploaded_without_weights(mlm, hub, tmp_path):
    """Publishing refused a folder without model.safetensors."""
    _, source, _ = mlm
    export(source, tmp_path / "out", "--push_to_hub", "org/name")
    assert set(hub.sent) == files_of(tmp_path / "out")


# ---- refused ----


def test_a_head_without_a_task_is_refused_by_name_and_its_encoder_exports(tmp_path):
    model = small_model("AutoModelForTokenClassification")
    source = save(model, tmp_path / "source")
    with pytest.raises(ValueError, match="BertForTokenClassification, whose head.*--task feature-"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out", "--task", "feature-extraction")
    inputs = masked_batch(4, 12)
    with torch.no_grad():
        expected = model.bert(**inputs)[0]
    close(run(session(tmp_path / "out" / "onnx" / "model.onnx"), inputs)[0], expected, FACTOR)


def test_a_source_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass --tokenizer"):
        export(GOLDENS / "mosaic_tiny", tmp_path / "out")
    assert not list(tmp_path.iterdir())


LAYOUTS = [("--onnx", "--task", "feature-extraction"), ("--layout", "jina"), ()]


@pytest.mark.parametrize("flags", LAYOUTS)
@pytest.mark.parametrize("kind", ["Pooling", "SpladePooling"])
def test_embeddings_that_are_no_mean_are_refused(mlm, tmp_path, kind, flags):
    """The mean would be taken in their place, without a word."""
    source = shutil.copytree(mlm[1], tmp_path / "source")
    write_pooling(source, 120, 16)
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["type"] = f"sentence_transformers.models.{kind}"
    (source / "modules.json").write_text(json.dumps(modules))
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match=f"a module {kind} that is not the mean"):
        convert_weights.main([str(source), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", LAYOUTS)
def test_texts_that_are_made_lower_case_before_the_tokenizer_are_refused(mlm, tmp_path, flags):
    source = shutil.copytree(mlm[1], tmp_path / "source")
    write_pooling(source, 120, 16)
    (source / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ValueError, match="lower case before its tokenizer"):
        convert_weights.main([str(source), str(tmp_path / "out"), *flags])


@pytest.mark.parametrize(
    "pooling, mean",
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, False),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, False),
        ({"pooling_mode": "cls"}, False),
        # As where the file is not there.
        ({}, False),
    ],
)
def test_only_the_mean_over_all_tokens_passes_for_it(pooling, mean):
    assert takes_the_mean(pooling) is mean


@pytest.mark.parametrize("flags", LAYOUTS)
def test_length_of_texts_and_of_embeddings_and_prompts_are_the_sources(
    mlm, tmp_path, graph_of_nothing, flags
):
    """Texts were cut at what the model is prepared for, by some clients or all, vectors no longer
    had length 1, and prompts were lost."""
    source, out = shutil.copytree(mlm[1], tmp_path / "source"), tmp_path / "out"
    write_pooling(source, 120, 9, normalize=True)
    (source / PROMPTS).write_text('{"prompts": {"query": "query: "}, "__version__": {}}')
    convert_weights.main([str(source), str(out), *flags])
    for name in POOLING_FILES:
        assert (out / name).read_text() == (source / name).read_text()
    kinds = [x["type"].rsplit(".")[-1] for x in json.loads((source / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((out / PROMPTS).read_text()) == {"prompts": {"query": "query: "}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == 9
    assert len(tokenizer("a " * 20, truncation=True)["input_ids"]) == 9


def test_a_cross_encoder_does_not_become_an_embedder(mlm, tmp_path):
    """Which lists modules too, without pooling."""
    source = shutil.copytree(mlm[1], tmp_path / "source")
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    (source / "modules.json").write_text(json.dumps([{"path": "", "type": kind}]))
    convert_weights.main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out" / "modules.json").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_not_installed_is_named_before_anything_is_made(
    mlm, tmp_path, monkeypatch, missing
):
    find = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util, "find_spec", lambda x: None if x == missing else find(x)
    )
    with pytest.raises(ValueError, match=f"--onnx needs {missing}: pip install {missing}$"):
        export(mlm[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_one_file_cannot_hold_are_refused(mlm, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 10**6)
    with pytest.raises(ValueError, match="an ONNX file holds 1,000,000"):
        export(mlm[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("graph_of_nothing")
def test_an_export_that_fails_leaves_nothing(mlm, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_export, "quantize", fail)
    with pytest.raises(OSError, match="no such operator"):
        export(mlm[1], tmp_path / "out", "--int8")
    assert not list(tmp_path.iterdir())


# ---- torch.onnx.export of the rest ----

OUTPUTS = {
    "AutoModelForQuestionAnswering": ["start_logits", "end_logits"],
    "AutoModelForMultipleChoice": ["logits"],
}


@pytest.mark.parametrize("auto_class", OUTPUTS)
def test_other_heads_export_with_dynamic_batch_and_length(auto_class, tmp_path):
    """Unpadding broke torch.export: how many tokens are left depends on data."""
    model = small_model(auto_class)
    choices = "MultipleChoice" in auto_class

    def batch(*shape):
        inputs = masked_batch(*shape)
        if choices:
            inputs = {name: torch.stack([x, x.roll(1, 0)], 1) for name, x in inputs.items()}
        return inputs

    example = batch(4, 12)
    sizes = {0: torch.export.Dim("batch"), 1 + choices: torch.export.Dim("seqlen")}
    program = torch.export.export(
        model, (), kwargs=example, dynamic_shapes=dict.fromkeys(example, sizes)
    )
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        program,
        f=file,
        dynamo=True,
        external_data=False,
        input_names=list(example),
        output_names=OUTPUTS[auto_class],
        verbose=False,
    )
    for shape in [(4, 12), (5, 31)]:
        inputs = batch(*shape)
        with torch.no_grad():
            expected = model(**inputs, return_dict=True)
        # In the order of the model's own.
        assert list(expected) == OUTPUTS[auto_class]
        traced = program.module()(**inputs).to_tuple()
        found = run(session(file), inputs)
        for x, y, z in zip(expected.values(), traced, found, strict=True):
            close(y, x, FACTOR)
            close(z, x, FACTOR)


def test_a_model_in_half_precision_exports_to_a_valid_graph(tmp_path):
    """ALiBi's bias was added in float32 there, and ONNX adds numbers of one dtype only."""
    model, inputs = small_model("AutoModel"), masked_batch(3, 12)
    with torch.no_grad():
        expected = model(**inputs)[0]
    file = tmp_path / "model.onnx"
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    shapes = dict.fromkeys(inputs, sizes)
    torch.onnx.export(
        model.half(), kwargs=inputs, dynamic_shapes=shapes, f=file, dynamo=True, verbose=False
    )
    found = run(session(file), inputs)[0]
    assert found.dtype == torch.float16 and found.shape == expected.shape
    # fp16's eps is 2^-10, and there are some 20 roundings on the way.
    assert (found.float() - expected).norm() <= 2**-10 * 20 * expected.norm()


def test_the_documented_export_runs_as_it_stands_and_is_what_others_read(tmp_path):
    """transformers.js and fastembed could not: the output was called where_4, in two files."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*torch.onnx.export.*?)```", page, re.S)
    model = small_model("AutoModel")
    model.save_pretrained(tmp_path)
    run_python(example.replace("runs/demo", str(tmp_path)))
    (file,) = (tmp_path / "onnx").iterdir()
    graph = session(file)
    assert [x.name for x in graph.get_inputs()] == ["input_ids", "attention_mask"]
    assert [x.name for x in graph.get_outputs()] == ["last_hidden_state"]
    inputs = masked_batch(5, 31)
    del inputs["token_type_ids"]
    with torch.no_grad():
        close(run(graph, inputs)[0], model(**inputs).last_hidden_state, FACTOR)
