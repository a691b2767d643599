# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and reloading through transformers' own machinery, as a user of the Hub does."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import MODEL_FILES, ROOT, load_golden, published_folder, run_python
from models import make, make_batch, make_labels
from safetensors.torch import save_file
from training import write_vocab
from transformers import dynamic_module_utils

from mosaic_bert import bert_layers

AUTO_MAP = json.loads((ROOT / "config.json").read_text())["auto_map"]
AUTO_CLASSES = sorted(set(AUTO_MAP) - {"AutoConfig"})


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder as we write it: our config.json with the golden's sizes, safetensors, decoder left
    out."""
    folder = published_folder(tmp_path_factory.mktemp("ours") / "mosaic_tiny")
    (folder / "pytorch_model.bin").unlink()
    config, weights, _ = load_golden("mosaic_tiny")
    config |= {"model_type": "mosaic_bert", "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    tied_or_head = ("cls.predictions.decoder.weight", "classifier.weight", "classifier.bias")
    weights = {name: x for name, x in weights.items() if name not in tied_or_head}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def golden():
    """Inputs with padding and the logits that the published code gave for them."""
    _, _, outputs = load_golden("mosaic_tiny")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: outputs[f"right_padded.{name}"] for name in names}
    return inputs, outputs["right_padded.logits"]


def load(auto_class, folder, **options):
    """The model as a user has it, in evaluation mode."""
    auto_class = getattr(transformers, auto_class)
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def assert_golden(model, golden):
    """Close enough to know the weights by; test_parity.py has the bound."""
    inputs, logits = golden
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**inputs).logits
    assert_near(ours[real], logits[real])


def assert_near(candidate, expected):
    """Equal but for float32 rounding in three layers: 2^10 eps of the largest value."""
    assert candidate.shape == expected.shape and candidate.isfinite().all()
    largest = expected.abs().max()
    assert (candidate - expected).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_auto_class_loads_every_weight_it_has_a_place_for(ours, auto_class):
    _, info = load(auto_class, ours, output_loading_info=True)
    missing = {name.split(".")[0] for name in info["missing_keys"]}
    assert missing <= {"classifier", "qa_outputs"}
    leftover = {name.removeprefix("bert.").split(".")[0] for name in info["unexpected_keys"]}
    assert leftover <= {"cls", "pooler"}
    assert not info["mismatched_keys"]


@pytest.mark.parametrize("kind", ["published", "ours"])
def test_folders_load_without_conversion(kind, mosaic, ours, golden):
    """Published: ALiBi tensors made in __init__ stopped transformers 5, which builds on meta."""
    assert_golden(load("AutoModelForMaskedLM", mosaic if kind == "published" else ours), golden)


def test_dnabert_2_and_s_load_without_conversion(tmp_path):
    """Their config has no model_type; DNABERT-S's names have no "bert." and it has no MLM head."""
    folder = published_folder(tmp_path / "dnabert2", "dnabert2_tiny")
    _, weights, outputs = load_golden("dnabert2_tiny")
    mask = outputs["attention_mask"].bool()
    logits = load("AutoModelForMaskedLM", folder)(outputs["input_ids"], mask).logits
    assert_near(logits[mask], outputs["logits"][mask])

    bare = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
    torch.save(bare, folder / "pytorch_model.bin")
    encoder = load("AutoModel", folder, add_pooling_layer=False)
    hidden = encoder(outputs["input_ids"], mask).last_hidden_state
    assert_near(hidden, outputs["last_hidden_state"])


@pytest.mark.parametrize("kind", ["published", "ours"])
def test_a_stock_config_works_as_the_published_card_passes_it(kind, mosaic, ours, golden, tmp_path):
    """Saved again, the folder must not become one that loads as a stock BERT."""
    folder = mosaic if kind == "published" else ours
    config = transformers.BertConfig.from_pretrained(folder)
    config.alibi_starting_size = 2048
    model = load("AutoModelForMaskedLM", folder, config=config)
    assert_golden(model, golden)
    assert model.config.alibi_starting_size == 2048
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mosaic_bert" and saved["alibi_starting_size"] == 2048
    assert_golden(load("AutoModelForMaskedLM", tmp_path), golden)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attn_implementation_is_taken_at_load(mosaic, golden, backend):
    model = load("AutoModelForMaskedLM", mosaic, attn_implementation=backend)
    assert model.config._attn_implementation == model.bert.config._attn_implementation == backend
    assert_golden(model, golden)


