# SPDX-License-Identifier: Apache-2.0
"""--toy: a script proves itself on a CPU, with tiny sizes, Triton's interpreter and no records."""

import os


def choose(argv: list[str]):
    """Makes this process a toy if the words say --toy. For a script that is run, before it loads
    torch: Triton reads whether it interprets once, and the modules here take their sizes with it.
    """
    if "--toy" in argv:
        os.environ.update(MOSAIC_BENCHMARKS_TOY="1", TRITON_INTERPRET="1")


def chosen() -> bool:
    return "MOSAIC_BENCHMARKS_TOY" in os.environ
