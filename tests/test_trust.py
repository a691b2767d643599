# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises of the model's files, which users run by trust_remote_code=True."""

import ast
import json
import sys

import pytest
from conftest import HAS_TRITON, MODEL_FILES, ROOT, run_python

LIBRARIES = {"torch", "transformers", "triton", "flash_attn"}
# What runs a text as code, or opens a file.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "open"}


def imported(tree: ast.AST) -> set[str]:
    """First names of what a file imports, at its top or anywhere else; siblings as .name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {x.name.split(".")[0] for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_import_only_what_is_promised(name):
    siblings = {"." + x.removesuffix(".py") for x in MODEL_FILES}
    found = imported(ast.parse((ROOT / name).read_text()))
    assert "torch" in found or "transformers" in found
    assert found <= LIBRARIES | set(sys.stdlib_module_names) | siblings


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_call_nothing_that_runs_text_or_opens_files(name):
    calls = [x for x in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(x, ast.Call)]
    assert calls
    assert not FORBIDDEN & {x.func.id for x in calls if isinstance(x.func, ast.Name)}


# Everything that Python reports of files, sockets and processes while the files are imported.
GUARDED = """
import importlib, importlib.util, json, sys, types
import torch, transformers, transformers.modeling_layers, transformers.modeling_outputs
import torch._subclasses, torch._C
for name in ("triton", "triton.language", "transformers.initialization"):
    if importlib.util.find_spec(name.split(".")[0]):
        try:
            importlib.import_module(name)
        except Exception:
            pass
package = types.ModuleType("mosaic_bert")
package.__path__ = [sys.argv[1]]
sys.modules["mosaic_bert"] = package
sys.dont_write_bytecode = True
events = []
NAMES = ("open", "socket.", "subprocess.", "os.", "shutil.", "urllib.", "ctypes.", "tempfile.")
HARMLESS = ("os.listdir", "os.scandir")

def watch(event, args):
    if event.startswith(NAMES) and event not in HARMLESS:
        events.append([event, *map(str, args[:2])])

sys.addaudithook(watch)
for name in sys.argv[2:]:
    importlib.import_module("mosaic_bert." + name)
print(json.dumps(events))
"""


def test_importing_the_model_opens_no_socket_and_writes_no_file():
    modules = [x.removesuffix(".py") for x in MODEL_FILES if HAS_TRITON or "triton" not in x]
    events = json.loads(run_python(GUARDED, ROOT, *modules).splitlines()[-1])
    others = [x for x in events if x[0] != "open"]
    assert not others
    # Python itself reads what it imports, and Triton the source of its kernels.
    paths = {path: mode for _, path, mode in events}
    assert set(paths.values()) <= {"r", "rb", "None"}
    assert all(path.endswith((".py", ".pyc")) for path in paths)
    assert any(path.startswith(str(ROOT)) for path in paths)
