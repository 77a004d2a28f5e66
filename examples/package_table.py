"""The table of the networks of packages: a process for each, bounded in time and memory, and their summary."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from package_row import networks_of
from rich.console import Console
from rich.table import Table

__all__ = ["COLUMNS", "LIST", "SECONDS", "cells_of", "names_of", "row_of", "show"]

Row = dict[str, Any]
LIST = Path(__file__).with_name("package_networks.py")
SECONDS, BYTES = 900, 12 * 2**30
"""What a network may take."""
COLUMNS = [
    "network", "version", "torch", "shape", "verdict", "streamed_eval", "streamed_training", "first_barrier_eval",
    "barriers_eval", "barriers_training", "bound_to_size", "compared_in", "memory_share", "segments", "error",
    "rounding", "reason",
]  # fmt: skip
MOST_REASONS = 12
SHAPES = re.compile(r"\[[\d, ]+\]")
"""In barriers, which are counted whatever the sizes."""


def names_of(path: Path, chosen: Sequence[str], console: Console) -> list[str]:
    """The names of the networks of a list, or those chosen of them; prints a line for a missing package."""
    listed = networks_of(path)
    if unknown := sorted(set(chosen) - set(listed)):
        raise SystemExit(f"{', '.join(unknown)}: not in {path}, which has {', '.join(listed)}")
    networks = [listed[name] for name in chosen or listed]
    packages = {network.package: network.imported for network in networks}
    missing = {pip for pip, name in packages.items() if importlib.util.find_spec(name) is None}
    for pip in sorted(missing):
        count = sum(network.package == pip for network in networks)
        console.print(f"{count} networks skipped, {pip} is not installed: python -m pip install {pip}")
    return [network.name for network in networks if network.package not in missing]


def row_of(name: str, path: Path = LIST, seconds: float = SECONDS) -> Row:
    """What a process says of a network; `verdict` and `reason` sum it up."""
    command = [sys.executable, str(Path(__file__).with_name("package_row.py")), str(path), name, str(BYTES)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, end = process.stdout, _end(process)
    except subprocess.TimeoutExpired as stopped:
        output, end = (stopped.stdout or b"").decode(), f"took more than {seconds:g} s"
    row: Row = {"network": name}
    for line in output.splitlines():
        row |= json.loads(line)
    return row | ({"end": end} if end else {})


def _end(process: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, if not well: its last line, or the signal that killed it."""
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}"
    lines = process.stderr.strip().splitlines() or ["ended without a word"]
    return lines[-1][:400] if process.returncode else ""


def verdict(row: Row) -> str:
    """A row in a word or two."""
    if "took more" in row.get("end", ""):
        return "too slow"
    if "shape" not in row or ("streamed_eval" not in row and "failure_eval" not in row):
        return "not built"
    if row.get("exact") is False:
        return "WRONG"
    if row.get("crashed") or "killed" in row.get("end", ""):
        return "CRASHED"
    if "streamed_eval" not in row:
        return "not captured"
    return "exact" if row.get("exact") else "not compared"


def reason(row: Row) -> str:
    """Why a network is an exception; empty if it is none."""
    failures = [row[key] for key in row if key.startswith("failure_")]
    if row.get("end") or failures:
        return "; ".join(dict.fromkeys([*failures, *([row["end"]] if row.get("end") else [])]))
    reasons = []
    if (least := min(row["streamed_eval"], row["streamed_training"])) < 0.9:
        mode = "eval" if least == row["streamed_eval"] else "training"
        reasons.append(
            f"{least:.0%} streams in {mode}: {row[f'barriers_{mode}'] or 'each part keeps its results'}"
        )
    if "least_memory" in row:
        reasons.append(f"exact within {row['memory_share']:.0%} of the memory: {row['least_memory']}")
    return "; ".join(reasons)


def cells_of(row: Row) -> Row:
    """A row of the table as text."""
    cells = {key: row[key] for key in COLUMNS if key in row}
    for key in {"error", "rounding"} & row.keys():
        cells[key] = f"{row[key]:.1e}"
    return cells | {"verdict": verdict(row), "reason": reason(row)}


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(
        "network", "verdict", "streams eval / training", "of memory", "error", "reason, or first barrier"
    )
    for row in rows:
        shares = "/".join(
            f"{row[key]:.0%}" if key in row else "-" for key in ("streamed_eval", "streamed_training")
        )
        memory = f"{row['memory_share']:.0%}" if "memory_share" in row else "-"
        error = f"{row['error']:.0e}" if "error" in row else "-"
        why = reason(row) or row.get("first_barrier_eval", "")
        table.add_row(row["network"], verdict(row), shares, memory, error, why)
    console.print(table)
    for line in summary(rows):
        console.print(line)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows say together, a line each."""
    captured = [row for row in rows if "streamed_eval" in row]
    verdicts = Counter(map(verdict, rows))
    ends = f"{verdicts['WRONG']} wrong, {verdicts['CRASHED']} crashed"
    yield f"{len(rows)} networks, {len(captured)} captured, {ends}"
    for mode in ("eval", "training"):
        shares = [row.get(f"streamed_{mode}", 0) for row in rows]
        counts = ", ".join(
            f"{sum(share >= least for share in shares)} at least {least:.0%}" for least in (0.99, 0.9, 0.5)
        )
        yield f"  of the activations in {mode} mode stream: {counts}"
    exact = [row for row in rows if row.get("exact")]
    within = sum(row["memory_share"] <= 0.3 for row in exact)
    others = len(exact) - within
    yield f"  exact within 30% of plain's memory: {within}, within the least that works: {others}"
    firsts = (SHAPES.sub("[..]", row["first_barrier_eval"]) for row in captured)
    reasons = Counter(filter(None, firsts))
    for text, count in reasons.most_common(MOST_REASONS):
        yield f"  {count} first end at {text}"
