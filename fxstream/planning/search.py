"""The fastest exact plan within a memory budget.

NOTE [the search]
1. The graph is a sequence of streamed regions with ordinary operators between them. A region may be cut at the
   places of `boundaries`; each stretch between two places is either streamed, in one of many grids, or left in the
   ordinary graph, where nothing is computed twice and everything is kept.
2. What a stretch adds to what is held until its backward (its outputs; all that autograd keeps, where it is not
   streamed) burdens later stretches only: they are gone when earlier ones run backward. So deep stretches, whose
   maps are small, are kept almost for free. A state of the search is what is held so far and the seconds so far;
   states that hold more and take longer than another are dropped. Each step must fit: held + gradients + one tile
   <= budget.
3. The time of a stretch is forward, recomputation and backward of its tiles, by the cost model (`cost`).
4. Without recording nothing is held, and a stretch needs its inputs, its outputs and one tile.
5. Offloaded boundaries are not held, a tile needs its boxes of them alone; what is not streamed holds its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxstream.planning.cost import Costs
from fxstream.planning.estimate import CostContext
from fxstream.planning.part_costs import PartCosts
from fxstream.planning.partition import FEW_PASSES, Places
from fxstream.tiling.grid import Grid
from fxstream.tiling.parts import whole_segment
from fxstream.tiling.request import Request
from fxstream.tiling.segment import make_segment

__all__ = ["Search", "Stretch"]

MOST_PLACES = 16
"""Places considered per region; their pairs are what planning time goes into."""
MOST_STATES = 40
"""States kept per place of the search."""
STEP = 1.3
"""Ratio of one number of tiles along an axis that is tried to the next."""


Stretch = tuple[tuple[str, ...], tuple[int, ...]]
"""A streamed stretch of a region: its nodes and its number of tiles along each axis."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to run a stretch: what it needs at once, what it adds to what is held, its seconds."""

    stretch: Stretch | None
    needs: float
    holds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _State:
    """A way to run everything up to a place; `peak` is the largest need so far and `binding` the node there."""

    held: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0
    binding: str = ""
    streamed: tuple[Stretch, ...] = ()


class Search:
    """The search of one network at one image size, for any budget.

    `parts` are the runs of nodes that may be streamed, in the order of the graph; `most_passes` is how often a
    stretch may be run forward for the reductions on its way.
    """

    def __init__(
        self,
        context: CostContext,
        parts: Sequence[tuple[str, ...]],
        request: Request,
        most_passes: int = FEW_PASSES,
    ) -> None:
        graph = context.graph
        self._most = request.segments if isinstance(request.segments, int) else None
        regions = [_Region(context, part, request, most_passes) for part in parts]
        results = (name for name in graph.costed if graph.is_result(name) and name not in context.written)
        self._results = float(sum(graph[name].bytes for name in results))
        inside = {name for part in parts for name in part}
        place = {name: i for i, name in enumerate(graph.costed)}
        starts = [place[part[0]] for part in parts]
        ordinary: list[list[str]] = [[] for _ in range(len(parts) + 1)]
        for name in place:
            if name not in inside:
                ordinary[sum(start < place[name] for start in starts)].append(name)
        self._sequence: list[_Region | _Ordinary] = []
        for k, nodes in enumerate(ordinary):
            if nodes:
                self._sequence.append(_Ordinary(context.dense(nodes), context.training))
            if k < len(regions):
                self._sequence.append(regions[k])

    def fastest(self, budget: float) -> tuple[Stretch, ...] | None:
        """The streamed stretches of the fastest plan that needs no more than `budget` bytes; None without one."""
        found = self._run(budget)
        return found.streamed if found is not None else None

    def smallest(self) -> tuple[tuple[Stretch, ...], str]:
        """The streamed stretches of the plan that needs the fewest bytes, and the node that needs them."""
        found = self._run(None)
        assert found is not None
        return found.streamed, found.binding

    def _run(self, budget: float | None) -> _State | None:
        """The fastest way within the budget, without one the way that needs the least; None if there is none."""
        weights = [part.weights for part in self._sequence]
        states = [_State(held=self._results)]
        for k, part in enumerate(self._sequence):
            behind = sum(weights[k + 1 :])
            if isinstance(part, _Ordinary):
                states = _best(
                    [s for state in states for s in _extended(state, [part.option], behind, budget, part.binding)],
                    budget,
                )
            else:
                states = self._through(part, states, behind, budget)
        return min(states, key=lambda s: s.peak if budget is None else s.seconds) if states else None

    def _through(self, region: _Region, states: list[_State], behind: float, budget: float | None) -> list[_State]:
        """The states behind a region, from those before it."""
        before = {state.streamed for state in states}
        shortest = min(map(len, before), default=0)
        at: dict[int, list[_State]] = {-1: states}
        for end in region.ends:
            found: list[_State] = []
            for start in region.starts(end):
                options, binding = region.options(start, end), region.binding(start, end)
                for state in at[start]:
                    found += _extended(state, options, behind + region.weights_behind(end), budget, binding)
            if self._most is not None:
                found = [state for state in found if len(state.streamed) - shortest <= self._most]
            at[end] = _best(found, budget)
        return at[region.ends[-1]]


