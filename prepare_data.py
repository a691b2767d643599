# SPDX-License-Identifier: Apache-2.0
"""From documents to rows of token ids: reading, splitting, training a tokenizer, encoding, packing.

train_mlm.py does all of it by itself. To do it once, on all cores, and train from the result:

    python prepare_data.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128
    accelerate launch train_mlm.py recipes/mosaic-bert-base-128.yaml --prepared_data c4-128

After an interruption the same command goes on. Machines share the work, each with its part:

    python prepare_data.py RECIPE --prepared_data c4-128 --tokenizer_name NAME --shard 2/8

Recipes and flags are train_mlm.py's, and --shard. What is in the folder: mosaic_tools/prepared.py.
"""

import json
import sys

from mosaic_tools.preparing import PreparingArguments, prepare
from mosaic_tools.recipe import PRETRAINING, parse


def main():
    groups = (*PRETRAINING, PreparingArguments)
    model_args, tokenizer_args, args, _, preparing = parse(sys.argv[1:], groups)
    if args.prepared_data is None:
        raise ValueError("give --prepared_data, the folder that the rows are written to")
    name = tokenizer_args.tokenizer_name or model_args.model_name_or_path
    print(json.dumps(prepare(args, tokenizer_args, name, preparing.part), indent=2))


if __name__ == "__main__":
    main()
