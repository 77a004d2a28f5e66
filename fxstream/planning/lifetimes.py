"""When the results of a run of operators are in memory, and the gradients of these.

NOTE [lifetimes]
1. Operator `n` of `N` runs forward at step `n` and backward at step `2N - 1 - n`. A result lives until its last
   reader has run, and if autograd keeps it, until the backward of the first reader that needs it; the gradient of
   a value from the backward of its last reader to its own; gradients of weights from there to the end.
2. Results that are views of an input, and gradients that are views of another (of a sum, a concatenation), are no
   new memory. Neither are results of operators that take over their input's memory.
3. What others read is theirs to hold once it is made: they have let go of it when the run's backward comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fxstream.graph.effects import WAS_IN_PLACE
from fxstream.graph.typed_graph import Saves, TypedGraph

__all__ = ["CONVOLUTIONS", "Lifetimes"]

CONVOLUTIONS = {f"aten::conv{n}d" for n in (1, 2, 3)}


class Lifetimes:
    """The lifetimes of a run of operators of a graph, in its order.

    The operators take over their input's memory as the graph's passes found (`TypedNode.reuses`); with `plain`,
    where the model calls them in place. In the graph of a segment (`is_segment`) nobody holds the results.
    """

    def __init__(self, graph: TypedGraph, nodes: Sequence[str], plain: bool, is_segment: bool) -> None:
        self._graph, self.nodes, self._plain, self._is_segment = graph, nodes, plain, is_segment
        self.place = {name: i for i, name in enumerate(nodes)}
        self.sizes = [graph[name].bytes for name in nodes]
        self._inputs, self._users, self._roots = self._edges()
        self.allocated = self._allocated()
        self.results, self.kept = self._results()
        self._own_from: list[int] = []
        """The place from which on in backward the gradient of a value that a node reads is memory of its own."""
        self.gradients, self.temporaries = self._gradients(), self._temporaries()

    def own_from(self, reader: int, start: int) -> int:
        """The operator after `start` whose backward has the gradient of a value that `reader` is the last to read.

        Where the reader passes the gradient of its result on, it is new memory when that one would be gone.
        """
        return max(-1, self._own_from[reader] - start)

    def _results(self) -> tuple[torch.Tensor, frozenset[str]]:
        """Lifetimes of results as rows: owner, last reader, first reader that saves it, bytes; and those saved."""
        count = len(self.nodes)
        last, saver = list(range(count + 1)), [count] * (count + 1)
        for i, name in enumerate(self.nodes):
            saves, inputs = self.saves(name), self._inputs[i]
            if self._leaves(name):
                last[self._roots[i]] = count
            for j in (*(inputs[k] for k in saves.inputs if k < len(inputs)), *[i] * saves.result):
                saver[self._roots[j]] = min(saver[self._roots[j]], i)
            for j in inputs:
                last[self._roots[j]] = max(last[self._roots[j]], i)
        rows = [(i, last[i], saver[i], self.sizes[i]) for i in range(count) if self._roots[i] == i]
        rows += [(i, i, i, size) for i, size in self._extra("extra")]
        saved = (name for i, name in enumerate(self.nodes) if saver[self._roots[i]] < count)
        return _rows(rows, 4), frozenset(saved)

    def _extra(self, kind: str) -> list[tuple[int, int]]:
        """Which operators make extra values of this kind, and their bytes."""
        rates = [getattr(self.saves(name), kind) for name in self.nodes]
        elements = (sum(value.elements for value in self._graph[name].values) for name in self.nodes)
        return [
            (i, round(rate * count)) for i, (rate, count) in enumerate(zip(rates, elements, strict=True)) if rate
        ]

    def _leaves(self, name: str) -> bool:
        """Whether a result is read outside of the run."""
        inside = {**self.place, "output": -1} if self._is_segment else self.place
        return self._graph.is_read_outside(name, inside)

    def _gradients(self) -> torch.Tensor:
        """Lifetimes of gradients as rows: owner, last reader, first value that has a view of it, bytes."""
        count, users = len(self.nodes), self._users
        groups, first = list(range(count)), list(range(count))
        for i in reversed(range(count)):
            if len(users[i]) == 1 and self.saves(self.nodes[users[i][0]]).passes_on:
                groups[i] = groups[users[i][0]]
            first[groups[i]] = min(first[groups[i]], i)
        passes_on = (self.saves(name).passes_on for name in self.nodes)
        self._own_from = [first[groups[i]] - 1 if is_view else i for i, is_view in enumerate(passes_on)]
        rows = []
        for i, name in enumerate(self.nodes):
            leaves = self._leaves(name)
            if groups[i] == i and self._has_gradient(name) and (users[i] or leaves):
                rows.append((i, count if leaves else users[i][-1], first[i], self.sizes[i]))
        return _rows(rows, 4)

    def _temporaries(self) -> torch.Tensor:
        """Gradients that are new memory until they are added to another, as rows: owner, reader, bytes."""
        rows = []
        for i, name in enumerate(self.nodes):
            for j in self._inputs[i] if not self.saves(name).passes_on else ():
                if j >= 0 and self._has_gradient(self.nodes[j]) and self._users[j][-1] != i:
                    rows.append((j, i, self.sizes[j]))
        rows += [(i, i, size) for i, size in self._extra("between")]
        return _rows(rows, 3)

    def _allocated(self) -> torch.Tensor:
        """What each operator allocates, as rows: its index, the index of the value as large as that, its bytes."""
        rows = []
        for i, name in enumerate(self.nodes):
            rows += [(i, i, self.sizes[i])] * (self._roots[i] == i)
            verdict = self._graph[name].verdict
            if verdict is not None and verdict.operator in CONVOLUTIONS:
                rows += [(i, j, self.sizes[j]) for j in (i, *self._inputs[i]) if j >= 0]
        return _rows(rows, 3)

    def _edges(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Per node the indices of its inputs (-1 outside) and its readers, and the index whose memory it is."""
        users: list[list[int]] = [[] for _ in self.nodes]
        inputs, roots = [], list(range(len(self.nodes) + 1))
        for i, name in enumerate(self.nodes):
            node, saves = self._graph[name], self.saves(name)
            inputs.append([self.place.get(one, -1) for one in node.inputs])
            for j in inputs[i]:
                if j >= 0:
                    users[j].append(i)
            # Autograd copies what an operator saves and then changes in place.
            was = WAS_IN_PLACE in node.node.meta and 0 not in saves.inputs
            viewed = 0 if (was if self._plain else node.reuses) else saves.views
            if viewed is not None and viewed < len(inputs[i]):
                roots[i] = roots[inputs[i][viewed]]
        return inputs, users, roots

    def _has_gradient(self, name: str) -> bool:
        return self._graph[name].has_gradient

    def saves(self, name: str) -> Saves:
        """What autograd saves of an operator."""
        saves = self._graph[name].saves
        assert saves is not None, name
        return saves


def _rows(rows: Iterable[tuple[int, ...]], count: int) -> torch.Tensor:
    """Rows of integers, sorted by the first of each."""
    table = torch.tensor(sorted(rows), dtype=torch.int64)
    return table.view(-1, count)
