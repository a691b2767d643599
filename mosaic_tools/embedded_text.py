# SPDX-License-Identifier: Apache-2.0
"""English text that every CPython carries, to train on without a download.

A document is a topic of Python's language reference, or all docstrings of a module of the standard
library. A twentieth of the documents is held out, always the same ones for a given Python.
Pairs are made of them too: a docstring's summary and the text that it stands above, a sentence and
the words around it.
"""

import ast
import re
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

# Not part of every installation, or one sentence repeated for each codec.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def embedded_passages() -> tuple[list[str], list[str]]:
    """(training, held-out) passages. No text occurs twice, no document is on both sides."""
    train, validation, seen = [], [], set()
    for name, texts in documents().items():
        new = [text for text in texts if not (text in seen or seen.add(text))]
        (validation if held_out(name, 5) else train).extend(passages(" ".join(new)))
    return train, validation


def embedded_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of a docstring's summary, a line of its own, and what it says
    below it. Training also has sentences, each with the words around it.

    A file's pairs are on the side that its passages are on. Held-out texts occur once, and nowhere
    in training, not as a part of another text either.
    """
    train, validation, seen, found = [], [], set(), documents()
    for name, texts in found.items():
        for text in texts:
            summary, _, body = text.partition("\n\n")
            pair = summary.strip(), " ".join(body.split())
            if "\n" not in pair[0] and is_long(pair) and seen.isdisjoint(pair):
                seen.update(pair)
                (validation if held_out(name, 5) else train).append(pair)
    kept = [text for pair in validation for text in pair]
    for name, texts in found.items():
        for text in texts:
            words = " ".join(text.split())
            if not (held_out(name, 5) or any(x in words for x in kept)):
                train.extend(filter(is_long, sentences_in_context(words)))
    return list(dict.fromkeys(train)), validation


def is_long(pair: tuple[str, str]) -> bool:
    """Whether both texts say enough to be found by each other."""
    return len(pair[0].split()) >= 3 and len(pair[1].split()) >= 8


def sentences_in_context(text: str, length: int = 64) -> list[tuple[str, str]]:
    """Each sentence of a text, with the up to `length` words around it: the inverse cloze task."""
    sentences, pairs = re.split(r"(?<=[.!?]) (?=[A-Z])", text), []
    for i, sentence in enumerate(sentences):
        before, after = (" ".join(x).split() for x in (sentences[:i], sentences[i + 1 :]))
        around = before[-length // 2 :] + after[: length // 2]
        pairs.append((sentence, " ".join(around)))
    return pairs


def held_out(key: str, percent: float) -> bool:
    """Whether the document of this key is among the per cent that training never sees."""
    return zlib.crc32(key.encode()) < percent / 100 * 2**32


def documents() -> dict[str, list[str]]:
    """The texts of all documents: topics by their names, docstrings by file."""
    return {name: [topics[name]] for name in sorted(topics)} | module_docstrings()


def module_docstrings() -> dict[str, list[str]]:
    """Docstrings by file. Sources are parsed, not imported: some modules act when imported."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts):
            try:
                nodes = ast.walk(ast.parse(path.read_bytes()))
            except (SyntaxError, ValueError):
                # Some distributions keep templates there.
                continue
            texts = (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED))
            found[name.as_posix()] = [text for text in texts if text]
    return found


def passages(text: str, length: int = 72) -> list[str]:
    """The text in pieces of `length` words, about 128 tokens, without rules such as =====."""
    words = re.sub(r"([^\w\s])\1{2,}", " ", text).split()
    return [" ".join(words[i : i + length]) for i in range(0, len(words), length)]
