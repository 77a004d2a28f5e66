"""The units of a plan, what each needs, and the values that go from one to others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.planning.boundaries import Boundaries, Context, costs_of, laid_out
from fxstream.planning.copies import copies_of_halves, padded_copies
from fxstream.planning.cost import Costs, Part
from fxstream.tiling.segment import runs_operators_alone
from fxstream.tiling.segment_plan import SegmentPlan

__all__ = ["Unit", "units_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What one unit needs, in bytes and seconds of one of its tiles, whatever is kept elsewhere.

    `tiles` is 0 for dense operators. `made` are the bytes of what it makes, `read` of the gradients of what it
    reads. `holds` is what it holds until its backward (per kept tile), apart from what other units read;
    `forward`, `backward` and `pulled` are the peaks of a forward, of a forward with its backward, and of the
    backward of a kept tile beyond what is saved. `there_forward`, `there_backward` and `gradients` are the
    boundaries and gradients of other units that exist meanwhile. `weights` are the gradients of all of its
    weights, `more_weights` of those that no later unit reads too: others are added to these. `folded` are the
    weights of its fusions, which exist from its forward to its backward. Where its tiles are replayed, `replayed`
    are the bytes of replays and of static tensors, which all units share, `static` of copies of whole inputs.
    """

    name: str
    tiles: int
    made: float
    read: float
    holds: float
    there_forward: float
    forward: float
    forward_seconds: float
    there_backward: float
    gradients: float
    backward: float
    pulled: float
    backward_seconds: float
    weights: float
    more_weights: float
    folded: float
    replayed: float = 0.0
    static: float = 0.0


def units_of(context: Context, plans: Sequence[SegmentPlan], offloaded: frozenset[str]) -> list[Unit]:
    """What every unit of a plan needs, in the order in which they run."""
    segments = tuple((plan.segment.name, plan.segment.graph.graph, bool(plan.axes)) for plan in plans)
    sets = context.differentiated, context.outside, context.written
    key = ("layout", context.graph.graph, segments, offloaded, *sets, context.is_part)
    layout = context.memo.get(key, lambda: laid_out(context, plans, offloaded))
    planned: dict[str | None, SegmentPlan] = {plan.segment.name: plan for plan in plans}
    of_units = [planned.get(name) for _, name in layout.units]
    costs = costs_of(context, [nodes for nodes, _ in layout.units], of_units)
    boundaries = Boundaries(context.graph, layout)
    last = {name: k for k, cost in enumerate(costs) for name in cost.weight_bytes}
    units = []
    for k, (plan, cost) in enumerate(zip(of_units, costs, strict=True)):
        needs = _Needs(context, k, plan, cost, boundaries, offloaded)
        unit = needs.unit(last)
        units.append(unit if context.machine.replayed is None else needs.with_replays(unit))
    return units


