# SPDX-License-Identifier: Apache-2.0
"""Encoders by ours and by others on the same rows, each in several settings, and whether each of
them is right.

Random weights, sizes of the published base models, MosaicBERT's vocabulary for all. A setting is
how a model is run: its attention, with padding or without, compiled or not.
"""

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from benchmarks.records import ROOT
from benchmarks.speed.clocks import DEVICE, TOY
from bert_padding import pack_batch
from mosaic_tools.callbacks import Throughput

VOCAB = 320 if TOY else 30528
CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 104
# The most positions that padded settings take at once; a larger batch becomes micro-batches.
POSITIONS = 65_536
# How far loss and gradient may be from those in float32 with padding and plain attention, relative
# to their size. A mask left out moves the gradient by 1e-3 at toy size and 2e-2 at base size.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# What is checked in float32 too, where the tolerance tells more.
TAKE_FLOAT32 = ("auto", "triton", "sdpa")
if TOY:
    # FlexAttention on a CPU needs a C++ compiler otherwise.
    torch.compiler.set_stance("force_eager")


@dataclass(frozen=True)
class Setting:
    """`attention` is transformers' attn_implementation. `packed`: all rows in one without padding;
    ours does that by itself. `hidden_dropout`: of our model, all others have their own.
    `torch_dropout`: torch's in place of our own for the CPU."""

    model: str
    attention: str
    packed: bool = False
    compiled: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.1
    torch_dropout: bool = False


OURS = "triton" if TOY else "auto"
# transformers' BERT has attention dropout as shipped; flex takes none. transformers packs neither
# of the two by itself: their document masks are made here, before the clock starts.
SETTINGS = {
    "mosaic": Setting("mosaic", OURS, packed=True),
    "mosaic-torch-dropout": Setting("mosaic", OURS, packed=True, torch_dropout=True),
    "mosaic-no-hidden-dropout": Setting("mosaic", OURS, packed=True, hidden_dropout=0.0),
    "mosaic-compiled": Setting("mosaic", OURS, packed=True, compiled=True),
    "mosaic-compiled-no-hidden-dropout": Setting(
        "mosaic", OURS, packed=True, compiled=True, hidden_dropout=0.0
    ),
    "bert": Setting("bert", "sdpa", attention_dropout=0.1),
    "bert-no-dropout": Setting("bert", "sdpa"),
    "bert-compiled": Setting("bert", "sdpa", compiled=True),
    "bert-flex": Setting("bert", "flex_attention", packed=True, compiled=True),
    "bert-flash": Setting("bert", "flash_attention_2", attention_dropout=0.1),
    "modernbert": Setting("modernbert", "sdpa"),
    "modernbert-compiled": Setting("modernbert", "sdpa", compiled=True),
    "modernbert-flex": Setting("modernbert", "flex_attention", packed=True, compiled=True),
    "modernbert-flash": Setting("modernbert", "flash_attention_2"),
}


