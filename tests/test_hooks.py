# SPDX-License-Identifier: Apache-2.0
"""Those who look inside: hooks that expect (batch, seqlen, dim), gradients of hidden states, and
weights that are no plain tensors."""

import pytest
import torch
import transformers
from models import HEADS, VOCAB, close, make, make_batch, make_labels
from torch import nn

from mosaic_bert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel

BATCH = make_batch(3, 9, 7)
LABELS = make_labels(BATCH)


class Noise:
    """A hook as NEFTune's: noise for (batch, seqlen, dim), of a seed; it keeps what it drew."""

    def __call__(self, module, inputs, output):
        scale = 5 / (output.shape[1] * output.shape[2]) ** 0.5
        self.drawn = torch.zeros_like(output).uniform_(-scale, scale)
        return output + self.drawn


def test_a_hook_on_the_embeddings_adds_the_noise_that_stock_bert_gets():
    """It saw (total, dim), and NEFTune raised an IndexError."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    drawn = []
    for model in (make(BertModel), transformers.BertModel(config).eval()):
        noise = Noise()
        handle = model.get_input_embeddings().register_forward_hook(noise)
        torch.manual_seed(7)
        with torch.no_grad():
            model(**BATCH)
        handle.remove()
        drawn.append(noise.drawn)
    assert torch.equal(*drawn)


def test_noise_reaches_the_real_tokens_and_nothing_else():
    model, noise = make(BertModel), Noise()
    words = model.get_input_embeddings()
    handle = words.register_forward_hook(noise)
    # Of padding, ids need not be of the vocabulary.
    batch = {**BATCH, "input_ids": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, 99)}
    with torch.no_grad():
        found = model(**batch).last_hidden_state
        handle.remove()
        embeds = words(BATCH["input_ids"]) + noise.drawn
        expected = model(inputs_embeds=embeds, attention_mask=BATCH["attention_mask"])
    assert torch.equal(found, expected.last_hidden_state)


@pytest.mark.parametrize("cls", HEADS)
def test_neftune_trains(cls, tmp_path):
    rows = [{"input_ids": x[m.bool()].tolist()} for x, m in zip(*BATCH.values(), strict=True)]
    targets = {
        BertForMaskedLM: lambda n: {"labels": [1] * n},
        BertForSequenceClassification: lambda n: {"labels": 1},
    }
    spans = {"start_positions": 0, "end_positions": 1}
    for row in rows:
        n = len(row["input_ids"])
        row |= {"attention_mask": [1] * n}
        if cls in targets:
            row |= targets[cls](n)
        else:
            row |= spans if "Question" in cls.__name__ else {"labels": [1] * n}

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor(
                [
                    r[name] + [fill[name]] * (width - len(r[name]))
                    if isinstance(r[name], list)
                    else r[name]
                    for r in rows
                ]
            )
            for name in rows[0]
        }

    losses = []
    for alpha in (None, 50.0):
        trainer = transformers.Trainer(
            make(cls),
            transformers.TrainingArguments(
                str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=3,
                report_to="none",
                save_strategy="no",
                neftune_noise_alpha=alpha,
                use_cpu=True,
            ),
            data_collator=collate,
            train_dataset=rows,
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] != losses[1] and all(x > 0 for x in losses)


def test_a_hook_on_all_embeddings_sees_rows():
    """As Captum's layer attributions need, which share a row's scores out by its tokens."""
    model, seen = make(BertForSequenceClassification), []
    model.bert.embeddings.register_forward_hook(lambda m, x, y: seen.append(y))
    logits = model(**BATCH).logits
    assert seen[0].shape == (3, 9, 64)
    gradient = torch.autograd.grad(logits[:, 0].sum(), seen[0])[0]
    real = BATCH["attention_mask"].bool()
    assert gradient[real].abs().sum(-1).min() > 0 and not gradient[~real].any()


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_hidden_states_have_gradients(cls):
    """They were copies beside the graph: retain_grad gave None."""
    model = make(cls)
    outputs = model(**BATCH, output_hidden_states=True)
    for states in outputs.hidden_states:
        states.retain_grad()
    # Not its square: after a LayerNorm that has the same sum for all rows.
    outputs[0].pow(3).sum().backward()
    real = BATCH["attention_mask"].bool()
    for states in outputs.hidden_states[:-1]:
        assert states.grad[real].abs().sum(-1).min() > 0 and not states.grad[~real].any()


def test_the_gradient_of_a_hidden_state_is_that_of_what_the_next_layer_reads():
    model = make(BertModel).double()
    outputs = model(**BATCH, output_hidden_states=True)
    (found,) = torch.autograd.grad(outputs.last_hidden_state.pow(3).sum(), outputs.hidden_states[0])
    direction, step = torch.randn_like(found), 1e-6
    values = []
    for sign in (1, -1):
        move = lambda m, x, y, sign=sign: y + sign * step * direction  # noqa: E731
        handle = model.embeddings.register_forward_hook(move)
        with torch.no_grad():
            values.append(model(**BATCH).last_hidden_state.pow(3).sum().item())
        handle.remove()
    slope = (values[0] - values[1]) / (2 * step)
    assert (found * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_the_last_hidden_state_is_one_of_those_returned():
    outputs = make(BertModel)(**BATCH, output_hidden_states=True)
    assert outputs.last_hidden_state is outputs.hidden_states[-1]


class Scaled(torch.Tensor):
    """A weight as quantizers store it: it knows matrix products, and no operator of ours."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "linear_cross_entropy" in str(func):
            raise NotImplementedError("quantized weights know no such operator")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_are_no_plain_tensors_take_the_way_through_logits():
    """torchao's raised NotImplementedError for the operator of the loss."""
    plain = make(BertForMaskedLM).train()
    expected = plain(**BATCH, labels=LABELS).loss
    model = make(BertForMaskedLM, tie_word_embeddings=False).train()
    model.load_state_dict(plain.state_dict())
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.data.as_subclass(Scaled), requires_grad=False)
    assert type(decoder.weight) is Scaled
    outputs = model(**BATCH, labels=LABELS)
    close(outputs.loss.as_subclass(torch.Tensor), expected)
    assert outputs.logits.shape == ((LABELS != -100).sum(), VOCAB)


def test_hooks_on_the_decoder_are_heard_in_training():
    """The loss without logits read its weight beside them."""
    model = make(BertForMaskedLM).train()
    plain = model(**BATCH, labels=LABELS).loss
    handle = model.get_output_embeddings().register_forward_hook(lambda m, x, y: y * 2)
    hooked = model(**BATCH, labels=LABELS).loss
    model.config.sparse_prediction = False
    close(hooked, model(**BATCH, labels=LABELS).loss)
    handle.remove()
    assert not torch.equal(hooked, plain)


def test_a_weight_that_a_hook_makes_is_the_one_of_today():
    model = make(BertForMaskedLM, tie_word_embeddings=False).train()
    decoder = nn.utils.spectral_norm(model.get_output_embeddings())
    model(**BATCH, labels=LABELS)
    with torch.no_grad():
        decoder.weight_orig.mul_(3)
    found = model(**BATCH, labels=LABELS).loss
    model.config.sparse_prediction = False
    close(found, model(**BATCH, labels=LABELS).loss, factor=2**16)
