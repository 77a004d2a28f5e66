"""Remove in-place operators from a captured graph, so that a crop may be a view without surprises.

`relu_(x)` becomes ``y = relu(x)`` and every later use of ``x`` becomes ``y``. A graph may also change in place

- a buffer of the model (``num_batches_tracked.add_(1)``): an effect, kept as it is;
- a tensor of which another view is used later (``x[:, 0] += 1``): kept as it is, and every value that shares
  its storage is marked in `UNSTREAMED`, so that it stays in the ordinary, ordered part of the graph.

What must keep its order (effects, random draws) is listed by `ordered_nodes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["UNSTREAMED", "make_functional", "ordered_nodes", "remove_dead_nodes"]

UNSTREAMED = "fxstream_unstreamed"
"""Key in ``node.meta``: why the node must stay outside a stream."""

RETURNS_ITS_INPUT = {
    "aten::dropout",
    "aten::feature_dropout",
    "aten::alpha_dropout",
    "aten::feature_alpha_dropout",
}
"""Operators that may return their input itself without saying so in their schema."""

RENAMED = {"aten::normal_": "normal_functional", "aten::bernoulli_.float": "bernoulli.p"}
"""Functional twins that are not the name without its underscore."""


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    """The schema of an operator node, or None for anything else."""
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the operator changes in place, by its schema."""
    return [given for given, alias in _arguments(node) if alias is not None and alias.is_write]


def _arguments(node: fx.Node) -> list[tuple[fx.Node, Any | None]]:
    """The tensor arguments with their alias annotation."""
    schema = schema_of(node)
    if schema is None:
        return []
    named = {argument.name: argument for argument in schema.arguments}
    bound = dict(zip(named, node.args, strict=False)) | dict(node.kwargs)
    return [
        (leaf, named[name].alias_info)
        for name, given in bound.items()
        for leaf in (given if isinstance(given, (list, tuple)) else (given,))
        if isinstance(leaf, fx.Node)
    ]


def _viewed_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose storage the result may share."""
    if node.op == "call_function" and schema_of(node) is None:
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (list, tuple))]
    schema = schema_of(node)
    if schema is not None and schema.name in RETURNS_ITS_INPUT:
        return node.all_input_nodes[:1]
    return [given for given, alias in _arguments(node) if alias is not None]


class _Storages:
    """Which nodes may share storage: a union-find over view operators."""

    def __init__(self, graph: fx.Graph) -> None:
        self._root: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes}
        for node in graph.nodes:
            for viewed in _viewed_inputs(node):
                self._root[self._find(node)] = self._find(viewed)
        self._groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._groups.setdefault(self._find(node), []).append(node)

    def _find(self, node: fx.Node) -> fx.Node:
        while self._root[node] is not node:
            node = self._root[node]
        return node

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """All nodes of the captured graph that may share storage with `node`."""
        return self._groups[self._find(node)]

    def add(self, node: fx.Node, like: fx.Node) -> None:
        """Count a new node among those that may share storage with `like`."""
        self._root[node] = self._find(like)
        self.sharing(like).append(node)


def make_functional(graph: fx.Graph) -> None:
    """Rewrite `graph` in place; what cannot be made functional is marked and left in order."""
    storages = _Storages(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        changed = mutated_inputs(node)
        if not changed:
            continue
        sharing = storages.sharing(changed[0])
        twin = _functional_twin(node)
        if twin is None or len(changed) > 1 or _is_seen_elsewhere(node, changed[0], sharing, position):
            for other in sharing:
                other.meta[UNSTREAMED] = f"its storage is changed in place by `{node.name}`"
            continue
        storages.add(_replace(graph, node, changed[0], twin, position), changed[0])


def _is_seen_elsewhere(
    node: fx.Node, changed: fx.Node, sharing: list[fx.Node], position: dict[fx.Node, int]
) -> bool:
    """Whether another name of the storage is used after `node`, or is a tensor of the model."""
    now = position[node]
    for other in sharing:
        if other.op == "placeholder" and other.meta.get("fxstream_model_tensor"):
            return True
        if other in (changed, node) or position.get(other, -1) > now:
            continue
        if any(position.get(user, now + 1) > now for user in other.users):
            return True
    return False


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """``relu.default`` for ``relu_.default``, or None."""
    schema = schema_of(node)
    assert schema is not None
    namespace, name = schema.name.split("::")
    if not name.endswith("_"):
        return None
    overload = schema.overload_name or "default"
    renamed = RENAMED.get(f"{schema.name}.{overload}", RENAMED.get(schema.name, name[:-1])).split(".")
    packet = getattr(getattr(torch.ops, namespace), renamed[0], None)
    wanted = renamed[1] if len(renamed) > 1 else overload
    return getattr(packet, wanted if wanted in packet.overloads() else "default") if packet else None


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    changed: fx.Node,
    twin: torch._ops.OpOverload,
    position: dict[fx.Node, int],
) -> fx.Node:
    """Put the functional twin in the place of an in-place node; returns the node that is the new value.

    An in-place operator keeps the type of what it changes while its twin promotes, so a twin of several
    tensors is followed by a conversion back.
    """
    with graph.inserting_before(node):
        new = graph.create_node("call_function", twin, node.args, node.kwargs)
        new.meta = dict(node.meta)
        result = new
        if len(node.all_input_nodes) > 1:
            result = graph.create_node("call_function", torch.ops.aten.type_as.default, (new, changed))
            result.meta = dict(node.meta)
    now = position[node]
    position[new] = position[result] = now
    node.replace_all_uses_with(result)
    changed.replace_all_uses_with(
        result, delete_user_cb=lambda user: position[user] > now and user not in (new, result)
    )
    graph.erase_node(node)
    return result


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random generator."""
    schema = schema_of(node)
    if schema is None or torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    in_training = given.get("train", given.get("training", True)) is not False
    return in_training and given.get("p", 1) != 0


def updates_statistics(node: fx.Node) -> bool:
    """Whether the node is a batch norm in training, which changes its running statistics."""
    schema = schema_of(node)
    return schema is not None and schema.name == "aten::batch_norm" and node.args[5] is True


def ordered_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose relative order is part of the model's meaning, in that order."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and (is_random(node) or updates_statistics(node) or UNSTREAMED in node.meta or _touches_marked(node))
    ]


def _touches_marked(node: fx.Node) -> bool:
    return any(UNSTREAMED in given.meta for given in node.all_input_nodes)


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Remove operators that nothing uses, unless they draw random numbers or have an effect."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if not (is_random(node) or updates_statistics(node) or mutated_inputs(node)):
            graph.erase_node(node)
