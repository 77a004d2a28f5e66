"""A segment as a module that runs on the CPU, at any size of its inputs.

Its spatial and whole inputs are placeholders; integers that follow from sizes inside stay size arithmetic, all
others are folded. Where a reshape has the extent of a tiled dim as a number, it is that of its input, and the
first other dim has what is left: the batch. Every floating type becomes one type and every device the CPU, so that
it runs there whatever the model's precision and device are. Node names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxstream.graph.nodes import name_of
from fxstream.graph.shapes import shapes_at
from fxstream.graph.type_graph import type_graph
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.tiling.segment import Segment, isolated, with_nodes

__all__ = ["Subgraph", "subgraph"]


RESHAPES = ("view", "reshape", "_unsafe_view")
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


def subgraph(segment: Segment, dtype: torch.dtype) -> Subgraph:
    """The segment's nodes as a module of their own, with `dtype` for every floating type."""

    def adapt(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return dtype
        if isinstance(leaf, float) and math.isnan(leaf):
            return IN_PLACE_OF_NAN
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    alone = _sized(isolated(segment, adapt))
    return Subgraph(fx.GraphModule({}, alone.graph.graph, "Subgraph"), alone, dtype, segment.graph)


def _sized(segment: Segment) -> Segment:
    """The segment, with numbers among the sizes of reshapes replaced where they are extents or the batch."""
    reshapes = (segment.graph[name] for name in segment.nodes if name_of(segment.graph[name].node) in RESHAPES)
    return with_nodes(segment, [size for typed in reshapes for size in _extents(segment.graph.graph, typed)])


def _extents(graph: fx.Graph, typed: TypedNode) -> list[TypedNode]:
    """The extents that take the place of numbers in one reshape."""
    node, pattern, extents = typed.node, typed.pattern, list[TypedNode]()
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for dim, before in zip(pattern.dims, pattern.reads[0].dims, strict=True):
        if isinstance(sizes[dim], int) and sizes[dim] >= 0:
            with graph.inserting_before(node):
                size = graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], before))
            extents.append(TypedNode(size, typed.index, integer=sizes[dim]))
            sizes[dim] = size
    others = [dim for dim in range(len(sizes)) if dim not in pattern.dims]
    if others and -1 not in sizes:
        sizes[others[0]] = -1
    node.update_arg(1, sizes)
    return extents
