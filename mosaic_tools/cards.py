# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a model is, an example that runs in its folder, facts, uses and limits."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData, metadata_load

# What an architecture's name ends in, and its task as the Hub calls it; all others give embeddings.
TASKS = {"ForMaskedLM": "fill-mask", "ForSequenceClassification": "text-classification"}
PAPER = "2312.17482"
SUMMARY = "A MosaicBERT encoder: BERT with ALiBi, gated MLPs and no padding inside."
OF_ONNX = "A MosaicBERT encoder, BERT with ALiBi and gated MLPs, as a graph for ONNX Runtime."
CARD = """\
---
{metadata}
---

# {name}

{summary}

{examples}

| | |
|---|---|
{table}

## Intended use

{use}

## Limits and bias

A model repeats what its training text says, prejudices about people included: an output is what was
likely in that text, and no statement of what is true or right. Bias was not measured. In languages
and fields that it was not trained on it is worse, and on text longer than in training. Measure it
on texts like yours before you rely on it.
{of_the_family}"""
EXAMPLE = """\
```python
from transformers import pipeline

# This folder, or its name on the Hub.
pipe = pipeline("{task}", model=".", trust_remote_code=True)
print(pipe({text}))
```"""
EXAMPLE_INPUTS = {
    "fill-mask": 'f"A {pipe.tokenizer.mask_token} sentence."',
    "text-classification": '"A sentence."',
}
EXAMPLE_OF_EMBEDDINGS = """\
An embedding is the mean over a text's tokens, without padding:

```python
import torch
from transformers import AutoModel, AutoTokenizer

# This folder, or its name on the Hub.
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModel.from_pretrained(".", trust_remote_code=True, add_pooling_layer=False)
inputs = tokenizer(["A sentence.", "And a longer one."], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = (hidden.float() * mask).sum(1) / mask.sum(1)
print(embeddings.shape)
```"""
EXAMPLE_OF_RETRIEVAL = """\
With sentence-transformers, 5 or later:

```python
from sentence_transformers import SentenceTransformer

# This folder, or its name on the Hub.
model = SentenceTransformer(".", trust_remote_code=True)
queries = model.encode_query(["What a text is about"])
documents = model.encode_document(["A text.", "Another one."])
print(model.similarity(queries, documents))
```

config_sentence_transformers.json has the prompts, if there are any. Older versions and servers do
not put them before texts by themselves."""
EXAMPLE_WITHOUT_TOKENIZER = """\
```python
import torch
from transformers import {auto_class}

# This folder, or its name on the Hub. The tokenizer is the one that the weights were trained with.
model = {auto_class}.from_pretrained(".", trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]]))[0].shape)
```"""
EXAMPLE_SERVED = """\
The weights are in the layout of jina-embeddings-v2, which servers read; an embedding is the mean
over all tokens. With llama.cpp's converter and llama-cpp-python, in this folder:

```bash
python convert_hf_to_gguf.py . --outtype f32 --outfile model.gguf
```

```python
from llama_cpp import Llama

print(Llama("model.gguf", embedding=True).embed("A sentence."))
```"""
# Of a graph's outputs, by task: the text it is asked for, and what is made of them.
EXAMPLE_OF_ONNX = """\
```python
from onnxruntime import InferenceSession
from transformers import {imports}

# In this folder. Its config is BERT's, as the clients below want it, and it has no weights for
# transformers' models.
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer({text}, return_tensors="np")
({output},) = InferenceSession("onnx/model.onnx").run(None, dict(inputs))
{rest}
```

In transformers.js, in sentence-transformers by `backend="onnx"`, in fastembed and in optimum it is
a model like those of BERT."""
ONNX_EXAMPLES = {
    "fill-mask": {
        "imports": "AutoTokenizer",
        "text": 'f"A {tokenizer.mask_token} sentence."',
        "output": "logits",
        "rest": 'masked = inputs["input_ids"] == tokenizer.mask_token_id\n'
        "print(tokenizer.decode(logits[masked].argmax(-1)))",
    },
    "text-classification": {
        "imports": "AutoConfig, AutoTokenizer",
        "text": '"A sentence."',
        "output": "logits",
        "rest": 'print(AutoConfig.from_pretrained(".").id2label[int(logits.argmax())])',
    },
    "feature-extraction": {
        "imports": "AutoTokenizer",
        "text": '["A sentence.", "And a longer one."], padding=True',
        "output": "hidden",
        "rest": "# The mean over a text's tokens, without padding.\n"
        'mask = inputs["attention_mask"][..., None]\n'
        "print(((hidden * mask).sum(1) / mask.sum(1)).shape)",
    },
}
USES = {
    "fill-mask": """\
To guess masked tokens, and above all to be fine-tuned: to classify texts or tokens, to answer
questions from a text, to embed. Until then its embeddings compare texts only roughly. It cannot
write text.""",
    "text-classification": """\
To label or score texts like those that it was trained on; `id2label` in config.json names its
labels. Not to decide about people unless a person checks it.""",
    "feature-extraction": """\
To embed texts, for search, clustering and comparison as far as its training allows, or to be
fine-tuned. It cannot write text.""",
}
FINE_TUNING = """
## LoRA

PEFT finds the matrices of the layers by `target_modules=["Wqkv", "dense", "gated_layers", "wo"]`.
"""
CITATION = """
## Citation

The architecture is MosaicBERT's ([arXiv:{paper}](https://arxiv.org/abs/{paper})){source}:

```bibtex
@inproceedings{{portes2023mosaicbert,
  title     = {{MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining}},
  author    = {{Jacob Portes and Alexander R. Trott and Sam Havens and Daniel King and
               Abhinav Venigalla and Moin Nadeem and Nikhil Sardana and Daya Khudia and
               Jonathan Frankle}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2023}},
  url       = {{https://arxiv.org/abs/{paper}}}
}}
```
"""


