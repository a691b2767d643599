# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made to do harm: the converter refuses them by name, runs nothing that is in them,
writes nothing, and stays within some memory and time. So do the commands that train."""

import contextlib
import io
import json
import pickle
import resource
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import save

import convert_weights
from mosaic_tools import family

CONFIG = (GOLDENS / "mosaic_tiny" / "config.json").read_text()
WEIGHTS = torch.load(GOLDENS / "mosaic_tiny" / "pytorch_model.bin", weights_only=True)


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(state, **options) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def tensors() -> bytes:
    return save({name: x.clone() for name, x in WEIGHTS.items()})


def safetensors(header, data=b"", size=None) -> bytes:
    """A file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def one(**entry) -> bytes:
    """A file of one tensor, of 8 bytes, that its header describes so."""
    default = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return safetensors({"a": default | entry}, bytes(8))


def bomb(part: str, content: bytes) -> bytes:
    """A torch checkpoint that is small on disk, and in which one part is huge."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for name in source.namelist():
            file.writestr(name, content if name.endswith(part) else source.read(name))
    return target.getvalue()


def with_config(**values) -> str:
    return json.dumps(json.loads(CONFIG) | values)


# The name of the file, its content, and what is said of it; with a path, where a payload would
# write.
PICKLES = {
    "in a list": lambda path: saved({**WEIGHTS, "x": [1, [Payload(path)]]}),
    "as a key's value, two deep": lambda path: saved({"state": {"model": {"x": Payload(path)}}}),
    "beside the model, as an optimizer": lambda path: saved(
        {"state": {"model": WEIGHTS, "optimizers": {"Adam": Payload(path)}}}
    ),
    "in torch's old format": lambda path: saved(
        {**WEIGHTS, "x": Payload(path)}, _use_new_zipfile_serialization=False
    ),
    "as a bare pickle": lambda path: pickle.dumps(Payload(path)),
}
FILES = {
    "header longer than the file": (
        {"model.safetensors": safetensors({}, size=2**62)},
        "header too large",
    ),
    "header that is nested for ever": (
        {"model.safetensors": safetensors(b"[" * 10**6)},
        "invalid JSON",
    ),
    "offsets beyond the file": ({"model.safetensors": one(data_offsets=[0, 2**40])}, "offset"),
    "offsets that go backwards": ({"model.safetensors": one(data_offsets=[8, 0])}, "offset"),
    "a shape that its bytes do not fill": ({"model.safetensors": one(shape=[2**40])}, "shape"),
    "a shape that overflows": ({"model.safetensors": one(shape=[2**33] * 2)}, "overflow"),
    "a dtype of no library": ({"model.safetensors": one(dtype="F33")}, "F33"),
    "a huge tensor of nothing": (
        {"model.safetensors": one(shape=[2**40, 0], data_offsets=[0, 0])},
        "read|no place for .*: a",
    ),
    "a pickle that unpacks to a gigabyte": (
        {"pytorch_model.bin": lambda: bomb("data.pkl", b"\x80\x02" + b"N0" * 2**29)},
        "would unpack to 1,07",
    ),
    "a tensor that unpacks to a gigabyte": (
        {"pytorch_model.bin": lambda: bomb("/data/0", bytes(2**30))},
        "would unpack to 1,07",
    ),
    "layers without end": ({"config.json": with_config(num_hidden_layers=10**9)}, "at most 1000"),
    "a vocabulary larger than memory": (
        {"config.json": with_config(vocab_size=2**31 - 1)},
        r"differ in shape: .*word_embeddings.weight \(2147483647, ",
    ),
    "labels without end": ({"config.json": with_config(num_labels=5 * 10**6)}, "at most 262144"),
    "a size below zero": ({"config.json": with_config(hidden_size=-96)}, "hidden_size must be"),
    "a config that is nested for ever": ({"config.json": "[" * 10**6}, "config.json is not JSON"),
    "a tokenizer that is an image": ({"tokenizer.json": b"\x89PNG\r\n\xff"}, "no tokenizer can"),
    "a tokenizer that is nested for ever": ({"tokenizer.json": "[" * 10**6}, "no tokenizer can"),
    "a vocabulary that is no text": ({"vocab.txt": b"\xff\xfe\x00"}, "vocab.txt is no text"),
    "a tokenizer with code of its own": (
        {
            "vocab.txt": "[PAD]\n[UNK]",
            "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["evil/code--t.T", null]}}',
        },
        "no tokenizer can be loaded",
    ),
}


@pytest.fixture
def limits():
    """At most 500 MB more than there are, and 10 seconds."""

    def too_long(*_):
        raise TimeoutError("10 seconds are over")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, handler = (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.signal(signal.SIGALRM, too_long),
    )
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + 500 * 2**20, before[1])
    )
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder, files: dict):
    """A folder of these files, beside the usual ones."""
    folder.mkdir()
    usual = {"config.json": CONFIG, "model.safetensors": tensors()}
    if "pytorch_model.bin" in files:
        del usual["model.safetensors"]
    for name, content in (usual | files).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def refused(folder, files: dict, message: str):
    """Converts such a folder, and expects a refusal."""
    write(folder, files)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_weights.main([str(folder), str(folder.with_name("out"))])
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("where", PICKLES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ep0.pt"])
def test_code_in_a_pickle_is_never_run(where, name, tmp_path):
    canary, folder = tmp_path / "executed", tmp_path / "source"
    content = PICKLES[where](canary)
    if name == "pytorch_model.bin":
        refused(folder, {name: content}, "is not loaded, since unpickling can run code")
    else:
        (tmp_path / name).write_bytes(content)
        (tmp_path / "config.json").write_text(CONFIG)
        words = [str(tmp_path / x) for x in (name, "out", "config.json")]
        with pytest.raises(ValueError, match="since unpickling can run code"):
            convert_weights.main([*words[:2], "--config", words[2]])
    assert not canary.exists()
    # Loaded without a thought it does what it says.
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(content), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": with_config(vocab_size=2 * 10**7)}, "1,920,251,808 weights, .* 323,072"),
        ({"config.json": with_config(intermediate_size=4 * 10**7)}, "34,560,144,288 weights"),
        (
            {
                "pytorch_model.bin": FILES["a tensor that unpacks to a gigabyte"][0][
                    "pytorch_model.bin"
                ]
            },
            "unpack to",
        ),
    ],
)
def test_the_commands_that_train_refuse_it_within_memory_and_time(
    files, message, tmp_path, request
):
    """They load by transformers, which took 15 GB and 40 seconds for such a vocabulary."""
    folder, loader = tmp_path / "source", family.model_class("AutoModelForMaskedLM")
    write(folder, {name: x() if callable(x) else x for name, x in files.items()})
    request.getfixturevalue("limits")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        family.load(loader, str(folder), family.read_config(str(folder)))


@pytest.mark.parametrize("what", FILES)
def test_it_is_refused_within_memory_and_time(what, tmp_path, request):
    files, message = FILES[what]
    # Made before the limits begin.
    files = {name: x() if callable(x) else x for name, x in files.items()}
    request.getfixturevalue("limits")
    refused(tmp_path / "source", files, message)


def test_code_elsewhere_that_a_config_names_is_not_taken_over(tmp_path):
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(with_config(auto_map={"AutoModel": "evil/code--m.Model"}))
    (folder / "model.safetensors").write_bytes(tensors())
    convert_weights.main([str(folder), str(out)])
    named = json.loads((out / "config.json").read_text())["auto_map"]
    assert {x.split(".")[0] for x in named.values()} == {"configuration_bert", "bert_layers"}
    assert "evil" not in (out / "config.json").read_text()
