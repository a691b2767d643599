# SPDX-License-Identifier: Apache-2.0
"""GLUE's tasks, each with the recipe of MosaicBERT's fine-tuning, and the figures it is judged by.

Recipes: mosaicml/examples at daddaeff7a, examples/benchmarks/bert: src/glue/finetuning_jobs.py,
yamls/finetuning/glue/mosaic-bert-base-uncased.yaml, and for other data
yamls/finetuning/mosaic-bert-base-uncased.yaml, which however cuts at 128 tokens, not 256, ends at
0.02 of the learning rate, not at 0, and has LayerNorm in float32. GLUE's ninth task, WNLI, is left
out there too.
"""

from dataclasses import dataclass, field

import numpy as np
from huggingface_hub import EvalResult
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

SEEDS = (19, 8364, 717, 10536, 90166)
# The Hub's data set.
GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What is read, how it is trained, and what counts.

    Args:
        columns: of the text, one or two.
        labels: names by id, in the order of the Hub's `glue`; None for regression.
        score: names of the metrics whose mean is the task's score.
        learning_rate, epochs, batch, decay: at the peak; of the data; rows of an optimizer step;
            decoupled weight decay at the peak.
        seeds: how many of SEEDS the paper's mean is over.
        from_mnli: starts from the model fine-tuned on MNLI, where there is one.
        validation: what is put behind the metric's name, and the split it is of.
    """

    title: str
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = ()
    score: tuple[str, ...] = ("accuracy",)
    learning_rate: float = 1e-5
    epochs: int = 10
    batch: int = 16
    decay: float = 1e-6
    seeds: int = 1
    from_mnli: bool = False
    validation: dict[str, str] = field(default_factory=lambda: {"": "validation"})

    def recipe(self) -> dict:
        """Values for FinetuneArguments. Autocast would round values of regression to eight bits, so
        it is off there."""
        values = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "global_batch_size": self.batch,
            "decoupled_weight_decay": self.decay,
        }
        if self.labels is None:
            values["bf16"] = False
        return values


PAIR = ("sentence1", "sentence2")
ENTAILS = ("entailment", "not_entailment")
# In the order of the model card's table.
TASKS = {
    "mnli": Task(
        "MNLI-(m/mm)",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy", "accuracy_mm"),
        5e-5,
        epochs=3,
        batch=48,
        decay=5e-6,
        validation={"": "validation_matched", "_mm": "validation_mismatched"},
    ),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        3e-5,
        epochs=5,
        decay=3e-6,
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ENTAILS),
    "sst2": Task(
        "SST-2",
        ("sentence",),
        ("negative", "positive"),
        learning_rate=3e-5,
        epochs=3,
        decay=3e-6,
        seeds=3,
    ),
    "cola": Task(
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        5e-5,
        batch=32,
        decay=5e-6,
        seeds=4,
    ),
    "stsb": Task(
        "STS-B", PAIR, None, ("spearman",), 3e-5, batch=32, decay=3e-6, seeds=5, from_mnli=True
    ),
    "mrpc": Task(
        "MRPC",
        PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        8e-5,
        batch=32,
        decay=8e-6,
        seeds=5,
        from_mnli=True,
    ),
    "rte": Task("RTE", PAIR, ENTAILS, epochs=3, decay=1e-5, seeds=5, from_mnli=True),
}


# ---- metrics ----


def metrics(
    predictions: np.ndarray, labels: np.ndarray, positive: int | None = None
) -> dict[str, float]:
    """What GLUE publishes for any of its tasks.

    Args:
        predictions: (rows, classes) logits, or (rows, 1) values.
        labels: (rows,) ids, or values.
        positive: id of the class that F1 is of; None: its mean over all classes.

    Returns:
        accuracy, F1, Matthews' correlation and
        loss, the mean cross-entropy; or Pearson's and Spearman's correlation and the mean squared
        error. Trainer's own loss counts a row twice where processes cannot share rows equally.

    Raises:
        FloatingPointError: a prediction is not finite.
    """
    if not np.isfinite(predictions).all():
        raise FloatingPointError(
            "the model's outputs are not finite, the training has diverged: try a lower "
            "--learning_rate or --max_grad_norm 1; in fp16 also --bf16 true"
        )
    if predictions.shape[1] == 1:
        values = predictions[:, 0]
        return {
            "pearson": correlation(pearsonr, values, labels),
            "spearman": correlation(spearmanr, values, labels),
            "loss": float(np.mean((values - labels) ** 2)),
        }
    guesses = predictions.argmax(-1)
    of = None if positive is None else [positive]
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, labels=of, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, guesses)),
        "loss": float(-log_softmax(predictions, axis=1)[np.arange(len(labels)), labels].mean()),
    }


def correlation(of, x: np.ndarray, y: np.ndarray) -> float:
    """0 where one of them is constant, as Matthews' is then; scipy's would be NaN."""
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(of(x, y).statistic)


def eval_results(name: str, task: Task, found: dict[str, float]) -> list[EvalResult]:
    """The evaluation for the Hub, by its names of metrics, which draws tables of it.

    Args:
        name: of the task.
        found: values by the names of `metrics`, each with its split's suffix.
    """
    is_glue = name in TASKS
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification" if task.labels else "Regression on texts",
            dataset_type=GLUE if is_glue else "custom",
            dataset_name=f"GLUE {task.title}" if is_glue else task.title,
            dataset_config=name if is_glue else None,
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=found[metric + suffix],
        )
        for suffix, split in task.validation.items()
        for metric, (kind, title) in metric_names(task).items()
    ]


def metric_names(task: Task) -> dict[str, tuple[str, str]]:
    """The Hub's type and a title for each of `metrics` that such a task has."""
    if not task.labels:
        return {
            "pearson": ("pearsonr", "Pearson's correlation"),
            "spearman": ("spearmanr", "Spearman's correlation"),
            "loss": ("mse", "Mean squared error"),
        }
    return {
        "accuracy": ("accuracy", "Accuracy"),
        "f1": ("f1", "F1" if len(task.labels) == 2 else "F1, mean over labels"),
        "matthews": ("matthews_correlation", "Matthews' correlation"),
        "loss": ("loss", "Loss"),
    }
