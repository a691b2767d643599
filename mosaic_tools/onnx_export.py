# SPDX-License-Identifier: Apache-2.0
"""A model's folder for ONNX Runtime, as optimum, sentence-transformers, fastembed and
transformers.js read it:

    onnx/model.onnx            float32, one file
    onnx/model_quantized.onnx  the same with weights of 8 bits, if asked for
    config.json                of a stock BERT, the name by which these clients know the inputs
    modules.json, 1_Pooling/   the mean over all tokens, for embeddings

Inputs are input_ids, attention_mask and token_type_ids, (batch, seqlen) int64 of any size; the
output is last_hidden_state, (batch, seqlen, dim), or logits. Neither weights for PyTorch nor code
are beside them: transformers would take the folder for a stock BERT, and draw its layers at random.
"""

import importlib.util
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig

# Tasks by optimum's names, the class that a task's model is loaded as, and its output.
TASKS = {
    "fill-mask": ("AutoModelForMaskedLM", "logits"),
    "text-classification": ("AutoModelForSequenceClassification", "logits"),
    "feature-extraction": ("AutoModel", "last_hidden_state"),
}
# What architectures end in whose heads have no task here.
OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
# The first that has GELU. Attention is an operator from 23 on, which is no faster, and which older
# runtimes, browsers' among them, do not know.
OPSET = 20
# A protobuf message, which an ONNX file is, holds no more.
MOST_BYTES = 2**31 - 2**20
# Fields of config.json that mean the same in a stock BERT.
FIELDS = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "num_hidden_layers")
FIELDS += ("num_attention_heads", "pad_token_id", "type_vocab_size", "vocab_size")
OF_LABELS = ("id2label", "label2id", "problem_type")


def check_packages():
    """ValueError: a package that writes or quantizes ONNX files is not installed, or torch is too
    old."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := [x for x in needed if importlib.util.find_spec(x) is None]:
        raise ValueError(f"--onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if torch.__version__ < (2, 9):
        raise ValueError(f"--onnx needs torch 2.9 or later, this is {torch.__version__}")


def for_task(
    source: str, architecture: str, auto_class: str, tensors: dict[str, Tensor], task: str | None
) -> tuple[str, str, dict[str, Tensor]]:
    """The task to export for, the class of its model, and the tensors of that.

    Args:
        architecture: as the source's config.json names it, or "".
        auto_class: what `tensors` are loaded as.
        task: of TASKS, or None: that of the source's head.

    Raises:
        ValueError: the source has another head than the task's, or one that has no task.
    """
    own = next((name for name, (cls, _) in TASKS.items() if cls == auto_class), None)
    if architecture.endswith(OTHER_HEADS):
        own = None
    task = task or own
    if task is None:
        raise ValueError(
            f"{source} is a {architecture}, whose head has no task here ({', '.join(TASKS)}): "
            "--task feature-extraction exports its encoder, and torch.onnx.export all of it"
        )
    if task == "feature-extraction":
        # Clients take the mean themselves.
        tensors = {
            name: x
            for name, x in tensors.items()
            if name.startswith("bert.") and not name.startswith("bert.pooler.")
        }
    elif task != own:
        found = " or ".join(dict.fromkeys(filter(None, (own, "feature-extraction"))))
        raise ValueError(f"{source} has no head for --task {task}: it can be exported for {found}")
    return task, TASKS[task][0], tensors


def save_onnx(model: nn.Module, task: str, folder: Path, int8: bool = False):
    """Writes the graph and config.json.

    Args:
        model: of the class that TASKS has for the task, in float32.

    Raises:
        ValueError: the weights take more than an ONNX file holds.
    """
    model.eval()
    size = sum(x.nbytes for x in model.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"the weights take {size:,} bytes in float32, and an ONNX file holds {MOST_BYTES:,}, "
            "which is all that browsers read: export a smaller model"
        )
    (folder / "onnx").mkdir()
    export(model, TASKS[task][1], folder / "onnx" / "model.onnx")
    if int8:
        quantize(folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx")

    config = model.config
    fields = FIELDS + (OF_LABELS if task == "text-classification" else ())
    stock = BertConfig(
        architectures=[type(model).__name__],
        max_position_embeddings=config.alibi_starting_size,
        **{name: getattr(config, name) for name in fields},
    )
    stock.save_pretrained(folder)


def export(model: nn.Module, output: str, file: Path):
    """Writes the model as one ONNX file, whose only output has that name."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # A size of 1 would be taken for a constant, and one tensor given twice for one input.
    inputs = {
        name: torch.ones(2, 4, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    with warnings.catch_warnings():
        # That inputs share their sizes, and of what torch itself will have to change.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            dynamic_shapes=dict.fromkeys(inputs, sizes),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            verbose=False,
        )
    # It holds this machine's paths.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(file, external_data=False)


def quantize(file: Path, target: Path):
    """Writes an ONNX file again with the weights of its matrices and tables in 8 bits.

    Each column of a matrix has a scale of its own. Weights take 7 of the bits, since CPUs without
    VNNI add products of 8 bits in 16, which overflow: so all CPUs give the same.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(file)
    # The quantizer transposes weights where they lie. Their shapes are then others than noted, and
    # embeddings that a decoder is tied to would be transposed too.
    del model.graph.value_info[:]
    uses = Counter(name for node in model.graph.node for name in node.input)
    weights = {x.name: x for x in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and uses[table := node.input[0]] > 1 and table in weights:
            node.input[0] = f"{table}.of_tokens"
            model.graph.initializer.add().CopyFrom(weights[table])
            model.graph.initializer[-1].name = node.input[0]
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        prepared = Path(place, "model.onnx")
        # Optimizing it is done where it runs.
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(prepared, target, per_channel=True, reduce_range=True)
