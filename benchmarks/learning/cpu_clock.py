# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this repository with its speed measured in CPU time.

    python benchmarks/learning/cpu_clock.py train_mlm.py --output_dir runs/demo ...

The rates that train_mlm.py logs are then by the process's own CPU seconds, of all its threads,
which other work on the machine disturbs least. On a GPU they would say nothing.
"""

import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mosaic_tools import callbacks


def main():
    clock = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch.object(callbacks, "time", clock):
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
