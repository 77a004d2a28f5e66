"""The cheapest way to run a network within a budget: where its regions are cut, and how each span runs.

NOTE [the search]
1. A network is a sequence of regions. Each may be cut into spans at some positions, and each span runs as one of
   its options. The unit of needs and budget is that of the regions: bytes of a memory, or pixels of a tile.
2. A dynamic program goes from position to position. A state is a way to run everything up to one: what it holds
   from there on, and what it costs. What an option holds burdens later options only (in a training step that is
   what is kept until the backward: it is gone when earlier spans run backward). So deep spans, whose maps are
   small, are kept almost for free. A state that holds more and costs more than another is dropped.
3. Each option must fit: saved + needs + gradients of the weights of this and later spans <= budget, and its cost
   must be finite. Without a budget each is taken in the way that needs the least, whatever it costs, and states
   compare by the largest need so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Option", "Region", "Search", "Span", "State"]

MOST_STATES = 40
"""States kept per position of the search."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span that is streamed, and its number of tiles along each axis.

    It runs whole, as one checkpoint, where `counts` is empty; None leaves them to the tile, or to `tiles`, the
    pixels of the finest output along each axis for each sweep. The recomputation of a checkpoint may be streamed
    in `parts`, with the operators between them recorded.
    """

    nodes: tuple[str, ...]
    counts: tuple[int, ...] | None = None
    parts: tuple[Span, ...] = ()
    tiles: tuple[tuple[int, ...], ...] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it runs whole."""
        return self.counts == ()


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a span: what it needs at once, what it adds to what is saved, what it costs.

    `span` is None where it is left to the dense graph. Of states that are equal, that of the lowest ranks is kept.
    """

    span: Span | None
    needs: float
    holds: float
    cost: float
    rank: tuple[int, ...] = ()


class Region(Protocol):
    """A part of the network that may be cut after its positions `ends`, the last of which is its own end."""

    @property
    def ends(self) -> Sequence[int]:
        """The positions, ascending."""

    def starts(self, end: int) -> Sequence[int]:
        """The positions where a span up to `end` may start, ascending; -1 is the region's start."""

    def options(self, start: int, end: int) -> Sequence[Sequence[Option]]:
        """Kinds of ways to run a span, each from the cheapest on. Of each kind the first that fits is tried."""

    def weights(self, start: int, end: int) -> float:
        """What gradients of the weights of a span need."""

    def largest(self, start: int, end: int) -> str:
        """The node of a span that needs the most."""


@dataclass(frozen=True, slots=True)
class State:
    """A way to run everything up to a position; `peak` is the largest need so far, `peak_at` the span there."""

    saved: float = 0.0
    cost: float = 0.0
    peak: float = 0.0
    peak_at: tuple[Region, int, int] | None = None
    spans: tuple[Span, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def binding(self) -> str:
        """The node that needs the most."""
        assert self.peak_at is not None
        region, start, end = self.peak_at
        return region.largest(start, end)

    def then(self, option: Option, weights: float, at: tuple[Region, int, int]) -> State:
        """The state after one more span."""
        needs = self.saved + option.needs + weights
        return State(
            self.saved + option.holds,
            self.cost + option.cost,
            max(self.peak, needs),
            at if needs > self.peak else self.peak_at,
            self.spans if option.span is None else (*self.spans, option.span),
            (*self.ranks, *option.rank),
        )


class Search:
    """The search through a sequence of regions, for any budget.

    `saved` is there from the start. With `count` each region gets at most so many streamed spans, or just so many
    if `exact`.
    """

    def __init__(
        self, regions: Sequence[Region], saved: float = 0.0, count: int | None = None, exact: bool = False
    ) -> None:
        self._regions, self._saved = regions, saved
        self._count, self._exact = count, exact

    def fastest(self, budget: float) -> State | None:
        """The cheapest way that needs no more than `budget`; None without one."""
        return min(self._states(budget), key=lambda state: state.cost, default=None)

    def smallest(self) -> State | None:
        """The way that needs the least; None where no region can be cut into `count` spans."""
        return min(self._states(None), key=lambda state: state.peak, default=None)

    def _states(self, budget: float | None) -> list[State]:
        """The states after all regions."""
        weights = [region.weights(-1, region.ends[-1]) for region in self._regions]
        states = [State(saved=self._saved)]
        for k, region in enumerate(self._regions):
            states = self._through(region, states, sum(weights[k + 1 :]), budget)
        return states

    def _through(self, region: Region, states: list[State], later: float, budget: float | None) -> list[State]:
        """The states after a region, from those before it; `later` are the weights of later regions."""
        before = min((len(state.spans) for state in states), default=0)
        last = region.ends[-1]
        at = {-1: states}
        for end in region.ends:
            states = [
                state
                for start in region.starts(end)
                for state in _extended(at[start], region, (start, end), later + region.weights(end, last), budget)
                if self._count is None or len(state.spans) - before <= self._count
            ]
            at[end] = self._best(states, budget)
        if self._exact:
            return [state for state in at[last] if len(state.spans) - before == self._count]
        return at[last]

    def _best(self, states: list[State], budget: float | None) -> list[State]:
        """The states worth extending, of each number of spans if that is exact."""
        if not self._exact:
            return _undominated(states, budget)
        counts = sorted({len(state.spans) for state in states})
        each = (_undominated([s for s in states if len(s.spans) == count], budget) for count in counts)
        return [state for of_count in each for state in of_count]


def _extended(
    states: Sequence[State], region: Region, span: tuple[int, int], later: float, budget: float | None
) -> Iterator[State]:
    """Each state after one more span, in the cheapest way of each kind that fits; `later` are later weights.

    Without a budget, in the way of each kind that needs the least.
    """
    kinds, at = region.options(*span), (region, *span)
    for state in states:
        for options in kinds:
            if budget is None:
                fitting = min(options, key=lambda option: option.needs, default=None)
            else:
                fitting = next((o for o in options if state.saved + o.needs + later <= budget), None)
            if fitting is not None:
                yield state.then(fitting, later, at)


def _undominated(states: list[State], budget: float | None) -> list[State]:
    """The states that no other beats in both what is saved and the cost (without a budget: the peak)."""
    best: list[State] = []
    least = math.inf
    for state in sorted(states, key=lambda s: (s.saved, s.peak if budget is None else s.cost, s.ranks)):
        other = state.peak if budget is None else state.cost
        if other < least:
            least = other
            best.append(state)
    if len(best) <= MOST_STATES:
        return best
    return [best[i * (len(best) - 1) // (MOST_STATES - 1)] for i in range(MOST_STATES)]
