# SPDX-License-Identifier: Apache-2.0
"""Rows to train on: prepared ones, or encoded now by one process while the others wait."""

import contextlib
import shlex
import signal
import sys

import datasets

from mosaic_tools.corpus import is_stream, load_documents
from mosaic_tools.encoding import encode
from mosaic_tools.prepared import load_prepared, tokens_of
from mosaic_tools.recipe import DataArguments, TokenizerArguments
from mosaic_tools.tokenization import choose_tokenizer, has_vocabulary_of


def load_rows(data: DataArguments, tokenizer_args: TokenizerArguments, name, args):
    """(training rows, held-out rows, tokenizer).

    Args:
        name: of the tokenizer, None to train one.

    Raises:
        ValueError: prepared rows were made with other entries than that tokenizer's.
        TimeoutError: as `main_process_first`.
    """
    if data.prepared_data:
        rows = load_prepared(data)
        if name and not has_vocabulary_of(name, rows[-1], bool(tokenizer_args.tokenizer_name)):
            raise ValueError(
                f"{data.prepared_data} was prepared with another tokenizer than {name}: leave "
                "out --tokenizer_name, or prepare again"
            )
        return rows
    # The main process fills the caches of data, the others read them.
    with main_process_first(args):
        train, validation = load_documents(data)
    tokenizer = choose_tokenizer(name, tokenizer_args, train, data.text_column)
    with main_process_first(args):
        train, validation = (encode(x, data, tokenizer) for x in (train, validation))
    return train, validation, tokenizer


@contextlib.contextmanager
def main_process_first(args):
    """`args.main_process_first`, but for half of the time only that the others would wait.

    Raises:
        TimeoutError: the main process took longer; it says how to prepare the data instead.
    """
    seconds = args.ddp_timeout // 2

    def give_up(*_):
        command = shlex.join(["python", "prepare_data.py", *sys.argv[1:], "--prepared_data", "NEW"])
        raise TimeoutError(
            f"{args.world_size - 1} process(es) have waited {seconds} s for one that reads and "
            f"tokenizes. Prepare the data first: {command}; then train with --prepared_data NEW. "
            f"Or let them wait for twice as long: --ddp_timeout {2 * args.ddp_timeout}"
        )

    with args.main_process_first():
        others_wait = args.world_size > 1 and args.process_index == 0
        if not others_wait:
            yield
            return
        before = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def size(rows) -> str:
    """Rows and tokens, in words."""
    if is_stream(rows):
        return "streamed"
    tokens = tokens_of(rows.data) if isinstance(rows, datasets.Dataset) else 0
    return f"{len(rows):,} rows" + (f", {tokens:,} tokens" if tokens else "")
