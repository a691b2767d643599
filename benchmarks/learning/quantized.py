# SPDX-License-Identifier: Apache-2.0
"""What does int8 cost in quality: by torch itself, by torchao, by ONNX Runtime?

Trained models are quantized in each of the ways below and compared with float32. Activations have
one scale for the whole batch (torch, ONNX Runtime) or one for each token (torchao). Where it is one
for the batch, what a text gives depends on its neighbours.

An embedding model, on held-out pairs of English that CPython carries:
    cosine      of its documents' embeddings and float32's, the lowest and the mean
    alone       cosine of a document's embedding by itself and among 31 others, the lowest
    ndcg        nDCG@10 of finding each summary's text among all of them
    spearman    STS-B: rank correlation of cosines with the human scores, without fine-tuning
A model with an MLM head, on held-out text, 15 % masked, over five draws of what is masked:
    loss, accuracy    of masked tokens, means over the draws
    loss_rise         over float32's, mean and standard deviation over the draws
    guesses_changed   share of masked tokens whose likeliest word is another one than float32's
Classifiers that finetune.py trained, on the task's validation data:
    score             the task's, by rows 32 at a time, and one at a time (score_alone)
    changed           share of rows that get another label than in float32; for regression the mean
                      difference of the values
And of each, bytes: its state dict as torch.save writes it, or the ONNX file.

    pip install torchao onnx onnxruntime onnxscript
    python benchmarks/learning/quantized.py --embedder runs/embeddings-demo --mlm runs/demo \
        --classifiers runs/glue/stsb/seed-19 runs/glue/sst2/seed-19 --data_dir glue
    python benchmarks/learning/quantized.py --toy    # proves the script, with random weights

Output: one JSON line for each model and way, appended to --output too, then a table for each model.
A way that cannot run says why. Times are for benchmarks/speed/.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import toy

if __name__ == "__main__":
    toy.choose(sys.argv)

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)

from benchmarks.int8 import torch_int8, torchao_int8
from benchmarks.records import print_table, recorder
from benchmarks.speed.clocks import FAILURES, TOY, record_file, why
from mosaic_tools import onnx_export
from mosaic_tools.classifiers import label_ids
from mosaic_tools.embedded_text import embedded_pairs, embedded_passages
from mosaic_tools.family import HERE
from mosaic_tools.glue_tasks import metrics
from mosaic_tools.labelled_data import LabelledDataArguments, load_task
from mosaic_tools.recipe import TokenizerArguments
from mosaic_tools.tokenization import train_tokenizer

BATCH = 32
DRAWS = range(2) if TOY else range(5)
# Of held-out texts, and of a task's rows.
MOST = 8 if TOY else None
COLUMNS = {
    "model": "", "way": "", "bytes": ",", "cosine_lowest": ".6f", "cosine_mean": ".6f",
    "alone_lowest": ".6f", "ndcg": ".4f", "spearman": ".4f", "loss": ".4f", "loss_rise": "+.4f",
    "loss_rise_spread": ".4f", "accuracy": ".2%", "guesses_changed": ".2%", "score": ".4f",
    "score_alone": ".4f", "changed": ".4f",
}  # fmt: skip


# ---- ways ----
# Each takes a float32 model in eval mode and the name of its output, and returns a function of
# inputs by name, int64 tensors (batch, seqlen), that gives that output, and the model's bytes.


def run_torch(model, output: str):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return lambda inputs: getattr(model(**inputs), output).float(), file.tell()


def run_onnx(model, output: str, int8: bool):
    import onnxruntime

    onnx_export.check_packages()
    with tempfile.TemporaryDirectory() as folder:
        file, quantized = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        onnx_export.export(model, output, file)
        if int8:
            onnx_export.quantize(file, quantized)
            file = quantized
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        size = file.stat().st_size

    def run(inputs):
        return torch.from_numpy(session.run([output], {k: x.numpy() for k, x in inputs.items()})[0])

    return run, size


WAYS = {
    "float32": run_torch,
    "torch": lambda model, x: run_torch(torch_int8(model), x),
    "torch-per-channel": lambda model, x: run_torch(torch_int8(model, per_channel=True), x),
    # Its inputs are products, the largest of them 60 to 100 standard deviations.
    "torch-but-wo": lambda model, x: run_torch(torch_int8(model, skip="mlp.wo"), x),
    "torchao": lambda model, x: run_torch(torchao_int8(model), x),
    "torchao-weights": lambda model, x: run_torch(torchao_int8(model, "Int8WeightOnlyConfig"), x),
    "onnx": lambda *x: run_onnx(*x, int8=False),
    "onnx-int8": lambda *x: run_onnx(*x, int8=True),
}


# ---- figures ----
# Each takes a way's function, and what float32 gave, None for float32 itself; it returns figures
# and what the others are compared with.


def embed(run, tokenizer, texts: list[str], max_length: int, batch: int = BATCH) -> torch.Tensor:
    """(texts, dim): the mean over a text's tokens."""
    vectors = []
    for start in range(0, len(texts), batch):
        inputs = dict(
            tokenizer(
                texts[start : start + batch],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_token_type_ids=True,
                return_tensors="pt",
            )
        )
        mask = inputs["attention_mask"][..., None]
        vectors.append((run(inputs) * mask).sum(1) / mask.sum(1))
    return torch.cat(vectors)


