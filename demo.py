# SPDX-License-Identifier: Apache-2.0
"""Loads a model that train_mlm.py wrote, as anyone would, and shows what it has learnt.

    python demo.py runs/demo              # exits 1 unless four times as good as a constant guess
    python demo.py runs/demo --factor 1   # for short runs

The text is the held-out part of the English that CPython carries. Fills a masked word in five of
its sentences, then compares the accuracy at 15 % masked tokens with that of always guessing the
token most frequent in the training part.
"""

import argparse
import random
import re
import sys
from collections import Counter

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    logging,
    pipeline,
)

from mosaic_tools.embedded_text import embedded_passages
from mosaic_tools.family import check_loaded

SENTENCE = re.compile(r"(?<![^.] )[A-Z][a-z]*(?: [a-z]+,?){7,17}[.](?= |$)")


def masked_sentences(passages, tokenizer, count: int):
    """(sentence, the word masked in it), for words that are one token, from different passages."""
    chosen, generator = [], random.Random(0)
    for passage in generator.sample(passages, len(passages)):
        sentence = SENTENCE.search(passage)
        words = re.findall(r" ([a-z]{4,})\b", sentence[0]) if sentence else []
        words = [word for word in words if word in tokenizer.get_vocab()]
        if words:
            word = generator.choice(words)
            masked = re.sub(rf" {word}\b", f" {tokenizer.mask_token}", sentence[0], count=1)
            chosen.append((masked, word))
    return chosen[:count]


def fill(sentences, model, tokenizer):
    fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)
    for sentence, truth in sentences:
        guesses = (f"{guess['token_str']} {guess['score']:.0%}" for guess in fill_mask(sentence))
        print(f"\n  {sentence}\n    truth: {truth}    guesses: {', '.join(guesses)}")


def encode(passages, tokenizer, model):
    return tokenizer(
        passages,
        truncation=True,
        max_length=model.config.alibi_starting_size,
        return_special_tokens_mask=True,
    )


@torch.inference_mode()
def masked_accuracy(passages, model, tokenizer, constant: int, batch_size: int = 32):
    """(share of masked tokens that the model guesses, share equal to `constant`, their number)."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=17)
    right = frequent = masked = 0
    for start in range(0, len(passages), batch_size):
        rows = encode(passages[start : start + batch_size], tokenizer, model)
        batch = collate([{k: v[i] for k, v in rows.items()} for i in range(len(rows["input_ids"]))])
        labels = batch.pop("labels")
        guesses = model(**batch).logits.argmax(-1)
        right += (guesses == labels).sum().item()
        frequent += (labels == constant).sum().item()
        masked += (labels != -100).sum().item()
    return right / masked, frequent / masked, masked


def most_frequent_token(passages, tokenizer, model) -> int:
    special = set(tokenizer.all_special_ids)
    rows = encode(passages, tokenizer, model)["input_ids"]
    counts = Counter(token for row in rows for token in row if token not in special)
    return counts.most_common(1)[0][0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="output_dir of train_mlm.py")
    parser.add_argument("--factor", type=float, default=4.0, help="times a constant guess to reach")
    args = parser.parse_args()

    logging.disable_progress_bar()
    model, loaded = AutoModelForMaskedLM.from_pretrained(
        args.folder, trust_remote_code=True, output_loading_info=True
    )
    check_loaded(args.folder, model, loaded)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    train, held_out = embedded_passages()

    print(f"{args.folder}: {type(model).__name__}, {model.num_parameters():,} parameters")
    print("Sentences that training never saw, one word masked in each:")
    fill(masked_sentences(held_out, tokenizer, 5), model, tokenizer)

    constant = most_frequent_token(train, tokenizer, model)
    accuracy, baseline, masked = masked_accuracy(held_out, model, tokenizer, constant)
    print(f"\nOf {masked:,} masked tokens in {len(held_out)} held-out passages")
    commonest = f"always guessing {tokenizer.decode([constant])!r}, the commonest, guesses"
    print(f"  {'the model guesses':<45}{accuracy:6.1%}")
    print(f"  {commonest:<45}{baseline:6.1%}")
    print(f"  that is {accuracy / baseline:.1f} times as good, {args.factor:g} times are asked for")
    sys.exit(accuracy < args.factor * baseline)


if __name__ == "__main__":
    main()
