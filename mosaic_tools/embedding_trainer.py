# SPDX-License-Identifier: Apache-2.0
"""Contrastive training by sentence-transformers: the model, losses, evaluation, and the Trainer.

What is written here joins that library to this package: a MosaicBERT loads whole or not at all, a
run resumes and stops as the others do, and folders load in old and new versions.
"""

import copy
import itertools
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import custom_object_save

from mosaic_tools import family
from mosaic_tools.callbacks import LogFile, StopOnSigterm
from mosaic_tools.checkpoints import Checkpoints
from mosaic_tools.pairs import SCORED, PairArguments, is_scored
from mosaic_tools.publishing import PROMPTS, check_modules, settings_of, write_pooling
from mosaic_tools.recipe import RecipeArguments, check_range, option
from mosaic_tools.recipe_trainer import RecipeTrainer, has_token_types, max_length_of
from mosaic_tools.tokenization import largest_id, load_tokenizer, make_tokenizer_portable

try:
    import sentence_transformers
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import (
        MultiDatasetBatchSamplers,
        NoDuplicatesBatchSampler,
        SetEpochMixin,
    )
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
        SequentialEvaluator,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        CoSENTLoss,
        MatryoshkaLoss,
    )
    from sentence_transformers.util import mine_hard_negatives
except ImportError as error:
    raise ImportError(
        "train_embeddings.py needs: pip install 'sentence-transformers >= 5.7'"
    ) from error

# What the evaluation calls them, and what the card does.
RANKING = {
    "eval_cosine_ndcg@10": "nDCG@10",
    "eval_cosine_mrr@10": "MRR@10",
    "eval_cosine_recall@10": "Recall@10",
}
CORRELATION = {"eval_spearman_cosine": "Spearman correlation"}


@dataclass
class EmbedderArguments:
    """A pre-trained encoder; its mean over a text's tokens becomes the embedding."""

    _argument_group_name = "model"

    model_name_or_path: str = option("", "Hub id or folder of the encoder", aliases=["--model"])
    tokenizer_name: str | None = option(None, "Hub id, folder or vocab.txt; None: the model's")
    symmetric: bool = option(False, "find anchors by positives too, not only positives by anchors")
    matryoshka_dims: list[int] | None = option(
        None, "first dimensions of an embedding that must do as well alone, such as 64 128 256"
    )
    mini_batch_size: int = option(
        32,
        "pairs that are computed at once, which decides on the memory and not on the result; "
        "scored pairs are computed all at once",
    )
    low_precision_layernorm: bool = option(
        True, "of a MosaicBERT: LayerNorm in autocast's dtype, not in float32"
    )
    attn_implementation: str | None = option(None, "None: the best that the device has")

    def __post_init__(self):
        check_range(self, "mini_batch_size", least=1)


@dataclass
class EmbeddingArguments(RecipeArguments, SentenceTransformerTrainingArguments):
    """RecipeArguments with defaults of contrastive training, and sentence-transformers' own."""

    per_device_train_batch_size: int = option(
        256, "rows of a step on each device: each has the others for comparison"
    )
    learning_rate: float = option(5e-5, "at its peak")
    max_grad_norm: float = option(1.0, "clips gradients; 0 does not")
    num_train_epochs: float = 1.0
    batch_sampler: str = option("no_duplicates", "of sentence-transformers; no text twice")
    source_weights: list[float] | None = option(
        None, "batches of each source beside those of the others, such as 2 1; None: as it has rows"
    )
    dataloader_drop_last: bool = option(True, "a smaller last batch would be an easier one")

    def __post_init__(self):
        if self.prompts is not None:
            raise ValueError("give --query_prompt and --document_prompt in place of --prompts")
        if self.global_batch_size is not None:
            raise ValueError(
                "give --per_device_train_batch_size in place of --global_batch_size: a row is "
                "compared with those of its batch, which micro-batches would take apart; "
                "--mini_batch_size saves memory"
            )
        weights = self.source_weights or []
        if not all(0 < x < math.inf for x in weights):
            raise ValueError(f"source_weights are {weights}: each must be a number above 0")
        super().__post_init__()
        if self.train_batch_size * self.world_size < 2:
            raise ValueError(
                "--per_device_train_batch_size 1 leaves a row nothing to be compared with: give 2 "
                "or more"
            )
        if weights and self.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.PROPORTIONAL:
            raise ValueError("give --source_weights or --multi_dataset_batch_sampler, not both")
        if self.world_size > 1 and not self.dataloader_drop_last:
            raise ValueError(
                "--dataloader_drop_last false: a smaller last batch cannot be shared out to "
                f"{self.world_size} processes; leave it out"
            )
        # A batch is drawn for all devices together, and each has its part of it.
        self.accelerator_config.split_batches = True


