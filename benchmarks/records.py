# SPDX-License-Identifier: Apache-2.0
"""Where the benchmarks' figures go, and what every record says of where they come from."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(*packages: str) -> dict[str, str | list | None]:
    """Command, device, the CPU's instructions that matter to speed, versions of Python, torch,
    transformers and these packages, None for what is absent, the commit of the working tree, and
    the time (UTC)."""
    # Not before: scripts set threads before torch is loaded.
    import torch

    from mosaic_tools.devices import cpu_instructions

    return {
        "command": command(sys.argv),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cpu_instructions": cpu_instructions(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *packages)},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command(argv: list[str]) -> str:
    """How the script was called, its path from the root, files and folders by their names only."""
    script = Path(argv[0]).resolve()
    script = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    # A file to write may not be there yet.
    words = [
        Path(word).name if Path(word).exists() or Path(word).is_absolute() else word
        for word in argv[1:]
    ]
    return shlex.join(["python", script, *words])


def commit() -> str | None:
    """The working tree's commit, or None: a copy has no history, and a machine may have no git."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def is_cpu(record: dict) -> bool:
    """Only a CPU's name has its cores."""
    return record["device"].endswith("cores")


def place(record: dict) -> str:
    """Device, and of a CPU its instructions: only what was measured in one place is comparable.

    Cloud machines give processors of many kinds one name, "Intel(R) Xeon(R) Processor".
    """
    if not is_cpu(record):
        return record["device"]
    # The first records have none.
    names = record.get("cpu_instructions", ["instructions not recorded"])
    return f"{record['device']} ({', '.join(names) or 'no instructions known'})"


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU's name, with the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def recorder(path, *packages: str):
    """A function that prints a row with its environment as JSON, and appends it to the file."""
    where = environment(*packages)

    def record(row: dict):
        line = json.dumps(row | where)
        print(line, flush=True)
        with open(path, "a") as file:
            file.write(line + "\n")

    return record


def print_table(rows: list[dict], columns: dict[str, str]):
    """Prints rows under `columns`, names with their format; what a row lacks stays empty, and its
    `skipped` closes the line."""
    lines = [list(columns)]
    for row in rows:
        cells = [(row.get(name), spec) for name, spec in columns.items()]
        lines.append(["" if value is None else format(value, spec) for value, spec in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line, row in zip(lines, [{}, *rows], strict=True):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([*cells, row.get("skipped", "")]).rstrip())
