# SPDX-License-Identifier: Apache-2.0
"""`make test-matrix`: the tests that versions can break, where `make test` does not run them.

Each row of ENVIRONMENTS is a session with an environment of its own. What a row does not pin is the
newest that pip finds, as a stranger gets it. A missing interpreter is an error.

    make test-matrix                          all of them, one after another
    make test-matrix ONLY="oldest model-only"

docs/compatibility.md says what they found.
"""

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
