"""Closed forms for people: receptive fields, tiles and costs as sympy expressions. The home of sympy.

Symbols: ``o`` an output pixel, ``n`` the image extent along one axis, ``t`` the output pixels of a tile along
one axis, ``T`` the largest box that a tile reads of the source along one axis. Tiles are square (the same ``t``
along every axis) and away from the border, where they hold most. All numbers are exact rationals.

With receptive field ``R`` and stride ``S`` a tile of ``t`` output pixels reads ``S (t - 1) + R`` source pixels, so
``T`` source pixels yield ``t = floor((T - R) / S) + 1``; adjacent tiles share ``R - S``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy

from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.graph.fields import ExtentChain, Fields

__all__ = ["IMAGE", "PIXEL", "TILE", "TILE_OUT", "FieldForm", "TileForms", "extent_form", "tile_forms"]

PIXEL, IMAGE, TILE_OUT, TILE = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ["o", "n", "t", "T"]
)


@dataclass(frozen=True, slots=True)
class FieldForm:
    """The first and last source pixel that output pixel ``o`` depends on.

    >>> from fxstream.geometry.receptive_field import AxisMap, ReceptiveField
    >>> FieldForm.of(ReceptiveField.of_map(AxisMap.window(3, 2, 1)))
    2*o - 1 .. 2*o + 1
    >>> FieldForm.of(ReceptiveField.of_map(AxisMap(1, 2, 0, 1)))
    floor(o/2) .. floor((o + 1)/2)
    """

    low: sympy.Expr
    high: sympy.Expr

    @classmethod
    def of(cls, field: ReceptiveField) -> FieldForm:
        """The closed form of a field."""
        return cls(_end_form(field, field.lows), _end_form(field, field.highs))

    def at(self, pixel: int) -> tuple[int, int]:
        """The first and last source pixel at one output pixel."""
        low, high = (end.subs(PIXEL, pixel) for end in (self.low, self.high))
        return int(low), int(high)

    def __str__(self) -> str:
        return f"{self.low} .. {self.high}"

    __repr__ = __str__


def _end_form(field: ReceptiveField, ends: Sequence[int]) -> sympy.Expr:
    """``floor((advance o + c) / period)`` where one constant serves all phases, else phase by phase."""
    period, advance = field.period, field.advance
    least = max(period * end - advance * r for r, end in enumerate(ends))
    most = min(period * end - advance * r + period - 1 for r, end in enumerate(ends))
    if least <= most:
        constant = min(max(0, least), most)
        return _floored(advance * PIXEL + constant, period)
    phase = sympy.Mod(PIXEL, period)
    cases = [(sympy.Integer(end), sympy.Eq(phase, r)) for r, end in enumerate(ends[:-1])]
    return advance * sympy.floor(PIXEL / period) + sympy.Piecewise(*cases, (sympy.Integer(ends[-1]), True))


def extent_form(chain: ExtentChain) -> sympy.Expr:
    """A node's pixels along one axis in the image's extent ``n``.

    >>> from fxstream.geometry.receptive_field import AxisExtent
    >>> extent_form((AxisExtent.window(3, 2, 1),))
    floor((n + 1)/2)
    """
    extent: sympy.Expr = IMAGE
    for step in chain:
        extent = _floored(step.num * extent + step.offset, step.den)
    return extent


def _floored(numerator: sympy.Expr, denominator: int) -> sympy.Expr:
    """``floor(numerator / denominator)``, kept as one fraction, as a person writes it."""
    if denominator == 1:
        return numerator
    fraction = sympy.Mul(numerator, sympy.Pow(denominator, -1, evaluate=False), evaluate=False)
    return sympy.floor(fraction, evaluate=False)


@dataclass(frozen=True, slots=True)
class TileForms:
    """What a tile of a segment costs, in ``t``, and what a grid of tiles that read ``T`` costs.

    `box` is what a tile holds of each source, per axis; `macs` and `activation_bytes` are those of one tile;
    `overhead` its arithmetic over that of its own output pixels in the plain network.
    `owned`, `overlap` (the share of a tile's box that its neighbour reads too) and `count` (tiles per axis, in
    the output's extent ``n``) are per axis.
    """

    box: Mapping[str, tuple[sympy.Expr, ...]]
    macs: sympy.Expr
    activation_bytes: sympy.Expr
    overhead: sympy.Expr
    owned: tuple[sympy.Expr, ...]
    overlap: tuple[sympy.Expr, ...]
    count: tuple[sympy.Expr, ...]

    def evaluate(self, tile: int) -> dict[str, Any]:
        """Every expression at one box size ``T`` of the source; the output pixels are the fewest of any axis."""
        owned = min(int(form.subs(TILE, tile)) for form in self.owned)
        at = {TILE_OUT: owned, TILE: tile}
        return {
            "owned": owned,
            "macs": float(self.macs.subs(at)),
            "activation_bytes": float(self.activation_bytes.subs(at)),
            "overhead": float(self.overhead.subs(at)) if owned > 0 else math.inf,
            "overlap": max(float(form.subs(at)) for form in self.overlap),
        }


def tile_forms(
    needed: Fields,
    fields: Sequence[ReceptiveField],
    sources: Sequence[str],
    macs_per_pixel: Mapping[str, Fraction],
    bytes_per_pixel: Mapping[str, Fraction],
) -> TileForms:
    """The closed forms of a segment.

    `needed` is what a pixel of the segment's output needs of each node, `fields` are those of the output in the
    main source; costs are per pixel of each node at its own resolution.
    """
    macs = _sum_over_boxes(needed, macs_per_pixel)
    plain = sum(_per_output_pixel(needed[name], cost) for name, cost in macs_per_pixel.items() if name in needed)
    box = {s: tuple(_rational(a) * TILE_OUT + _rational(b) for a, b in _extents(needed[s])) for s in sources}
    owned = tuple(
        _floored(f.stride.denominator * (TILE - f.size), f.stride.numerator) + 1 if f.stride else sympy.oo
        for f in fields
    )
    area = TILE_OUT ** len(fields)
    return TileForms(
        box=box,
        macs=macs,
        activation_bytes=_sum_over_boxes(needed, bytes_per_pixel),
        overhead=sympy.expand(macs / (_rational(plain) * area)) if plain else sympy.Integer(1),
        owned=owned,
        overlap=tuple(sympy.Integer(f.overlap) / TILE for f in fields),
        count=tuple(sympy.ceiling(IMAGE / form) for form in owned),
    )


def _extents(fields: Sequence[ReceptiveField]) -> list[tuple[Fraction, Fraction]]:
    return [field.tile_extent() for field in fields]


def _per_output_pixel(fields: Sequence[ReceptiveField], cost: Fraction) -> Fraction:
    return cost * math.prod((field.stride for field in fields), start=Fraction(1))


def _sum_over_boxes(needed: Fields, cost_per_pixel: Mapping[str, Fraction]) -> sympy.Expr:
    """The sum over nodes of cost times pixels held, as a polynomial in ``t``."""
    powers: dict[int, Fraction] = {}
    for name, cost in cost_per_pixel.items():
        if name not in needed or not cost:
            continue
        for factors in itertools.product(*(((1, a), (0, b)) for a, b in _extents(needed[name]))):
            power = sum(exponent for exponent, _ in factors)
            powers[power] = powers.get(power, Fraction(0)) + cost * math.prod(c for _, c in factors)
    terms = [_rational(c) * TILE_OUT**power for power, c in sorted(powers.items(), reverse=True) if c]
    return sympy.Add(*terms)


def _rational(number: Fraction) -> sympy.Rational:
    return sympy.Rational(number.numerator, number.denominator)