def test_no_attn_implementation_means_the_best_of_the_device(mosaic):
    assert load("AutoModelForMaskedLM", mosaic).config._attn_implementation == "auto"


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_3"])
def test_an_unknown_backend_is_refused_at_load(mosaic, backend):
    with pytest.raises(ValueError, match=f"'{backend}' is not available"):
        load("AutoModelForMaskedLM", mosaic, attn_implementation=backend)


def test_dtype(mosaic, golden):
    model = load("AutoModelForMaskedLM", mosaic, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**golden[0]).logits.isfinite().all()


def test_device_map(mosaic, golden):
    pytest.importorskip("accelerate")
    assert_golden(load("AutoModelForMaskedLM", mosaic, device_map="auto"), golden)


def test_without_trust_our_folder_fails_loudly(ours):
    """Published, a stock BERT with random layers was loaded in silence."""
    code = (
        "import sys, transformers\n"
        "for name in sys.argv[2:]:\n"
        "    try: getattr(transformers, name).from_pretrained(sys.argv[1])\n"
        "    except ValueError as error: print('\\nrefused', 'trust_remote_code' in str(error))\n"
    )
    out = run_python(code, ours, "AutoModel", "AutoModelForMaskedLM", "AutoConfig")
    assert out.splitlines().count("refused True") == 3


RELOAD = """
import sys, torch, transformers
from safetensors.torch import load_file
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = load_file(sys.argv[2])
print(torch.equal(model(**inputs).logits, load_file(sys.argv[3])["logits"]),
type(model.config).__name__)
"""


def test_a_saved_model_reloads_in_a_new_process(mosaic, golden, tmp_path):
    """Published, saving failed on the tied decoder and left a folder without weights."""
    model = load("AutoModelForMaskedLM", mosaic)
    model.save_pretrained(tmp_path / "saved")
    assert {x.name for x in (tmp_path / "saved").glob("*.py")} == set(MODEL_FILES)
    inputs, _ = golden
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits}, tmp_path / "out.safetensors")
    save_file(inputs, tmp_path / "in.safetensors")
    arguments = (tmp_path / x for x in ("saved", "in.safetensors", "out.safetensors"))
    assert run_python(RELOAD, *arguments).split() == ["True", "MosaicBertConfig"]


def test_a_model_from_config_saves_its_code_too(tmp_path):
    config = transformers.AutoConfig.from_pretrained(
        ROOT, trust_remote_code=True, hidden_size=32, num_attention_heads=2, num_hidden_layers=1
    )
    model = transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    assert {x.name for x in tmp_path.glob("*.py")} == set(MODEL_FILES)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


