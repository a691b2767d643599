# SPDX-License-Identifier: Apache-2.0
"""A model compiled ahead of time for full rows on a CPU: one file, which a server runs with torch
alone and without compiling anything.

    from mosaic_aot import load

    model = load("model.pt2")
    output = model(torch.tensor([[101, 2023, 2003, 102]]))

The file is machine code, which `load` runs: take it from nobody whom you would not trust with that.
Input is input_ids, (batch, seqlen) int64 of any size without padding; rows of other lengths are
calls of their own. The output is last_hidden_state, (batch, seqlen, dim), or logits. The file holds
machine code and weights in the layout that the CPU's matrix product wants, so it runs under the
torch that made it, on CPUs that have the instructions of the one that it was made on.

This file needs nothing but torch: a copy of it, mosaic_aot.py, lies beside each model.pt2.
"""

import platform
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

FILE, LOADER = "model.pt2", "mosaic_aot.py"
# Keys of the package's metadata. torch's own do not have them.
TORCH, MACHINE, INSTRUCTIONS, OUTPUT = (
    f"mosaic_{x}" for x in ("torch", "machine", "instructions", "output")
)
OPTIONS = {
    # Weights become constants, which oneDNN's matrix products want in an order of their own.
    "freezing": True,
    # As many threads as torch has when the model runs, not as it had when it was compiled.
    "cpp.dynamic_threads": True,
}


class OfIds(nn.Module):
    """A model as a function of input_ids alone, without a mask, which gives one tensor."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_ids), self.output)


def save_aot(model: nn.Module, output: str, folder: Path, longest: int | None = None):
    """Writes FILE, and a copy of this one as LOADER. It takes minutes, and a C++ compiler.

    Args:
        model: on the CPU, in the dtype to run in.
        output: of the model's outputs the one to return, as last_hidden_state or logits.
        longest: tokens that a row may have at most, where the model has a limit: MosaicBERT has
            none.

    Raises:
        ValueError: torch is older than 2.9, or there is no C++ compiler.
    """
    check_compiler()
    bound_to = {
        TORCH: torch.__version__,
        MACHINE: platform.machine(),
        INSTRUCTIONS: " ".join(sorted(instructions())),
        OUTPUT: output,
    }
    # Sizes of 1 would be taken for constants.
    example = torch.zeros(2, 128, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen", max=longest)}
    with torch.no_grad():
        program = torch.export.export(
            OfIds(model.eval(), output), (example,), dynamic_shapes=(sizes,)
        )
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / FILE),
            inductor_configs=OPTIONS | {"aot_inductor.metadata": bound_to},
        )
    shutil.copy(__file__, folder / LOADER)


def check_compiler():
    """ValueError: this torch cannot export models of any size, or g++ is not there."""
    if torch.__version__ < (2, 9):
        raise ValueError(f"--aot needs torch 2.9 or later, this is {torch.__version__}")
    if shutil.which("g++") is None:
        raise ValueError("--aot needs a C++ compiler, and there is no g++: install it")


def instructions() -> set[str]:
    """The instruction sets that this CPU has, by torch's names."""
    return {name for name, found in torch.cpu.get_capabilities().items() if found is True}


def load(file: str | Path):
    """The model in the file, a function of input_ids. It runs on as many threads as torch does.

    The function raises ValueError unless it is given (batch, seqlen) int64 on a CPU: the machine
    code does not look, and would read other numbers.

    Raises:
        ValueError: there is no such file or it is none of `save_aot`'s, it was made by another
            torch, or on a CPU that has instructions which this one lacks.
    """
    bound_to = read_metadata(file)
    if bound_to[TORCH] != torch.__version__:
        raise ValueError(
            f"{file} was compiled by torch {bound_to[TORCH]}, this is {torch.__version__}: install "
            "that one, or compile the model again"
        )
    lacking = set(bound_to[INSTRUCTIONS].split()) - instructions()
    if bound_to[MACHINE] != platform.machine() or lacking:
        raise ValueError(
            f"{file} was compiled for {bound_to[MACHINE]} with {bound_to[INSTRUCTIONS]}; this CPU "
            f"is {platform.machine()} and lacks {' '.join(sorted(lacking)) or 'nothing else'}: "
            "compile the model on a CPU like it"
        )
    compiled = torch._inductor.aoti_load_package(str(file))

    def model(input_ids: Tensor) -> Tensor:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.is_cpu:
            raise ValueError(
                f"input_ids must be (batch, seqlen) int64 on the CPU, got {input_ids.dtype} of "
                f"shape {tuple(input_ids.shape)} on {input_ids.device}"
            )
        return compiled(input_ids.contiguous())

    return model


def read_metadata(file: str | Path) -> dict[str, str]:
    """What the file is bound to, by the keys above. Nothing of it is run. ValueError: as `load`."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        found = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(file), "model")
    except RuntimeError as error:
        raise ValueError(f"{file} is no package of AOTInductor: {error}") from error
    if TORCH not in found:
        raise ValueError(f"{file} does not say what it was compiled for: make it by --aot")
    return found
