# SPDX-License-Identifier: Apache-2.0
"""From documents to rows of token ids: reading, splitting, training a tokenizer, encoding, packing.

train_mlm.py does all of it by itself. To do it once, on all cores, and train from the result:

    python prepare_data.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128
    accelerate launch train_mlm.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128

Recipes and flags are train_mlm.py's. The folder holds the rows (Arrow, read by memory map), the
tokenizer, and prepared.json, which says how they were made.
"""

import json
import sys
from pathlib import Path

from mosaic_tools.corpus import load_documents
from mosaic_tools.encoding import check_new, encode, save_prepared
from mosaic_tools.recipe import parse
from mosaic_tools.tokenization import choose_tokenizer


def main():
    model_args, tokenizer_args, args, recipe = parse(sys.argv[1:])
    if args.prepared_data is None:
        raise ValueError("give --prepared_data, the folder that the rows are written to")
    check_new(Path(args.prepared_data))
    # What is prepared is read whole, also by recipes that stream.
    args.streaming = False
    train, validation = load_documents(args)
    name = tokenizer_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = choose_tokenizer(name, tokenizer_args, train, args.text_column)
    train, validation = (encode(x, args, tokenizer, recipe.seed) for x in (train, validation))
    facts = save_prepared(Path(args.prepared_data), train, validation, tokenizer, args)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
