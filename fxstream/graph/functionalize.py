"""Remove in-place operators from a captured graph, so that a crop may be a view without surprises.

`relu_(x)` becomes ``y = relu(x)`` and every later use of ``x`` becomes ``y``. A graph may also change in place

- a buffer of the model (``num_batches_tracked.add_(1)``): an effect, kept as it is;
- a tensor of which another view is used later (``x[:, 0] += 1``): kept as it is, and every value that shares
  its storage is marked in `UNSTREAMED`, so that it stays in the ordinary, ordered part of the graph.

`new_empty(x, size)` becomes ``empty(size)``: of `x` it takes only type and device, and so a random draw of that
size does not depend on the image.

What must keep its order (effects, random draws) is listed by `ordered_nodes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxstream.graph.nodes import bind, parameters_of, schema_of

__all__ = [
    "UNSTREAMED",
    "WAS_IN_PLACE",
    "is_random",
    "make_factories",
    "make_functional",
    "ordered_nodes",
    "remove_dead_nodes",
]

UNSTREAMED = "fxstream_unstreamed"
"""Key in ``node.meta``: why the node must stay outside a stream."""
WAS_IN_PLACE = "fxstream_was_in_place"
"""Key in ``node.meta``: the model's own operator changed its input, so that its result was no new memory."""

RETURNS_ITS_INPUT = {
    "aten::dropout",
    "aten::feature_dropout",
    "aten::alpha_dropout",
    "aten::feature_alpha_dropout",
}
"""Operators that may return their input itself without saying so in their schema."""

NOT_DIFFERENTIABLE = {"aten::copy_"}
"""In-place operators whose functional twin has no derivative."""

RENAMED = {"aten::normal_": "normal_functional", "aten::bernoulli_.float": "bernoulli.p"}
"""Functional twins that are not the name without its underscore."""


FACTORIES = {
    "aten::new_empty": torch.ops.aten.empty.memory_format,
    "aten::new_zeros": torch.ops.aten.zeros.default,
    "aten::new_ones": torch.ops.aten.ones.default,
    "aten::new_full": torch.ops.aten.full.default,
}
"""What makes the same tensor without another one to take type and device from."""


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the node changes in place: by its schema, as running statistics, or in its subgraphs."""
    if updates_statistics(node):
        arguments = bind(node)
        return [arguments["running_mean"], arguments["running_var"]]
    if any(mutated_inputs(inner) for inner in inner_nodes(node)):
        return [given for given in node.all_input_nodes if given.op != "get_attr"]
    return [given for given, alias in _arguments(node) if alias is not None and alias.is_write]


def subgraphs(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator (a `no_grad` or autocast block of the model, say) runs."""
    if node.op != "call_function" or schema_of(node) is not None:
        return []
    owner = node.graph.owning_module
    modules = [getattr(owner, str(given.target)) for given in node.all_input_nodes if given.op == "get_attr"]
    return [module.graph for module in modules if isinstance(module, fx.GraphModule)]


def inner_nodes(node: fx.Node) -> list[fx.Node]:
    """The operator nodes of its subgraphs."""
    return [inner for graph in subgraphs(node) for inner in graph.nodes if inner.op == "call_function"]


def _arguments(node: fx.Node) -> list[tuple[fx.Node, Any | None]]:
    """The tensor arguments with their alias annotation."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        (leaf, parameter.alias_info)
        for parameter, argument in zip(parameters_of(node.target), bind(node).values(), strict=True)
        for leaf in (argument if isinstance(argument, (list, tuple)) else (argument,))
        if isinstance(leaf, fx.Node)
    ]


def _viewed_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose storage the result may share, by the schema; all that a higher-order operator is given."""
    if node.op == "call_function" and schema_of(node) is None:
        several = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (list, tuple))]
        return [n for n in node.all_input_nodes if n.op != "get_attr"] if subgraphs(node) else several
    schema = schema_of(node)
    if schema is not None and schema.name in RETURNS_ITS_INPUT:
        return node.all_input_nodes[:1]
    return [given for given, alias in _arguments(node) if alias is not None]


def _storage_of(node: fx.Node) -> int | None:
    """What identifies the storage of the node's fake value; it tells views that no schema declares."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


@dataclass(eq=False, slots=True)
class _Storage:
    """The nodes so far that may share one storage, and why it must stay outside a stream, if so."""

    members: list[fx.Node]
    reason: str | None = None


def make_functional(graph: fx.Graph) -> None:
    """Rewrite `graph` in place; what cannot be made functional is marked and left in order."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    storages: dict[fx.Node, _Storage] = {}
    first_of: dict[int | None, fx.Node] = {}
    for node in list(graph.nodes):
        changed = mutated_inputs(node)
        if not changed:
            same = first_of.setdefault(_storage_of(node), node)
            viewed = [*_viewed_inputs(node), *([same] if same is not node and _storage_of(node) else [])]
            _join(storages, node, [given for given in viewed if given in storages])
            continue
        if updates_statistics(node):
            _join(storages, node, [])
            _keep(storages, node, changed)
            continue
        twin = _functional_twin(node)
        sharing = storages[changed[0]].members
        harmless = twin is torch.ops.aten.detach.default  # changes no value
        seen = not harmless and _is_seen_elsewhere(node, changed[0], sharing, position)
        if twin is None or len(changed) > 1 or seen:
            _join(storages, node, changed)
            _keep(storages, node, changed)
        else:
            result = _replace(graph, node, changed[0], twin, position)
            _join(storages, result, [])
            first_of[_storage_of(result)] = result
    for storage in storages.values():
        for node in storage.members if storage.reason else ():
            node.meta[UNSTREAMED] = storage.reason


