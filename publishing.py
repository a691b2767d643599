# SPDX-License-Identifier: Apache-2.0
"""What a folder for the Hub needs beside weights and code: a tokenizer that loads on every
supported transformers, and a model card. convert_weights.py and train_mlm.py write folders with it.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import AutoTokenizer, BertTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
EXAMPLE_INPUTS = {"fill-mask": 'f"A {pipe.tokenizer.mask_token} sentence."'}

CARD = """\
---
{metadata}
---

# {name}

{summary}

```python
{example}```

| | |
|---|---|
{table}
"""


EXAMPLE = """\
from transformers import pipeline

# This folder, or its name on the Hub.
pipe = pipeline("{task}", model=".", trust_remote_code=True)
print(pipe({text}))
"""

EXAMPLE_WITHOUT_TOKENIZER = """\
import torch
from transformers import {auto_class}

# This folder, or its name on the Hub. The tokenizer is the one that the weights were trained with.
model = {auto_class}.from_pretrained(".", trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]]))[0].shape)
"""


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
    entries = vocab.read_text(encoding="utf-8").splitlines()
    if missing := [token for token in SPECIAL_TOKENS if token not in entries]:
        raise ValueError(f"{vocab} lacks {', '.join(missing)}: give a BERT vocabulary")
    if lowercase is None:
        lowercase = all(x == x.lower() for x in entries if x not in SPECIAL_TOKENS)
    return BertTokenizerFast(str(vocab), do_lower_case=lowercase)


def make_tokenizer_portable(folder: str | Path, max_length: int):
    """Lets transformers 4 and 5 load a saved tokenizer alike, both with token_type_ids.

    transformers 5 writes a class that 4 does not have, and 5.0 omits token types unless asked.

    Args:
        max_length: where `truncation=True` cuts, in tokens.
    """
    file = Path(folder, "tokenizer_config.json")
    settings = json.loads(file.read_text())
    is_bert = settings["tokenizer_class"].startswith("BertTokenizer")
    settings["tokenizer_class"] = "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_length
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n")


def write_card(
    folder: str | Path,
    name: str,
    auto_class: str,
    summary: str,
    facts: dict[str, object],
    base_model: str | None = None,
    has_tokenizer: bool = True,
):
    """Writes README.md: what the model is, an example that runs in the folder, a table of facts.

    Args:
        auto_class: how the model is loaded, one of TASKS.
        base_model: Hub id that the weights come from.
        has_tokenizer: whether the folder holds one.
    """
    task = TASKS[auto_class]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["mosaic-bert", "alibi", "custom_code"],
        base_model=base_model,
    )
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        summary=summary,
        example=(EXAMPLE if has_tokenizer else EXAMPLE_WITHOUT_TOKENIZER).format(
            task=task, auto_class=auto_class, text=EXAMPLE_INPUTS.get(task, '"A sentence."')
        ),
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    Path(folder, "README.md").write_text(card, encoding="utf-8")
