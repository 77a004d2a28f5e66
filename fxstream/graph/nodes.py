"""Functions on fx nodes: arguments by schema name, calls from them, copies of nodes and graphs.

Every other file that reads or writes the arguments of an operator by name, or copies nodes, does it through here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

__all__ = [
    "TRACED",
    "attributes_of",
    "bind",
    "bind_to",
    "call_with",
    "copy_graph",
    "copy_node",
    "name_of",
    "parameters_of",
    "schema_of",
    "trace_of",
]

TRACED = ("nn_module_stack", "stack_trace")
"""Keys in ``node.meta`` that lead back to the user's module and source line."""


def trace_of(node: fx.Node) -> dict[str, Any]:
    """What of a node's meta leads back to the user's module and source line."""
    return {key: node.meta[key] for key in TRACED if key in node.meta}


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    """The schema of an operator node, or None for anything else."""
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def name_of(node: fx.Node) -> str:
    """The name of an operator without namespace and overload, as ``conv2d``; empty for anything else."""
    schema = schema_of(node)
    return "" if schema is None else schema.name.split("::")[1]


@functools.cache
def parameters_of(target: torch._ops.OpOverload) -> tuple[torch.Argument, ...]:
    """The parameters in the schema of an operator, in order; reading them from the schema is slow."""
    return tuple(target._schema.arguments)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator node by schema name, defaults filled in; empty for a node without a schema.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> bind(graph.call_function(torch.ops.aten.add.Tensor, (x, x)))
    {'self': x, 'other': x, 'alpha': 1}
    """
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return bind_to(node.target, node.args, node.kwargs) if is_operator else {}  # type: ignore[arg-type]


def bind_to(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments of an operator by schema name, in the order of the schema, defaults filled in.

    A parameter without a default that has no argument is None.
    """
    return {
        parameter.name: args[i] if i < len(args) else kwargs.get(parameter.name, parameter.default_value)
        for i, parameter in enumerate(parameters_of(target))
    }


def call_with(graph: fx.Graph, target: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> fx.Node:
    """A call at the insertion point of the graph with arguments by schema name.

    Keyword-only arguments are passed as keywords, and only those in `arguments`; all others by position, with
    their defaults.
    """
    positional, keywords = [], {}
    for parameter in parameters_of(target):
        if not parameter.kwarg_only:
            positional.append(arguments.get(parameter.name, parameter.default_value))
        elif parameter.name in arguments:
            keywords[parameter.name] = arguments[parameter.name]
    return graph.call_function(target, tuple(positional), keywords)


def attributes_of(graph: fx.Graph, owner: object = None) -> dict[str, Any]:
    """What the graph takes from its module (or another `owner`), by name: subgraphs, and functions of the user."""
    owner = graph.owning_module if owner is None else owner
    return {str(n.target): operator.attrgetter(str(n.target))(owner) for n in graph.nodes if n.op == "get_attr"}


def copy_node(graph: fx.Graph, node: fx.Node, replace: Callable[[fx.Node], Any]) -> fx.Node:
    """A copy of a node, with its name and meta, at the insertion point of another graph.

    `replace` gives the argument that takes the place of each node among its arguments: a node of the new graph, or
    a constant.
    """
    copy = graph.node_copy(node, replace)
    copy.name = node.name  # fx renames a node whose name is one of Python's (`input`)
    return copy


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and the copy of each node but the output; copies have the names of their nodes."""
    copy = fx.Graph(graph.owning_module)
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))
    for original, node in nodes.items():
        node.name = original.name
    return copy, nodes