@dataclass
class Rows:
    """Rows of tokens, padded on the right: ids, mask and labels are (batch, seqlen) int64."""

    lengths: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, part: slice) -> "Rows":
        """Some of the rows, padded to the longest of them, rounded up to a multiple of 8."""
        lengths = self.lengths[part]
        columns = slice(-(-max(lengths) // 8) * 8)
        # transformers' BERT takes a view of the labels.
        cut = [x[part, columns].contiguous() for x in (self.ids, self.mask, self.labels)]
        return Rows(lengths, *cut)


def make_rows(lengths: list[int]) -> Rows:
    """Random words between [CLS] and [SEP], 30 % of them labelled and replaced by [MASK]."""
    generator = torch.Generator().manual_seed(0)
    shape = len(lengths), -(-max(lengths) // 8) * 8
    length, column = torch.tensor(lengths)[:, None], torch.arange(shape[1])
    words = torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)
    is_word = (column > 0) & (column < length - 1)
    chosen = is_word & (torch.rand(shape, generator=generator) < 0.3)
    ids = torch.where(chosen, MASK, words).masked_fill(column == length - 1, SEP)
    ids[:, 0] = CLS
    mask = (column < length).long()
    return Rows(lengths, ids * mask, mask, torch.where(chosen, words, -100))


def configure(setting: Setting, **sizes):
    """Configuration of a model of base size or of these sizes, or of toy size with --toy."""
    values = sizes | dict(vocab_size=VOCAB, pad_token_id=0)
    if TOY:
        values |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        values |= dict(intermediate_size=64)
    if setting.model == "mosaic":
        values |= dict(low_precision_layernorm=True, hidden_dropout_prob=setting.hidden_dropout)
        return AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **values)
    if setting.model == "bert":
        values |= dict(attention_probs_dropout_prob=setting.attention_dropout)
        return AutoConfig.for_model("bert", **values)
    values |= dict(bos_token_id=CLS, cls_token_id=CLS, eos_token_id=SEP, sep_token_id=SEP)
    # Logits for labels only, which is its authors' setting. transformers 4 would compile by itself.
    values |= dict(sparse_prediction=True, reference_compile=False)
    if TOY:
        # Less than toy rows have.
        values |= dict(local_attention=16)
    return AutoConfig.for_model("modernbert", **values)


class Encoder:
    """A masked language model in a setting, for a task.

    Args:
        name: of SETTINGS.
        dtype: in training of autocast, the weights being float32; else of the weights.
        task: "step", an optimizer step, on batches packed as train_mlm.py does; "fill-mask",
            logits of all tokens; "embeddings", the mean of the last hidden states of a row.

    Raises:
        AssertionError: it is wrong, see `check`.
        ImportError, RuntimeError, ValueError: the setting is not to be had here.
    """

    # At most, in a micro-batch of padded settings.
    positions = POSITIONS

    def __init__(self, name: str, dtype: torch.dtype, task: str):
        self.name, self.setting, self.dtype, self.task = name, SETTINGS[name], dtype, task
        torch.manual_seed(0)
        self.model = self.build(self.setting.attention)
        # Flex has no backward pass on a CPU.
        if not (TOY and self.setting.attention == "flex_attention"):
            self.check()
        if task == "step":
            # The recipe's.
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02,
                fused=True,
            )  # fmt: skip
        else:
            self.model.to(dtype)
        self.model.train(task == "step")
        self.run = self.model.base_model if task == "embeddings" else self.model
        if self.setting.compiled and not TOY:
            # Else what was compiled too often would go on uncompiled, and be timed as if it were.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            # Unpadded batches never have the same size again.
            dynamic = True if self.setting.packed else None
            self.run = torch.compile(self.run, dynamic=dynamic)

    def build(self, attention: str):
        """The model with this attention and random weights."""
        model = AutoModelForMaskedLM.from_config(
            configure(self.setting),
            trust_remote_code=True,
            attn_implementation=attention,
        ).to(DEVICE)
        for name, x in list(model.named_modules()):
            if self.setting.torch_dropout and isinstance(x, torch.nn.Dropout):
                model.set_submodule(name, torch.nn.Dropout(x.p))
        return model

    def autocast(self, dtype=None):
        dtype = dtype or self.dtype
        return torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)

    def inputs(self, rows: Rows, labels: bool) -> list[dict]:
        """Arguments of the model, a dict for each micro-batch, on the device."""
        # For inference ours is given a mask, as its users do.
        if self.setting.packed and (labels or self.setting.model != "mosaic"):
            return [self.packed(rows, labels)]
        at_once = max(1, self.positions // rows.ids.shape[1])
        batches = []
        for start in range(0, len(rows.lengths), at_once):
            part = rows[start : start + at_once]
            batch = {"input_ids": part.ids} | ({"labels": part.labels} if labels else {})
            if not part.mask.all():
                batch["attention_mask"] = part.mask
            column = torch.arange(part.ids.shape[1])
            batches.append(batch | self.position_ids(column[None]))
        return [to_device(batch) for batch in batches]

    def position_ids(self, position) -> dict:
        """For BERT in long rows: its learned positions, 512 as shipped, over and over, so that its
        size does not depend on the rows."""
        learned = self.model.config.max_position_embeddings
        if self.setting.model != "bert" or position.max() < learned:
            return {}
        # transformers before 5 has no more token types than positions by itself.
        return {"position_ids": position % learned, "token_type_ids": torch.zeros_like(position)}

    def packed(self, rows: Rows, labels: bool) -> dict:
        """All rows without their padding, and what keeps them apart."""
        if self.setting.model == "mosaic":
            batch = pack_batch(rows.ids, rows.mask, labels=rows.labels)._asdict()
            return to_device({"input_ids": rows.ids, "labels": rows.labels, "batch": batch})
        from torch.nn.attention.flex_attention import create_block_mask

        real = rows.mask.bool()
        row = torch.repeat_interleave(torch.tensor(rows.lengths)).to(DEVICE)
        position = torch.cat([torch.arange(length) for length in rows.lengths])
        window = getattr(self.model.config, "local_attention", 0) // 2

        def same_row(b, h, i, j):
            return row[i] == row[j]

        def near(b, h, i, j):
            return same_row(b, h, i, j) & ((i - j).abs() <= window)

        build = create_block_mask if TOY else torch.compile(create_block_mask)
        mask = build(same_row, None, None, len(row), len(row), DEVICE)
        if self.setting.model == "modernbert":
            local = build(near, None, None, len(row), len(row), DEVICE)
            mask = {"full_attention": mask, "sliding_attention": local}
        batch = {"input_ids": rows.ids[real], "position_ids": position}
        batch |= self.position_ids(position)
        batch |= {"labels": rows.labels[real]} if labels else {}
        return to_device({name: x[None] for name, x in batch.items()}) | {"attention_mask": mask}

    def function(self, rows: Rows):
        """A function that does the task for the rows, and returns what shows that it went well:
        the loss, or the last micro-batch's logits or embeddings."""
        batches = self.inputs(rows, labels=self.task == "step")
        if self.task == "step":
            return self.step(batches)

        @torch.no_grad()
        def infer():
            for batch in batches:
                output = self.run(**batch)
                if self.task == "fill-mask":
                    result = output.logits
                else:
                    result = mean(output.last_hidden_state, batch.get("attention_mask"))
            return result

        return infer

    def step(self, batches: list[dict]):
        """A function that takes a whole optimizer step, and returns the loss."""
        labels = [(batch["labels"] != -100).sum() for batch in batches]
        shares = [count / sum(labels) for count in labels]

        def step():
            total = 0
            for batch, share in zip(batches, shares, strict=True):
                with self.autocast():
                    loss = self.run(**batch).loss * share
                loss.backward()
                total += loss.detach()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return total

        return step

    def check(self):
        """AssertionError unless loss and gradients, not compiled and without dropout, are those of
        the same weights in float32, with padding and plain attention."""
        # Above 1024 tokens (SKIP_ABOVE) our kernels skip tiles.
        longest = 1100 if DEVICE == "cuda" and self.setting.model == "mosaic" else 300
        rows = make_rows([40, 3, 17] if TOY else [longest, 3, 129])

        def results(model, inputs, dtype):
            with self.autocast(dtype):
                loss = model(**inputs).loss
            weights = model.get_input_embeddings().weight
            return loss.detach(), torch.autograd.grad(loss, weights)[0]

        reference = self.build("eager").eval()
        reference.load_state_dict(self.model.state_dict())
        padded = {"input_ids": rows.ids, "attention_mask": rows.mask, "labels": rows.labels}
        expected = results(reference, to_device(padded), torch.float32)
        # The layers are without dropout, and the model takes the way of training.
        self.model.eval().training = True
        inputs = self.inputs(rows, labels=True)[0]
        exact = self.setting.attention in TAKE_FLOAT32
        for dtype in {self.dtype, torch.float32 if exact else self.dtype}:
            for found, right in zip(results(self.model, inputs, dtype), expected, strict=True):
                error = ((found - right).norm() / right.norm()).item()
                # Not the opposite, which lets NaN pass.
                if not error <= TOLERANCE[dtype]:
                    raise AssertionError(f"{self.name}, {dtype}: off by {error:.2g} of its size")
        if not abs(expected[0] - math.log(VOCAB)) < 1:
            raise AssertionError(f"{self.name}: the loss is {expected[0]:.3g}, not ln {VOCAB}")

    def flop(self, rows: Rows) -> float:
        """Model FLOP of the task, padding not counted, by callbacks.Throughput's formula; of
        inference the third that is its forward pass, with logits of all tokens or of none.
        ModernBERT's local layers count the scores in their window."""
        config, layers = self.model.config, self.model.config.num_hidden_layers
        scores = sum(length**2 for length in rows.lengths)
        if self.setting.model == "modernbert":
            window = config.local_attention // 2
            every = -(-layers // 3)
            near = sum(scores_near(length, window) for length in rows.lengths)
            scores = (every * scores + (layers - every) * near) / layers
        tokens, labelled = sum(rows.lengths), (rows.labels != -100).sum().item()
        logits = {"step": labelled, "fill-mask": tokens, "embeddings": 0}[self.task]
        counts = torch.tensor([tokens, scores, logits], dtype=torch.float64)
        flop = float(Throughput(self.model, None).flop @ counts)
        return flop if self.task == "step" else flop / 3


def mean(hidden_states, mask):
    """(batch, seqlen, dim) -> (batch, dim), over the tokens that are not padding."""
    if mask is None:
        return hidden_states.mean(1)
    mask = mask[..., None].to(hidden_states.dtype)
    return (hidden_states * mask).sum(1) / mask.sum(1)


def scores_near(length: int, window: int) -> int:
    """Pairs of tokens at most `window` apart."""
    far = max(0, length - 1 - window)
    return length**2 - far * (far + 1)


def to_device(batch: dict) -> dict:
    """Tensors of a batch, also those one level down, on the device."""
    return {
        name: to_device(x) if isinstance(x, dict) else x.to(DEVICE) if torch.is_tensor(x) else x
        for name, x in batch.items()
    }
