# SPDX-License-Identifier: Apache-2.0
"""encoding.py: ids to the bit the tokenizer's own, though of a text only a beginning is read."""

import functools
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from training import trained_tokenizer
from transformers import PreTrainedTokenizerFast

from mosaic_tools import encoding, tokenization
from mosaic_tools.encoding import Encoder
from mosaic_tools.recipe import DataArguments, TokenizerArguments

# What texts are drawn from: words that are known, cut in pieces or too long to be known; scripts
# with and without spaces; every kind of white space; marks that combine with what is before.
FRAGMENTS = [
    *(
        "the",
        "man's",
        "Reading",
        "naïve",
        "ЁЛКА",
        "don't",
        "x" * 101,
        "3.14",
        "½",
        "[MASK]",
        "[SEP]",
    ),
    *(" ", "  ", "\n", "\t", " \n", "\r\n", "\u00a0", "\u3000", "\u200b", "\x00", "\u0085"),
    *(
        "日本語",
        "。",
        "、",
        "我们在这里。",
        "他说：“好！”",
        "カタカナ",
        "가나다",
        "สวัสดีชาวโลก",
        "नमस्ते",
        "مرحبا",
    ),
    *(
        "\u0301",
        "e\u0301",
        "\u0308a",
        "👩‍👩‍👧",
        "🇩🇪",
        "✂️",
        "ﬁ",
        "Å",
        "\u00a8",
        "...",
        "--",
        "_",
        "'",
        "“",
    ),
    *(
        "ACGTTGCA",
        "https://a.b/c?d=e",
        "。・",
        "the man",
        "the\u00a0man",
        "' the",
        " " * 5,
        "！゛ア",
        "\ufffd",
        "İ",
        "ß",
        "\ud7a3",
        "，",
        "！a",
    ),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=40).map("".join)


