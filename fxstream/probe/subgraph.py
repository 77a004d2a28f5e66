"""A segment as a module that runs on the CPU, at any size of its inputs.

Its spatial and whole inputs are placeholders; integers that follow from sizes inside stay size arithmetic, all
others are folded. A result whose size is folded (an upsampling to the size of a map outside) is as many times
larger than its input as in the model, so that it is small where its input is. Where a reshape has the extent of a
tiled dim as a number, it is that of its input, and the first other dim has what is left: the batch. Every floating
type becomes one type and every device the CPU, so that it runs there whatever the model's precision and device
are. Node names are kept.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxstream.geometry.receptive_field import BROADCAST
from fxstream.graph.nodes import name_of
from fxstream.graph.shapes import shapes_at
from fxstream.graph.type_graph import type_graph
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.rules import Value
from fxstream.rules.patterns import Moved, Pointwise
from fxstream.tiling.segment import Segment, isolated, with_nodes

__all__ = ["Subgraph", "subgraph"]


RESHAPES = ("view", "reshape", "_unsafe_view")
TOGETHER = ("linear", "conv", "max_pool", "avg_pool", "upsample")
"""Operators that read channels of a pixel together, or each alike."""
SIZES = ("output_size", "size", "shape")
"""Parameters of operators that are the sizes of the result."""
IN_PLACE_OF_NAN = 0.5
"""A constant of the model that is NaN would be taken for what the probe puts around its tiles."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """The nodes of a segment as a module; takes its spatial and then its whole inputs, returns its outputs.

    `dtype` is its one floating type; `graph` the typed graph of the model that it was taken from.
    """

    module: fx.GraphModule
    segment: Segment
    dtype: torch.dtype
    graph: TypedGraph

    def input_shape(self, name: str, batch: int, extents: Sequence[int]) -> tuple[int, ...]:
        """The shape of a spatial input at another batch size (dim 0) and other extents of its tiled dims."""
        shape = [batch, *self.graph.value(name).shape[1:]]
        for dim, extent in zip(dict(self.segment.spatial)[name], extents, strict=True):
            shape[dim] = extent
        return tuple(shape)

    def has_batch(self, name: str) -> bool:
        """Whether a spatial input has a batch in front; a table of positions has none."""
        return 0 not in dict(self.segment.spatial)[name]

    def whole_shape(self, name: str, batch: int) -> tuple[int, ...]:
        """The shape of a whole input.

        One that follows from an image (a gate) or from its size (a draw), and is not a vector, has its batch size.
        """
        value = self.graph.value(name)
        images = (v for v in (self.graph.value(one) for one, _ in self.segment.spatial) if v.image)
        batches = {image.shape[0] for image in images}
        follows = len(value.shape) > 1 and {value.shape[0]} == batches and (value.image or self._is_sized(name))
        return (batch, *value.shape[1:]) if follows else value.shape

    def _is_sized(self, name: str) -> bool:
        """Whether an integer of the graph goes into a whole input, as into a random draw per sample.

        Or it is expanded, to a number where the graph is bound to its size.
        """
        reached = [name]
        for one in reached:
            reached += [source for source in self.graph[one].inputs if source not in reached]
        return any(self.graph.is_integer(one) or name_of(self.graph[one].node) == "expand" for one in reached)

    def type_of(self, name: str) -> torch.dtype:
        """The type in which an input is given: the one floating type also for images of integers; else its own.

        Whole numbers beside an image are classes.
        """
        dtype = self.graph.value(name).dtype
        beside = any(image.dtype != torch.int64 for image in self.graph.images)
        is_classes = dtype == torch.bool or (dtype == torch.int64 and beside)
        is_image = name in dict(self.segment.spatial) and not is_classes
        return self.dtype if dtype.is_floating_point or is_image else dtype

    def separates_channels(self) -> bool:
        """Whether some operator takes the channels of a pixel apart: as pixels of a window, or leaves some out.

        Without one a NaN in one channel of a pixel does as much as a NaN in every channel.
        """
        return any(_takes_apart(self.segment.graph[name]) for name in self.segment.nodes)

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> Segment:
        """The segment, typed by the same rules, at other shapes of the spatial inputs.

        Raises `InputError` where an operator refuses these shapes.
        """
        with FakeTensorMode():
            tensors = [torch.empty(shapes[name], dtype=self.type_of(name)) for name, _ in self.segment.spatial]
            batch = next(iter(shapes.values()))[0]
            tensors += [
                torch.empty(self.whole_shape(name, batch), dtype=self.type_of(name)) for name in self.segment.whole
            ]
        spatial = dict(self.segment.spatial)
        graph = type_graph(self.module.graph, shapes_at(self.module, tensors), spatial)
        return self.segment.with_graph(graph)


def _takes_apart(node: TypedNode) -> bool:
    """Whether an operator has other pixels than it reads, or less channels, and is none of `TOGETHER`."""
    if name_of(node.node).startswith(TOGETHER):
        return False
    if node.is_tuple or not isinstance(node.pattern, (Pointwise, Moved)):
        return True
    pixels, elements = math.prod(node.values[0].extents), node.values[0].elements
    reads = (read for read in node.pattern.reads if BROADCAST not in read.maps)
    return any(math.prod(read.extents) != pixels or read.value.elements > elements for read in reads)


def subgraph(segment: Segment, dtype: torch.dtype) -> Subgraph:
    """The segment's nodes as a module of their own, with `dtype` for every floating type."""

    def adapt(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return dtype
        if isinstance(leaf, float) and math.isnan(leaf):
            return IN_PLACE_OF_NAN
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    alone = _in_proportion(_sized(isolated(segment, adapt)))
    return Subgraph(fx.GraphModule({}, alone.graph.graph, "Subgraph"), alone, dtype, segment.graph)


def _sized(segment: Segment) -> Segment:
    """The segment, with numbers among the sizes of reshapes replaced where they are extents or the batch."""
    reshapes = (segment.graph[name] for name in segment.nodes if name_of(segment.graph[name].node) in RESHAPES)
    return with_nodes(segment, [size for typed in reshapes for size in _extents(segment.graph, typed)])


def _extents(typed_graph: TypedGraph, typed: TypedNode) -> list[TypedNode]:
    """The extents that take the place of numbers in one reshape, and other dims where the batch is behind them."""
    graph, batches = typed_graph.graph, {image.shape[0] for image in typed_graph.images}
    node, pattern, extents = typed.node, typed.pattern, list[TypedNode]()
    shape, sizes = typed.values[0].shape, list(node.args[1])  # type: ignore[arg-type]
    is_behind = shape[0] not in batches and 0 not in pattern.dims
    kept = _kept_dims(pattern.reads[0].value.shape, shape) if is_behind else {}
    others = [dim for dim in range(len(sizes)) if dim not in pattern.dims and dim not in kept]
    if others and (-1 not in sizes or sizes[others[0]] == pattern.reads[0].value.shape[0]):
        sizes = [shape[dim] if size == -1 else size for dim, size in enumerate(sizes)]
        sizes[others[0]] = -1  # the batch, which has two entries on a strip
    for dim, before in {**kept, **dict(zip(pattern.dims, pattern.reads[0].dims, strict=True))}.items():
        if (isinstance(sizes[dim], int) and sizes[dim] >= 0) or dim not in pattern.dims:
            with graph.inserting_before(node):
                size = graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], before))
            extents.append(TypedNode(size, typed.index, integer=shape[dim]))
            sizes[dim] = size
    node.update_arg(1, sizes)
    return extents


