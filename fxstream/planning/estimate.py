"""What a plan is predicted to cost: the seconds and the peak of memory of one call, from the cost model.

NOTE [where the peak is] The plan runs as a sequence of units: segments, and the dense operators before, between
and after them. Each unit has a step in forward and, with recording, one in backward. At every step there are

- boundaries: results of one unit that a later one reads, in backward until the first of these is done, and the
  results of the network;
- gradients of boundaries: from the backward of their last reader to that of the unit that made them;
- saved: what autograd saves of the dense operators, and the graphs of kept tiles, of units up to this one;
- the unit itself: one of its tiles, with what is prefetched, or its dense operators;
- gradients of the weights of this and later units, twice for a streamed unit (one tile's, and their sum);
- folded weights of this and earlier segments;
- where tiles are replayed, the memory of replays, of the unit that needs most, and copies of all whole inputs.

The peak is that of the step that needs most. Not counted: the image, the weights, what an optimiser holds.
An image from outside of the device's memory counts where dense operators read it, for they read it whole.
Of offloaded boundaries and their gradients the boxes of a tile count alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.speeds import Machine
from fxstream.machine.units import bytes_text
from fxstream.planning.cost import Costs
from fxstream.planning.units import Unit, units_of
from fxstream.tiling.segment_plan import SegmentPlan, offloadable
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["CostContext", "Prediction", "Step", "keep_graphs", "predict"]


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes by category at one step; see the NOTE."""

    boundaries: float
    gradients: float
    kept: float
    unit: float
    weights: float
    folded: float = 0.0
    replays: float = 0.0

    @property
    def bytes(self) -> int:
        """All of them."""
        return int(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted for one call, with its backward where `training`: bytes at the peak, seconds, the plain network's.

    Seconds are those of a typical machine: compare them with `plain_seconds` only. `binding` is the unit at the
    peak: a segment's name, or empty for dense operators. `offloaded` are the bytes of boundaries in host memory,
    where their gradients come to be too.
    """

    training: bool
    peak: Step
    binding: str
    seconds: float
    plain_bytes: int
    plain_seconds: float
    offloaded: int = 0

    @property
    def bytes(self) -> int:
        """The peak."""
        return self.peak.bytes

    @property
    def time_ratio(self) -> float:
        """Predicted seconds over those of the plain network."""
        return self.seconds / max(self.plain_seconds, 1e-12)

    def lines(self) -> list[str]:
        """The prediction in words, for the end of a plan."""
        peak, step = self.peak, "a training step" if self.training else "a call without gradients"
        parts = (
            ("boundaries", peak.boundaries),
            ("their gradients", peak.gradients),
            ("kept graphs", peak.kept),
            (f"a tile of {self.binding}" if self.binding else "dense operators", peak.unit),
            ("gradients of weights", peak.weights),
            ("folded weights", peak.folded),
            ("replays of tiles", peak.replays),
        )
        listed = ", ".join(f"{what} {bytes_text(count)}" for what, count in parts if count)
        away = [f"  in host memory: boundaries {bytes_text(self.offloaded)}"] if self.offloaded else []
        return [
            f"predicted for {step}: {self.time_ratio:.2f}x the plain time, {bytes_text(self.bytes)} instead of"
            f" {bytes_text(self.plain_bytes)}",
            f"  at the peak: {listed}",
            *away,
        ]


@dataclass(frozen=True)
class CostContext:
    """What every estimate at one image size starts from; the graph knows what autograd saves of each operator.

    `differentiated` are the images whose gradient is asked for, `training` says whether there is a backward at
    all. `outside` are images that are not in the device's memory, of which segments read boxes, `written` results
    that a segment writes elsewhere tile by tile. `ranks` share the tiles; seconds and kept tiles are those of one.
    With `offload` boundaries lie in host memory. The graph may be that of a segment whose recomputation runs in
    parts (`is_part`); its results have gradients from outside. `memo` has what was made of the same network at
    other sizes.
    """

    graph: TypedGraph
    machine: Machine
    training: bool = True
    differentiated: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    written: frozenset[str | None] = frozenset()
    ranks: int = 1
    offload: bool = False
    memo: MemoOfStructure = field(default_factory=MemoOfStructure)
    is_part: bool = False

    def of_parts(self, plan: SegmentPlan) -> CostContext:
        """The context of the recomputation of a segment in parts, with its backward."""
        inputs = (self.graph[one] for one in plan.segment.inputs if one in self.graph.nodes)  # others are folded
        differentiated = frozenset(one.name for one in inputs if one.saves is not None and one.has_gradient)
        return replace(
            self,
            graph=plan.segment.graph,
            differentiated=differentiated | self.differentiated.intersection(plan.segment.inputs),
            outside=frozenset(),
            written=frozenset(name for part in plan.parts if part.skips for name in part.segment.outputs),
            ranks=1,
            offload=False,
            is_part=True,
        )

    def costs(self, graph: TypedGraph, nodes: Sequence[str], plain: bool = False) -> Costs:
        """The costs of a run of operators, at whatever size they were first asked for."""
        key = ("costs", graph.graph, tuple(nodes), plain, self.machine)
        is_segment = self.is_part or graph is not self.graph
        return self.memo.get(key, lambda: Costs(graph, self.machine, nodes, plain, is_segment))

    def dense(self, nodes: Sequence[str]) -> Costs:
        """The costs of a run of operators that runs as the model has it."""
        return Costs(self.graph, self.machine, nodes)

    def tiles_per_rank(self, tiles: int) -> int:
        """Tiles on the busiest rank: ``ceil(tiles / ranks)``."""
        return -(-tiles // self.ranks)

    def collecting(self, made: float, weights: float = 0.0) -> float:
        """Seconds to put bytes of tiles' results, or of gradients beside weights', together on all ranks."""
        exchanged = 2 * (made + weights) if weights else made
        return self.machine.writing(made) + (self.ranks - 1) / self.ranks * exchanged / self.machine.link

    @functools.cached_property
    def plain(self) -> tuple[int, float]:
        """Peak bytes and seconds of the plain network."""
        costs = self.costs(self.graph, self.graph.costed, plain=True)
        part, shares = costs.plain, costs.shares(self.graph)
        forward, backward = map(float, part.seconds(shares))
        images = sum(self.graph[name].bytes for name in self.outside)
        if self.training:
            return images + int(part.profile(shares).max()), forward + backward
        return images + int(part.profile_unrecorded(shares).max()), forward


class Estimator:
    """The steps of a plan, for any numbers of kept tiles."""

    def __init__(self, context: CostContext, plans: Sequence[SegmentPlan]) -> None:
        self._context = context
        self._offloaded = offloadable(context.graph, plans) if context.offload else frozenset[str]()
        in_parts = {plan.segment.name: plan for plan in plans if plan.parts and context.training}
        self._units = [
            _recomputed_in_parts(context, unit, in_parts[unit.name]) if unit.name in in_parts else unit
            for unit in units_of(context, plans, self._offloaded)
        ]
        self.replayed = max((unit.replayed for unit in self._units), default=0.0)
        self.static = sum(unit.static for unit in self._units)
        self._replays = 0.0 if context.is_part else self.replayed + self.static

    def __len__(self) -> int:
        """How many units there are."""
        return len(self._units)

    def steps(self, kept: Mapping[str, int]) -> Iterator[tuple[str, Step, float]]:
        """The name of the unit, the bytes and the seconds of every step, forward and then backward.

        `kept` are the numbers of kept tiles by the name of the segment.
        """
        before = self._before(kept)
        for unit, (saved, folded) in zip(self._units, before, strict=True):
            yield self._forward(unit, saved, folded, kept)
        weights = 0.0
        for unit, (earlier, folded) in reversed(list(zip(self._units, before, strict=True))):
            if self._context.training:
                yield from self._backward(unit, earlier, folded, weights, kept)
                weights += unit.more_weights

    def _before(self, kept: Mapping[str, int]) -> list[tuple[float, float]]:
        """What earlier units hold when each runs, and the folded weights that there are."""
        saved, folded, before = 0.0, 0.0, []
        for unit in self._units:
            folded = unit.folded + folded * self._context.training
            before.append((saved, folded))
            saved += self._holds(unit, kept)
        return before

    def _holds(self, unit: Unit, kept: Mapping[str, int]) -> float:
        """Bytes that a unit holds until its backward."""
        return unit.holds * self._context.tiles_per_rank(kept[unit.name]) if unit.tiles else unit.holds

    def _forward(
        self, unit: Unit, saved: float, folded: float, kept: Mapping[str, int]
    ) -> tuple[str, Step, float]:
        made = unit.made if unit.tiles else 0.0
        seconds = self._context.tiles_per_rank(max(1, unit.tiles)) * unit.forward_seconds
        if unit.tiles > 1 or self._context.ranks > 1:
            seconds += self._context.collecting(made)
        here = saved + self._holds(unit, kept) if unit.tiles else saved
        step = Step(unit.there_forward + made, 0.0, here, unit.forward, 0.0, folded, self._replays)
        return unit.name, step, seconds

    def _backward(
        self, unit: Unit, earlier: float, folded: float, weights: float, kept: Mapping[str, int]
    ) -> Iterator[tuple[str, Step, float]]:
        context = self._context
        saved = context.tiles_per_rank(kept.get(unit.name, 0))
        recomputed = context.tiles_per_rank(max(1, unit.tiles)) - saved
        both = weights + unit.weights if unit.tiles else weights
        around = unit.there_backward, unit.gradients
        step = Step(*around, earlier, unit.backward, both, folded, self._replays)
        if unit.tiles > 1 or (unit.tiles and context.ranks > 1):
            yield unit.name, replace(step, unit=0.0), context.collecting(unit.read, unit.weights)
        if recomputed:
            again = unit.forward_seconds if unit.tiles else 0.0
            yield unit.name, step, recomputed * (again + unit.backward_seconds)
        if saved:
            graphs = earlier + unit.holds * saved
            yield unit.name, replace(step, kept=graphs, unit=unit.pulled), saved * unit.backward_seconds

    def prediction(self, kept: Mapping[str, int]) -> Prediction:
        """The peak of all steps and the sum of their seconds, beside the plain network's."""
        plain_bytes, plain_seconds = self._context.plain
        steps = list(self.steps(kept))
        name, peak, _ = max(steps, key=lambda step: step[1].bytes)
        seconds = sum(spent for *_, spent in steps)
        away = sum(self._context.graph[boundary].bytes for boundary in self._offloaded)
        return Prediction(self._context.training, peak, name, seconds, plain_bytes, plain_seconds, away)

    def most_kept(self, budget: int) -> dict[str, int]:
        """The graphs of tiles that may be kept within a budget, by the name of the segment; the last come first.

        Those of a unit are there at its own steps and at those of later units.
        """
        kept = {unit.name: 0 for unit in self._units if unit.tiles}
        left, weights = float(budget), 0.0
        for unit, (earlier, folded) in reversed(list(zip(self._units, self._before(kept), strict=True))):
            if unit.tiles:
                at_its_steps = self._left_of_unit(unit, earlier, folded, weights, budget)
                kept[unit.name] = self._kept_within(unit, min(left, at_its_steps))
            _, forward, _ = self._forward(unit, earlier, folded, kept)
            steps = [forward, *(step for _, step, _ in self._backward(unit, earlier, folded, weights, kept))]
            left -= self._holds(unit, kept) if unit.tiles else 0.0
            left = min(left, budget - max(step.bytes for step in steps))
            weights += unit.more_weights
        return kept

    def _left_of_unit(self, unit: Unit, earlier: float, folded: float, weights: float, budget: int) -> float:
        """What is left for kept graphs of a unit at its own steps."""
        one = {unit.name: unit.tiles}
        _, forward, _ = self._forward(unit, earlier, folded, one)
        (*_, (_, pulled, _)) = self._backward(unit, earlier, folded, weights, one)
        return budget - max(forward.bytes, pulled.bytes) + self._holds(unit, one)

    def _kept_within(self, unit: Unit, left: float) -> int:
        """How many tiles of a unit may be kept with so many bytes, on all ranks."""
        if unit.holds <= 0:
            return unit.tiles if left >= 0 else 0
        return max(0, min(unit.tiles, math.floor(left / unit.holds) * self._context.ranks))


def _recomputed_in_parts(context: CostContext, unit: Unit, plan: SegmentPlan) -> Unit:
    """What a unit needs whose recomputation, with its backward, is itself a sequence of units."""
    parts, skipped = Estimator(context.of_parts(plan), plan.parts), {p.segment.name for p in plan.parts if p.skips}
    steps = list(parts.steps({part.segment.name: 0 for part in plan.parts}))
    passed = {i for i in range(len(parts)) if steps[i][0] in skipped}
    seconds = sum(spent for i, (*_, spent) in enumerate(steps) if i not in passed)
    peak = float(max(step.bytes for i, (_, step, _) in enumerate(steps) if i not in passed))
    return replace(
        unit,
        backward=peak,
        backward_seconds=seconds - unit.forward_seconds,
        replayed=parts.replayed,
        static=parts.static,
    )


def predict(context: CostContext, plans: Sequence[SegmentPlan]) -> Prediction:
    """Peak and seconds of these segments with everything else run as the model has it."""
    if plans:
        return Estimator(context, plans).prediction({plan.segment.name: plan.kept for plan in plans})
    plain_bytes, seconds = context.plain
    return Prediction(context.training, Step(0, 0, 0, plain_bytes, 0), "", seconds, plain_bytes, seconds)


def keep_graphs(
    context: CostContext, plans: Sequence[SegmentPlan], budget: int
) -> tuple[tuple[SegmentPlan, ...], Prediction]:
    """The segments with the graphs of as many tiles kept as the budget allows, and their prediction.

    The last segments come first: a kept graph burdens its own and later steps only, so that theirs are the
    cheapest to keep. Nothing is kept where the budget is too small even so, or where there is no backward.
    """
    estimator = Estimator(context, plans)
    kept = {plan.segment.name: 0 for plan in plans}
    prediction = estimator.prediction(kept)
    if prediction.bytes > budget or not context.training:
        return tuple(plans), prediction
    kept = estimator.most_kept(budget)
    chosen = tuple(replace(plan, kept=kept[plan.segment.name]) for plan in plans)
    return chosen, estimator.prediction(kept) if any(kept.values()) else prediction