def _keep(storages: dict[fx.Node, _Storage], node: fx.Node, changed: list[fx.Node]) -> None:
    """Leave an in-place node as it is, and what it changes outside of the stream."""
    for given in changed:
        storages[given].reason = f"its storage is changed in place by `{node.name}`"


def _join(storages: dict[fx.Node, _Storage], node: fx.Node, viewed: list[fx.Node]) -> None:
    """Count `node` among those that share storage with what it views; a new storage if nothing."""
    whole = storages[viewed[0]] if viewed else _Storage([])
    for other in (storages[given] for given in viewed[1:]):
        if other is not whole:
            whole.members += other.members
            storages.update(dict.fromkeys(other.members, whole))
    whole.members.append(node)
    storages[node] = whole


def _is_seen_elsewhere(
    node: fx.Node, changed: fx.Node, sharing: list[fx.Node], position: dict[fx.Node, int]
) -> bool:
    """Whether another name of the storage is used after `node`, or is a tensor of the model."""
    now = position[node]
    return any(
        other.meta.get("fxstream_model_tensor") is True
        or (other is not changed and any(position[user] > now for user in other.users))
        for other in sharing
    )


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """``relu.default`` for ``relu_.default``, or None."""
    schema = schema_of(node)
    if schema is None or not schema.name.endswith("_") or schema.name in NOT_DIFFERENTIABLE:
        return None
    namespace, name = schema.name.split("::")
    overload = schema.overload_name or "default"
    renamed = RENAMED.get(f"{schema.name}.{overload}", RENAMED.get(schema.name, name[:-1])).split(".")
    packet = getattr(getattr(torch.ops, namespace), renamed[0], None)
    wanted = renamed[1] if len(renamed) > 1 else overload
    found = [name for name in (wanted, "default") if packet is not None and name in packet.overloads()]
    return getattr(packet, found[0]) if found else None


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    changed: fx.Node,
    twin: torch._ops.OpOverload,
    position: dict[fx.Node, int],
) -> fx.Node:
    """Put the functional twin in the place of an in-place node; returns the node that is the new value.

    An in-place operator keeps the type of what it changes while its twin promotes, so a twin of tensors of
    several types is followed by a conversion back.
    """
    with graph.inserting_before(node):
        new = _call_positionally(graph, node, twin)
        new.meta = dict(node.meta) | {WAS_IN_PLACE: True}
        result = new
        if len(_types(node)) > 1:
            result = graph.call_function(torch.ops.aten.type_as.default, (new, changed))
            result.meta = dict(node.meta)
    now = position[node]
    position[new] = position[result] = now
    node.replace_all_uses_with(result)
    changed.replace_all_uses_with(
        result, delete_user_cb=lambda user: position[user] > now and user not in (new, result)
    )
    graph.erase_node(node)
    return result


def _types(node: fx.Node) -> set[object]:
    """The types of the tensors that a node is given; a tensor of unknown type counts as one of its own."""
    return {getattr(given.meta.get("val"), "dtype", given) for given in node.all_input_nodes}


def _call_positionally(graph: fx.Graph, node: fx.Node, twin: torch._ops.OpOverload) -> fx.Node:
    """A call of the twin with the arguments of an in-place operator, and with defaults that its twin may lack.

    The two name their arguments differently; only those that must be keywords have the same names.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    keywords = {parameter.name for parameter in parameters_of(node.target) if parameter.kwarg_only}
    args = tuple(argument for name, argument in bind(node).items() if name not in keywords)
    return graph.call_function(twin, args, {name: node.kwargs[name] for name in node.kwargs if name in keywords})


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random generator, itself or in its subgraphs."""
    schema = schema_of(node)
    if schema is None:
        return any(is_random(inner) for inner in inner_nodes(node))
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    arguments = bind(node)
    in_training = arguments.get("train", arguments.get("training", True)) is not False
    return in_training and bool(arguments.get("p", 1) != 0)


def updates_statistics(node: fx.Node) -> bool:
    """Whether the node is a batch norm in training, which changes its running statistics."""
    if node.target is not torch.ops.aten.batch_norm.default:
        return False
    arguments = bind(node)
    return arguments["training"] is True and arguments["running_mean"] is not None


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


def make_factories(graph: fx.Graph) -> None:
    """Let new tensors depend on no other one, in place."""
    for node in graph.nodes:
        schema, made = schema_of(node), node.meta.get("val")
        if schema is not None and schema.name in FACTORIES and isinstance(made, torch.Tensor):
            node.target = FACTORIES[schema.name]
            node.args = node.args[1:]
            node.kwargs = {"dtype": made.dtype, "device": made.device}


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Remove operators that nothing uses, unless they draw random numbers or have an effect."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if not (is_random(node) or mutated_inputs(node)):
            graph.erase_node(node)
