"""A tile for a memory budget: the largest whose predicted peak stays below it.

The prediction is that of `summary`, for one training step without parameters.
"""

from __future__ import annotations

import re

from fxstream.compiler import checked_request
from fxstream.errors import InputError, PlanError
from fxstream.locality import Locality
from fxstream.planning import Plan, make_plan
from fxstream.summary import predicted_memory

__all__ = ["parse_bytes", "plan_within"]

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}
FINENESS = 2**0.5
"""Ratio of one tile that is tried to the next."""


def parse_bytes(text: str) -> int:
    """Bytes from ``8GiB``, ``500 MB``, ``1e9``. Raises `InputError` for anything else.

    >>> parse_bytes("1.5 GiB"), parse_bytes("500MB"), parse_bytes("2g")
    (1610612736, 500000000, 2147483648)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise InputError(f"{text!r} is no amount of memory: write 8GiB, 500MB or a number of bytes")
    return int(float(match[1]) * units[match[2].lower()])


def plan_within(
    locality: Locality, budget: int, extent: int, segments: int | None = None, cut: str | None = None
) -> tuple[int, Plan]:
    """The largest of a series of tiles, from the image's `extent` down, that is predicted to fit, and its plan.

    Raises `PlanError`, naming the smallest budget that works, where none fits.
    """
    tile, least = float(extent), None
    while tile >= 1:
        try:
            plan = make_plan(locality, checked_request(round(tile), segments, cut))
        except PlanError:
            break
        peak = predicted_memory(locality, plan).streamed
        if peak <= budget:
            return round(tile), plan
        least = peak if least is None else min(least, peak)
        tile /= FINENESS
    raise PlanError(f"no tile is predicted to fit into {budget} bytes; the least that one needs is {least} bytes")
