# SPDX-License-Identifier: Apache-2.0
"""Where the benchmarks' figures go, and what every record says of where they come from."""

import importlib.metadata
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(*packages: str) -> dict[str, str | None]:
    """Versions of these packages, the commit of the working tree, and the time (UTC)."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