def ndcg(queries: torch.Tensor, documents: torch.Tensor, most: int = 10) -> float:
    """Mean nDCG@most by cosines, where the i-th document is the only right one for query i."""
    queries, documents = (nn.functional.normalize(x.double()) for x in (queries, documents))
    scores = queries @ documents.T
    # From 0; what scores as high comes before it.
    rank = (scores >= scores.diag()[:, None]).sum(1) - 1
    return torch.where(rank < most, 1 / torch.log2(rank + 2.0), 0.0).mean().item()


def of_embedder(embedder, pairs, scored):
    """
    Args:
        embedder: a SentenceTransformer. pairs: (query, document) each.
        scored: (text, text, score) each, none if there is no such data.
    """
    queries = [embedder.prompts.get("query", "") + x for x, _ in pairs]
    documents = [embedder.prompts.get("document", "") + x for _, x in pairs]

    def figures(run, expected):
        def vectors(texts, **options):
            return embed(run, embedder.tokenizer, texts, embedder.max_seq_length, **options)

        found = vectors(documents)
        expected = found if expected is None else expected
        cosines = cosine_similarity(found.double(), expected.double())
        by_itself = cosine_similarity(vectors(documents, batch=1).double(), found.double())
        row = {
            "cosine_lowest": cosines.min().item(),
            "cosine_mean": cosines.mean().item(),
            "alone_lowest": by_itself.min().item(),
            "ndcg": ndcg(vectors(queries), found),
            "documents": len(documents),
        }
        if scored:
            left, right, truth = zip(*scored, strict=True)
            similar = cosine_similarity(vectors(list(left)), vectors(list(right)))
            row["spearman"] = float(spearmanr(similar.numpy(), truth).statistic)
        return row, found

    return figures


