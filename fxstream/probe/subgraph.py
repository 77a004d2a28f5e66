"""A part of the captured graph as a graph of its own, at any size of its inputs.

The spatial inputs of the part (`leaves`) and its small tensors become placeholders; integers that follow from
sizes inside the part stay size arithmetic, all others are folded. Every floating type becomes one type and every
device the CPU, so that the part runs there whatever the model's precision and place are. Node names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import Shape, shapes_at
from fxstream.graph.typed_graph import Locality, analyse_locality
from fxstream.rules import Value
from fxstream.tiling.bounds import Segment

__all__ = ["Excerpt", "excerpt"]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The nodes of a segment as a module; takes its leaves and then its small tensors, returns its outputs.

    `dtype` is its one floating type; `locality` the one of the whole graph that it was taken from.
    """

    module: fx.GraphModule
    segment: Segment
    dtype: torch.dtype
    locality: Locality

    def leaf_shape(self, leaf: str, batch: int, extents: Sequence[int]) -> tuple[int, ...]:
        """The shape of a leaf at another batch size (dim 0) and other extents of its stream dims."""
        dims = dict(self.segment.leaves)[leaf]
        meta = self.locality.metas[leaf]
        assert isinstance(meta, Shape)
        shape = [batch, *meta.shape[1:]]
        for dim, extent in zip(dims, extents, strict=True):
            shape[dim] = extent
        return tuple(shape)

    def small_shape(self, name: str, batch: int) -> tuple[int, ...]:
        """The shape of a small tensor.

        One that follows from an image (a gate) or from its size (a draw), and is no vector, has its batch size.
        """
        value = self.locality.values[name]
        assert isinstance(value, Value)
        images = (v for v in (self.locality.value(leaf) for leaf, _ in self.segment.leaves) if v.image)
        batches = {image.shape[0] for image in images}
        follows = len(value.shape) > 1 and {value.shape[0]} == batches and (value.image or self._is_sized(name))
        return (batch, *value.shape[1:]) if follows else value.shape

    def _is_sized(self, name: str) -> bool:
        """Whether an integer of the graph goes into a small tensor, as into a random draw per sample."""
        reached = [self.locality.nodes[name]]
        for node in reached:
            reached += [given for given in node.all_input_nodes if given not in reached]
        return any(isinstance(self.locality.metas.get(node.name), int) for node in reached)

    def type_of(self, name: str) -> torch.dtype:
        """The type in which an input is given: the one floating type also for images of integers; else its own.

        Whole numbers beside an image are classes.
        """
        meta = self.locality.metas[name]
        assert isinstance(meta, Shape)
        beside = any(image.dtype != torch.int64 for image in self.locality.images)
        is_classes = meta.dtype == torch.bool or (meta.dtype == torch.int64 and beside)
        is_image = name in dict(self.segment.leaves) and not is_classes
        return self.dtype if meta.dtype.is_floating_point or is_image else meta.dtype

    def at(self, leaves: Mapping[str, tuple[int, ...]]) -> Locality:
        """The verdicts of the same rules at other shapes of the leaves.

        Raises `InputError` where an operator refuses these shapes.
        """
        with FakeTensorMode():
            given = [torch.empty(leaves[name], dtype=self.type_of(name)) for name, _ in self.segment.leaves]
            batch = next(iter(leaves.values()))[0]
            given += [
                torch.empty(self.small_shape(name, batch), dtype=self.type_of(name))
                for name in self.segment.smalls
            ]
        metas = shapes_at(self.module, given)
        return analyse_locality(self.module.graph, metas, dict(self.segment.leaves))


def excerpt(locality: Locality, segment: Segment, dtype: torch.dtype) -> Excerpt:
    """The segment's nodes as a graph of their own, with `dtype` for every floating type."""
    graph = fx.Graph()
    env: dict[str, fx.Node] = {name: _named(graph.placeholder(name), name) for name in segment.inputs}
    wanted = set(segment.nodes)
    for node in locality.graph.nodes:
        is_integer = isinstance(locality.metas.get(node.name), int)
        inside = all(given.name in env for given in node.all_input_nodes)
        if node.name not in wanted and not (is_integer and inside and node.all_input_nodes):
            continue
        args, kwargs = _adapted((node.args, dict(node.kwargs)), env, locality, dtype)
        copy = _named(graph.create_node(node.op, node.target, args, kwargs), node.name)
        copy.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        env[node.name] = copy
    graph.output(tuple(env[name] for name in segment.outputs))
    graph.lint()
    return Excerpt(fx.GraphModule({}, graph, "Excerpt"), segment, dtype, locality)


def _named(node: fx.Node, name: str) -> fx.Node:
    """The node under exactly this name, which fx would change if it is one of Python's (`input`)."""
    node.name = name
    return node


def _adapted(arguments: Any, env: Mapping[str, fx.Node], locality: Locality, dtype: torch.dtype) -> Any:
    """The arguments with nodes of the new graph, integers from elsewhere folded, and the one floating type."""

    def adapt(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            meta = locality.metas.get(leaf.name)
            return env[leaf.name] if leaf.name in env or not isinstance(meta, int) else meta
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return dtype
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    return pytree.tree_map(adapt, arguments, is_leaf=lambda x: x is None)
