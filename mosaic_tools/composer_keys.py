# SPDX-License-Identifier: Apache-2.0
"""The keys of each kind of Composer's recipes, and what becomes of them: the name of our flag with
the same meaning, a rule, several rules, or nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from mosaic_tools.composer_rules import (
    CHECKPOINTS,
    NOTHING,
    SIZES,
    File,
    agreed,
    algorithms,
    base_of_sizes,
    begins_anew,
    betas,
    data,
    duration,
    end_of_schedule,
    interval,
    last_rows,
    loggers,
    micro_batch,
    new_model,
    of_checkpoint,
    only,
    optimizer,
    output,
    positions,
    precision,
    precision_of_tasks,
    pretrained,
    refused,
    saving,
    schedule,
    size,
    some_batches,
    start,
    tasks,
    warm_up,
)


def all_of(group: str, names: str, rule) -> dict:
    """Rows of `group.name` for each of the names."""
    return {f"{group}.{name}".lstrip("."): rule for name in names.split()}


EVERYWHERE = {
    **all_of("", "progress_bar log_to_console console_log_interval python_log_level", NOTHING),
    **all_of(
        "callbacks",
        "speed_monitor lr_monitor memory_monitor runtime_estimator optimizer_monitor "
        "health_checker",
        NOTHING,
    ),
    "loggers": loggers,
    "algorithms": algorithms,
    **all_of("scheduler", "name alpha_f", schedule),
    "scheduler.t_warmup": warm_up,
    "scheduler.t_max": end_of_schedule,
    # They name what others refer to.
    **all_of("", "tokenizer_name max_seq_len mlm_probability data_local data_remote", NOTHING),
    "model.gradient_checkpointing": "gradient_checkpointing",
    **all_of("model.model_config", "vocab_size num_labels use_cache", NOTHING),
    "model.model_config.hidden_dropout_prob": "hidden_dropout_prob",
    "model.model_config.attention_probs_dropout_prob": "attention_probs_dropout_prob",
    # No field of a BERT's.
    "model.model_config.max_position_embedding": NOTHING,
    "model.model_config.initializer_range": only(0.02, "new weights are drawn as in BERT"),
    "model.model_config.layer_norm_eps": only(1e-12, "LayerNorm is BERT's"),
    "model.model_config.hidden_act": only("gelu", "the activation is BERT's"),
    "model.model_config.type_vocab_size": only(2, "token types are BERT's"),
}
TRAINED = {
    "optimizer.name": optimizer,
    "optimizer.lr": "learning_rate",
    "optimizer.betas": betas,
    "optimizer.eps": "adam_epsilon",
    "optimizer.weight_decay": "decoupled_weight_decay",
    "max_duration": duration,
    "eval_interval": interval("eval"),
    "train_subset_num_batches": only(-1, "all rows are trained on"),
    "global_train_batch_size": "global_batch_size",
    "global_eval_batch_size": NOTHING,
    "device_train_microbatch_size": micro_batch,
    "device_eval_batch_size": "per_device_eval_batch_size",
    "precision": precision,
    "device": lambda value, file: {"use_cpu": True} if value == "cpu" else NOTHING,
    "run_name": output("save_folder", "run_name"),
    "save_folder": (output("save_folder", "run_name"), saving),
    **all_of("", "save_interval save_num_checkpoints_to_keep", saving),
    **all_of("", "save_overwrite load_weights_only", NOTHING),
    "train_loader.num_workers": "dataloader_num_workers",
    "train_loader.drop_last": last_rows,
    "eval_loader.drop_last": NOTHING,
    **all_of("train_loader", "pin_memory prefetch_factor persistent_workers timeout", NOTHING),
    **all_of(
        "eval_loader", "num_workers pin_memory prefetch_factor persistent_workers timeout", NOTHING
    ),
}
TOKENIZERS = (
    "model.tokenizer_name",
    "train_loader.dataset.tokenizer_name",
    "eval_loader.dataset.tokenizer_name",
)
LENGTHS = ("train_loader.dataset.max_seq_len", "eval_loader.dataset.max_seq_len")
SHUFFLED = only(True, "rows are shuffled")


def loader(name: str, ours: str, shuffle, share: str) -> dict:
    """Rows of a loader of pre-training."""
    group = f"{name}.dataset"
    return {
        f"{name}.name": only("text", "a loader reads documents"),
        **all_of(group, "local remote split", data(name, ours)),
        f"{group}.shuffle": shuffle,
        f"{group}.mlm_probability": share,
        # How shards are fetched and ordered.
        **all_of(
            group,
            "predownload download_retry download_timeout validate_hash keep_zip keep_raw "
            "partition_algo num_canonical_nodes shuffle_algo shuffle_seed",
            NOTHING,
        ),
        f"{group}.streams": refused(
            "shards of several places are read by --train_file FOLDER FOLDER", "train_file"
        ),
        f"{group}.samples_per_epoch": refused("an epoch is all rows: leave it out"),
        **all_of(
            group,
            "eos_token_id bos_token_id group_method",
            refused("rows of several documents are made here, of text: leave it out, give --pack"),
        ),
    }


PRETRAINING = {
    **EVERYWHERE,
    **TRAINED,
    "seed": "seed",
    "model.name": new_model,
    "model.use_pretrained": pretrained,
    "model.pretrained_model_name": base_of_sizes,
    "load_path": (of_checkpoint("model_name_or_path"), begins_anew),
    "load_weights_only": begins_anew,
    "model.pretrained_checkpoint": of_checkpoint("model_name_or_path"),
    **{f"model.model_config.{name}": size(name) for name in SIZES},
    "model.model_config.max_position_embeddings": positions,
    "model.model_config.alibi_starting_size": "alibi_starting_size",
    **loader("train_loader", "train_file", SHUFFLED, "mlm_probability"),
    **loader("eval_loader", "validation_file", NOTHING, "eval_mlm_probability"),
    **dict.fromkeys(TOKENIZERS, agreed("tokenizer_name", *TOKENIZERS)),
    **dict.fromkeys(LENGTHS, agreed("max_seq_length", *LENGTHS)),
    "eval_subset_num_batches": some_batches,
}
# A checkpoint has its own.
OF_CHECKPOINT = all_of(
    "model.model_config", f"{' '.join(SIZES)} max_position_embeddings alibi_starting_size", NOTHING
)
OF_FILES = ("model.tokenizer_name", "train_loader.tokenizer_name", "eval_loader.tokenizer_name")
CUT = ("train_loader.max_seq_len", "eval_loader.max_seq_len")
CLASSIFICATION = {
    **EVERYWHERE,
    **TRAINED,
    **OF_CHECKPOINT,
    "seed": lambda value, file: {"seeds": [value]},
    **all_of("model", "name num_labels pretrained_model_name", NOTHING),
    "model.use_pretrained": start,
    **dict.fromkeys(CHECKPOINTS, of_checkpoint("model")),
    "train_loader.shuffle": SHUFFLED,
    **all_of("", "train_loader.split eval_loader.split eval_loader.shuffle", NOTHING),
    **dict.fromkeys(OF_FILES, agreed("tokenizer_name", *OF_FILES)),
    **dict.fromkeys(CUT, agreed("max_seq_length", *CUT)),
    "eval_subset_num_batches": only(-1, "all rows are evaluated"),
}
FOLDERS = ("save_finetune_checkpoint_folder", "base_run_name")
GLUE = {
    **EVERYWHERE,
    **OF_CHECKPOINT,
    **all_of("model", "name pretrained_model_name", NOTHING),
    "model.use_pretrained": start,
    "model.tokenizer_name": agreed("tokenizer_name", "model.tokenizer_name", "tokenizer_name"),
    "tokenizer_name": agreed("tokenizer_name", "model.tokenizer_name", "tokenizer_name"),
    "starting_checkpoint_load_path": of_checkpoint("model"),
    "model.pretrained_checkpoint": of_checkpoint("model"),
    **dict.fromkeys(FOLDERS, output(*FOLDERS)),
    **all_of(
        "", "parallel local_pretrain_checkpoint_folder save_finetune_checkpoint_prefix", NOTHING
    ),
    "precision": precision_of_tasks,
    "tasks": tasks,
    # Read with the tasks.
    "default_seed": lambda value, file: {},
}
# Last parts of keys that the scripts read as if they were left out, where they are null.
MAY_BE_NULL = (
    *("load_path", "starting_checkpoint_load_path", "pretrained_checkpoint", "use_pretrained"),
    *("pretrained_model_name", "gradient_checkpointing", "local", "remote", "split", "streams"),
    *("shuffle", "samples_per_epoch", "eos_token_id", "bos_token_id", "group_method", "device"),
    *("run_name", "base_run_name", "save_folder", "algorithms", "loggers"),
)


@dataclass
class Kind:
    """A kind of file.

    Args:
        script: that it was written for, and the command of ours that takes it.
        flag: which tells that command from others.
        is_kind_of: whether a recipe is of this kind; asked one kind after the other.
        table: of its keys; what is in no row is unknown.
        silent: what that script does if the file does not say so, where it is not our default.
    """

    script: str
    command: str
    flag: str
    is_kind_of: Callable
    table: dict
    silent: Callable


def without_algorithms(file: File) -> dict:
    """LayerNorm of a MosaicBERT is then in float32."""
    return (
        {"low_precision_layernorm": False} if file.keys.get("model.name") == "mosaic_bert" else {}
    )


def silent_pretraining(file: File) -> dict:
    """Without a folder no checkpoint is saved; attention dropout is bert-base-uncased's."""
    values = {"attention_probs_dropout_prob": 0.1} | without_algorithms(file)
    if "train_loader.dataset.shuffle" not in file.keys:
        file.remark("no train_loader.dataset.shuffle: rows are shuffled; there they were not")
    if "save_folder" not in file.keys and not file.has_flag("save_strategy", "save_steps"):
        values["save_strategy"] = "no"
        file.remark(
            "no save_folder: nothing is saved before the end; --save_steps 3500 "
            "--save_total_limit 3 saves checkpoints"
        )
    return values


KINDS = (
    Kind("glue.py", "finetune.py", "seeds", lambda x: "tasks" in x, GLUE, without_algorithms),
    Kind(
        "sequence_classification.py",
        "finetune.py",
        "seeds",
        lambda x: "num_labels" in (x.get("model") or {}),
        CLASSIFICATION,
        without_algorithms,
    ),
    Kind(
        "main.py",
        "train_mlm.py",
        "mlm_probability",
        lambda x: True,
        PRETRAINING,
        silent_pretraining,
    ),
)
