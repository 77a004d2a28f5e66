"""Writes operators into a graph in front of the one that they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxstream.graph.shapes import Meta, Shape
from fxstream.rules.ops import overload

__all__ = ["Lowering", "Writer", "copied"]

aten = torch.ops.aten
KEPT = ("nn_module_stack", "stack_trace")


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and the copy of each node, which has the name of that node.

    fx itself would rename a node whose name is one of Python's (`input`).
    """
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))
    for original, node in nodes.items():
        node.name = original.name
    return copy, nodes


class Writer:
    """Writes operators in front of the node that is taken apart.

    `given` are its arguments by schema name, `dims` the stream dims of the map that it reads.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, metas: Mapping[str, Meta], dims: tuple[int, ...]) -> None:
        self.dims = dims
        self._graph, self._node, self._metas = graph, node, metas
        assert isinstance(node.target, torch._ops.OpOverload)
        arguments = node.target._schema.arguments
        names = [argument.name for argument in arguments]
        self.given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        self.given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def __getitem__(self, argument: str) -> Any:
        return self.given[argument]

    def meta(self, node: fx.Node) -> Shape:
        """Shape and type of an argument, at the size at which the graph is taken apart."""
        meta = self._metas[node.name]
        assert isinstance(meta, Shape)
        return meta

    @property
    def inputs(self) -> list[fx.Node]:
        """All nodes among its arguments."""
        return self._node.all_input_nodes

    @property
    def result(self) -> Shape:
        """Shape and type of the result of the operator that is taken apart."""
        return self.meta(self._node)

    def again(self, /, **replaced: Any) -> fx.Node:
        """The same operator with some of its arguments replaced."""
        assert isinstance(self._node.target, torch._ops.OpOverload)
        given = self.given | replaced
        arguments = self._node.target._schema.arguments
        positional = [given[argument.name] for argument in arguments if not argument.kwarg_only]
        keywords = {argument.name: given[argument.name] for argument in arguments if argument.kwarg_only}
        return self.call(self._node.target, *positional, **keywords)

    @property
    def device(self) -> torch.device:
        """Where the operator runs."""
        made = self._node.meta["val"]
        tensor = made if isinstance(made, torch.Tensor) else made[0]
        assert isinstance(tensor, torch.Tensor)
        return tensor.device

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One more operator."""
        with self._graph.inserting_before(self._node):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {key: self._node.meta[key] for key in KEPT if key in self._node.meta}
        return node

    def size(self, tensor: fx.Node, dim: int) -> fx.Node:
        """An extent of a tensor, at any size."""
        return self.call(aten.sym_size.int, tensor, dim)

    def like(self, tensor: fx.Node, image: fx.Node) -> fx.Node:
        """A wide tensor in the type of an image of less than 32 bits; itself where that is no other."""
        dtype = self.meta(image).dtype
        return tensor if dtype.itemsize >= 4 else self.call(aten.to.dtype, tensor, dtype)

    def narrowed(self, tensor: fx.Node) -> fx.Node:
        """A wide tensor in the type of the operator's result where that is of less than 32 bits."""
        own = self.result.dtype
        return tensor if own.itemsize >= 4 else self.call(aten.to.dtype, tensor, own)

    def statistics(self, image: fx.Node, dims: Sequence[int]) -> list[fx.Node]:
        """Mean, variance and sample variance over some dims."""
        found = self.call(overload("moments"), image, list(dims))
        return [self.call(aten.select.int, found, 0, i) for i in range(3)]


Lowering = Callable[[Writer], fx.Node | tuple[fx.Node, ...] | None]
"""Writes what an operator is made of and returns its result or results; None where it stays as it is."""
