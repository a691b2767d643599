# SPDX-License-Identifier: Apache-2.0
"""README and docs say only what is so: their examples run, the files they name are there, and the
file map has every file. Commands and links are in test_documented_commands.py."""

import re

import pytest
from conftest import GOLDENS, ROOT, run_python
from training import write_vocab

import convert_weights

README = (ROOT / "README.md").read_text()
FILE_MAP = re.search(r"## File map\n[^`]*```\n(.*?)```", README, re.S).group(1)
# CHANGELOG.md may name what is gone.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for room in ("docs", "benchmarks") for page in sorted(ROOT.glob(f"{room}/*.md"))),
]
NOT_IN_MAP = {"README.md", "__init__.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny converted folder with a tokenizer."""
    vocab = tmp_path_factory.mktemp("readme") / "vocab.txt"
    folder = vocab.parent / "model"
    write_vocab(vocab, entries=320)
    arguments = (GOLDENS / "mosaic_tiny", folder, "--tokenizer", vocab)
    convert_weights.main([str(x) for x in arguments])
    return folder


def examples(page, folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return [x.replace("runs/demo", str(folder)) for x in blocks]


def test_the_example_runs_as_it_stands(folder):
    example = examples("README.md", folder)[0]
    assert len(example.strip().splitlines()) <= 9
    guesses = run_python(example)
    assert len(guesses.splitlines()) == 5


def test_the_examples_of_using_the_model_run_one_after_the_other(folder):
    results = """
from math import isfinite
batch, seqlen = inputs["input_ids"].shape
assert embeddings.shape == (batch, encoder.config.hidden_size)
assert attentions[0].shape == (batch, model.config.num_attention_heads, seqlen, seqlen)
assert isfinite(loss.item()) and logits.shape == (batch, seqlen, model.config.vocab_size)
# What is packed is what is padded.
whole = encoder(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
torch.testing.assert_close(hidden[0], whole)
"""
    run_python("\n".join([*examples("docs/using.md", folder), results]))


def test_readme_is_a_page():
    text = re.sub(r"^---\n.*?\n---\n", "", README, flags=re.S)
    assert len(re.sub(r"```.*?```", "", text, flags=re.S).split()) <= 1000


# llama.cpp's, DNABERT-2's and transformers'.
OF_OTHERS = {
    *("convert_hf_to_gguf.py", "finetune/train.py", "run_glue.py", "run_mlm.py", "text_data.py"),
    # mosaicml/examples', and what is made of the first.
    *("yamls/main/mosaic-bert-base-uncased.yaml", "mine.yaml"),
    "yamls/finetuning/mosaic-bert-base-uncased.yaml",
    "yamls/finetuning/glue/mosaic-bert-base-uncased.yaml",
    # In a compiled model's folder.
    "mosaic_aot.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda x: x.relative_to(ROOT).as_posix())
def test_every_file_it_names_exists(page):
    text = page.read_text().replace(FILE_MAP, "")
    named = set(re.findall(r"(?<![\w./-])\.?[\w/-]+\.(?:py|yaml)\b", text)) - OF_OTHERS
    assert not {x for x in named if not (ROOT / x).exists() and not (page.parent / x).exists()}


def named_in_the_file_map():
    """Paths from the root: an indented name lies in the folder above it, if there is one."""
    folder = ""
    for line in FILE_MAP.splitlines():
        match = re.match(r"( *)([\w./-]+(?:, [\w./-]+)*)  ", line)
        names = match[2].split(", ") if match else []
        yield from ((folder if match[1] else "") + name for name in names)
        if not match or not match[1]:
            folder = names[0] if names and names[0].endswith("/") else ""


def test_the_file_map_has_every_file():
    named = set(named_in_the_file_map())
    assert not {x for x in named if not (ROOT / x).exists()}
    patterns = ("*.py", "*.md", "mosaic_tools/*.py", "benchmarks/*.py")
    files = {x for pattern in patterns for x in ROOT.glob(pattern) if x.name not in NOT_IN_MAP}
    assert {x.relative_to(ROOT).as_posix() for x in files} <= named


def test_contributing_says_what_proves_a_change_to_each_file():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("which test proves it")[1]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    changed = {file for row in rows for file in re.findall(r"[\w/]+\.py", row[2])}
    proofs = {file for row in rows for file in re.findall(r"[\w/]+\.py", row[3])}
    files = [*ROOT.glob("*.py"), *ROOT.glob("mosaic_tools/[!_]*.py")]
    assert changed >= {x.relative_to(ROOT).as_posix() for x in files}
    assert proofs and all(x.startswith("tests/test_") for x in proofs)
    assert all((ROOT / x).is_file() for x in changed | proofs)


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"test", "demo"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