class _Needs:
    """What one unit needs, of its operators and of what crosses it."""

    def __init__(
        self,
        context: Context,
        k: int,
        plan: SegmentPlan | None,
        cost: Costs,
        boundaries: Boundaries,
        offloaded: frozenset[str],
    ) -> None:
        self._context, self._k, self._plan, self._cost = context, k, plan, cost
        self._boundaries, self._offloaded = boundaries, offloaded
        self._is_whole = plan is None or plan.tile_count == 1

    def unit(self, last: dict[str, int]) -> Unit:
        """All of it; `last` is the last unit that reads each weight."""
        cost, plan, k = self._cost, self._plan, self._k
        shares, turn = self._shares(SegmentPlan.largest), len(cost.nodes)
        recorded, unrecorded, saved = self._profiles(shares)
        forward, backward = self._seconds(shares)
        around = self._boundaries
        of_last = sum(around.last_of.get(k, {}).values()) if self._is_whole else 0.0
        return Unit(
            name=plan.segment.name if plan is not None else "",
            tiles=plan.tile_count if plan is not None else 0,
            made=around.made[k],
            read=around.read[k],
            holds=(saved - (around.made[k] if plan is None else 0.0)) * self._context.training,
            there_forward=around.there_forward[k],
            forward=float((recorded[:turn] if plan is None and self._context.training else unrecorded).max()),
            forward_seconds=forward,
            there_backward=around.there_backward[k],
            # At once, where no sum over tiles exists all the while.
            gradients=around.gradients[k] - of_last - sum(self._made().values()),
            backward=float(recorded.max()),
            pulled=float(recorded[turn:].max()) - saved,
            backward_seconds=backward,
            weights=float(cost.weight_gradients.sum()),
            more_weights=float(sum(size for name, size in cost.weight_bytes.items() if last[name] == k)),
            folded=float(sum(fusion.bytes for fusion in plan.segment.fusions)) if plan is not None else 0.0,
        )

    def with_replays(self, unit: Unit) -> Unit:
        """The unit with what it needs for replays of its tiles, where these may have some."""
        plan = self._plan
        if plan is None or self._is_whole or not runs_operators_alone(plan.segment):
            return unit
        segment, graph = plan.segment, plan.segment.graph
        maps = (name for name in segment.outputs if not graph.pattern(name).reduces)
        boxes = sum(_box_bytes(plan, name) for name in (*(name for name, _ in segment.spatial), *maps))
        gradients = unit.weights * self._context.training
        static = float(sum(graph[name].bytes for name in segment.whole))
        return replace(unit, replayed=max(unit.forward, unit.backward) + 2 * boxes + gradients, static=static)

    def _part(self) -> Part:
        """The operators of the unit, which run whole or on tiles."""
        return self._cost.whole if self._plan is None or not self._plan.axes else self._cost.tiled

    def _seconds(self, largest: torch.Tensor) -> tuple[float, float]:
        """Seconds of a forward and a backward of a tile, with its transfers; `largest` are its shares."""
        cost, plan = self._cost, self._plan
        transfer = sum(self._transfers(plan)) / cost.machine.host if plan is not None else 0.0
        forward, backward = self._part().seconds(largest if self._is_whole else self._shares(SegmentPlan.usual))
        return float(forward) + transfer, float(backward) + transfer

    def _shares(self, pixels: Callable[[SegmentPlan, str], Sequence[float]]) -> torch.Tensor:
        """What a tile with so many pixels of each node has, over what the costs are of."""
        plan, cost = self._plan, self._cost
        if plan is None or not plan.axes:
            return cost.shares(self._context.graph if plan is None else plan.segment.graph)
        of_tile = [pixels(plan, name) for name in cost.nodes]
        return (torch.tensor(of_tile, dtype=torch.float64) / torch.tensor(cost.extents, dtype=torch.float64)).prod(
            -1
        )

    def _profiles(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Bytes of a tile at each step, with recording and without, and what it saves, with boxes and copies."""
        part, plan = self._part(), self._plan
        recorded, unrecorded = part.profile(shares, self._outer()), part.profile_unrecorded(shares)
        saved = float((part.saved if plan is not None else part.remaining)(shares))
        if plan is None:
            for name, size in self._made().items():
                recorded[part.turn : 2 * part.turn - self._cost.place[name]] += size
        else:
            saved += self._add_copies(plan, recorded, unrecorded)
            boxes, gradients = self._uniform(plan)
            saved, boxes = saved + boxes, boxes + self._prefetched(plan)
            recorded, unrecorded = recorded + boxes, unrecorded + boxes
            recorded[part.turn :] += self._transfers(plan)[1] + gradients
        return recorded, unrecorded, saved

    def _outer(self) -> dict[str, float]:
        """Bytes of gradients of values from outside, from the backward of their last reader on."""
        outer: dict[str, float] = {}
        if self._is_whole:
            outer = dict(self._boundaries.last_of.get(self._k, {}))
        plan, graph = self._plan, self._context.graph
        for name, _ in plan.segment.spatial if plan is not None else ():
            is_box = not self._is_whole or name in self._offloaded
            has_gradient = graph[name].saves is not None and graph[name].has_gradient
            if is_box and (has_gradient or name in self._context.differentiated):
                outer[name] = _box_bytes(plan, name)
        return {name: size for name, size in outer.items() if name in self._cost.outer}

    def _made(self) -> dict[str, float]:
        """Bytes of the gradients of what dense operators make for others: each is there until its maker's."""
        return self._boundaries.gradients_of.get(self._k, {}) if self._plan is None else {}

    def _add_copies(self, plan: SegmentPlan, recorded: torch.Tensor, unrecorded: torch.Tensor) -> float:
        """Add padded copies of inputs to the profiles; returns the bytes of those that autograd saves."""
        saved, turns = 0.0, len(recorded) - 1
        for name, size in padded_copies(plan.segment, plan.axes).items():
            i, saves = self._cost.place[name], plan.segment.graph[name].saves
            is_saved = saves is not None and 0 in saves.inputs
            recorded[i : turns - i if is_saved else i + 1] += size
            unrecorded[i] += size
            saved += size * is_saved
        halves = copies_of_halves(plan.segment, plan.axes) if self._context.machine.halves_volumes else {}
        for name, (made, moved) in halves.items():
            i = self._cost.place[name]
            recorded[i] += made
            recorded[turns - 1 - i] += moved
        return saved

    def _uniform(self, plan: SegmentPlan) -> tuple[float, float]:
        """Bytes of copies of a uniform tile's boxes, and of gradients of results, of which it owns a part."""
        if not plan.is_uniform:
            return 0.0, 0.0
        boxes = (_box_bytes(plan, name) for name, _ in plan.segment.spatial)
        return sum(boxes), sum(_box_bytes(plan, name) for name in plan.segment.outputs)

    def _prefetched(self, plan: SegmentPlan) -> float:
        """Bytes of this tile's and the next one's boxes of what lies outside."""
        outside = self._context.outside | self._offloaded
        return sum(2 * _box_bytes(plan, name) for name, _ in plan.segment.spatial if name in outside)

    def _transfers(self, plan: SegmentPlan) -> tuple[float, float]:
        """Bytes of a tile's boxes of offloaded boundaries: those that it reads, those that it writes."""
        read = (_box_bytes(plan, name) for name, _ in plan.segment.spatial if name in self._offloaded)
        made = (_box_bytes(plan, name) for name in plan.segment.outputs if name in self._offloaded)
        return sum(read), sum(made)


def _box_bytes(plan: SegmentPlan | None, name: str) -> float:
    """Bytes of the largest box that a tile holds of a spatial input or an output."""
    assert plan is not None
    node = plan.segment.graph[name]
    dims = dict(plan.segment.spatial).get(name, node.values[0].dims)
    lengths = plan.largest(name) if plan.axes else [node.values[0].shape[dim] for dim in dims]
    return node.bytes * math.prod(n / node.values[0].shape[dim] for dim, n in zip(dims, lengths, strict=True))