def stated(folder: str | Path) -> dict:
    """Licence and language that a folder's README.md states for the Hub, as far as it does."""
    card = Path(folder, "README.md")
    try:
        found = (metadata_load(card) or {}) if card.is_file() else {}
    except (ValueError, yaml.YAMLError):
        # A card that the Hub could not read either.
        return {}
    names = ("license", "license_name", "license_link", "language")
    return {name: found[name] for name in names if found.get(name)}


def about_weights(license: str | None, language: list[str] | None) -> dict:
    """What --license and --language say, as a card's metadata.

    Raises:
        ValueError: one is not as the Hub abbreviates it.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license is {license!r}: give it as the Hub abbreviates it, such as apache-2.0, mit "
            "or cc-by-4.0"
        )
    for code in language or []:
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", code):
            raise ValueError(
                f"language is {code!r}: give codes of two or three letters, such as en or zh, or "
                "multilingual, or code"
            )
    return {k: x for k, x in {"license": license, "language": language}.items() if x}


def write_card(
    folder: str | Path,
    name: str,
    summary: str,
    facts: dict[str, object],
    example_input: str | None = None,
    **metadata,
):
    """Writes README.md: what the model is, examples that run in the folder, a table of facts, what
    it is for, its limits, how to cite it.

    config.json says what kind of model it is; it must be there, and the tokenizer if there is one.

    Args:
        facts: of the training data, the recipe, the evaluation, and what else is known.
        example_input: Python for what a pipeline is asked; None: a sentence.
        metadata: for the Hub, as ModelCardData takes it: license, language, base_model, datasets,
            eval_results.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture = config["architectures"][0]
    ending = next((x for x in TASKS if architecture.endswith(x)), "")
    task = TASKS.get(ending, "feature-extraction")
    served = architecture == "JinaBertModel"
    # A graph's config is a stock BERT's.
    exported = config["model_type"] == "bert" and (folder / "onnx" / "model.onnx").is_file()
    of_the_family = served or exported or config["model_type"] == "mosaic_bert"
    retrieves = (folder / "config_sentence_transformers.json").is_file()
    tags = ["sentence-transformers"] if retrieves else []
    kind = "onnx" if exported else "custom_code"
    tags += ["mosaic-bert", "alibi", kind, f"arxiv:{PAPER}"] if of_the_family else []
    library = "transformers.js" if exported else "transformers"
    data = ModelCardData(
        library_name="sentence-transformers" if retrieves else library,
        pipeline_tag="sentence-similarity" if retrieves else task,
        tags=tags or None,
        model_name=name if metadata.get("eval_results") else None,
        **metadata,
    )
    if served:
        examples = [EXAMPLE_SERVED]
    elif exported:
        examples = [EXAMPLE_OF_ONNX.format(**ONNX_EXAMPLES[task])]
    elif retrieves:
        examples = [EXAMPLE_OF_RETRIEVAL]
    elif not (folder / "tokenizer_config.json").is_file():
        examples = [EXAMPLE_WITHOUT_TOKENIZER.format(auto_class=f"AutoModel{ending}")]
    else:
        text = example_input or EXAMPLE_INPUTS.get(task)
        examples = [EXAMPLE.format(task=task, text=text)] if text else []
        examples += [EXAMPLE_OF_EMBEDDINGS] if task != "text-classification" else []
    languages = [data.language] if isinstance(data.language, str) else data.language
    facts = facts | {
        "language": ", ".join(map(str, languages or ["not stated"])),
        "licence of the weights": data.license or "not stated",
    }
    source = f"; for the weights cite [their source](https://huggingface.co/{data.base_model})"
    citation = CITATION.format(paper=PAPER, source=source if data.base_model else "")
    card = CARD.format(
        metadata=data.to_yaml(),
        name=name,
        summary=summary,
        examples="\n\n".join(examples),
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        use=USES[task],
        of_the_family=("" if served or exported else FINE_TUNING) + citation
        if of_the_family
        else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
