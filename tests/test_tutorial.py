# SPDX-License-Identifier: Apache-2.0
"""docs/tutorial.ipynb: its cells run in order on what `make demo` writes, offline, without Jupyter,
and compute what the text beside them says."""

import base64
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from safetensors.torch import load_file, save_file
from training import SIZES, flags, run

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LENGTHS = [128, 256, 512, 1024]

# Runs the code cells in one namespace, then prints what the tests look at.
RUNNER = """
import json, os, sys
from pathlib import Path

notebook = Path(sys.argv[1])
os.chdir(notebook.parent)
names = {}
for cell in json.loads(notebook.read_text())["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

curve, training = names["ax"].lines
labels, model = names["labels"], names["model"]

# The rows of one length, and the model's own loss of all of them, in a padded batch.
rows = []
hook = model.register_forward_pre_hook(lambda module, args: rows.extend(args[0]))
names["loss_at"](256)
hook.remove()
pad = names["torch"].nn.functional.pad
batch = {"input_ids": rows, "labels": [pad(x, (1, 1), value=-100) for x in labels.split(254)]}
batch["attention_mask"] = [row.new_ones(row.numel()) for row in rows]
fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
batch = {
    key: names["torch"].stack([pad(x, (0, 256 - x.numel()), value=fill[key]) for x in values])
    for key, values in batch.items()
}
with names["torch"].no_grad():
    own_loss = model(**batch).loss.item()

print("\\n" + json.dumps({
    "guesses": [[guess["token_str"] for guess in best] for best in names["guesses"]],
    "slopes": names["slopes"],
    "plotted": [list(map(float, values)) for values in curve.get_data()],
    "marked": float(training.get_xdata()[0]),
    "own_loss": own_loss,
    "row_lengths": [row.numel() for row in rows],
    "tokens": len(labels),
    "labels": labels[labels != -100].tolist(),
    "embeddings": names["embeddings"].tolist(),
    "alone": names["alone"].tolist(),
    "cut": names["cut"].tolist(),
}))
"""


def cells(kind: str) -> list[dict]:
    return [x for x in json.loads(NOTEBOOK.read_text())["cells"] if x["cell_type"] == kind]


def executed(folder: Path) -> dict:
    """What the notebook makes of a model's folder."""
    printed = run_python(
        RUNNER, NOTEBOOK, MOSAIC_BERT_FOLDER=str(folder), MPLBACKEND="Agg", OMP_NUM_THREADS="1"
    )
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` writes, from fewer steps of a smaller model."""
    cwd = tmp_path_factory.mktemp("demo")
    size = flags(**SIZES | {"vocab_size": 400}, max_steps=2, cpu_threads=1, eval_strategy="no")
    run(cwd, ROOT / "train_mlm.py", ROOT / "recipes/demo.yaml", "--output_dir", cwd / "out", *size)
    return cwd / "out"


@pytest.fixture(scope="module")
def result(demo):
    return executed(demo)


def test_masks_are_filled(result):
    assert len(result["guesses"]) >= 3
    for best in result["guesses"]:
        assert len(best) == 3 and all(token.strip() for token in best)


def test_the_slopes_are_those_of_the_model(result):
    assert result["slopes"] == [2**-4, 2**-8]


def test_the_plot_has_a_loss_for_each_length_and_marks_that_of_training(result):
    lengths, losses = result["plotted"]
    assert lengths == LENGTHS and result["marked"] == 128
    assert len(losses) == len(LENGTHS) and all(map(math.isfinite, losses))
    # Two steps leave a model near a blind guess.
    assert all(0 < loss < math.log(400) + 1 for loss in losses)


def test_a_loss_is_the_mean_over_masked_tokens_in_rows_of_that_length(result):
    full, rest = divmod(result["tokens"], 254)
    assert result["row_lengths"] == [256] * full + [rest + 2] * bool(rest)
    assert result["plotted"][1][LENGTHS.index(256)] == pytest.approx(result["own_loss"], rel=1e-5)


def test_fifteen_percent_are_masked(result):
    assert result["tokens"] > 7 * max(LENGTHS)
    # Four standard deviations.
    tolerance = 4 * math.sqrt(0.15 * 0.85 / result["tokens"])
    assert len(result["labels"]) / result["tokens"] == pytest.approx(0.15, abs=tolerance)


def test_every_length_predicts_the_same_masked_tokens(demo, tmp_path):
    """A model that sees no text, only its decoder's bias, has one loss, whatever the length."""
    folder = shutil.copytree(demo, tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("word_embeddings.weight") or name.endswith("decoder.weight"):
            weights[name].zero_()
    bias = weights["cls.predictions.decoder.bias"].normal_(
        generator=torch.Generator().manual_seed(0)
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    result = executed(folder)
    expected = torch.nn.functional.cross_entropy(
        bias.expand(len(result["labels"]), -1), torch.tensor(result["labels"])
    )
    assert result["plotted"][1] == pytest.approx([expected.item()] * len(LENGTHS), rel=1e-5)


def test_embeddings_leave_out_padding_and_take_in_the_whole_text(result):
    embeddings, alone, cut = (torch.tensor(result[x]) for x in ("embeddings", "alone", "cut"))
    assert embeddings.shape == (2, SIZES["hidden_size"])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings[1], alone[0], atol=1e-5, rtol=0)
    assert (embeddings[0] - cut[0]).abs().max() > 1e-3


def test_the_file_is_a_notebook_with_its_pictures_and_without_traces_of_a_machine():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [x["data"]["image/png"] for x in outputs if x["output_type"] == "display_data"]
    assert len(pictures) == 2
    assert all(base64.b64decode(x).startswith(b"\x89PNG") for x in pictures)
    # What is shown is what a reader's run prints: no warnings, no absolute paths.
    texts = [x for x in outputs if x["output_type"] != "display_data"]
    assert texts and all(x["output_type"] == "stream" and x["name"] == "stdout" for x in texts)
    assert not any(" /" in line for x in texts for line in x["text"])
    assert NOTEBOOK.stat().st_size < 150_000


def test_the_text_quotes_the_losses_that_its_outputs_show():
    printed = "".join(
        line for x in cells("code") for y in x["outputs"] for line in y.get("text", [])
    )
    losses = dict(re.findall(r"(\d+) tokens: loss ([\d.]+)", printed))
    assert list(losses) == [str(length) for length in LENGTHS]
    text = "".join(line for x in cells("markdown") for line in x["source"])
    assert f"{losses['1024']} against {losses['128']}" in text
