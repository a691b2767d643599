# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: a tiny corpus, a model's sizes, and runs of the scripts in
processes of their own, offline, with caches of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mosaic_tools import tokenization
from mosaic_tools.recipe import TokenizerArguments

ROOT = Path(__file__).resolve().parents[1]

# Code for a new process: side_by_side's `run` in that process, in place of one for each command.
RUN_IN_PLACE = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})

def run(commands):
    for words in commands.values():
        print("RUN", words[0])
        sys.argv[:] = map(str, words)
        runpy.run_path(sys.argv[0], run_name="__main__")

os.chdir(sys.argv[1])
"""

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 150,
}
ACCELERATE = ["-m", "accelerate.commands.launch"]
DOCUMENTS = [
    f"the {age} {reader} reads a {size} book"
    for age in ("old", "young", "tall", "small", "wise")
    for reader in ("man", "woman", "child", "teacher")
    for size in ("long", "short", "new", "green")
]


def command_of(cwd: Path, *words) -> dict:
    """Arguments for subprocess: `python *words` in cwd."""
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    return {"args": [sys.executable, *(str(word) for word in words)], "cwd": cwd, "env": env}


def run(cwd: Path, *words, fails=False) -> str:
    """Output of `python *words` in cwd."""
    done = subprocess.run(**command_of(cwd, *words), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def write_vocab(file: Path, *words: str, entries: int = 0) -> Path:
    """BERT's vocab.txt: the special tokens, these words, and w5, w6, ... up to so many entries."""
    tokens = [*tokenization.SPECIAL_TOKENS, *words]
    tokens += [f"w{i}" for i in range(len(tokens), entries)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(tokens))
    return file


def flags(**values) -> list[str]:
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


def read_json(*path):
    return json.loads(Path(*path).read_text())


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def trained_tokenizer(**values):
    args = TokenizerArguments(**{"vocab_size": 100} | values)
    return tokenization.train_tokenizer(iter(DOCUMENTS), args)
