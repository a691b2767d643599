# SPDX-License-Identifier: Apache-2.0
"""Every command in README and docs: its script is there and has the flags that it is given, its
make target exists, and relative links lead somewhere."""

import functools
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda x: x.relative_to(ROOT).as_posix())
BASH = re.compile(r"```(?:bash|sh|console)\n(.*?)```", re.S)


def commands(page) -> list[list[str]]:
    """The words of each command line in the page's bash blocks, comments left out."""
    blocks = [x.replace("\\\n", " ") for x in BASH.findall(page.read_text())]
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def flags_of(*program: str) -> set[str]:
    """The flags that a program's --help lists; of an example, whose client is not installed here,
    those that its source adds."""
    if program[0].startswith("examples/"):
        source = (ROOT / program[0]).read_text()
        return set(re.findall(r'add_argument\(\s*"(--?[a-zA-Z][\w-]*)"', source))
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{program}: {done.stderr}"
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


def given(words: list[str]) -> set[str]:
    """The flags among words; an optional one is in brackets."""
    names = (word.lstrip("[").rstrip("]").split("=")[0] for word in words)
    return {name for name in names if re.match(r"--?[a-zA-Z]", name)}


@PAGE
def test_scripts_have_the_flags_that_pages_give_them(page):
    """Flags that did not exist stayed unnoticed."""
    for words in commands(page):
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        ours = [i for i in scripts if (ROOT / words[i]).exists()]
        launched = words[:2] == ["accelerate", "launch"]
        if words[0].startswith("python") and scripts[:1] == [1]:
            # Scripts of others are named too, by their bare names.
            assert ours or words[1] in OTHERS, f"{page.name}: there is no {words[1]}"
        assert not launched or ours, f"{page.name}: {shlex.join(words)} starts no script"
        if ours and (launched or words[0].startswith("python")):
            at = ours[0]
            strange = given(words[at + 1 :]) - flags_of(words[at])
            if launched:
                launcher = flags_of("-m", "accelerate.commands.launch")
                strange |= given(words[2:at]) - launcher
            assert not strange, f"{page.name}: {words[at]} has no {', '.join(sorted(strange))}"


# llama.cpp's.
OTHERS = {"convert_hf_to_gguf.py"}


@PAGE
def test_make_has_the_targets_that_pages_name(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    variables = set(re.findall(r"^([A-Z_]+) [:?]?=", makefile, re.M)) | {"ONLY"}
    text = page.read_text()
    named = [words[1:] for words in commands(page) if words[0] == "make"]
    named += [x.split() for x in re.findall(r"`make ([^`]+)`", text)]
    for words in named:
        for word in words:
            name = word.split("=")[0]
            assert name in (variables if "=" in word else targets), f"{page.name}: make {word}"


@PAGE
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_flag_that_does_not_exist_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\npython convert_weights.py SOURCE FOLDER --layuot jina\n```\n")
    with pytest.raises(AssertionError, match="convert_weights.py has no --layuot"):
        test_scripts_have_the_flags_that_pages_give_them(page)
    page.write_text("```bash\naccelerate launch --num_procesess 2 train_mlm.py\n```\n")
    with pytest.raises(AssertionError, match="has no --num_procesess"):
        test_scripts_have_the_flags_that_pages_give_them(page)
    page.write_text("Run `make tset`, or [this](nowhere.md).")
    with pytest.raises(AssertionError, match="make tset"):
        test_make_has_the_targets_that_pages_name(page)
    with pytest.raises(AssertionError, match="nowhere.md"):
        test_links_to_files_lead_somewhere(page)
