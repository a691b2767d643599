# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loaded from anywhere, trained on text, and saved so that every supported transformers
reads them."""

import itertools
import json
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from mosaic_tools.recipe import TokenizerArguments

# A tokenizer learns from at most so many documents.
TOKENIZER_DOCUMENTS = 200_000
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(name: str | Path, lowercase: bool | None = None):
    """A tokenizer from the Hub, a folder, or BERT's vocab.txt (or a folder with nothing else).

    Args:
        name: Hub id, folder or file.
        lowercase: for a vocab.txt; None: unless one of its entries has a capital.

    Raises:
        ValueError: there is none, or it brings code of its own; a vocab.txt lacks one of BERT's
            special tokens.
    """
    path = Path(name)
    vocab = path / "vocab.txt" if path.is_dir() else path
    has_more = (path / "tokenizer_config.json").exists() or (path / "tokenizer.json").exists()
    if has_more or not vocab.is_file():
        try:
            # Never the source's own code, which nobody was asked to trust.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise ValueError(f"no tokenizer can be loaded from {name}: {error}") from error
        # What transformers 5.0 makes of a folder that holds none.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"no tokenizer can be loaded from {name}: it has no vocabulary")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{name} is a {type(tokenizer).__name__}, which writes no tokenizer.json: "
                "give a fast tokenizer"
            )
        return tokenizer
    try:
        entries = vocab.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{vocab} is no text in UTF-8: give a BERT vocabulary") from error
    if missing := [token for token in SPECIAL_TOKENS if token not in entries]:
        raise ValueError(f"{vocab} lacks {', '.join(missing)}: give a BERT vocabulary")
    if lowercase is None:
        lowercase = all(x == x.lower() for x in entries if x not in SPECIAL_TOKENS)
    return BertTokenizerFast(str(vocab), do_lower_case=lowercase)


def make_tokenizer_portable(folder: str | Path, max_length: int, token_types: bool = True):
    """Lets transformers 4 and 5, and what reads tokenizer.json alone, load a saved tokenizer alike.

    transformers 5 writes a class that 4 does not have, and 5.0 omits token types unless asked.
    tokenizer.json keeps how the last texts were cut and padded, if there were any.

    Args:
        max_length: where `truncation=True` cuts, in tokens.
        token_types: whether the model takes token_type_ids.
    """
    file = Path(folder, "tokenizer_config.json")
    settings = json.loads(file.read_text())
    is_bert = settings["tokenizer_class"].startswith("BertTokenizer")
    settings["tokenizer_class"] = "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_length
    types = ["token_type_ids"] if token_types else []
    settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n")
    file = Path(folder, "tokenizer.json")
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.save(str(file))


def largest_id(tokenizer) -> int:
    return max(tokenizer.get_vocab().values())


def has_vocabulary_of(checkpoint: str, tokenizer, must_have_one: bool = False) -> bool:
    """Whether the checkpoint's tokenizer has the same entries, or it has none and need not."""
    try:
        return load_tokenizer(checkpoint).get_vocab() == tokenizer.get_vocab()
    except ValueError:
        if must_have_one:
            raise
        return True


# ---- training one ----


def choose_tokenizer(name: str | None, args: TokenizerArguments, documents, column: str):
    """The tokenizer of that name, or one trained on the first documents."""
    if name and not args.train_tokenizer:
        return existing_tokenizer(name, args.lowercase)
    rows = itertools.islice(documents, TOKENIZER_DOCUMENTS)
    return train_tokenizer((row[column] for row in rows), args)


def existing_tokenizer(name: str, lowercase: bool | None):
    """A Hub id's, a folder's or a BERT vocab.txt's tokenizer. ValueError: it cannot mask or pad."""
    tokenizer = load_tokenizer(name, lowercase)
    for role in ("mask_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise ValueError(
                f"the tokenizer {name} has no {role}, which masked language modelling needs: "
                "choose another --tokenizer_name, or --train_tokenizer"
            )
    return tokenizer


def train_tokenizer(texts, args: TokenizerArguments):
    """A tokenizer trained on these texts by the main process and sent to the others.

    Sent, since WordPiece training has no fixed order: no two runs give the same ids.
    """
    state = [None]
    if PartialState().is_main_process:
        make = byte_pairs if args.train_tokenizer == "bpe" else wordpiece
        tokenizer, trainer = make(args)
        tokenizer.train_from_iterator(texts, trainer)
        state = [tokenizer.to_str()]
    return as_transformers(Tokenizer.from_str(broadcast_object_list(state)[0]))


def wordpiece(args: TokenizerArguments):
    """(tokenizer, trainer) of WordPiece with BERT's text processing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=args.lowercase is not False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=args.vocab_size, special_tokens=SPECIAL_TOKENS
    )


def byte_pairs(args: TokenizerArguments):
    """(tokenizer, trainer) of byte-level BPE: no text is unknown, words may be of any length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase() if args.lowercase else normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with BERT's template, [CLS] text [SEP] pair [SEP], and special tokens."""
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
