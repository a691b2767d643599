# SPDX-License-Identifier: Apache-2.0
"""publishing.py: what would be sent to the Hub, what never is, and an upload that fails."""

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from conftest import GOLDENS, MODEL_FILES, run_python

import convert_weights
import publishing

TOKEN = "hf_" + "secret" * 5
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
# Which transformers 4 writes too.
FILES_OF_OLD_TOKENIZERS = {"vocab.txt", "special_tokens_map.json"}


class Recorder:
    """In place of HfApi: a Hub that holds `repositories`, name -> private."""

    def __init__(self, error=None):
        self.error, self.calls, self.sent, self.repositories = error, [], {}, {}

    def __call__(self):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append("create_repo")
        assert exist_ok or repo_id not in self.repositories
        self.repositories.setdefault(repo_id, bool(private))

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.repositories[repo_id])

    def create_branch(self, repo_id, branch, exist_ok=False):
        self.calls.append(f"create_branch {branch}")

    def upload_folder(self, folder_path, repo_id, revision, allow_patterns, commit_message):
        self.calls.append(f"upload_folder {revision}")
        if self.error:
            raise self.error
        files = {x.relative_to(folder_path).as_posix(): x for x in Path(folder_path).rglob("*")}
        self.sent = {
            name: x.read_bytes()
            for name, x in files.items()
            if x.is_file() and any(fnmatch.fnmatch(name, y) for y in allow_patterns)
        }
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(publishing, "HfApi", recorder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return recorder


@pytest.fixture
def vocab(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([*publishing.SPECIAL_TOKENS, *(f"w{i}" for i in range(5, 320))]))
    return file


def convert(vocab, out, *flags):
    arguments = (GOLDENS / "mosaic_tiny", out, "--tokenizer", vocab, *flags)
    convert_weights.main([str(x) for x in arguments])


def contents(folder):
    return {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_convert_weights_sends_the_whole_model_in_one_commit(hub, vocab, tmp_path, capsys):
    convert(vocab, tmp_path / "out", "--push_to_hub", "org/name")
    assert hub.calls == ["create_repo", "upload_folder None"]
    wanted = {"model.safetensors", "config.json", "README.md", *MODEL_FILES, *TOKENIZER_FILES}
    assert set(hub.sent) - FILES_OF_OLD_TOKENIZERS == wanted
    auto_map = json.loads(hub.sent["config.json"])["auto_map"]
    # No "other/name--": the code is the repository's own.
    assert {x.split(".")[0] + ".py" for x in auto_map.values()} <= set(MODEL_FILES)
    assert "# org/name" in hub.sent["README.md"].decode()
    printed = capsys.readouterr()
    assert "https://huggingface.co/org/name/commit/1" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in x for x in hub.sent.values())


def test_a_branch_and_a_private_repository(hub, vocab, tmp_path):
    flags = ("--push_to_hub", "org/name", "--private", "--revision", "v2")
    convert(vocab, tmp_path / "out", *flags)
    assert hub.calls == ["create_repo", "create_branch v2", "upload_folder v2"]
    assert hub.repositories == {"org/name": True}


def test_nothing_private_goes_to_a_repository_that_is_public(hub, vocab, tmp_path):
    """The Hub ignores `private` for a repository that exists."""
    convert(vocab, tmp_path / "out")
    hub.repositories["org/name"] = False
    with pytest.raises(ValueError, match="org/name exists and is public: nothing was uploaded"):
        publishing.publish(tmp_path / "out", "org/name", private=True)
    assert hub.sent == {} and hub.calls == ["create_repo"]


def test_jinas_layout_is_sent_with_its_pooling_and_without_code(hub, vocab, tmp_path):
    convert(vocab, tmp_path / "out", "--layout", "jina", "--push_to_hub", "org/name")
    wanted = {"model.safetensors", "config.json", "README.md", *TOKENIZER_FILES}
    wanted |= {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert set(hub.sent) - FILES_OF_OLD_TOKENIZERS == wanted


def test_what_training_leaves_in_the_folder_stays_there(hub, vocab, tmp_path):
    """Optimizer states are large, and pickles and secrets nobody's business."""
    out = tmp_path / "out"
    convert(vocab, out)
    expected = {x.name for x in out.iterdir()}
    (out / "checkpoint-10" / "global").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "optimizer.pt", "global/README.md"):
        (out / "checkpoint-10" / name).write_text(TOKEN)
    for name in ("training_args.bin", "trainer_state.json", "all_results.json", ".env", "token"):
        (out / name).write_text(TOKEN)
    publishing.publish(out, "org/name")
    assert set(hub.sent) == expected


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required"),
        ConnectionError(f"could not send 'authorization: Bearer {TOKEN}'"),
        RuntimeError("the network is down"),
    ],
    ids=["not logged in", "quotes the token", "unforeseen"],
)
def test_a_failing_upload_leaves_the_folder_intact_and_says_what_to_do(
    hub, vocab, tmp_path, capsys, error
):
    hub.error, out = error, tmp_path / "out"
    with pytest.raises(OSError, match="was not uploaded to org/name, and is as it was") as found:
        convert(vocab, out, "--push_to_hub", "org/name")
    assert type(error).__name__ in str(found.value) and "hf auth login" in str(found.value)
    # Nor is it in what a traceback would print.
    assert TOKEN not in str(found.value) + capsys.readouterr().out
    assert found.value.__cause__ is None and found.value.__suppress_context__
    before = contents(out)
    model = transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
    assert model(torch.tensor([[2, 5, 3]])).logits.shape == (1, 3, 320)

    hub.error = None
    (again,) = [x for x in str(found.value).splitlines() if "python -c" in x]
    exec(again.split('"')[1])
    assert set(hub.sent) == {x.relative_to(out).as_posix() for x in before}
    assert contents(out) == before