HUB = """
import importlib.util, sys
# transformers looks for a module with find_spec before it lets a file import it.
blocked, find = {"triton", "einops", "flash_attn"}, importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in blocked else find(name, *rest)
sys.modules.update({name: None for name in blocked})
import torch, transformers
for revision in ({}, {"revision": "0" * 40}):
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        "org/tiny", trust_remote_code=True, **revision
    )
    print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""


@pytest.mark.parametrize("kind", ["published", "ours"])
def test_loads_by_id_where_triton_and_einops_are_missing(kind, mosaic, ours, tmp_path):
    """Files from the Hub are searched for imports, in functions too: only a try excuses one."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(mosaic if kind == "published" else ours, repository / "snapshots" / ("0" * 40))
    out = run_python(HUB, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    assert out.splitlines().count("(1, 3, 320)") == 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A WordPiece tokenizer whose 320 entries are specials and the words w5 .. w319."""
    file = write_vocab(tmp_path_factory.mktemp("vocab") / "vocab.txt", entries=320)
    return transformers.BertTokenizerFast(str(file))


def test_the_fill_mask_pipeline_fills_masks(ours, tokenizer):
    model = load("AutoModelForMaskedLM", ours)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    text = "w5 w6 [MASK] w8"
    (best, *rest) = fill(text)
    inputs = tokenizer(text, return_tensors="pt")
    logits = model(**inputs).logits[0, 3]
    assert best["token"] == logits.argmax().item() and len(rest) == 4


@pytest.mark.parametrize(
    "task, auto_class",
    [
        ("text-classification", "AutoModelForSequenceClassification"),
        ("token-classification", "AutoModelForTokenClassification"),
        ("feature-extraction", "AutoModel"),
    ],
)
def test_other_pipelines_run(ours, tokenizer, task, auto_class):
    pipe = transformers.pipeline(task, model=load(auto_class, ours), tokenizer=tokenizer)
    assert len(pipe(["w5 w6 w7", "w8"])) == 2


if transformers.__version__ < "5":  # which has no such pipeline

    def test_the_question_answering_pipeline_answers_from_the_context(ours, tokenizer):
        model = load("AutoModelForQuestionAnswering", ours)
        pipe = transformers.pipeline("question-answering", model=model, tokenizer=tokenizer)
        answer = pipe(question="w5 w6", context="w10 w11 w12")
        assert answer["answer"] in "w10 w11 w12"


def test_flattened_batches_equal_padded_ones(ours):
    rows = [
        {"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (3, 9, 1)
    ]
    flat = transformers.DataCollatorWithFlattening()(rows)
    model = load("AutoModelForMaskedLM", ours)
    with torch.no_grad():
        packed = model(**flat).logits[0]
        alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert_near(packed, torch.cat(alone))


@pytest.mark.parametrize("auto_class", ["AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_trainer_trains_and_evaluates_rows_of_any_length(ours, auto_class, tmp_path):
    """Published, evaluation met logits of other shapes in each batch, and failed."""
    pytest.importorskip("accelerate")
    ids = [list(range(5, 5 + n)) for n in (3, 9, 1, 20)]
    rows = [{"input_ids": x, "attention_mask": [1] * len(x), "labels": [1] * len(x)} for x in ids]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        pad = {k: [r[k] + [v] * (width - len(r[k])) for r in rows] for k, v in fill.items()}
        return {name: torch.tensor(x) for name, x in pad.items()}

    trainer = transformers.Trainer(
        load(auto_class, ours),
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            use_cpu=True,
        ),  # fmt: skip
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda x: {"scored": (x.label_ids != -100).sum()},
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_scored"] == sum(map(len, ids))


def test_reads_longer_text_than_it_was_trained_on(mosaic):
    config = transformers.AutoConfig.from_pretrained(mosaic, trust_remote_code=True)
    config.alibi_starting_size = 1024
    model = load("AutoModelForMaskedLM", mosaic, config=config)
    assert model(torch.arange(700)[None] % 320).logits.shape == (1, 700, 320)


def test_lora_on_wqkv_trains_saves_and_merges(mosaic, golden, tmp_path):
    peft = pytest.importorskip("peft")
    model = load("AutoModelForMaskedLM", mosaic)
    inputs, _ = golden
    before = model(**inputs).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["Wqkv"], r=4))
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    for _ in range(2):
        lora(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    trained = lora.eval()(**inputs).logits
    assert not torch.allclose(trained, before)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load("AutoModelForMaskedLM", mosaic), tmp_path)
    assert_near(again.eval()(**inputs).logits, trained)
    assert_near(again.merge_and_unload()(**inputs).logits, trained)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["word_embeddings", "token_type_embeddings"]},
        {"target_modules": ["Wqkv"], "trainable_token_indices": {"word_embeddings": [7, 8]}},
    ],
    ids=["LoRA", "single tokens"],
)
def test_adapters_of_embeddings_train(ours, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load("AutoModel", ours), peft.LoraConfig(**options))
    model(input_ids=torch.tensor([[7, 8, 9]])).pooler_output.square().sum().backward()
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert trained
    for name in trained:
        assert model.get_parameter(name).grad is not None, name


def test_weights_that_are_offloaded_are_fetched(mosaic, golden):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = load("AutoModelForMaskedLM", mosaic), {"input_ids": golden[0]["input_ids"]}
    expected = model(**inputs).logits
    assert torch.equal(
        accelerate.cpu_offload(model, torch.device("cpu"))(**inputs).logits, expected
    )


# ---- code from elsewhere ----


def test_files_in_a_package_of_ones_own_save_a_folder_that_loads(golden, tmp_path):
    """It had no code, although its config named some."""
    model = make(bert_layers.BertForMaskedLM)
    model.save_pretrained(tmp_path)
    assert {x.name for x in tmp_path.glob("*.py")} == set(MODEL_FILES)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load("AutoModelForMaskedLM", tmp_path)(ids).logits, model(ids).logits)
    assert load("AutoModelForTokenClassification", tmp_path)(ids).logits.shape == (1, 3, 2)


LOAD_AND_COMPILE = """
import sys, torch, transformers
outputs = []
for folder in sys.argv[1:]:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    torch._dynamo.reset()
    compiled, ids = torch.compile(model.eval(), backend="aot_eager"), torch.tensor([[1, 2]])
    print(torch.equal(compiled(ids).logits, model(ids).logits))
"""


def test_folders_whose_names_are_not_ascii_load_side_by_side(ours, tmp_path):
    """Operators take ASCII names only: nothing could load them, and after that nothing compiled."""
    names = ["\u6a21\u578b", "\u5b57\u5178", "mod\u00e8le 1", "model"]
    folders = [shutil.copytree(ours, tmp_path / name) for name in names]
    modules = str(tmp_path / "m\u00f3dulos y m\u00e1s")
    out = run_python(LOAD_AND_COMPILE, *folders, HF_MODULES_CACHE=modules)
    assert out.split() == ["True"] * len(names)


# ---- caches ----

# Root writes whatever the modes say, but not to a file system that is mounted for reading.
MOUNT = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
FROM_READ_ONLY = """
import os, torch, transformers
for folder in ("mosaic_tiny", "changed"):
    try:
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        print(tuple(model(torch.tensor([[1, 2, 3]])).pooler_output.shape))
    except OSError as error:
        print(os.strerror(error.errno))
"""


def test_what_was_loaded_once_loads_from_a_read_only_file_system(ours, tmp_path):
    """transformers copies code that is new to it to the modules' cache, and cannot there."""
    read_only = ["unshare", "-rm", "sh", "-ec", MOUNT, "sh", str(tmp_path)]
    mounted = subprocess.run([*read_only, "true"], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounts are not allowed here: {mounted.stderr.strip()}")
    load("AutoModel", ours)
    shutil.copytree(dynamic_module_utils.HF_MODULES_CACHE, tmp_path / "HF_MODULES_CACHE")
    for name in ("mosaic_tiny", "changed"):
        shutil.copytree(ours, tmp_path / name)
    with (tmp_path / "changed" / "bert_padding.py").open("a") as file:
        file.write("# changed")
    # Not TORCHINDUCTOR_CACHE_DIR: torch makes that folder when it is imported.
    caches = ("HF_HOME", "HF_MODULES_CACHE", "TRITON_CACHE_DIR")
    environment = os.environ | {name: str(tmp_path / name) for name in caches}
    command = [*read_only, sys.executable, "-c", FROM_READ_ONLY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 96)", "Read-only file system"]


def load_into(modules, folder, barrier, outcomes):
    """What a process does: loads at the same moment as the others, and tells how it went."""
    for module in (dynamic_module_utils, transformers.utils.hub):
        module.HF_MODULES_CACHE = modules
    barrier.wait()
    try:
        model = load("AutoModelForMaskedLM", folder)
        outcomes.put(model(torch.tensor([[1, 2, 3]])).logits.shape)
    except BaseException as error:
        outcomes.put(error)


def test_processes_load_at_once_into_an_empty_module_cache(ours, tmp_path):
    context, count = multiprocessing.get_context("fork"), 4
    for attempt in range(3):
        barrier, outcomes = context.Barrier(count), context.Queue()
        arguments = (str(tmp_path / str(attempt)), ours, barrier, outcomes)
        processes = [context.Process(target=load_into, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
        assert [outcomes.get(timeout=300) for _ in processes] == [(1, 3, 320)] * count
        for process in processes:
            process.join()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_decoder_of_its_own_trains_resizes_saves_and_reloads(backend, tmp_path):
    """tie_word_embeddings=False was refused."""
    model = make(bert_layers.BertForMaskedLM, backend, tie_word_embeddings=False).train()
    decoder, words = model.cls.predictions.decoder, model.get_input_embeddings()
    assert decoder.weight is not words.weight and not torch.equal(decoder.weight, words.weight)
    batch = make_batch(3, 9)
    model(**batch, labels=make_labels(batch)).loss.backward()
    assert decoder.weight.grad.abs().sum() > 0
    assert not torch.equal(decoder.weight.grad, words.weight.grad)
    model.eval().resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    again = load("AutoModelForMaskedLM", tmp_path)
    assert again.config.tie_word_embeddings is False
    assert again(**batch).logits.shape == (2, 9, 70)
    decoder = model.get_output_embeddings()
    assert torch.equal(again.get_output_embeddings().weight, decoder.weight)
    assert_near(again(**batch).logits, model(**batch).logits)


def test_a_decoder_that_is_stored_beside_its_tied_embeddings_stays_tied(mosaic):
    """Published files store both: transformers 5.0 then trained two matrices, with a remark."""
    model = load("AutoModelForMaskedLM", mosaic)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_untied_decoder_that_equals_the_embeddings_stays_untied(tmp_path):
    model = make(bert_layers.BertForMaskedLM, tie_word_embeddings=False)
    words = model.get_input_embeddings().weight
    model.get_output_embeddings().weight.data.copy_(words.data)
    model.save_pretrained(tmp_path)
    again = load("AutoModelForMaskedLM", tmp_path)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert torch.equal(again.get_output_embeddings().weight, words)


# ---- tools that cannot pass trust_remote_code ----

WITHOUT_TRUST = """
import sys, torch, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = sys.argv[1]
get_class_from_dynamic_module("bert_layers.register_for_auto_classes", folder)()
model = transformers.AutoModel.from_pretrained(folder)
print(type(model).__name__, type(model.config).__name__)
trusted = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([[1, 2, 3]])
print(torch.equal(model(ids).pooler_output, trusted(ids).pooler_output))
for name in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
    print(type(getattr(transformers, f"AutoModelFor{name}").from_pretrained(folder)).__name__)

decoder = transformers.BertConfig(vocab_size=320, hidden_size=model.config.hidden_size,
    num_hidden_layers=1, num_attention_heads=2, is_decoder=True, add_cross_attention=True)
pair = transformers.EncoderDecoderModel(
    encoder=model, decoder=transformers.BertLMHeadModel(decoder)
).eval()
pair.config.decoder_start_token_id, pair.config.pad_token_id = 1, 0
pair.save_pretrained(sys.argv[2])
again = transformers.EncoderDecoderModel.from_pretrained(sys.argv[2])
print(torch.equal(pair(ids, labels=ids).logits, again(ids, labels=ids).logits))
"""


def test_one_call_registers_the_model_for_tools_that_cannot_pass_trust(ours, tmp_path):
    out = run_python(WITHOUT_TRUST, ours, tmp_path / "pair")
    found = out.split()
    assert found[:3] == ["BertModel", "MosaicBertConfig", "True"]
    assert found[3:7] == [
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ]
    assert found[7:] == ["True"]
