# SPDX-License-Identifier: Apache-2.0
"""A disk that fills at each of the files that a command writes, one after the other. The command
says so and how to go on. What was whole stays whole, and once there is room the command ends as it
would have.

A small file system is mounted for it: as root, or by `unshare -rm make soak`. A few minutes.
"""

import contextlib
import hashlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import embeddings
import finetuning
import pytest
from conftest import GOLDENS
from training import DOCUMENTS, RESUME, RUN, flags

import convert_weights
import finetune
import prepare_data
import train_embeddings
import train_mlm
from mosaic_tools import family, preparing
from mosaic_tools.checkpoints import newest_checkpoint

pytest_plugins = ["finetuning"]
pytestmark = pytest.mark.soak

PAGE, ROOM = 4096, 64 * 2**20


class Disk:
    """A file system of its own.

    Args:
        path: where it is mounted.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", path]
        if reason := subprocess.run(words, capture_output=True, text=True).stderr:
            pytest.skip(f"run it as root, or by `unshare -rm make soak`: {reason}")

    def resize(self, size: int):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)

    def files(self) -> list[Path]:
        return [x for x in self.path.rglob("*") if x.is_file()]

    def sums(self) -> dict[str, str]:
        """Of all files, by name."""
        read = {str(x.relative_to(self.path)): x.read_bytes() for x in self.files()}
        return {name: hashlib.sha256(x).hexdigest() for name, x in read.items()}

    def sizes_that_do_not_do(self) -> dict[tuple[str, int], int]:
        """Bytes with which each of the files, in the order of writing, would not fit whole; by the
        file's name and its place in that order."""
        sizes, before = {}, 0
        for file in sorted(self.files(), key=lambda x: x.stat().st_mtime_ns):
            pages = -(-file.stat().st_size // PAGE)
            # tmpfs takes a size of 0 for no limit.
            sizes[file.name, len(sizes)] = max(before + pages // 2, 1) * PAGE
            before += pages
        return sizes

    def empty(self):
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", disk.path], check=True)


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(command, *words):
        argv = [f"{command.__name__}.py", *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        # Hundreds of runs say nothing of what is asked here.
        said = io.StringIO()
        with (
            family.without_report(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            command.main(*[argv[1:]] * (command in (finetune, convert_weights)))

    return call


def survives(disk, run, run_again, message, results="model.safetensors", check=lambda: None):
    """Fills the disk at each file that `run` writes.

    Args:
        run_again: what a user does once there is room.
        message: expected, beside that of the disk.
        results: name of the files which then are those of an undisturbed run.
        check: what must hold while the disk is full.
    """

    def found():
        return {name: x for name, x in disk.sums().items() if name.endswith(results)}

    run()
    expected, sizes, filled = found(), disk.sizes_that_do_not_do(), 0
    assert expected
    for (name, _), size in sizes.items():
        disk.empty()
        disk.resize(size)
        try:
            run()
        except OSError as error:
            assert re.search(f"could not be written.*{message}", str(error))
            filled += 1
            check()
            disk.resize(ROOM)
            run_again()
        assert found() == expected, f"after the disk was full at {name}"
    # The picture takes a page more or less, with which the last file may fit after all.
    assert filled >= len(sizes) - 2
    print(f"the disk was full at {filled} of {len(sizes)} files")


def survives_or_leaves_nothing(disk, run):
    """As `survives`, of what has its folder whole or not at all: the same command is for both."""

    def nothing_is_left():
        assert not disk.files()

    message = "Nothing is left of it. Make room"
    survives(disk, run, run, message, results="", check=nothing_is_left)


def test_pretraining(disk, call, vocab, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    values = {"max_steps": 6, "tokenizer_name": vocab, "output_dir": disk.path / "out"}
    words = flags(**RUN | values)
    survives(
        disk,
        lambda: call(train_mlm, *words),
        lambda: call(train_mlm, *words, *RESUME),
        "Make room.*Repeat the command with --resume_from_checkpoint last",
    )


def test_a_checkpoint_outlives_the_one_that_does_not_fit(disk, call, vocab, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    values = {"max_steps": 3, "tokenizer_name": vocab, "output_dir": disk.path / "out"}
    call(train_mlm, *flags(**RUN | values))
    whole, before = newest_checkpoint(disk.path / "out")[0], disk.sums()
    disk.resize(sum(-(-x.stat().st_size // PAGE) for x in disk.files()) * PAGE + 10 * PAGE)
    with pytest.raises(OSError, match=f"last complete checkpoint is {whole}"):
        call(train_mlm, *flags(**RUN | values | {"max_steps": 6}), *RESUME)
    kept = {name: x for name, x in before.items() if whole.name in name}
    assert kept and kept.items() <= disk.sums().items()


def test_embeddings(disk, call, golden, tmp_path):
    values = embeddings.RUN | embeddings.write_data(tmp_path / "pairs")
    values |= {"model_name_or_path": golden, "save_strategy": "steps", "save_steps": 3}
    words = flags(**values | {"output_dir": disk.path / "out"})
    survives(
        disk,
        lambda: call(train_embeddings, *words),
        lambda: call(train_embeddings, *words, *RESUME),
        "Make room.*Repeat the command with --resume_from_checkpoint last",
    )


def test_finetuning(disk, call, golden, tmp_path):
    values = finetuning.write_own(tmp_path / "own", finetuning.by_age())
    values |= finetuning.QUICK | {"num_train_epochs": 1, "output_dir": disk.path / "out"}
    words = flags(**values, model=golden, seeds=1)
    survives(
        disk,
        lambda: call(finetune, *words),
        lambda: call(finetune, *words),
        "Make room.*Repeat the command: what is finished is kept",
    )


def test_conversion(disk, call, vocab):
    words = (GOLDENS / "mosaic_tiny", disk.path / "out", "--tokenizer", vocab)
    survives_or_leaves_nothing(disk, lambda: call(convert_weights, *words))


def test_a_former_conversion_outlives_the_one_that_does_not_fit(disk, call, vocab):
    words = (GOLDENS / "mosaic_tiny", disk.path / "out", "--tokenizer", vocab)
    call(convert_weights, *words)
    before, sizes = disk.sums(), disk.sizes_that_do_not_do()
    used = sum(-(-x.stat().st_size // PAGE) for x in disk.files()) * PAGE
    for size in sizes.values():
        disk.resize(used + size)
        with pytest.raises(OSError, match="could not be written"):
            call(convert_weights, *words, "--overwrite")
        assert disk.sums() == before


def test_prepared_data(disk, call, vocab, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    monkeypatch.setattr(preparing, "FEWEST", 20)
    values = {key: RUN[key] for key in ("train_file", "validation_split", "max_seq_length")}
    words = flags(**values, tokenizer_name=vocab, prepared_data=disk.path / "rows")
    survives(
        disk,
        lambda: call(prepare_data, *words),
        lambda: call(prepare_data, *words),
        "[Rr]epeat the command",
        results="",
    )
