"""Writes through views of a tensor: ``y[:, :, 1:] = x`` is a new `y`, of which all later views are taken again.

NOTE [a write through views]
1. Views of one tensor, their base, make a tree: each is made of another by one operator. What is written to one of
   them is put back into the one that it is a view of (a scatter, or the view undone), and so on to the base.
2. What reads the base later reads the new one. What reads another view later reads that view of the new base.
3. Where a view of the tree has no operator that undoes it, or the base is a tensor of the model or of the call,
   the write stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxstream.graph.effects import WAS_IN_PLACE
from fxstream.graph.nodes import bind

__all__ = ["UNDONE", "Tree", "tree_of"]

aten = torch.ops.aten
Position = dict[fx.Node, int]


class Tree:
    """The views of a base: `parents` has what each of them is a view of; `written` is one of them, or the base."""

    def __init__(self, base: fx.Node, parents: Mapping[fx.Node, fx.Node], written: fx.Node) -> None:
        self.base, self._parents, self._written = base, parents, written
        self.again: dict[fx.Node, fx.Node] = {}
        """The base and the views that are read later, as they are after the write."""

    def write(self, node: fx.Node, value: fx.Node, position: Position) -> None:
        """Put `value` in the place of what `node` writes: rules 1 and 2. The node is no longer read then."""
        view, now = self._written, position[node]
        with node.graph.inserting_before(node):
            while view is not self.base:
                parent = self._parents[view]
                value = _like(UNDONE[view.target](view, parent, value), parent)
                position[value], view = now, parent
            self.again[self.base] = value
            later = [one for one in self._parents if any(position[user] > now for user in one.users)]
            for one in (self._written, *later):
                self._taken_again(one, now, position)
        node.replace_all_uses_with(self.again[self._written])
        for before, after in self.again.items():
            before.replace_all_uses_with(after, delete_user_cb=lambda user: position[user] > now)

    def _taken_again(self, view: fx.Node, now: int, position: Position) -> fx.Node:
        """The same view of the new base."""
        if view not in self.again:
            parent = self._parents[view]
            new_parent = self._taken_again(parent, now, position)
            copy = view.graph.node_copy(view, lambda one: new_parent if one is parent else one)
            position[copy] = now
            self.again[view] = copy
        return self.again[view]


def tree_of(written: fx.Node, aliases: nx.Graph) -> Tree | None:
    """The tree of all views that share memory with a node; None where a write cannot be put back (rule 3)."""
    members = nx.node_connected_component(aliases, written)
    parents: dict[fx.Node, fx.Node] = {}
    for one in members:
        inputs = [source for source in one.all_input_nodes if source in members]
        if one.op != "call_function" or len(inputs) > 1:
            return None
        parents |= {one: inputs[0]} if inputs else {}
    bases = members - set(parents)
    if len(bases) != 1:
        return None
    view, (base,) = written, bases
    while view is not base:
        if view.target not in UNDONE:
            return None
        view = parents[view]
    return Tree(base, parents, written)


def _like(node: fx.Node, other: fx.Node) -> fx.Node:
    node.meta = dict(other.meta) | {WAS_IN_PLACE: True}
    return node


def _scattered(target: Callable[..., Any]) -> Callable[[fx.Node, fx.Node, fx.Node], fx.Node]:
    """How a value is put back into a tensor, by a scatter with the arguments of the view."""
    return lambda view, parent, value: view.graph.call_function(target, (parent, value, *view.args[1:]))


def _unsqueezed(view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    return view.graph.call_function(aten.squeeze.dim, (value, view.args[1]))


def _transposed(view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    return view.graph.call_function(aten.transpose.int, (value, *view.args[1:]))


def _permuted(view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    dims = [dim % len(bind(view)["dims"]) for dim in bind(view)["dims"]]
    return view.graph.call_function(aten.permute.default, (value, [dims.index(d) for d in range(len(dims))]))


UNDONE: dict[Any, Callable[[fx.Node, fx.Node, fx.Node], fx.Node]] = {
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    aten.select.int: _scattered(aten.select_scatter.default),
    aten.unsqueeze.default: _unsqueezed,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
}
"""Per view, how a value of it is put back into what it is a view of."""