def other(pre_tokenizer, normalizer=None, *added):
    """A BPE of some characters with these parts."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokenization.SPECIAL_TOKENS)
    tokenizer.train_from_iterator(FRAGMENTS * 3, trainer)
    tokenizer = tokenization.as_transformers(tokenizer)
    if pre_tokenizer:
        # transformers 4.57 takes its space away.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens(list(added))
    return tokenizer


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    args = {"wordpiece": {}, "cased": {"lowercase": False}, "bytes": {"train_tokenizer": "bpe"}}
    if name in args:
        args = TokenizerArguments(vocab_size=400, **args[name])
        return tokenization.train_tokenizer(iter(FRAGMENTS * 3), args)
    token = functools.partial(AddedToken, normalized=False)
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    forms = normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()])
    return {
        "words, compatibility forms": lambda: other(pre_tokenizers.Whitespace(), forms),
        "bytes behind a space": lambda: other(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "bytes that are not split": lambda: other(byte_level(use_regex=False)),
        "metaspace": lambda: other(pre_tokenizers.Metaspace()),
        "not split": lambda: other(None),
        "a replacement": lambda: other(byte_level(), normalizers.Replace("n ", "m")),
        "bytes without accents": lambda: other(byte_level(), normalizers.StripAccents()),
        "bytes as BERT's": lambda: other(byte_level(), normalizers.BertNormalizer()),
        "a token that is normalized": lambda: other(
            pre_tokenizers.BertPreTokenizer(),
            normalizers.NFKC(),
            AddedToken("the\u00a0man", normalized=True),
        ),
        "a text twice": lambda: twice(other(pre_tokenizers.Whitespace())),
        "a token with a space": lambda: other(byte_level(), None, token("the man")),
        "a token before spaces": lambda: other(byte_level(), None, token("'", rstrip=True)),
        "a token behind spaces": lambda: other(byte_level(), None, token("'", lstrip=True)),
    }[name]()


def twice(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [MASK] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3), ("[MASK]", 4)],
    )
    return tokenizer


CUT = ["wordpiece", "cased", "bytes", "words, compatibility forms", "a token behind spaces"]
WHOLE = [
    *("bytes behind a space", "bytes that are not split", "metaspace", "not split"),
    *("bytes without accents", "bytes as BERT's", "a token that is normalized", "a text twice"),
    *("a replacement", "a token with a space", "a token before spaces"),
]


def ids_of(texts, tokenizer, length, pack):
    whole = tokenizer(texts, truncation=True, max_length=length, return_overflowing_tokens=pack)
    return whole["input_ids"]


@pytest.mark.parametrize("pack", [False, True], ids=["cut", "packed"])
@pytest.mark.parametrize("name", CUT + WHOLE)
@example(texts=["the man", "a the\u00a0man b", "' the _  \n x", "ア。・ア、！゛ア"], length=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), length=st.integers(3, 40))
def test_ids_are_the_tokenizers_own(name, pack, texts, length):
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer, DataArguments(max_seq_length=length, pack=pack))
    assert encoder.cuts == (name in CUT and not pack)
    # Cut wherever it may be.
    with mock.patch.multiple(encoding, CHARACTERS=0, MORE=0, SPARE=1):
        found = [x.tolist() for x in encoder(texts)]
    assert found == ids_of(texts, tokenizer, length, pack)
    assert [x.tolist() for x in encoder(texts)] == found


@pytest.mark.parametrize("name", ["wordpiece", "bytes", "metaspace"])
def test_ids_are_the_tokenizers_own_where_it_cuts_on_the_left_or_splits_special_tokens(name):
    texts = ["the man's [MASK] Reading \n" * n for n in range(12)]
    for side, splits in (("left", False), ("right", True)):
        tokenizer = tokenizer_of(name)
        given = tokenizer.truncation_side, tokenizer.split_special_tokens
        tokenizer.truncation_side, tokenizer.split_special_tokens = side, splits
        try:
            encoder = Encoder(tokenizer, DataArguments(max_seq_length=20))
            assert [x.tolist() for x in encoder(texts)] == ids_of(texts, tokenizer, 20, False)
        finally:
            tokenizer.truncation_side, tokenizer.split_special_tokens = given


@pytest.mark.parametrize(
    "name, word, share",
    [
        ("wordpiece", "the man's Reading ", 0.2),
        ("bytes", "the man's Reading ", 0.2),
        ("wordpiece", "我们在这里。", 0.2),
        ("bytes", "日本語、", 0.2),
        ("metaspace", "the man's Reading ", 1),
        ("wordpiece", "x", 1),
    ],
)
def test_of_a_long_text_a_beginning_is_read(monkeypatch, name, word, share):
    """The whole of each text was tokenized, of which rows of 128 tokens keep a fifth."""
    text, read = word * 2000, []
    encoder = Encoder(tokenizer_of(name), DataArguments(max_seq_length=32))
    backend = encoder.backend

    def encode_batch_fast(texts, **kwargs):
        read.extend(texts)
        return backend.encode_batch_fast(texts, **kwargs)

    encoder.backend = SimpleNamespace(encode_batch_fast=encode_batch_fast)
    expected = ids_of([text], tokenizer_of(name), 32, False)
    assert [x.tolist() for x in encoder([text])] == expected
    read = sum(map(len, read))
    assert read == len(text) if share == 1 else 0 < read < share * len(text)


def test_more_texts_than_the_library_gets_at_a_time_keep_their_order(monkeypatch):
    monkeypatch.setattr(encoding, "TEXTS", 3)
    texts = ["the man " * n for n in range(20)]
    for pack in (False, True):
        encoder = Encoder(trained_tokenizer(), DataArguments(max_seq_length=8, pack=pack))
        whole = Encoder(trained_tokenizer(), DataArguments(max_seq_length=8, pack=pack))
        monkeypatch.setattr(encoding, "TEXTS", 3)
        found = [len(x) for x in encoder(texts)]
        monkeypatch.setattr(encoding, "TEXTS", 100)
        assert found == [len(x) for x in whole(texts)]


def test_ids_take_two_bytes_where_the_vocabulary_allows():
    few, many = trained_tokenizer(), tokenizer_of("wordpiece")
    data = DataArguments(max_seq_length=8)
    assert Encoder(few, data)(["the"])[0].dtype == "uint16"
    assert encoding.features(few, data)["input_ids"].feature.dtype == "uint16"
    large = SimpleNamespace(get_vocab=lambda: {"x": 2**16})
    assert encoding.id_dtype(large).__name__ == "int32" != encoding.id_dtype(many).__name__