# ---- model ----


def build_embedder(args: EmbedderArguments, data: PairArguments) -> SentenceTransformer:
    """The encoder, by this folder's code if it is a MosaicBERT, under the mean over all tokens.

    Raises:
        ValueError: as `family.load` and `check_modules`; there is no tokenizer, it has ids that the
            encoder does not, or a Matryoshka dimension is none of the encoder's.
    """
    source = args.model_name_or_path
    if not source:
        raise ValueError("give --model_name_or_path, the folder or Hub id of a pre-trained encoder")
    values = family.config_values(source)
    normalize = "Normalize" in check_modules(source)
    tokenizer = load_tokenizer(args.tokenizer_name or source)
    encoder = load_encoder(args, values, tokenizer, data.max_seq_length)
    if wrong := [x for x in args.matryoshka_dims or [] if not 0 < x <= encoder.config.hidden_size]:
        raise ValueError(
            f"matryoshka_dims {', '.join(map(str, wrong))}: {source} has embeddings of "
            f"{encoder.config.hidden_size} dimensions"
        )
    length = max_length_of(encoder.config, tokenizer, data.max_seq_length)
    for prompt in data.prompts().values():
        if len(tokenizer(prompt)["input_ids"]) >= length:
            raise ValueError(
                f"the prompt {prompt!r} leaves nothing of a text of {length} tokens: shorten it, "
                "or raise --max_seq_length"
            )
    # One name, since transformers copies its code to a cache by it.
    with tempfile.TemporaryDirectory() as folder, family.without_report():
        place = Path(folder, "encoder")
        # Not by save_pretrained, which writes in the main process only.
        encoder.config.save_pretrained(place)
        if family.is_ours(encoder.config):
            custom_object_save(encoder, place, config=encoder.config)
        save_file(encoder.state_dict(), place / "model.safetensors", {"format": "pt"})
        prompts = {"query": "", "document": ""}
        prompts |= settings_of(source, PROMPTS).get("prompts", {}) | data.prompts()
        save_modules(encoder, tokenizer, place, length, prompts, normalize)
        embedder = SentenceTransformer(str(place), trust_remote_code=True, device="cpu")
    # Not the copy, which may have a new pooler.
    embedder[0].model = encoder
    return embedder


def load_encoder(args: EmbedderArguments, values: dict, tokenizer, max_seq_length: int):
    """The checkpoint's encoder, whose config.json has these values, without a head or pooler."""
    source = args.model_name_or_path
    if family.is_of_family(values):
        config = family.as_ours(values, source)
        config.attention_probs_dropout_prob = 0.0
        config.low_precision_layernorm = args.low_precision_layernorm
        config.pad_token_id = tokenizer.pad_token_id
        length = max(config.alibi_starting_size, max_seq_length)
        config.alibi_starting_size = config.max_position_embeddings = length
        model_class, options = family.model_class("AutoModel"), {"add_pooling_layer": False}
    else:
        config, model_class, options = AutoConfig.from_pretrained(source), AutoModel, {}
    if largest_id(tokenizer) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest_id(tokenizer)}, {source} a vocabulary of "
            f"{config.vocab_size}: give the --tokenizer_name that it was trained with"
        )
    options["attn_implementation"] = args.attn_implementation
    encoder, _ = family.load(model_class, source, config, other_head=True, **options)
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    return encoder


