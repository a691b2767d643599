# SPDX-License-Identifier: Apache-2.0
"""Texts of long_retrieval.py: pairs to train on, and two tasks of finding long documents."""

import re
from dataclasses import dataclass
from random import Random

from mosaic_tools.corpus import load_files

# Tokens before a query's passage, at least, and up to which its document must be read at least.
DEPTHS = {0: 256, 256: 512, 512: 1024, 1024: 2048, 2048: 4096}
PASSAGE = 70  # words, about 100 tokens


@dataclass
class Task:
    """Documents, and queries that each belong to one of them, at a depth in it."""

    documents: list[str]
    queries: list[str]
    relevant: list[int]  # the document of each query
    depths: list[int]  # of DEPTHS


def read_articles(patterns: list[str], longest: int) -> tuple[list[str], list[str]]:
    """(the other articles, the longest ones, in the order of the files), an article a line.

    Raises:
        ValueError: there are not more articles than that.
    """
    articles = list(dict.fromkeys(load_files(patterns, streaming=False)["text"]))
    if len(articles) <= longest:
        raise ValueError(f"{len(articles)} articles: none is left beside the {longest} longest")
    by_length = sorted(articles, key=lambda text: -len(text.split()))
    held_out = set(by_length[:longest])
    return [x for x in articles if x not in held_out], [x for x in articles if x in held_out]


def sentences(text: str) -> list[str]:
    return re.split(r'(?<=[a-z0-9)"][.!?])\s+(?=[A-Z"])', text)


def passages(text: str, words: int = PASSAGE) -> list[list[str]]:
    """Whole sentences in runs of at least so many words; what is left at the end is dropped."""
    runs, run = [], []
    for sentence in sentences(text):
        run.append(sentence)
        if sum(len(x.split()) for x in run) >= words:
            runs.append(run)
            run = []
    return runs


def is_query(sentence: str) -> bool:
    return 8 <= len(sentence.split()) <= 40


def followed(text: str, words: int = PASSAGE) -> list[tuple[str, str]]:
    """(sentence, the passage before it) of an article."""
    runs = passages(text, words)
    pairs = zip(runs[1:], runs, strict=False)
    return [(run[0], " ".join(before)) for run, before in pairs if is_query(run[0])]


def training_pairs(articles: list[str], random: Random) -> list[dict[str, str]]:
    """Of each article that has one: a sentence, and the 20 to 140 words or more before it."""
    found = (followed(text, random.randint(20, 140)) for text in articles)
    chosen = (random.choice(pairs) for pairs in found if pairs)
    return [{"anchor": sentence, "positive": passage} for sentence, passage in chosen]


def controlled(articles: list[str], count: int, longest: int, size, random: Random) -> Task:
    """Documents of `longest` tokens, each of passages of as many articles. At each depth begins
    one whose article is in no other place; its query is the sentence that follows it there.

    Args:
        size: the number of tokens of a text.

    Raises:
        ValueError: there are too few articles.
    """
    found = [pairs for x in random.sample(articles, len(articles)) if (pairs := followed(x))]
    # An article with a target has no other passage in the task.
    targets = [random.choice(pairs) for pairs in found[: count * len(DEPTHS)]]
    fillers = [passage for pairs in found[count * len(DEPTHS) :] for _, passage in pairs]
    fillers = iter(random.sample(fillers, len(fillers)))
    task = Task([], [], [], [])
    try:
        for document in range(count):
            parts, tokens = [], 0
            waiting = dict(zip(DEPTHS, targets[document::count], strict=True))
            while tokens < longest:
                depth = next(iter(waiting), longest)
                if tokens >= depth:
                    query, part = waiting.pop(depth)
                    task.queries.append(query)
                    task.relevant.append(document)
                    task.depths.append(depth)
                else:
                    part = next(fillers)
                parts.append(part)
                tokens += size(part)
            task.documents.append(" ".join(parts))
    except (StopIteration, ValueError) as error:
        raise ValueError(f"{len(articles)} articles are too few for {count} documents") from error
    return task


def natural(articles: list[str], size, random: Random) -> Task:
    """Articles less the passages that their queries, a sentence of each, are drawn from."""
    task = Task([], [], [], [])
    for document, text in enumerate(articles):
        kept, tokens, waiting = [], 0, list(DEPTHS)
        for passage in passages(text):
            choices = [x for x in passage if is_query(x)]
            if waiting and tokens >= waiting[0] and choices:
                task.queries.append(random.choice(choices))
                task.relevant.append(document)
                task.depths.append(waiting.pop(0))
            else:
                kept.append(" ".join(passage))
                tokens += size(kept[-1])
        task.documents.append(" ".join(kept))
    return task
