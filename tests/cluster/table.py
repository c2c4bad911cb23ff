"""What failures led to, as a table that is printed and kept."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

COMMAND = "make faults"
_LONGEST_CAUSE = 160


@dataclass(frozen=True)
class Measured:
    """What one failure led to.

    Attributes:
        fault: What happened.
        cluster: Where.
        outcome: "error", "restart", "trained" (without a restart) or "skipped".
        detect: Seconds until the driver knew.
        bar: Seconds within which it should have known.
        resume: Seconds until the next attempt's first step.
        repeated: Steps that were done twice.
        rows_lost: Rows that history misses.
        weights: How they compare with those of a run that nothing happened to.
        cause: What the user was told first.
    """

    fault: str
    cluster: str
    outcome: str
    detect: float | None = None
    bar: float | None = None
    resume: float | None = None
    repeated: int | None = None
    rows_lost: int | None = None
    weights: str = ""
    cause: str = ""


def table_of(rows: Sequence[Measured]) -> list[str]:
    names = ("fault", "cluster", "outcome", "detect s", "bar s", "resume s", "steps again", "rows lost", "weights")
    lines = ["| " + " | ".join((*names, "first cause")) + " |"]
    lines.append("| --- | --- | --- |" + " ---: |" * 5 + " --- | --- |")
    for row in rows:
        seconds = ["" if value is None else f"{value:.1f}" for value in (row.detect, row.bar, row.resume)]
        counts = ["" if value is None else str(value) for value in (row.repeated, row.rows_lost)]
        cause = row.cause.partition("\n")[0].replace("|", "/")[:_LONGEST_CAUSE]
        lines.append(
            "| " + " | ".join((row.fault, row.cluster, row.outcome, *seconds, *counts, row.weights, cause)) + " |"
        )
    return lines


def _machine() -> dict[str, str | int | float]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "pyspark", "pyarrow", "petastorm", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def write(folder: Path, rows: Sequence[Measured]) -> None:
    machine, versions = _machine(), _versions()
    stem = folder / f"faults_{datetime.date.today().isoformat()}"
    told = {"command": COMMAND, "machine": machine, "versions": versions, "faults": [asdict(row) for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
    facts = [f"- {title}: " + ", ".join(f"{name} {value}" for name, value in found.items())
             for title, found in (("machine", machine), ("versions", versions))]  # fmt: skip
    lines = [f"`{COMMAND}`", "", *facts, "", *table_of(rows)]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
