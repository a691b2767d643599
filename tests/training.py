# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: a tiny corpus, a model's sizes, and runs of the scripts in
processes of their own, offline, with caches of their own."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
# Epochs of four steps, dropout, two micro-batches a step, a checkpoint every three steps.
RUN = SIZES | {
    "train_file": "text.txt",
    "validation_split": 20,
    "max_seq_length": 16,
    "global_batch_size": 16,
    "per_device_train_batch_size": 8,
    "max_steps": 30,
    "learning_rate": 3e-3,
    "cpu_threads": 1,
    "logging_steps": 1,
    "save_steps": 3,
    "output_dir": "out",
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


def start(cwd: Path, *words) -> subprocess.Popen:
    """`run`, which goes on while the test does."""
    return subprocess.Popen(
        **command_of(cwd, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition, process):
    """Looks as often as it can, so as not to miss what lasts milliseconds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(2e-4)


def train_here(folder: Path, words: list):
    """train_mlm.py in this process and folder; what it says is in said.txt there."""
    import train_mlm

    # That of loader workers, which a process inherits from what began it.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    with open("said.txt", "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [str(word) for word in words]
    train_mlm.main()


def arguments(whole: Path, **values) -> list:
    """Words of RUN with these flags, on the text in `whole` and with the tokenizer of the run
    there."""
    same = {"train_file": whole / "text.txt", "tokenizer_name": whole / "out"}
    return [ROOT / "train_mlm.py", *flags(**RUN | same | values)]


def write_vocab(file: Path, *words: str, entries: int = 0) -> Path:
    """BERT's vocab.txt: the special tokens, these words, and w5, w6, ... up to so many entries."""
    # Not at the top: a model is tested without what the commands need.
    pytest.importorskip("accelerate")
    from mosaic_tools import tokenization

    tokens = [*tokenization.SPECIAL_TOKENS, *words]
    tokens += [f"w{i}" for i in range(len(tokens), entries)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(tokens))
    return file


def flags(**values) -> list[str]:
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


RESUME = flags(resume_from_checkpoint="last")


def read_json(*path):
    return json.loads(Path(*path).read_text())


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step that a run logged, each once."""
    entries = read_log(folder)
    by_step = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert len(by_step) == sum("loss" in entry for entry in entries), "a step is logged twice"
    return by_step


def rates(folder: Path) -> list[float]:
    """The learning rate of each step that a run logged."""
    return [entry["learning_rate"] for entry in read_log(folder) if "loss" in entry]


def trained_tokenizer(**values):
    from mosaic_tools import recipe, tokenization

    args = recipe.TokenizerArguments(**{"vocab_size": 100} | values)
    return tokenization.train_tokenizer(iter(DOCUMENTS), args)