def of_mlm(tokenizer, texts: list[str], max_length: int):
    rows = tokenizer(texts, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    rows = [{name: x[i] for name, x in rows.items()} for i in range(len(texts))]

    def draw(run, seed: int):
        """Cross-entropy, guess and label of every masked token."""
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
        losses, guesses, labels = [], [], []
        for start in range(0, len(rows), BATCH):
            batch = dict(collate(rows[start : start + BATCH]))
            label = batch.pop("labels")
            batch.setdefault("token_type_ids", torch.zeros_like(label))
            logits, label = run(batch)[label != -100], label[label != -100]
            losses.append(cross_entropy(logits, label, reduction="none"))
            guesses.append(logits.argmax(1))
            labels.append(label)
        return torch.cat(losses), torch.cat(guesses), torch.cat(labels)

    def figures(run, expected):
        found = [draw(run, seed) for seed in DRAWS]
        both = list(zip(found, expected or found, strict=True))
        rises = [(x[0] - y[0]).mean().item() for x, y in both]
        changed = [(x[1] != y[1]).double().mean().item() for x, y in both]
        row = {
            "loss": mean([loss.mean().item() for loss, _, _ in found]),
            "loss_rise": mean(rises),
            "loss_rise_spread": stdev(rises),
            "accuracy": mean([(x == y).double().mean().item() for _, x, y in found]),
            "guesses_changed": mean(changed),
            "tokens": sum(len(x) for _, _, x in found),
        }
        return row, found

    return figures


def of_classifier(tokenizer, task, part, ids: dict[str, int]):
    columns = [list(part.rows[name])[:MOST] for name in task.columns]
    labels = part.labels[:MOST]
    labels = np.array([ids[x] for x in labels] if task.labels else labels)

    def outputs(run, batch: int) -> np.ndarray:
        found = []
        for start in range(0, len(labels), batch):
            texts = [x[start : start + batch] for x in columns]
            options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": True}
            found.append(run(dict(tokenizer(*texts, truncation=True, max_length=256, **options))))
        return torch.cat(found).numpy()

    def score(outputs) -> float:
        found = metrics(outputs, labels)
        return float(np.mean([found[name] for name in task.score]))

    def figures(run, expected):
        found = outputs(run, BATCH)
        expected = found if expected is None else expected
        if task.labels:
            changed = (found.argmax(1) != expected.argmax(1)).mean()
        else:
            changed = np.abs(found - expected).mean()
        row = {"score": score(found), "score_alone": score(outputs(run, 1))}
        row |= {f"of_{x}": y for x, y in metrics(found, labels).items()}
        return row | {"changed": float(changed), "rows": len(labels)}, found

    return figures


@torch.inference_mode()
def measure(name: str, model, output: str, figures, ways: list[str], record) -> list[dict]:
    """A row for each way, float32 first."""
    rows, expected = [], None
    for way in ["float32", *(x for x in ways if x != "float32")]:
        row = {"model": name, "way": way}
        try:
            # Not in inference mode: torchao packs weights that may be used outside it too.
            with torch.inference_mode(False), torch.no_grad():
                run, size = WAYS[way](model, output)
            found, compared = figures(run, expected)
            row |= {"bytes": size} | found
        except FAILURES as error:
            row["skipped"] = why(error)
        else:
            expected = compared if way == "float32" else expected
        rows.append(row)
        record(row)
    return rows


# ---- models ----


def embedding_model(folder: str, data_dir: str | None):
    options = {"trust_remote_code": True, "model_kwargs": {"add_pooling_layer": False}}
    embedder = SentenceTransformer(folder, device="cpu", **options)
    pairs, scored = embedded_pairs()[1][:MOST], []
    if data_dir and Path(data_dir, "stsb").is_dir():
        task, part = validation("stsb", data_dir)
        scored = list(zip(*(part.rows[x] for x in task.columns), part.labels, strict=True))
    return embedder[0].model, "last_hidden_state", of_embedder(embedder, pairs, scored)


def masked_model(folder: str):
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = embedded_passages()[1][:MOST]
    return model, "logits", of_mlm(tokenizer, texts, model.config.alibi_starting_size)


def classifier(folder: str, data_dir: str):
    """A run of finetune.py, whose folder is in that of its task."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    task, part = validation(Path(folder).parent.name, data_dir)
    return model, "logits", of_classifier(tokenizer, task, part, label_ids(model.config))


def validation(name: str, data_dir: str):
    task, parts, _ = load_task(name, LabelledDataArguments(task=[name], data_dir=data_dir))
    return task, parts["validation"]


def write_toys(folder: Path) -> list[str]:
    """Models with random weights and a task's rows; the arguments that name them."""
    texts = embedded_passages()[1][:100]
    tokenizer = train_tokenizer(texts, TokenizerArguments(vocab_size=300))
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 96}
    sizes |= {"pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.from_pretrained(HERE, trust_remote_code=True, **sizes)
    config.id2label = {0: "negative", 1: "positive"}
    for auto_class, name in [
        (AutoModelForMaskedLM, "mlm"),
        (AutoModelForSequenceClassification, "sst2/seed-1"),
    ]:
        model = auto_class.from_config(config, trust_remote_code=True)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [json.dumps({"sentence": x, "label": i % 2}) for i, x in enumerate(texts)]
    (folder / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / "data" / "sst2" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    # sentence-transformers takes the mean of an encoder that has no pooling of its own.
    places = {"embedder": "mlm", "mlm": "mlm", "classifiers": "sst2/seed-1", "data_dir": "data"}
    return [word for name, x in places.items() for word in (f"--{name}", str(folder / x))]


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embedder", help="folder of train_embeddings.py")
    parser.add_argument("--mlm", help="folder of train_mlm.py")
    parser.add_argument(
        "--classifiers", nargs="+", default=[], help="folders TASK/seed-N of finetune.py"
    )
    parser.add_argument("--data_dir", help="folder with TASK/train.jsonl and TASK/dev.jsonl")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", default=record_file("quantized"))
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args(argv)


def main():
    args = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        if args.toy:
            args = parse([*sys.argv[1:], *write_toys(Path(folder))])
        models = {}
        if args.embedder:
            models["embedder"] = embedding_model(args.embedder, args.data_dir)
        if args.mlm:
            models["mlm"] = masked_model(args.mlm)
        models |= {Path(x).parent.name: classifier(x, args.data_dir) for x in args.classifiers}
    record = recorder(args.output, "torchao", "onnxruntime", "onnxscript")
    for name, (model, output, figures) in models.items():
        rows = measure(name, model.float().eval(), output, figures, args.ways, record)
        has = set().union(*rows)
        print_table(rows, {name: spec for name, spec in COLUMNS.items() if name in has})


if __name__ == "__main__":
    main()
