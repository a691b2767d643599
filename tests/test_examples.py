# SPDX-License-Identifier: Apache-2.0
"""The examples, as far as that goes without their clients: versions are pinned and are those that
the page names, the browser's page finds its files, and `make test-clients` notices what is wrong.
"""

import json
import re

import clients
import pytest
import torch
from conftest import GOLDENS, ROOT
from training import write_vocab
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import convert_weights

EXAMPLES, BROWSER = ROOT / "examples", ROOT / "examples" / "browser"
SERVING = (ROOT / "docs" / "serving.md").read_text()
SCRIPTS = sorted(x for pattern in ("*.py", "node/*.mjs") for x in EXAMPLES.glob(pattern))
HTML = (BROWSER / "index.html").read_text()
JAVASCRIPT = {x.name: x.read_text() for x in BROWSER.glob("*.js")}


def pinned(file) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", file.read_text(), re.M))


CONSTRAINTS = {x.name: pinned(x) for x in (ROOT / "constraints" / "clients").glob("*.txt")}
NPM = json.loads((EXAMPLES / "package.json").read_text())["dependencies"]


@pytest.mark.parametrize("page", [ROOT / "docs/serving.md", *SCRIPTS], ids=lambda x: x.name)
def test_what_it_says_to_install_is_pinned(page):
    text = page.read_text()
    assert "constraints/clients/" in text or "npm install --ignore-scripts" in text
    for packages, name in re.findall(r"pip install ([\w -]+) -c constraints/clients/(\S+)", text):
        assert set(packages.split()) <= CONSTRAINTS[name].keys(), name


def test_the_page_has_the_versions_that_are_pinned():
    versions = {name: {x[name] for x in CONSTRAINTS.values() if name in x} for name in CLIENTS}
    versions["transformers.js"] = {NPM["@huggingface/transformers"]}
    for name, found in versions.items():
        assert len(found) == 1, name
        assert re.search(rf"{re.escape(name)} {re.escape(*found)}(?![\w.]*\d)", SERVING), name


CLIENTS = ("sentence-transformers", "optimum-onnx", "fastembed", "openvino")


def test_versions_are_exact():
    assert CONSTRAINTS and NPM
    for name, found in CONSTRAINTS.items():
        lines = (ROOT / "constraints" / "clients" / name).read_text().splitlines()
        assert len(found) == len([x for x in lines if not x.startswith("#")]), name
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", x) for x in NPM.values())


def test_the_page_names_every_script_and_its_folders():
    for script in SCRIPTS:
        name = script.relative_to(ROOT).as_posix()
        assert name in SERVING and name in script.read_text(), name
    folders = re.findall(r'": "([\w-]+)"', JAVASCRIPT["models.js"].split("FOLDERS")[1])
    assert len(folders) == 2
    for text in (SERVING, (ROOT / "Makefile").read_text()):
        assert {f"examples/models/{x}" for x in folders} <= set(re.findall(r"[\w/-]+", text))


# ---- the browser's page ----


def test_the_files_that_the_page_asks_for_are_there():
    asked = re.findall(r'(?:href|src)="([^"]+)"', HTML)
    for text in JAVASCRIPT.values():
        asked += re.findall(r'(?:from |import\(|new URL\()"([^"]+)"', text)
    assert {"app.js", "style.css", "./models.js"} <= set(asked)
    for name in asked:
        # What npm installs, and what --onnx exports, is not part of the repository.
        installed = name.startswith(("../node_modules/", "../models/", "data:"))
        assert installed or (BROWSER / name).is_file(), name


def test_the_page_asks_no_other_server():
    for name, text in {"index.html": HTML, **JAVASCRIPT}.items():
        assert not re.search(r"//[\w-]+\.\w", re.sub(r"^\s*// .*", "", text, flags=re.M)), name


def test_the_elements_that_the_script_looks_for_are_there():
    looked_for = re.findall(r'(?:getElementById|connect)\("(\w+)"', JAVASCRIPT["app.js"])
    assert set(looked_for) == set(re.findall(r'id="(\w+)"', HTML))


# ---- what make test-clients compares ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vocab = tmp_path_factory.mktemp("clients") / "vocab.txt"
    write_vocab(vocab, entries=320)
    folder = vocab.parent / "model"
    arguments = (GOLDENS / "mosaic_tiny", folder, "--tokenizer", vocab)
    convert_weights.main([str(x) for x in arguments])
    return folder


def compare(folder, lines, monkeypatch, *words):
    output = folder.parent / "output.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["clients.py", str(folder), str(output), *map(str, words)])
    clients.main()


def parts_of(folder, auto_class=AutoModel, **kwargs):
    """The model as clients.py calls it, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return clients.by_pytorch(folder, auto_class, **kwargs), tokenizer


TEXTS = ["w5 w6 w7", "w8 w9"]


def as_lines(embeddings):
    return [{"text": x, "embedding": y} for x, y in zip(TEXTS, embeddings.tolist(), strict=True)]


def test_embeddings_of_another_text_are_noticed(folder, monkeypatch):
    run, tokenizer = parts_of(folder, add_pooling_layer=False)
    together = clients.embeddings(run, tokenizer, TEXTS)
    alone = torch.cat([clients.embeddings(run, tokenizer, [x]) for x in TEXTS])
    torch.testing.assert_close(together, alone)
    assert torch.allclose(together.norm(dim=1), torch.ones(2))
    lines = as_lines(together)
    compare(folder, lines, monkeypatch)
    lines[1]["embedding"] = lines[0]["embedding"]
    with pytest.raises(SystemExit, match="is more than 1e-05"):
        compare(folder, lines, monkeypatch)


def test_8_bits_are_compared_with_those_of_the_same_file(folder, tmp_path, monkeypatch):
    own = clients.embeddings(*parts_of(folder, add_pooling_layer=False), TEXTS)
    # Stands for the runtime that reads the file: rounded as if to few bits.
    rounded = torch.nn.functional.normalize((own * 64).round() / 64, dim=1)
    read = []

    def by_onnx(path):
        read.append(path)
        return lambda rows: rounded[:, None].expand(-1, rows["input_ids"].shape[1], -1)

    monkeypatch.setattr(clients, "by_onnx", by_onnx)
    compare(folder, as_lines(rounded), monkeypatch, "--quantized", tmp_path)
    assert read == [tmp_path / "embeddings"]
    with pytest.raises(SystemExit, match="is more than 1e-05"):
        compare(folder, as_lines(own), monkeypatch, "--quantized", tmp_path)


def test_wrong_scores_nan_and_silence_are_noticed(folder, monkeypatch):
    text = "w5 [MASK] w7"
    run, tokenizer = parts_of(folder, AutoModelForMaskedLM)
    best = clients.scores(run, tokenizer, text).topk(2)
    tokens = tokenizer.convert_ids_to_tokens(best.indices)
    guesses = [{"token": x, "score": y} for x, y in zip(tokens, best.values.tolist(), strict=True)]
    assert guesses[0]["score"] >= guesses[1]["score"] > 0
    compare(folder, [{"text": text, "guesses": guesses}], monkeypatch)
    for wrong in (guesses[0]["score"] + 0.01, float("nan")):
        lines = [{"text": text, "guesses": [guesses[0] | {"score": wrong}]}]
        lines.insert(0, {"text": text, "guesses": guesses})
        with pytest.raises(SystemExit, match="is more than 1e-05"):
            compare(folder, lines, monkeypatch)
    with pytest.raises(SystemExit, match="has no output"):
        compare(folder, [], monkeypatch)
