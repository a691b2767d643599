# SPDX-License-Identifier: Apache-2.0
"""`make test-matrix`: the tests that versions can break, where `make test` does not run them; and
`make test-clients`: the scripts of examples/, each where its client is installed.

Each row of ENVIRONMENTS is a session with an environment of its own. What a row does not pin is the
newest that pip finds, as a stranger gets it. A missing interpreter is an error.

    make test-matrix                          all of them, one after another
    make test-matrix ONLY="oldest model-only"

docs/compatibility.md says what they found.

Each row of CLIENTS is a session too, of the versions in constraints/clients/. Clients in JavaScript
need Node and npm, the page needs Debian's Chromium. Their folders are in examples/models/.

    make test-clients                         needs runs/demo, and makes it if it is not there
    make test-clients ONLY="fastembed node"

docs/serving.md says what they found.
"""

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.envdir = ".venv-matrix"

TODAY = "torch==2.13.0 transformers==5.23.0 pytest hypothesis"
ALL = "-r requirements.txt pytest hypothesis peft onnx onnxruntime onnxscript"

# Each begins with tests/test_.
MODEL = (
    "configuration.py heads.py tracing.py derivatives.py compile.py loading.py attention.py "
    "masked_lm.py padding.py parity.py trust.py"
)
CONVERTER = "convert_weights.py"
TRAINING = (
    "train_mlm.py::test_a_resumed_run_ends_where_an_uninterrupted_one_does "
    "finetune.py::test_a_converted_golden_learns_which_reader_is_old"
)
KERNEL = (
    "flash_attn_triton.py::test_tiles_of_the_table_match_the_oracle "
    "flash_attn_triton.py::test_dropout_gradients_match_the_oracle_with_the_same_mask "
    "flash_attn_triton.py::test_operators_pass_opcheck"
)
# Compiling takes minutes: two classes of five will do.
QUICK = "not graphs_once_more and not (test_compile and (ForSequence or ForToken or ForQuestion))"

# name: (Python, what pip installs, tests)
ENVIRONMENTS = {
    "newest-transformers": (
        "3.13",
        f"{ALL} torch==2.13.0 transformers==5.24.0",
        f"{MODEL} {CONVERTER} {TRAINING} {KERNEL}",
    ),
    "newest-torch": (
        "3.11",
        f"{ALL} torch==2.14.1 transformers==5.24.0",
        f"{MODEL} {CONVERTER} {TRAINING} {KERNEL}",
    ),
    "python3.12": (
        "3.12",
        f"{ALL} torch==2.11.0 transformers==5.0.0 numpy<2.3",
        f"{MODEL} {CONVERTER} {TRAINING} {KERNEL}",
    ),
    "python3.10": (
        "3.10",
        f"{ALL} torch==2.9.1 transformers==4.57.6",
        f"{MODEL} {CONVERTER} {TRAINING} {KERNEL}",
    ),
    "oldest": (
        "3.11",
        f"{ALL} torch==2.6.0 transformers==4.57.6 numpy<2.3",
        f"{MODEL} {CONVERTER} {TRAINING} {KERNEL}",
    ),
    "model-only": ("3.11", TODAY, MODEL),
    "no-data": ("3.11", f"{TODAY} triton==3.9.0 accelerate", f"{MODEL} {CONVERTER} {KERNEL}"),
    "broken-triton": ("3.11", f"{TODAY} triton==3.9.0 accelerate", f"{MODEL} {CONVERTER}"),
}
BREAK_TRITON = """
import importlib.util, pathlib
file = pathlib.Path(importlib.util.find_spec("triton").origin)
file.write_text('raise ImportError("libcuda.so.1: cannot open shared object file")')
"""

for name, (python, packages, tests) in ENVIRONMENTS.items():

    @nox.session(name=name, python=python)
    def session(session, packages=packages, tests=tests):
        session.install(*packages.split())
        if session.name == "broken-triton":
            session.run("python", "-c", BREAK_TRITON)
        session.run("python", "-m", "pip", "freeze")
        files = [f"tests/test_{test}" for test in tests.split()]
        session.run("python", "-m", "pytest", "-rs", "-k", QUICK, *files, *session.posargs)


EMBEDDINGS, MASKED = "examples/models/embeddings", "examples/models/fill-mask"
# Of several lengths, so that some are padded.
TEXTS = (
    "Returns the length of the list.",
    "A file.",
    "Read all the bytes of an object, and write them to a file that is open for writing.",
)
# And one that is cut. Not for transformers.js, which cuts off the last [SEP] too.
WITH_LONG = (*TEXTS, "Read the bytes of an object. " * 60)
MASKS = ("The function returns the [MASK] of the list.",)
INT8_FILE = "--file onnx/model_quantized.onnx"

# name: (what pip installs, runs: (command, its folder and texts, what chooses 8 bits))
CLIENTS = {
    "optimum": (
        "torch sentence-transformers optimum-onnx onnxruntime",
        (
            (
                "python examples/sentence_transformers_onnx.py",
                (EMBEDDINGS, *WITH_LONG),
                "--file model_quantized.onnx",
            ),
            ("python examples/optimum_onnx.py", (MASKED, *MASKS), "--file model_quantized.onnx"),
        ),
    ),
    "fastembed": (
        "fastembed",
        (("python examples/fastembed_custom.py", (EMBEDDINGS, *WITH_LONG), INT8_FILE),),
    ),
    "openvino": (
        "openvino tokenizers",
        (("python examples/openvino_onnx.py", (EMBEDDINGS, *WITH_LONG), INT8_FILE),),
    ),
    "node": (
        "",
        (
            ("node examples/node/embed.mjs", (EMBEDDINGS, *TEXTS), "--dtype q8"),
            ("node examples/node/fill_mask.mjs", (MASKED, *MASKS), "--dtype q8"),
        ),
    ),
    # Its page has the folders and the texts.
    "browser": ("playwright", (("python tests/browser.py", (), "--dtype q8"),)),
}
NPM_INSTALL = "npm install --ignore-scripts --no-package-lock --no-fund --no-audit"

for name, (packages, runs) in CLIENTS.items():

    @nox.session(name=name, python="3.11" if packages else False, tags=["clients"], default=False)
    def client(session, packages=packages, runs=runs):
        if packages:
            constraints = f"constraints/clients/{session.name}.txt"
            session.install(*packages.split(), "-c", constraints)
        if session.name in ("node", "browser"):
            with session.chdir("examples"):
                session.run(*NPM_INSTALL.split(), external=True)
        before = digests()
        for command, arguments, int8 in runs:
            for weights, flags in (("float32", ""), ("int8", int8)):
                output = Path(session.create_tmp(), f"{Path(command).stem}-{weights}.jsonl")
                with open(output, "w") as file:
                    session.run(
                        *(*command.split(), *arguments, *flags.split()),
                        env={"HF_HUB_OFFLINE": "1"},
                        stdout=file,
                        stderr=sys.stderr,
                        external=not packages,
                    )
                # What the ONNX files were made of, where this package is installed.
                python, source = (os.environ[x] for x in ("MOSAIC_PYTHON", "MOSAIC_FOLDER"))
                words = ["--quantized", "examples/models"] if weights == "int8" else []
                session.run(
                    *(python, "tests/clients.py", source, str(output), *words), external=True
                )
        if digests() != before:
            session.error("the client wrote into examples/models/")


def digests() -> dict[Path, str]:
    """What is in the exported folders, file by file."""
    files = [x for x in Path("examples/models").rglob("*") if x.is_file()]
    return {x: hashlib.sha256(x.read_bytes()).hexdigest() for x in files}
