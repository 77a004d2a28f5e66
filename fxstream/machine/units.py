"""Bytes and multiply-accumulates as text, and bytes from text."""

from __future__ import annotations

import math
import re

from fxstream.errors import InputError

__all__ = ["bytes_text", "macs_text", "parse_bytes"]

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def parse_bytes(text: str) -> int:
    """Bytes from ``8GiB``, ``500 MB``, ``1e9``. Raises `InputError` for anything else.

    >>> parse_bytes("1.5 GiB"), parse_bytes("500MB"), parse_bytes("2g")
    (1610612736, 500000000, 2147483648)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise InputError(f"cannot parse {text!r} as a size: use 8GiB, 500MB or a number of bytes")
    return int(float(match[1]) * units[match[2].lower()])


def bytes_text(count: float, *, up: bool = False) -> str:
    """Bytes with a binary unit and three digits, rounded to nearest, or `up` for an amount that must suffice.

    >>> bytes_text(3.3 * 2**30), bytes_text(1023), bytes_text(2**20 + 1, up=True)
    ('3.30 GiB', '1023 B', '1.01 MiB')
    """
    power = next((power for power in range(3) if count < 1024 ** (power + 1)), 3)
    scaled = count / 1024**power
    digits = 0 if power == 0 or scaled >= 100 else 1 if scaled >= 10 else 2
    shown = math.ceil(scaled * 10**digits) / 10**digits if up else scaled
    return f"{shown:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def macs_text(count: float) -> str:
    """Multiply-accumulates with a decimal unit.

    >>> macs_text(4.1e9)
    '4.10 G'
    """
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000 or unit == "T":
            return (
                f"{count:.0f}" if not unit else f"{count:.{2 if count < 10 else 1 if count < 100 else 0}f} {unit}"
            )
        count /= 1000
    raise AssertionError
