"""`fxstream::contract`, an einsum of two operands whose positions are dims of their own.

Where all stream axes are summed it is a reduction over space (attention pooling); where they stay, and one operand
has none, it is local (attention of each position to a few tokens). Partial sums have 32 bits at least.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fxstream.geometry.receptive_field import BROADCAST, IDENTITY
from fxstream.rules.ops import wide
from fxstream.rules.reductions import reduced, sums_of_tiles
from fxstream.rules.rule import Answer, Call, Evaluation, Footprint, Kind, Read, Refusal, RuleTable, Value

__all__ = ["add_rules"]

ARGUMENTS = ("self", "other")


def add_rules(table: RuleTable) -> None:
    """The one operator."""
    table.add("fxstream::contract", "contraction", contract)


def contract(call: Call) -> Answer:
    """A reduction over all stream axes, or a local product."""
    inputs, output = call["equation"].split("->")
    letters = dict(zip(ARGUMENTS, inputs.split(","), strict=True))
    axes = {tuple(letters[name][d] for d in call[name].dims) for name in ARGUMENTS if call[name].dims}
    if len(axes) != 1:
        return Refusal(Kind.GLOBAL, "multiplies maps whose stream axes are different dims")
    (space,) = axes
    sizes = {
        c: max(_size(call[n], letters[n], c) for n in ARGUMENTS) for c in {*letters["self"], *letters["other"]}
    }
    reads = [_read(call[name], name, letters[name], space, sizes) for name in ARGUMENTS]
    if any(isinstance(read, Refusal) for read in reads):
        return Refusal(Kind.GLOBAL, "multiplies a map with what follows some of its stream axes only")
    found = sorted((r for r in reads if isinstance(r, Read)), key=lambda read: BROADCAST in read.maps)
    macs = math.prod(sizes.values())
    if set(space) <= set(output):
        dims = tuple(output.index(c) for c in space)
        return Footprint(Evaluation.POINTWISE, dims, tuple(found), call.target, macs=macs)
    if set(space) & set(output):
        return Refusal(Kind.REDUCE, "sums over some stream axes and keeps others")
    if len(found) < len(ARGUMENTS):
        return Refusal(Kind.REDUCE, "sums products of a map and a small tensor over space")
    if found[0].argument != "self":
        return Refusal(Kind.REDUCE, "sums products of a map and one of a single row over space")
    answer = reduced(found, products, sums_of_tiles, call["equation"])
    return replace(answer, macs=macs) if isinstance(answer, Footprint) else answer


def products(one: torch.Tensor, other: torch.Tensor, equation: str) -> torch.Tensor:
    """A tile's sums of products."""
    return torch.einsum(equation, wide(one), wide(other))


def _size(value: Value, letters: str, letter: str) -> int:
    return value.shape[letters.index(letter)] if letter in letters else 1


def _read(
    value: Value, name: str, letters: str, space: tuple[str, ...], sizes: dict[str, int]
) -> Read | Refusal | None:
    """How an operand is read; None where it is small and passed whole."""
    if not set(space) & set(letters):
        return None
    if not set(space) <= set(letters):
        return Refusal(Kind.GLOBAL, "follows some stream axes and lacks others")
    dims = tuple(letters.index(c) for c in space)
    maps = tuple(IDENTITY if value.shape[d] == sizes[letters[d]] else BROADCAST for d in dims)
    return Read(name, value, dims, maps)
