"""Circular padding and rolls, moved up the graph: one wide copy of a map early on, and crops behind it.

NOTE [wide maps]
1. A map that is padded circularly is periodic. What follows it may be computed on a wide map: a few periods and
   pieces of them instead of one, and of that the map itself is a crop. Convolutions of stride 1, pointwise
   operators and nearest upsampling of a periodic map give a periodic map.
2. So a circular padding, or a roll, is a crop of a map that is wide enough. From the last padding up to the maps
   that nothing periodic is known of, every operator is asked for what its readers need of its result beyond the
   borders. There the map is made wide, by `fxstream::wrapped`: that reads the map from end to end, and what
   follows it streams.
3. How far the result of an operator reaches beyond a period is its excess: a padding adds to it, a convolution
   takes away. A circular padding repeats the map that it is given, so that is followed where its excess is 0 only.
4. Pixels beyond the borders are computed again, from equal numbers. By linearity the gradients that flow back
   through them add up to those of the pixels that they repeat.
5. The rewritten graph holds at every image size: only numbers that no size changes are looked at. A stride does
   not divide every size, so a convolution with one is not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.captured import Captured
from fxstream.graph.effects import UNSTREAMED, is_random
from fxstream.graph.nodes import attributes_of, bind, copy_node, name_of, trace_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.operators import operator, overload
from fxstream.rules import Pointwise, Value
from fxstream.rules.windowed import CONVOLUTIONS, per_axis

__all__ = ["with_wraps", "wraps_around"]

Sides = tuple[tuple[int, int], ...]
"""Pixels before and after a map, along each of its stream axes."""
UPSAMPLINGS = frozenset(
    f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in CONVOLUTIONS
)


@dataclass(frozen=True, slots=True)
class _Step:
    """What an operator makes of a period of each of `maps`: it pads it, joins `spans + 1` pixels, repeats each."""

    maps: tuple[fx.Node, ...]
    pads: Sides
    spans: tuple[int, ...]
    factors: tuple[int, ...]

    @property
    def is_padding(self) -> bool:
        """Whether it is a circular padding, or a roll."""
        return any(map(any, self.pads))

    @property
    def is_of_one(self) -> bool:
        """Whether it is pointwise, of one map: as well as its result that may be made wide."""
        return len(self.maps) == 1 and not any(self.spans) and set(self.factors) == {1}

    def needs(self, sides: Sides) -> Sides:
        """What it reads beyond the borders of its maps for a result that is so much wider."""
        return tuple(
            (-(-before // factor) + pad[0], -(-after // factor) + pad[1])
            for (before, after), factor, pad in zip(sides, self.factors, self.pads, strict=True)
        )

    def gives(self, sides: Sides) -> Sides:
        """How much wider its result is for maps that are so much wider, where it is no padding."""
        return tuple((f * before, f * after) for (before, after), f in zip(sides, self.factors, strict=True))

    def excess(self, of_map: tuple[int, ...]) -> tuple[int, ...]:
        """The excess of its result (rule 3)."""
        parts = zip(of_map, self.pads, self.spans, self.factors, strict=True)
        return tuple((excess + sum(pad) - span) * factor for excess, pad, span, factor in parts)


def wraps_around(graph: fx.Graph) -> bool:
    """Whether a graph has a circular padding, or a roll."""
    return any(name_of(one) == "roll" or "circular" in (*one.args, *one.kwargs.values()) for one in graph.nodes)


def with_wraps(captured: Captured, typed: TypedGraph) -> Captured:
    """The same model with its circular paddings and rolls moved up; the same object where that unites none."""
    steps = {} if captured.bound else _followed(captured.graph, typed)
    needed = _needed(captured.graph, steps)
    if sum(step.is_padding for step in steps.values()) <= len(needed.keys() - steps.keys()):
        return captured
    graph = _Wide(typed, steps, needed).rewritten(captured.graph)
    graph.lint()
    return replace(captured, module=fx.GraphModule(attributes_of(graph, captured.module), graph))


def _followed(graph: fx.Graph, typed: TypedGraph) -> dict[fx.Node, _Step]:
    """What is made of periodic maps, by operators that keep them periodic."""
    steps: dict[fx.Node, _Step] = {}
    excesses: dict[fx.Node, tuple[int, ...]] = {}
    for node in graph.nodes:
        step = _step(typed, node)
        if step is None or not (step.is_padding or step.is_of_one or any(one in steps for one in step.maps)):
            continue
        of_maps = {excesses.get(one, (0,) * len(step.pads)) for one in step.maps}
        if len(of_maps) == 1 and not (step.is_padding and any(*of_maps)):
            steps[node], excesses[node] = step, step.excess(*of_maps)
    return steps


def _step(typed: TypedGraph, node: fx.Node) -> _Step | None:
    """What an operator makes of a period; None where nothing is known of it."""
    dims, arguments = _dims(typed, node), bind(node)
    maps = tuple(one for one in node.all_input_nodes if _dims(typed, one))
    if not dims or not arguments or not maps or UNSTREAMED in node.meta or is_random(node):
        return None
    nothing, rank = (
        _Step(maps, ((0, 0),) * len(dims), (0,) * len(dims), (1,) * len(dims)),
        len(_value(typed, node).shape),
    )
    if name_of(node) in PADDINGS:
        pads = PADDINGS[name_of(node)](arguments, rank)
        is_along = bool(pads) and set(pads) <= set(dims)
        return replace(nothing, pads=tuple(pads.get(d, (0, 0)) for d in dims)) if is_along else None
    if any(_dims(typed, one) != dims for one in maps):
        return None
    if node.target in CONVOLUTIONS.values():
        return _convolution(typed, nothing, arguments, dims)
    if name_of(node) in UPSAMPLINGS:
        factors = _of_last(arguments.get("scale_factors") or (), dims, rank)
        return replace(nothing, factors=factors) if factors else None
    return nothing if _is_pointwise(typed, node, maps) else None


def _is_pointwise(typed: TypedGraph, node: fx.Node, maps: tuple[fx.Node, ...]) -> bool:
    """Whether each pixel is made of the same pixel of the maps alone, whatever their extents."""
    one = typed[node.name]
    return (
        one.is_local
        and type(one.pattern) is Pointwise
        and {read.value.name for read in one.pattern.reads} == {image.name for image in maps}
        and all(which == IDENTITY for read in one.pattern.reads for which in read.maps)
        and not any(typed[name].integer is not None for name in one.inputs)
    )


def _convolution(
    typed: TypedGraph, nothing: _Step, arguments: Mapping[str, Any], dims: tuple[int, ...]
) -> _Step | None:
    """A convolution of stride 1 without padding of its own, along the stream axes."""
    weight = _value(typed, arguments["weight"]).shape
    numbers = [arguments[name] for name in ("stride", "padding", "dilation")]
    if not all(isinstance(one, (list, tuple)) for one in numbers):
        return None
    n = len(weight) - 2
    strides, paddings, dilations = (_of_last(per_axis(one, n), dims, len(weight)) for one in numbers)
    if not strides or not dilations or paddings != (0,) * len(dims) or strides != (1,) * len(dims):
        return None
    return replace(nothing, spans=tuple(d * (weight[dim] - 1) for d, dim in zip(dilations, dims, strict=True)))


def _of_last(numbers: Any, dims: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
    """Whole numbers of the last dims, those of the stream axes; None where they are others."""
    places = [d - (rank - len(numbers)) for d in dims]
    chosen = [numbers[place] for place in places if place >= 0]
    if len(chosen) < len(dims) or any(isinstance(one, fx.Node) or one != int(one) for one in chosen):
        return None
    return tuple(map(int, chosen))


def _pads(arguments: Mapping[str, Any], rank: int) -> dict[int, tuple[int, int]]:
    """Pixels before and after each dim that is padded circularly; none where they follow from the size."""
    pads = arguments["pad"]
    if arguments["mode"] != "circular" or not all(isinstance(pad, int) and pad >= 0 for pad in pads):
        return {}
    pairs = {rank - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    return {dim: pair for dim, pair in pairs.items() if any(pair)}


def _shifts(arguments: Mapping[str, Any], rank: int) -> dict[int, tuple[int, int]]:
    """The same of a roll: what is missing at one end of each dim, and too much at the other."""
    shifts, dims = arguments["shifts"], [dim % rank for dim in arguments["dims"]]
    if len(set(dims)) < len(shifts) or not all(isinstance(shift, int) for shift in shifts):
        return {}
    return {dim: (shift, -shift) for dim, shift in zip(dims, shifts, strict=True) if shift}


PADDINGS = {"pad": _pads, "roll": _shifts}
"""Per operator, what it adds at the ends of a periodic map."""


def _dims(typed: TypedGraph, node: fx.Node) -> tuple[int, ...]:
    one = typed.nodes.get(node.name)
    return one.values[0].dims if one is not None and one.values and not one.is_tuple else ()


def _value(typed: TypedGraph, node: fx.Node) -> Value:
    return typed[node.name].values[0]


def _needed(graph: fx.Graph, steps: Mapping[fx.Node, _Step]) -> dict[fx.Node, Sides]:
    """How much wider each map is needed, along the axes of its readers (rule 2)."""
    needed: dict[fx.Node, Sides] = {}
    for node in reversed(graph.nodes):
        step = steps.get(node)
        if step is None:
            continue
        mine = step.needs(needed.get(node, ((0, 0),) * len(step.pads)))
        for one in step.maps:
            pairs = zip(mine, needed.get(one, _none(mine)), strict=True)
            needed[one] = tuple((max(a[0], b[0], 0), max(a[1], b[1], 0)) for a, b in pairs)
    return {node: sides for node, sides in needed.items() if any(map(any, sides))}


class _Wide:
    """Writes the graph with wide maps."""

    def __init__(self, typed: TypedGraph, steps: Mapping[fx.Node, _Step], needed: Mapping[fx.Node, Sides]) -> None:
        self._typed, self._steps, self._needed = typed, steps, needed
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._crops: dict[tuple[fx.Node, Sides], fx.Node] = {}

    def rewritten(self, graph: fx.Graph) -> fx.Graph:
        """The graph with each map as wide as its readers need it."""
        for node in graph.nodes:
            self._copies[node] = self._written(node)
        return self._graph

    def _written(self, node: fx.Node) -> fx.Node:
        """A node as wide as it is needed."""
        step, sides = self._steps.get(node), self._needed.get(node)
        if step is None:
            copied = copy_node if node.op == "placeholder" else fx.Graph.node_copy  # inputs go by their names
            copy = copied(self._graph, node, self._crop)
            return copy if sides is None else self._wrapped(node, copy, sides)
        reads = step.needs(sides or _none(step.pads))
        if step.is_padding:
            return self._crop(step.maps[0], reads)
        copy = self._graph.node_copy(node, lambda one: self._crop(one, reads if one in step.maps else None))
        if any(map(any, reads)):
            copy.meta.pop("val", None)  # which has another shape
        return self._cut(node, copy, step.gives(reads), sides or _none(step.pads))

    def _wrapped(self, node: fx.Node, copy: fx.Node, sides: Sides) -> fx.Node:
        """A wide map of one that nothing is known of; who needs no more reads that."""
        self._crops[node, _none(sides)] = copy
        before, after = zip(*sides, strict=True)
        wide = self._graph.call_function(
            overload("wrapped"), (copy, [*_dims(self._typed, node)], [*before], [*after])
        )
        later = (one for one, step in self._steps.items() if step.is_padding and one > node)
        return _traced(wide, next(later))  # whose line is the user's reason for it

    def _crop(self, node: fx.Node, sides: Sides | None = None) -> fx.Node:
        """A map with so many pixels beyond its borders, without any by default."""
        of_wide = self._needed.get(node)
        if of_wide is None or sides == of_wide:
            return self._copies[node]
        of_crop = sides or _none(of_wide)
        if (node, of_crop) not in self._crops:
            self._crops[node, of_crop] = self._cut(node, self._copies[node], of_wide, of_crop)
        return self._crops[node, of_crop]

    def _cut(self, node: fx.Node, wide: fx.Node, of_wide: Sides, of_crop: Sides) -> fx.Node:
        """A crop of a wide map of a node."""
        for dim, (before, after), (first, last) in zip(_dims(self._typed, node), of_wide, of_crop, strict=True):
            if (before, after) != (first, last):
                bounds = (dim, before - first, last - after or None)
                wide = _traced(self._graph.call_function(torch.ops.aten.slice.Tensor, (wide, *bounds)), node)
        return wide


def _none(sides: Sides) -> Sides:
    return ((0, 0),) * len(sides)


def _traced(copy: fx.Node, node: fx.Node) -> fx.Node:
    copy.meta.update(trace_of(node))
    return copy


@operator("wrapped(Tensor self, int[] dims, int[] before, int[] after) -> Tensor")
def _wrapped(tensor: torch.Tensor, dims: list[int], before: list[int], after: list[int]) -> torch.Tensor:
    """A tensor with so many pixels of itself, repeated from the opposite end, before and after it along dims."""
    for dim, first, last in zip(dims, before, after, strict=True):
        extent = tensor.shape[dim]
        parts = [tensor.narrow(dim, extent - first % extent, first % extent)] * (first % extent > 0)
        parts += [tensor] * (first // extent + 1 + last // extent)
        parts += [tensor.narrow(dim, 0, last % extent)] * (last % extent > 0)
        tensor = torch.cat(parts, dim) if len(parts) > 1 else tensor
    return tensor
