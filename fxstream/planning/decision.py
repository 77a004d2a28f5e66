"""What a plan decides, apart from what follows from it at one size.

A decision says where the network is cut into spans, which of them run whole, and how many pixels of its outputs a
tile of each other has. It is made once per network, mode, budget and device by the search; at another size the
grids, boxes, predicted bytes and seconds follow by arithmetic.

It holds at a size where it fits the budget and costs about as much per pixel as what the search chose at the
nearest size that is hardly larger (`Yardstick`): with less pixels more of the network may run whole within a
budget. Otherwise the search runs, and its choice becomes a decision too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxstream.errors import InputError

__all__ = ["DecidedSpan", "Decision", "Decisions"]

TOLERANCE = 1.04
"""Predicted seconds per pixel over those of the best choice nearby that a decision may have."""
NEAR = 2.0
"""Sizes within this factor along each axis are near."""
HARDLY_LARGER = 1.05
"""Pixels over those of a size up to which a size says what the best choice for it may cost per pixel."""
MOST_DECISIONS = 8
"""Decisions that are kept; each is tried in turn."""
MOST_YARDSTICKS = 64
"""Sizes that were searched, which are remembered."""


@dataclass(frozen=True, slots=True)
class DecidedSpan:
    """A span of operators, from `first` to `last` in the order of their region, by the names of their nodes.

    `tiles` are the pixels of the finest output of a tile along each axis, for each sweep over the span; empty
    where it runs whole, None where the tile that the user gave decides. `parts` are those of its recomputation.
    """

    first: str
    last: str
    tiles: tuple[tuple[int, ...], ...] | None
    parts: tuple[DecidedSpan, ...] = ()

    def with_smaller_tiles(self, factor: float) -> DecidedSpan:
        """The same span in tiles of less pixels along each axis."""
        tiles = tuple(tuple(max(1, round(n * factor)) for n in tile) for tile in self.tiles or ())
        return replace(self, tiles=tiles, parts=tuple(part.with_smaller_tiles(factor) for part in self.parts))

    def to_json(self) -> list[object]:
        """The span as what JSON can hold."""
        return [self.first, self.last, self.tiles, [part.to_json() for part in self.parts]]

    @classmethod
    def from_json(cls, read: Sequence[Any]) -> DecidedSpan:
        """The span that `to_json` made; plans of earlier versions have no parts."""
        first, last, tiles, *parts = read
        return cls(str(first), str(last), _tiles(tiles), tuple(cls.from_json(one) for one in (*parts, [])[0]))

    def __str__(self) -> str:
        if self.tiles is None:
            return f"{self.first} .. {self.last}"
        sizes = ", ".join("x".join(map(str, tile)) for tile in self.tiles)
        parts = f", recomputed in parts ({'; '.join(map(str, self.parts))})" if self.parts else ""
        how = f"tiles of {sizes} pixels of its result" if sizes else f"whole{parts}"
        return f"{self.first} .. {self.last}, {how}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The spans that are streamed, in order, and whether boundaries lie in host memory; prints as a list of spans.

    >>> decision = Decision((DecidedSpan("conv", "relu", ((64, 64),)),))
    >>> Decision.from_json(decision.to_json()) == decision
    True
    """

    spans: tuple[DecidedSpan, ...]
    offload: bool = False

    def with_smaller_tiles(self, factor: float) -> Decision:
        """The same spans in tiles of less pixels along each axis."""
        return replace(self, spans=tuple(one.with_smaller_tiles(factor) for one in self.spans))

    def to_json(self) -> str:
        """The decision as text, for `from_json` in another process."""
        return json.dumps({"offload": self.offload, "spans": [span.to_json() for span in self.spans]})

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """The decision that `to_json` wrote. Raises `InputError` for any other text."""
        try:
            read = json.loads(text)
            spans = tuple(DecidedSpan.from_json(span) for span in read["spans"])
            return cls(spans, bool(read["offload"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"a plan is the text that Decision.to_json wrote; found {text[:40]!r}: {error}"
            ) from None

    def __str__(self) -> str:
        away = ", boundaries in host memory" if self.offload else ""
        return "\n".join([f"{len(self.spans)} spans{away}", *(f"  {span}" for span in self.spans)])


def _tiles(tiles: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if tiles is None else tuple(tuple(int(n) for n in tile) for tile in tiles)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The predicted seconds per pixel of the best choice at one size."""

    extents: tuple[int, ...]
    seconds: float

    @property
    def pixels(self) -> int:
        """How many pixels an image of that size has."""
        return math.prod(self.extents)

    def distance(self, extents: Sequence[int]) -> float:
        """The largest factor between these extents along any axis."""
        return max((max(a / b, b / a) for a, b in zip(self.extents, extents, strict=True)), default=1.0)


@dataclass
class Decisions:
    """All decisions for one network, mode, budget and device, the last that held first, and what was searched."""

    made: list[Decision] = field(default_factory=list)
    saved: Decision | None = None
    """The decision that the user gave: it holds at every size at which it fits."""
    yardsticks: list[Yardstick] = field(default_factory=list)

    def __iter__(self) -> Iterator[Decision]:
        return iter([*([self.saved] if self.saved is not None else []), *self.made])

    def holds(self, decision: Decision, extents: Sequence[int], seconds: float, near: float = NEAR) -> bool:
        """Whether a decision that is predicted to take so long at a size may be taken there without a search.

        It is compared with sizes within a factor of `near` along each axis.
        """
        if decision is self.saved:
            return True
        pixels = math.prod(extents)
        comparable = [one for one in self.yardsticks if one.pixels <= HARDLY_LARGER * pixels]
        each = [(one.distance(extents), one.seconds) for one in comparable]
        return bool(each) and min(each)[0] <= near and seconds / pixels <= TOLERANCE * min(each)[1]

    def add(self, decision: Decision, extents: Sequence[int], seconds: float) -> None:
        """Remember a choice; it is the first that will be tried."""
        self.prefer(decision)
        self.yardsticks = [Yardstick(tuple(extents), seconds / math.prod(extents)), *self.yardsticks][
            :MOST_YARDSTICKS
        ]

    def prefer(self, decision: Decision) -> None:
        """Try this decision first at the next size."""
        if decision is not self.saved:
            others = [one for one in self.made if one != decision]
            self.made = [decision, *others][:MOST_DECISIONS]