def save_modules(
    encoder, tokenizer, folder, max_seq_length: int, prompts: dict[str, str], normalize: bool
):
    """What makes an encoder's folder a SentenceTransformer, in the forms of old versions of the
    library, which new ones read too."""
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder, max_seq_length, has_token_types(encoder.config))
    write_pooling(folder, encoder.config.hidden_size, max_seq_length, normalize)
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    file = Path(folder, PROMPTS)
    file.write_text(json.dumps(settings, indent=2) + "\n")


# ---- data ----


def with_negatives(sources: dict, count: int, embedder, batch_size: int) -> dict:
    """Each pair with `count` hard negatives, by sentence-transformers' miner, which leaves out
    pairs that have fewer. ValueError: there is a source that they do not suit."""
    for name, rows in sources.items():
        if is_scored(rows) or len(rows.column_names) > 2:
            raise ValueError(
                f"{name} has the columns {', '.join(rows.column_names)}: --mine_hard_negatives is "
                "for pairs, leave it out or the other columns"
            )
    return {name: mine(name, x, count, embedder, batch_size) for name, x in sources.items()}


def mine(name: str, rows, count: int, embedder, batch_size: int):
    """The pairs of one source, with negatives."""
    # The miner does not see that an anchor may be a text of another pair; it would be the nearest.
    texts = set(rows["positive"])
    has_anchors = not texts.isdisjoint(rows["anchor"])
    if len(texts) <= count + has_anchors:
        raise ValueError(f"{name} has {len(texts)} texts: --mine_hard_negatives {count} needs more")
    mined = mine_hard_negatives(
        rows,
        embedder,
        num_negatives=count + has_anchors,
        output_format="n-tuple",
        batch_size=batch_size,
        verbose=False,
    )
    if not has_anchors:
        return mined
    kept = []
    for anchor, positive, *negatives in zip(*(mined[x] for x in mined.column_names), strict=True):
        others = [x for x in negatives if x != anchor][:count]
        negatives = {f"negative_{i}": x for i, x in enumerate(others, 1)}
        kept.append({"anchor": anchor, "positive": positive} | negatives)
    return datasets.Dataset.from_list(kept)


def check_sources(sources: dict, args: EmbeddingArguments):
    """ValueError: a source has no batch of as many rows as all devices have, without a text twice,
    or there are not as many weights as sources."""
    rows = args.train_batch_size * args.world_size
    for name, source in sources.items():
        sampler = NoDuplicatesBatchSampler(
            source, rows, drop_last=True, valid_label_columns=["score"], generator=torch.Generator()
        )
        if not next(iter(sampler), None):
            raise ValueError(
                f"{name} has {len(source)} rows, too few for a batch of {rows} on {args.world_size}"
                " device(s) that has no text twice: lower --per_device_train_batch_size"
            )
    weights = args.source_weights
    if weights and len(weights) != len(sources):
        raise ValueError(
            f"source_weights are {weights} for the {len(sources)} source(s) {', '.join(sources)}: "
            "give as many numbers as --train_file has words"
        )


def prompts_of_columns(sources: dict, prompts: dict[str, str]) -> dict[str, dict[str, str]]:
    """For each source and column what is put before its texts. Scored pairs have no roles, and so
    no prompts.

    Args:
        prompts: the model's, by "query" and "document".
    """
    return {
        name: {}
        if is_scored(rows)
        else {
            column: prompts["query" if column == "anchor" else "document"]
            for column in rows.column_names
        }
        for name, rows in sources.items()
    }


# ---- loss and evaluation ----


def describe_loss(rows, args: EmbedderArguments) -> str:
    """`build_loss` in words."""
    both = ", both directions" if args.symmetric else ""
    name = "CoSENTLoss" if is_scored(rows) else f"CachedMultipleNegativesRankingLoss{both}"
    dims = ", ".join(map(str, args.matryoshka_dims or ()))
    return name + (f", of the first {dims} dimensions and of all" if dims else "")


