# SPDX-License-Identifier: Apache-2.0
"""README.md says only what is so: its example runs, its commands parse, its files are there."""

import re

import pytest
from conftest import GOLDENS, ROOT, run_python

import convert_weights
from mosaic_tools.tokenization import SPECIAL_TOKENS

README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_it_stands(tmp_path):
    vocab, folder = tmp_path / "vocab.txt", tmp_path / "model"
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, 320))]))
    arguments = (GOLDENS / "mosaic_tiny", folder, "--tokenizer", vocab)
    convert_weights.main([str(x) for x in arguments])
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len(example.strip().splitlines()) <= 9
    guesses = run_python(example.replace("runs/demo", str(folder)))
    assert len(guesses.splitlines()) == 5


# llama.cpp's, DNABERT-2's and transformers'.
OF_OTHERS = {"convert_hf_to_gguf.py", "finetune/train.py", "run_glue.py", "run_mlm.py"}


@pytest.mark.parametrize(
    "file", sorted(set(re.findall(r"\b[\w/-]+\.(?:py|yaml)\b", README)) - OF_OTHERS)
)
def test_every_file_it_names_exists(file):
    assert (ROOT / file).exists()


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"test", "demo"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
