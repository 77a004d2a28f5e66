"""What an operator does besides computing its result: writes in place and random draws, and the order they need.

Everything is read off the operator's schema and tags, and for a higher-order operator off the operators of the
subgraphs that it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxstream.graph.nodes import bind, parameters_of, schema_of

__all__ = [
    "UNSTREAMED",
    "WAS_IN_PLACE",
    "is_random",
    "mutated_inputs",
    "ordered_chains",
    "ordered_nodes",
    "remove_dead_nodes",
    "returns_storage",
    "subgraphs",
    "tensor_arguments",
    "updates_statistics",
]

UNSTREAMED = "fxstream_unstreamed"
"""Key in ``node.meta``: why the node must stay outside a stream."""
WAS_IN_PLACE = "fxstream_was_in_place"
"""Key in ``node.meta``: the model's operator changed its input, so that its result needed no new memory."""


def tensor_arguments(node: fx.Node) -> list[tuple[fx.Node, Any | None]]:
    """The tensors that an operator node reads, each with its alias annotation in the schema, if it has one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        (tensor, parameter.alias_info)
        for parameter, argument in zip(parameters_of(node.target), bind(node).values(), strict=True)
        for tensor in _as_sequence(argument)
        if isinstance(tensor, fx.Node)
    ]


def _as_sequence(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def subgraphs(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator runs, as for a `no_grad` or autocast block of the model."""
    if node.op != "call_function" or schema_of(node) is not None:
        return []
    owner = node.graph.owning_module
    modules = [getattr(owner, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [module.graph for module in modules if isinstance(module, fx.GraphModule)]


def _inner_nodes(node: fx.Node) -> list[fx.Node]:
    """The operator nodes of the subgraphs of a node."""
    return [inner for graph in subgraphs(node) for inner in graph.nodes if inner.op == "call_function"]


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the node changes in place: by its schema, as running statistics, or in its subgraphs."""
    if updates_statistics(node):
        arguments = bind(node)
        statistics = (arguments["running_mean"], arguments["running_var"])
        return [buffer for buffer in statistics if isinstance(buffer, fx.Node)]
    if any(mutated_inputs(inner) for inner in _inner_nodes(node)):
        return [tensor for tensor in node.all_input_nodes if tensor.op != "get_attr"]
    return [tensor for tensor, alias in tensor_arguments(node) if alias is not None and alias.is_write]


def returns_storage(node: fx.Node) -> bool:
    """Whether a result of a node that changes tensors may share the storage of one: by its schema."""
    schema = schema_of(node)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def updates_statistics(node: fx.Node) -> bool:
    """Whether the node is a batch norm in training that changes its running statistics; no schema says so."""
    if node.target is not torch.ops.aten.batch_norm.default:
        return False
    arguments = bind(node)
    return arguments["training"] is True and arguments["running_mean"] is not None


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random generator, itself or in its subgraphs."""
    if schema_of(node) is None:
        return any(is_random(inner) for inner in _inner_nodes(node))
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    arguments = bind(node)
    in_training = arguments.get("train", arguments.get("training", True)) is not False
    return in_training and bool(arguments.get("p", arguments.get("dropout_p", 1)) != 0)


def ordered_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose relative order is part of the model's meaning, in that order.

    These are random draws, nodes with an effect, and what reads a value that is changed in place.
    """
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and (is_random(node) or updates_statistics(node) or UNSTREAMED in node.meta or _reads_unstreamed(node))
    ]


def ordered_chains(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The random draws, and the nodes with an effect: what must keep its order, each among its own.

    No draw depends on the order of an update of running statistics, which waits for statistics of the batch.
    """
    ordered = ordered_nodes(graph)
    draws = [node for node in ordered if is_random(node)]
    pure = [node for node in draws if UNSTREAMED not in node.meta and not _reads_unstreamed(node)]
    return draws, [node for node in ordered if node not in pure]


def _reads_unstreamed(node: fx.Node) -> bool:
    return any(UNSTREAMED in tensor.meta for tensor in node.all_input_nodes)


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Remove operators that nothing uses, in place, unless they draw random numbers or have an effect."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not (node.users or is_random(node) or mutated_inputs(node)):
            graph.erase_node(node)