@pytest.mark.parametrize("missing", ["README.md", "config.json", "model.safetensors", "bert_"])
def test_an_incomplete_folder_is_not_sent(hub, vocab, tmp_path, missing):
    out = tmp_path / "out"
    convert(vocab, out)
    for file in out.glob(f"{missing}*"):
        file.unlink()
    name = "bert_layers.py" if missing == "bert_" else missing
    with pytest.raises(ValueError, match=f"is no model to publish: it lacks {name}"):
        publishing.publish(out, "org/name")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["name", "org/name/more", "org/na me"])
def test_a_name_that_the_hub_cannot_have_is_refused_before_any_work(hub, vocab, tmp_path, name):
    with pytest.raises(ValueError):
        convert(vocab, tmp_path / "out", "--push_to_hub", name)
    assert hub.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--private",), ("--revision", "v2")])
def test_flags_of_an_upload_that_is_not_asked_for_are_refused(hub, vocab, tmp_path, flags):
    with pytest.raises(SystemExit):
        convert(vocab, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


PLAIN = """
import sys, types
import transformers, transformers.utils.hub as hub
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

def create_repo(*args, **options):
    return types.SimpleNamespace(repo_id="org/name", url=None)

def create_commit(*args, operations, **options):
    print("commit", *(x.path_in_repo for x in operations))

def no_card_yet(*args, **options):
    raise EntryNotFoundError("README.md")

ModelCard.load, ModelCard.validate = no_card_yet, lambda *args, **options: None
for fake in (create_repo, create_commit):
    # transformers 4 and 5.0 call functions, later ones methods.
    setattr(hub, fake.__name__, fake)
    setattr(HfApi, fake.__name__, fake)
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub("org/name")
"""


def test_plain_push_to_hub_sends_weights_code_config_and_card(mosaic):
    printed = run_python(PLAIN, mosaic, HF_TOKEN=TOKEN)
    (commit,) = [x.split() for x in printed.splitlines() if x.startswith("commit")]
    assert set(commit[1:]) == {"README.md", "config.json", "model.safetensors", *MODEL_FILES}
    assert TOKEN not in printed
