"""Bytes and multiply-accumulates as text, and bytes from text."""

from __future__ import annotations

import math
import numbers
import re

from fxstream.errors import InputError

__all__ = ["bytes_text", "macs_text", "parse_bytes", "parse_memory"]

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}
NUMBER = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*|%)")
FEWEST = 2**8
"""Fewer bytes than these are taken for a number whose unit was left out."""


def parse_bytes(text: str) -> int:
    """Bytes from ``8GiB``, ``500 MB``, ``1e9``. Raises `InputError` for anything else.

    >>> parse_bytes("1.5 GiB"), parse_bytes("500MB"), parse_bytes("2g")
    (1610612736, 500000000, 2147483648)
    """
    amount = parse_memory(text)
    if isinstance(amount, float):
        raise InputError(f"{text!r} is a share and not an amount of bytes: use 8GiB or 500MB")
    return amount


def parse_memory(memory: object) -> int | float:
    """Bytes as an int, or a share, above 0 and at most 1, as a float; from numbers and from text alike.

    A number without a unit is a share where it is at most 1 and written as a fraction (``0.5``, ``"0.5"``,
    ``1.0``) or with a percent sign (``"50%"``), and bytes otherwise. Raises `InputError` for anything else, and
    for so few bytes that a unit must have been left out.

    >>> [parse_memory(memory) for memory in (0.5, "0.5", "50%", "8GiB", "8 GiB", 2**33)]
    [0.5, 0.5, 0.5, 8589934592, 8589934592, 8589934592]
    """
    match = NUMBER.fullmatch(_as_text(memory))
    units = {name.lower(): factor for name, factor in UNITS.items()}
    amount = float(match[1]) if match is not None else 0.0
    if match is None or match[2].lower() not in (*units, "%") or not 0 < amount < math.inf:
        raise InputError(f"cannot parse {memory!r} as a size: use 8GiB, 500MB, a number of bytes, or a share: 50%")
    if match[2] == "%" or (not match[2] and amount <= 1 and not match[1].isdigit()):
        return _share(memory, amount / 100 if match[2] else amount)
    if not match[2] and amount < FEWEST:
        raise InputError(f"{memory!r} is a number of bytes and needs a unit: {match[1]}GiB, or {match[1]}MiB")
    return int(amount * units[match[2].lower()])


def _as_text(memory: object) -> str:
    if isinstance(memory, numbers.Real) and not isinstance(memory, bool):
        return str(int(memory) if isinstance(memory, numbers.Integral) else float(memory))
    return memory.strip() if isinstance(memory, str) else ""


def _share(memory: object, share: float) -> float:
    if share > 1:
        raise InputError(f"{memory!r} is more than all: give a share up to 100%, or an amount such as 8GiB")
    return share


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