def _extended(
    state: _State, options: Sequence[_Option], weights: float, budget: float | None, binding: str
) -> Iterator[_State]:
    """The state after one more stretch: unstreamed, and streamed in the fastest grid that fits, where these fit.

    Options come fastest first. Without a budget each is taken in the grid that needs the least.
    """
    streamed = [option for option in options if option.stretch is not None]
    ordinary = [option for option in options if option.stretch is None]
    for choices in (ordinary, streamed):
        if budget is None:
            fitting = min(choices, key=lambda option: option.needs, default=None)
        else:
            fitting = next((o for o in choices if state.held + o.needs + weights <= budget), None)
        if fitting is not None:
            needs = state.held + fitting.needs + weights
            more = (fitting.stretch,) if fitting.stretch is not None else ()
            yield _State(
                state.held + fitting.holds,
                state.seconds + fitting.seconds,
                max(state.peak, needs),
                binding if needs > state.peak else state.binding,
                (*state.streamed, *more),
            )


def _best(states: list[_State], budget: float | None) -> list[_State]:
    """The states that no other beats in both what is held and in seconds (without a budget: in the peak)."""
    best: list[_State] = []
    least = math.inf
    for state in sorted(states, key=lambda s: (s.held, s.peak if budget is None else s.seconds)):
        other = state.peak if budget is None else state.seconds
        if other < least:
            least = other
            best.append(state)
    if len(best) <= MOST_STATES:
        return best
    return [best[i * (len(best) - 1) // (MOST_STATES - 1)] for i in range(MOST_STATES)]


class _Ordinary:
    """Operators outside of all regions."""

    def __init__(self, costs: Costs, training: bool) -> None:
        part, ones = costs.part(), torch.ones(len(costs.nodes), dtype=torch.float64)
        profile = part.profile(ones) if training else part.profile_unrecorded(ones)
        forward, backward = map(float, part.seconds(ones))
        holds = float(part.held(ones)) if training else 0.0
        self.option = _Option(None, float(profile.max()), holds, forward + backward * training)
        self.weights = float(costs.weight_gradients.sum()) * training
        self.binding = max(costs.nodes, key=lambda name: costs.sizes[costs.place[name]])


@dataclass(frozen=True, slots=True)
class _Grids:
    """The grids of the stretches that end at one place: tiles along each axis, in all, and what one holds."""

    counts: list[tuple[int, ...]]
    tiles: torch.Tensor
    shares: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Around:
    """Bytes around a stretch: what it reads of its region and of images outside, what it makes that others read.

    `gradients` are those of wanted images and of what is there before and behind it, `weights` the gradients of
    its weights, `folded` the weights of its folds.
    """

    inputs: float
    images: float
    made: float
    gradients: float
    weights: float
    folded: float


class _Region:
    """A region with the costs of all of its stretches."""

    def __init__(self, context: CostContext, nodes: tuple[str, ...], request: Request, most_passes: int) -> None:
        graph, training = context.graph, context.training
        self._graph, self._nodes, self._training = graph, nodes, training
        self._request, self._most_passes = Request(None), most_passes
        self._plain = context.dense(nodes)
        self._costs = PartCosts(context, nodes)
        self._context = context
        self._extents = torch.tensor([graph[name].extents for name in nodes], dtype=torch.float64)
        self._places = places = Places(graph, nodes)
        self._all_runs_whole = training and whole_segment(graph, "", nodes) is not None
        self._stages = torch.tensor([graph[name].stage for name in nodes])
        if isinstance(request.segments, tuple):
            chosen = places.behind(request.segments)
        else:
            chosen = [] if request.segments == 1 else list(places.candidates(MOST_PLACES + places.reductions))
        self.ends = sorted({*chosen, len(nodes) - 1})
        live = places.live()
        live[-1] = list(make_segment(graph, "", nodes).outputs)
        self._live = {end: live[end] for end in self.ends} | {-1: []}
        read = {one for name in nodes for one in graph[name].inputs}
        self._images = self._bytes(*context.differentiated & read)
        self._outside, self._written = context.outside, context.written
        self._of = {name: i for i, name in enumerate(nodes)}
        gradients = self._costs.weight_gradients * training
        self.weights = float(gradients.sum())
        self._weights_up_to = torch.cat([torch.zeros(1, dtype=torch.float64), gradients.cumsum(0)])
        self._folded_up_to = torch.cat([torch.zeros(1, dtype=torch.float64), self._costs.folded.cumsum(0)])
        self._grids: dict[int, _Grids] = {}
        self._options: dict[tuple[int, int], list[_Option]] = {}

    def starts(self, end: int) -> list[int]:
        """The places behind which a stretch up to `end` may begin."""
        return self._places.starts(end, [-1, *self.ends], self._most_passes)

    def _runs_whole(self, start: int, end: int) -> bool:
        """Whether a stretch can be one checkpoint."""
        nodes = self._nodes[start + 1 : end + 1]
        return self._all_runs_whole or whole_segment(self._graph, "", nodes) is not None

    def weights_behind(self, end: int) -> float:
        """Bytes of the gradients of the weights behind a place."""
        return self.weights - float(self._weights_up_to[end + 1])

    def binding(self, start: int, end: int) -> str:
        """The node of a stretch with the largest result."""
        stretch = range(start + 1, end + 1)
        return self._nodes[max(stretch, key=lambda i: self._graph[self._nodes[i]].bytes)]

    def options(self, start: int, end: int) -> list[_Option]:
        """All ways to run the nodes behind place `start` up to place `end`, fastest first."""
        if (start, end) not in self._options:
            self._options[start, end] = sorted(self._ways(start, end), key=lambda option: option.seconds)
        return self._options[start, end]

    def _ways(self, start: int, end: int) -> Iterator[_Option]:
        around = self._around(start, end)
        yield from self._untiled(start, end, around)
        yield from self._tiled(start, end, around)

    def _around(self, start: int, end: int) -> _Around:
        inputs, outputs = self._live[start], self._live[end]
        made = (name for name in outputs if self._of[name] > start and name not in self._written)
        return _Around(
            inputs=self._bytes(*inputs),
            images=self._read_from_outside(start, end),
            made=self._bytes(*made),
            gradients=self._images + self._bytes(*inputs, *outputs),
            weights=float(self._weights_up_to[end + 1] - self._weights_up_to[start + 1]),
            folded=float(self._folded_up_to[end + 1] - self._folded_up_to[start + 1]),
        )

    def _untiled(self, start: int, end: int, around: _Around) -> Iterator[_Option]:
        """The stretch in the ordinary graph, and as one checkpoint."""
        plain, fused = self._plain.part(start + 1, end + 1), self._costs.part(start + 1, end + 1)
        ones = torch.ones(len(self._nodes), dtype=torch.float64)
        ones_fused = self._costs.shares(ones)
        forward, backward = map(float, plain.seconds(ones))
        brought = around.inputs if self._context.offload else 0.0
        read = around.images + brought
        if not self._training:
            needs = float(plain.profile_unrecorded(ones).max()) + around.inputs + around.images
            yield _Option(None, needs, 0.0, forward)
            return
        needs, others = float(plain.profile(ones).max()), around.gradients + read
        yield _Option(None, needs + others, float(plain.held(ones)) + read, forward + backward)
        if self._runs_whole(start, end):
            needs = float(fused.profile(ones_fused).max()) + others + around.weights + around.folded
            holds = around.made + brought + around.folded
            forward, backward = map(float, fused.seconds(ones_fused))
            yield _Option((self._nodes[start + 1 : end + 1], ()), needs, holds, 2 * forward + backward)

    def _tiled(self, start: int, end: int, around: _Around) -> Iterator[_Option]:
        """The stretch in every grid."""
        part, grids = self._costs.part(start + 1, end + 1), self._grids_at(end)
        nodes, offload, training = self._nodes[start + 1 : end + 1], self._context.offload, self._training
        inputs, made = (0.0, 0.0) if offload else (around.inputs, around.made)
        shares = self._costs.shares(grids.shares)
        forward, backward = torch.zeros(len(grids.counts)), torch.zeros(len(grids.counts))
        for stage in self._places.stages(start, end):
            ahead, back = part.seconds(self._costs.shares(grids.shares * (self._stages <= stage)))
            forward, backward = forward + ahead, backward + back
        turns = (grids.tiles / self._context.ranks).ceil()
        boxes = sum((grids.shares[:, self._of[n]] * self._bytes(n) for n in self._live[start]), torch.zeros(()))
        collected = self._context.collecting(made) + training * self._context.collecting(inputs, around.weights)
        transferred = offload * ((1 + training) * around.made + (1 + 2 * training) * turns * boxes)
        copies = collected + transferred / self._context.machine.host
        read_ahead = 2 * boxes * offload + around.folded
        if training:
            whole = self._images if offload else around.gradients
            needs = part.profile(shares).amax(-1) + boxes + read_ahead + whole + around.weights
            seconds = turns * (2 * forward + backward) + copies
        else:
            needs = part.profile_unrecorded(shares).amax(-1) + inputs + made + read_ahead
            seconds = turns * forward + copies
        holds = made + around.folded if training else 0.0
        for counts, need, spent in zip(grids.counts, needs.tolist(), seconds.tolist(), strict=True):
            yield _Option((nodes, counts), need, holds, spent)
        if training and self._context.ranks > 1:  # on one alone, what is kept is better left unstreamed
            kept, again = turns * part.held(shares), seconds - turns * forward
            ways = zip(grids.counts, (needs + kept).tolist(), kept.tolist(), again.tolist(), strict=True)
            for counts, need, held, spent in ways:
                yield _Option((nodes, counts), need, holds + held, spent)

    def _read_from_outside(self, start: int, end: int) -> float:
        """Bytes of the images from outside that a stretch reads."""
        stretch = self._nodes[start + 1 : end + 1] if self._outside else ()
        read = {one for name in stretch for one in self._graph[name].inputs}
        return self._bytes(*read & self._outside)

    def _bytes(self, *names: str) -> float:
        return float(sum(self._graph[name].bytes for name in names))

    def _grids_at(self, end: int) -> _Grids:
        """Grids of all sizes for the stretches that end at a place, and the shares of an inner tile."""
        if end not in self._grids:
            run = self._places.run(-1, end)
            axes = range(run.axes)
            grids = [Grid(run, self._request, axis) for axis in axes]
            finest = max(grid.fullest for grid in grids)
            known: dict[tuple[int, int], torch.Tensor] = {}
            like = [next(j for j in axes if grids[j].is_like(grids[i])) for i in axes]

            def share(axis: int, count: int) -> torch.Tensor:
                key = like[axis], count
                if key not in known:
                    lengths = grids[axis].inner(count)
                    held = torch.tensor([lengths.get(n, 0) for n in self._nodes], dtype=torch.float64)
                    known[key] = held / self._extents[:, axis]
                return known[key]

            found: dict[tuple[int, ...], torch.Tensor] = {}
            for wanted in _numbers(finest, len(axes)):
                counts = tuple(
                    grid.even(-(-w * grid.fullest // finest)) for w, grid in zip(wanted, grids, strict=True)
                )
                if counts not in found:
                    along = [share(axis, count) for axis, count in zip(axes, counts, strict=True)]
                    found[counts] = torch.stack(along).prod(0)
            tiles = torch.tensor([math.prod(counts) for counts in found], dtype=torch.float64)
            self._grids[end] = _Grids(list(found), tiles, torch.stack(list(found.values())))
        return self._grids[end]


def _numbers(finest: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Numbers of tiles along each axis to consider: equal along all, and one fewer step along the last."""
    count, before = 1, None
    while count <= finest:
        if before is not None and axes > 1:
            yield (*[count] * (axes - 1), before)
        yield (count,) * axes
        count, before = max(count + 1, int(count * STEP)), count
