# SPDX-License-Identifier: Apache-2.0
"""A Hub that records what would be sent to it."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

from mosaic_tools import publishing

TOKEN = "hf_" + "secret" * 5
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
# Which transformers 4 writes too.
FILES_OF_OLD_TOKENIZERS = {"vocab.txt", "special_tokens_map.json"}


class Recorder:
    """A Hub that holds `repositories`, name -> private, and answers to `api`, which takes what the
    installed HfApi takes."""

    def __init__(self, error=None):
        self.error, self.calls, self.sent, self.repositories = error, [], {}, {}
        self.there = [".gitattributes"]
        self.api = create_autospec(HfApi)
        calls = ("create_repo", "repo_info", "create_branch", "list_repo_files", "upload_folder")
        for name in calls:
            getattr(self.api.return_value, name).side_effect = getattr(self, name)

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append("create_repo")
        assert exist_ok or repo_id not in self.repositories
        self.repositories.setdefault(repo_id, bool(private))

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.repositories[repo_id])

    def create_branch(self, repo_id, branch, exist_ok=False):
        self.calls.append(f"create_branch {branch}")

    def list_repo_files(self, repo_id, revision):
        return self.there

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
    monkeypatch.setattr(publishing, "HfApi", recorder.api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield recorder
    # Nothing else was asked of the Hub.
    asked = {name for name, *_ in recorder.api.return_value.method_calls}
    known = {"create_repo", "repo_info", "create_branch", "list_repo_files", "upload_folder"}
    assert asked <= known