def build_loss(rows, embedder, args: EmbedderArguments, gather: bool):
    """Of a source: CoSENT for scored pairs, for others cross-entropy over the batch, and over those
    of all devices if they gather."""
    if is_scored(rows):
        loss = CoSENTLoss(embedder)
    else:
        both = {
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
        }
        loss = CachedMultipleNegativesRankingLoss(
            embedder,
            mini_batch_size=args.mini_batch_size,
            gather_across_devices=gather,
            **both if args.symmetric else {},
        )
    if args.matryoshka_dims:
        whole = embedder[0].model.config.hidden_size
        loss = MatryoshkaLoss(embedder, loss, sorted({*args.matryoshka_dims, whole}))
    return loss


def build_evaluator(held_out: dict, batch_size: int, dims: list[int]) -> SequentialEvaluator:
    """Retrieval of each held-out pair's positive among all of them by its anchor, and the rank
    correlation of scored pairs' cosines; then the same by the first dimensions, as many as each of
    dims says. The score is that of whole embeddings."""
    pairs = [x for rows in held_out.values() if not is_scored(rows) for x in rows]
    scored = [x for rows in held_out.values() if is_scored(rows) for x in rows]
    queries = dict.fromkeys(x["anchor"] for x in pairs)
    documents = dict.fromkeys(x["positive"] for x in pairs)
    relevant = {text: set() for text in queries}
    for x in pairs:
        relevant[x["anchor"]].add(x["positive"])
    # Each text is its own id.
    retrieval = {text: text for text in queries}, {text: text for text in documents}, relevant
    columns = [[x[name] for x in scored] for name in SCORED]

    def evaluators(**options):
        options |= {"batch_size": batch_size, "write_csv": False}
        if pairs:
            yield InformationRetrievalEvaluator(*retrieval, **options)
        if scored:
            yield EmbeddingSimilarityEvaluator(*columns, **options)

    whole = list(evaluators())
    parts = [x for dim in dims for x in evaluators(truncate_dim=dim, name=f"dim_{dim}")]
    return SequentialEvaluator(whole + parts, lambda scores: scores[len(whole) - 1])


