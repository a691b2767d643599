# SPDX-License-Identifier: Apache-2.0
"""A model compiled ahead of time is the model, and says why it does not load elsewhere."""

import importlib.util
import re
import shutil

import pytest
import torch
from conftest import GOLDENS, ROOT, run_python
from models import close
from transformers import AutoModel

import convert_weights
from mosaic_tools import aot

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 9) or shutil.which("g++") is None, reason="needs torch 2.9 and g++"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """By the command, of a checkpoint with an MLM head, which is left out of what is compiled."""
    folder = tmp_path_factory.mktemp("aot") / "compiled"
    source = str(GOLDENS / "mosaic_tiny")
    convert_weights.main([source, str(folder), "--aot", "--task", "feature-extraction"])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """The folder's own, which loads as any other: padded batches are for it."""
    options = {"add_pooling_layer": False, "trust_remote_code": True}
    return AutoModel.from_pretrained(folder, **options).eval()


@pytest.fixture
def elsewhere(folder):
    """The copy of the loader that lies beside the package, where a test may change the machine."""
    spec = importlib.util.spec_from_file_location("aot_beside", folder / aot.LOADER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_the_model_at_any_batch_and_length(folder, model):
    """One row, one token, lengths that no vector fills, and more than it was recorded with."""
    compiled = aot.load(folder / aot.FILE)
    for shape in [(1, 1), (1, 16), (3, 7), (2, 129), (9, 33)]:
        ids = torch.randint(0, model.config.vocab_size, shape)
        with torch.no_grad():
            close(compiled(ids), model(ids).last_hidden_state, factor=64)


def test_it_reads_a_part_of_a_tensor_as_that_part(folder, model):
    """The machine code takes rows to lie one behind the other: it read the columns left out."""
    ids = torch.randint(0, model.config.vocab_size, (3, 20))
    compiled = aot.load(folder / aot.FILE)
    assert torch.equal(compiled(ids[:, :11]), compiled(ids[:, :11].clone()))


@pytest.mark.parametrize(
    "ids",
    [torch.ones(2, 3, dtype=torch.int32), torch.ones(3, dtype=torch.int64), torch.ones(2, 3)],
    ids=["int32", "one axis", "float"],
)
def test_what_the_machine_code_would_misread_is_refused(folder, ids):
    with pytest.raises(ValueError, match=r"must be \(batch, seqlen\) int64 on the CPU, got"):
        aot.load(folder / aot.FILE)(ids)


def test_a_server_needs_torch_alone_and_the_page_says_how(folder):
    page = (ROOT / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*mosaic_aot.*?)```", page, re.S)
    check = """
import sys
assert hidden.shape[:2] == (1, 4) and embedding.shape == hidden[:, 0].shape
assert "transformers" not in sys.modules
"""
    run_python(
        f"import os, sys; os.chdir({str(folder)!r}); sys.path.insert(0, '')\n{example}{check}"
    )


def test_threads_are_those_of_the_process_that_runs_it(folder):
    """Without cpp.dynamic_threads the code asks for as many as there were when it was compiled."""
    import zipfile

    with zipfile.ZipFile(folder / aot.FILE) as package:
        kernels = [x for x in package.namelist() if x.endswith(".kernel.cpp")]
        code = "".join(package.read(x).decode() for x in kernels)
    assert "#pragma omp" in code and "num_threads(" not in code


def test_another_torch_is_refused_by_name(elsewhere, folder, monkeypatch):
    monkeypatch.setattr(elsewhere.torch, "__version__", "2.99.0")
    with pytest.raises(ValueError, match=r"compiled by torch 2\.\d+\.\S+, this is 2\.99\.0"):
        elsewhere.load(folder / elsewhere.FILE)


def test_a_cpu_that_lacks_an_instruction_is_refused_by_name(elsewhere, folder, monkeypatch):
    made_on = elsewhere.read_metadata(folder / elsewhere.FILE)[elsewhere.INSTRUCTIONS].split()
    missing = made_on[-1]
    monkeypatch.setattr(elsewhere, "instructions", lambda: set(made_on[:-1]) | {"of_later_cpus"})
    with pytest.raises(ValueError, match=f"lacks {missing}: compile the model on"):
        elsewhere.load(folder / elsewhere.FILE)
    monkeypatch.setattr(elsewhere, "instructions", lambda: {*made_on, "of_later_cpus"})
    assert elsewhere.load(folder / elsewhere.FILE) is not None


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_what_is_no_package_is_refused(tmp_path, content):
    file = tmp_path / "model.pt2"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        aot.load(file)


def test_a_missing_compiler_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(aot.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no g\\+\\+"):
        convert_weights.main([str(GOLDENS / "mosaic_tiny"), str(tmp_path / "out"), "--aot"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, said",
    [
        ("--aot --onnx", "--aot compiles what the mosaic layout holds"),
        ("--aot --layout jina", "--aot compiles what the mosaic layout holds"),
        ("--task fill-mask", "--task needs --onnx or --aot"),
        ("--aot --push_to_hub org/name", "nothing of it is uploaded: push without it"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert_weights.main([str(GOLDENS / "mosaic_tiny"), str(tmp_path / "out"), *words.split()])
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_head_that_the_checkpoint_lacks_is_refused(tmp_path):
    words = [str(GOLDENS / "mosaic_tiny"), str(tmp_path / "out"), "--aot"]
    with pytest.raises(ValueError, match="no head for --task text-classification: leave it out"):
        convert_weights.main([*words, "--task", "text-classification"])
    assert not list(tmp_path.iterdir())