def _kept_dims(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """By dim of the result of a reshape, the dim of its input that it is: those in front of which all are alike.

    >>> _kept_dims((3, 1, 8, 6), (3, 1, 48))
    {0: 0, 1: 1}
    >>> _kept_dims((3, 1, 8), (3, 1, 1, 8))  # the batch may be either
    {0: 0}
    """
    front = len(list(itertools.takewhile(lambda sizes: sizes[0] == sizes[1], zip(before, after, strict=False))))
    while front and 1 in (*before[front : front + 1], *after[front : front + 1]) and before[front - 1] == 1:
        front -= 1
    return {dim: dim for dim in range(front)}


def _in_proportion(segment: Segment) -> Segment:
    """The isolated segment with every result of a fixed size as a multiple of the input that it reads."""
    nodes: dict[str, TypedNode] = {}
    for name, typed in segment.graph.nodes.items():
        if name in segment.nodes and typed.values and not typed.pattern.reduces:
            for added in _sizes_followed(segment.graph, typed):
                nodes[added.name] = replace(added, index=len(nodes))
        nodes[name] = replace(typed, index=len(nodes))
    return segment.with_graph(replace(segment.graph, nodes=nodes))


def _sizes_followed(graph: TypedGraph, typed: TypedNode) -> list[TypedNode]:
    """Writes size arithmetic in place of the numbers that are a result's tiled extents; the nodes of that.

    An axis along which its input has one pixel, or none is read, keeps its number.
    """
    value, read, added = typed.values[0], typed.pattern.reads[0], list[TypedNode]()
    sizes = {}
    for k, axis_map in enumerate(read.maps):
        if read.extents[k] > 1 and axis_map != BROADCAST:
            sizes[k] = (value.extents[k], read.extents[k], read.dims[k])
    for i, argument in _sizes_of(typed.node):
        axes = _axes_of(argument, value)
        if not any(k in sizes for k in axes.values()):
            continue
        numbers = list(argument)
        for place, k in axes.items():
            if k in sizes and isinstance(numbers[place], int):
                made = _multiple(graph, typed.node, read.value.name, *sizes[k])
                numbers[place] = made[-1].node
                added += made
        typed.node.update_arg(i, numbers)
    return added


def _sizes_of(node: fx.Node) -> list[tuple[int, Any]]:
    """The arguments, by index, that are sizes of the result; those of reshapes follow as in `_sized`."""
    if not isinstance(node.target, torch._ops.OpOverload) or name_of(node) in RESHAPES:
        return []
    parameters = node.target._schema.arguments
    return [(i, argument) for i, argument in enumerate(node.args) if parameters[i].name in SIZES]


def _axes_of(argument: Any, value: Value) -> dict[int, int]:
    """Which tiled axis each place of a list of sizes is, as ``output_size`` or as the whole shape; else empty."""
    if not isinstance(argument, (list, tuple)):
        return {}
    if len(argument) == len(value.dims) and tuple(argument) == value.extents:
        return {k: k for k in range(len(value.dims))}
    if len(argument) == len(value.shape) and all(argument[d] == value.shape[d] for d in value.dims):
        return {d: k for k, d in enumerate(value.dims)}
    return {}


def _multiple(graph: TypedGraph, before: fx.Node, source: str, extent: int, of: int, dim: int) -> list[TypedNode]:
    """The nodes, in front of another, of a size of `source` times ``extent / of``."""
    with graph.graph.inserting_before(before):
        size = graph.graph.call_function(torch.ops.aten.sym_size.int, (graph[source].node, dim))
        nodes, ratio = [TypedNode(size, 0, integer=of)], Fraction(extent, of)
        if ratio != 1:
            product = graph.graph.call_function(operator.mul, (size, ratio.numerator))
            whole = graph.graph.call_function(operator.floordiv, (product, ratio.denominator))
            nodes += [TypedNode(product, 0, integer=of * ratio.numerator), TypedNode(whole, 0, integer=extent)]
    return nodes