def baselines(embedder, evaluator: SequentialEvaluator, seed: int) -> dict[str, dict[str, float]]:
    """What the same evaluation of retrieval finds without training: by the encoder with random
    weights, and by words alone (TF-IDF). Names are RANKING's."""
    ranking = evaluator.evaluators[0]
    if not isinstance(ranking, InformationRetrievalEvaluator):
        return {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = copy.deepcopy(embedder)
        untrained[0].model = type(embedder[0].model)(embedder[0].model.config)
    by_chance = ranking(untrained.to(embedder.device).eval())
    return {
        "random weights": {f"eval_{name}": x for name, x in by_chance.items()},
        "TF-IDF": tfidf(ranking),
    }


def tfidf(ranking: InformationRetrievalEvaluator) -> dict[str, float]:
    """The evaluation of cosines between counts of words, weighted by how rare they are; empty if
    there are no words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(re.search(r"\w", text) for text in ranking.corpus):
        return {}
    # Words of one letter too.
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    documents = vectorizer.fit_transform(ranking.corpus)
    similarities = (vectorizer.transform(ranking.queries) @ documents.T).toarray()
    results = [
        [{"corpus_id": x, "score": y} for x, y in zip(ranking.corpus_ids, row, strict=True)]
        for row in similarities
    ]
    metrics = ranking.compute_metrics(results)
    return {
        "eval_cosine_ndcg@10": metrics["ndcg@k"][10],
        "eval_cosine_mrr@10": metrics["mrr@k"][10],
        "eval_cosine_recall@10": metrics["recall@k"][10],
    }


# ---- training ----


class Epoch:
    """Tells all samplers the epoch. sentence-transformers 5.7 tells it to none of a source, whose
    batches would be the same in every epoch."""

    def __init__(self, *samplers):
        self.samplers = samplers

    def set_epoch(self, epoch: int):
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


class Share(SetEpochMixin):
    """So many batches of a source in each epoch. If it has fewer it starts over, in another order;
    if it has more, others are left out in each epoch."""

    def __init__(self, sampler, batches: int):
        super().__init__()
        self.sampler, self.batches = sampler, batches
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last

    def __len__(self):
        return self.batches

    def __iter__(self):
        passes = math.ceil(self.batches / len(self.sampler))
        return itertools.islice(self.endless(self.epoch * passes), self.batches)

    def endless(self, first: int):
        """Batches of one pass after another, whose orders are those of the epochs from `first`."""
        for number in itertools.count(first):
            self.sampler.set_epoch(number)
            yield from self.sampler


def weighted(samplers: list, weights: list[float]) -> list[Share]:
    """Samplers of as many batches together, up to rounding, shared out by the weights; each has one
    batch at least."""
    batches = sum(map(len, samplers)) / sum(weights)
    pairs = zip(samplers, weights, strict=True)
    return [Share(sampler, max(1, round(batches * weight))) for sampler, weight in pairs]


class EmbeddingTrainer(RecipeTrainer, SentenceTransformerTrainer):
    """sentence-transformers' Trainer with the habits of this package's: the recipe's weight decay,
    checkpoints that are known to be whole, a stop on SIGTERM and on a loss that is not finite,
    log.jsonl, folders as `save_modules` writes them."""

    def __init__(self, embedder, args: EmbeddingArguments, train: dict, **kwargs):
        self.sigterm = StopOnSigterm()
        super().__init__(
            embedder,
            args,
            train_dataset=train,
            processing_class=embedder.tokenizer,
            callbacks=[Checkpoints(streams=False), self.sigterm, LogFile()],
            **kwargs,
        )

    def get_batch_sampler(self, dataset, batch_size: int, **kwargs):
        """Has as many batches as it says. sentence-transformers 5.7's has fewer where texts recur,
        and training would end before the learning rate does."""
        rows = batch_size * self.args.world_size
        sampler = super().get_batch_sampler(dataset, rows, **kwargs)
        is_old = int(sentence_transformers.__version__.split(".")[0]) < 6
        if not (is_old and isinstance(sampler, NoDuplicatesBatchSampler) and sampler.drop_last):
            return sampler
        batches = sum(1 for _ in sampler)
        if batches < len(sampler):
            self.accelerator.print(
                f"{batches * rows:,} of {len(dataset):,} rows fit into batches of {rows} that have "
                "no text twice: an epoch reads so many"
            )
        return Share(sampler, batches)

    def get_multi_dataset_batch_sampler(self, dataset, batch_samplers: list, **kwargs):
        if self.args.source_weights:
            batch_samplers = weighted(batch_samplers, self.args.source_weights)
        sampler = super().get_multi_dataset_batch_sampler(dataset, batch_samplers, **kwargs)
        # Where batches are split, accelerate tells the epoch to this one only.
        sampler.sampler = Epoch(sampler, *batch_samplers)
        return sampler

    def log(self, logs, *args, **kwargs):
        """Stops where the loss, or at the end of training the mean of all, is not finite."""
        super().log(logs, *args, **kwargs)
        loss = logs.get("loss", logs.get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"stopped in step {self.state.global_step}: the loss is {loss}. Try a lower "
                "--learning_rate or a longer --warmup_ratio; in fp16 also --bf16 true"
            )

    def add_model_card_callback(self, default_args_dict):
        """The card is cards.py's."""

    def _save(self, output_dir=None, state_dict=None):
        self.model[0].model.save_pretrained(output_dir or self.args.output_dir)

    def finish_folder(self, folder):
        model = self.model
        normalize = any(type(module).__name__ == "Normalize" for module in model)
        settings = model.max_seq_length, model.prompts, normalize
        save_modules(model[0].model, self.processing_class, folder, *settings)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        self.model[0].model.load_state_dict(weights)
