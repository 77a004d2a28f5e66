"""Normalisations that were taken apart, as the model's own operator again where a stretch of the graph runs whole.

NOTE [normalisations that run whole]
1. What a normalisation was is kept at the node of its moments (`Whole`). Where all that it was taken apart into
   runs whole, in the dense graph or in one checkpoint, the operator itself runs in its place: one kernel forward
   and one backward, in the memory that the model needs.
2. Running statistics change once per call. In the dense graph the operator does that, where nothing else reads
   or changes them. A checkpoint runs twice: there, and anywhere else, the operator gets empty statistics and a
   momentum of one, so that they become those of the batch, which the dense graph goes on with.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxstream.graph.captured import CUMULATIVE
from fxstream.graph.nodes import call_with, parameters_of
from fxstream.graph.typed_graph import TypedGraph

__all__ = ["WHOLE", "Name", "Whole", "result_of", "runs_whole", "with_statistics"]

WHOLE = "fxstream_whole"
"""Key in the ``node.meta`` of moments: the normalisation that they were taken of."""
RUNNING = ("running_mean", "running_var")


class Name(str):
    """The name of a node, among arguments that are none."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Whole:
    """An operator that was taken apart: its arguments by schema name, with names for nodes.

    `inside` are the nodes that it was taken apart into, `result` is the last of them, `moments` the node of its
    statistics, which an update of running ones may read too if it `has_update`. `is_wide` says that statistics of
    the batch lose nothing in the type of the running ones.
    """

    target: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    moments: str
    result: str
    inside: frozenset[str]
    has_update: bool = False
    is_wide: bool = True

    @property
    def names(self) -> Iterator[str]:
        """The nodes that it reads."""
        return (one for one in self.arguments.values() if isinstance(one, Name))

    def updates_alone(self, graph: TypedGraph) -> bool:
        """Whether it may change the running statistics by itself (rule 2)."""
        running = [self.arguments[name] for name in RUNNING if self.arguments.get(name) is not None]
        is_kept = self.arguments.get("momentum") != CUMULATIVE
        return is_kept and all(len(graph[name].node.users) == 1 for name in running)

    def write(self, graph: fx.Graph, env: Mapping[str, fx.Node], **replaced: Any) -> fx.Node:
        """A call of it, with some arguments replaced."""
        arguments = map_aggregate({**self.arguments, **replaced}, lambda a: env[a] if isinstance(a, Name) else a)
        return call_with(graph, self.target, arguments)

    def write_with_statistics(
        self, graph: fx.Graph, env: Mapping[str, fx.Node], typed: TypedGraph
    ) -> tuple[fx.Node, fx.Node]:
        """A call of it that leaves running statistics as they are: its result, and the moments of the batch."""
        plain = self.write(graph, env, **dict.fromkeys(RUNNING))
        value = typed.value(self.moments)
        call = graph.call_function(with_statistics, (self.target, value.shape, value.dtype, *plain.args))
        graph.erase_node(plain)
        items = [graph.call_function(operator.getitem, (call, k)) for k in range(2)]
        return items[0], items[1]


def result_of(moments: fx.Node) -> str | None:
    """The result of the normalisation that moments were taken of; None where they belong to none."""
    whole = moments.meta.get(WHOLE)
    return whole.result if isinstance(whole, Whole) else None


def runs_whole(graph: TypedGraph, nodes: Collection[str]) -> dict[str, Whole]:
    """The normalisations that can run as one operator where these nodes run whole, by their moments (rule 1).

    What they read is there when their moments are taken: their input, and placeholders. A rewrite may have given a
    node of theirs another input than the operator had, as a wide map (see `wraps`); then they stay apart.
    """
    wholes = (graph[name].node.meta.get(WHOLE) for name in nodes)
    return {
        whole.moments: whole
        for whole in wholes
        if isinstance(whole, Whole)
        and all(one in nodes or graph.is_integer(one) for one in whole.inside)
        and whole.is_wide
        and _is_there(graph, whole)
        and _reads_its_own(graph, whole)
    }


def _is_there(graph: TypedGraph, whole: Whole) -> bool:
    _, *others = whole.names
    return all(
        one in graph.nodes and graph[one].node.op == "placeholder" for one in others if not _runs(whole, one)
    )


def _reads_its_own(graph: TypedGraph, whole: Whole) -> bool:
    """Whether all that it was taken apart into reads what the operator reads, and nothing else."""
    read = {one.name for name in whole.inside for one in graph[name].node.all_input_nodes}
    return read <= whole.inside.union(whole.names)


def _runs(whole: Whole, name: str) -> bool:
    return any(whole.arguments.get(running) == name for running in RUNNING)


def with_statistics(
    target: torch._ops.OpOverload, shape: tuple[int, ...], dtype: torch.dtype, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a normalisation, and the moments of its input in this shape; the variance itself is missing.

    >>> image = torch.tensor([[[1.0, 3.0]]])
    >>> arguments = (image, None, None, None, None, True, 0.1, 0.0, False)
    >>> with_statistics(torch.ops.aten.batch_norm.default, (3, 1), torch.float32, *arguments)
    (tensor([[[-1.,  1.]]]), tensor([[2.],
            [0.],
            [2.]]))
    """
    statistics = torch.zeros(3, shape[-1], dtype=dtype, device=arguments[0].device)
    empty = {"running_mean": statistics[0], "running_var": statistics[2], "momentum": 1.0}
    named = [parameter.name for parameter in parameters_of(target)]
    result = target(*(empty.get(name, argument) for name, argument in zip(named, arguments, strict=True)))
    return result, statistics if len(shape) == 2 else statistics.unsqueeze(1).expand(shape)
