"""What operators cost on a tile: seconds, and bytes over time, given the share of its pixels that a tile holds.

NOTE [the cost model]
1. Time. An operator takes its multiply-accumulates over the machine's rate, plus the bytes that it reads and
   writes over the machine's bandwidth, plus a constant for the call. A backward costs twice its forward. Weights
   are read per tile, and their gradients written and added per tile: many small tiles of a layer with large
   weights are slow. Memory that the operating system hands out afresh costs more than traffic: on the CPU that
   are results above the size that the C library reuses, and the copies of its input and result that
   a convolution lays out for itself. Small tiles can be faster than the plain network for that alone. Whether the
   process has an allocator that reuses large memory too is tried out once.
2. Memory is a sum of lifetimes on a line of moments: operator `n` of `N` runs forward at moment `n` and backward
   at moment `2N - 1 - n`. A result lives until its last reader has run, and if autograd keeps it, until the
   backward of the first reader that needs it; the gradient of a value from the backward of its last reader to its
   own; gradients of weights from there to the end.
3. Results that are views of an input, and gradients that are views of another (of a sum, a concatenation), are no
   new memory. Neither are results of operators that take over their input's memory.
4. Of workspaces inside an operator only the gradients of what it keeps of its own are counted. Everything but
   weights scales with the share of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxstream.graph.functionalize import WAS_IN_PLACE
from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Locality
from fxstream.machine.heap import REUSED, allocates_afresh
from fxstream.tiling.autograd_saves import Saved, takes_over
from fxstream.tiling.bounds import is_read_outside

__all__ = ["Costs", "Machine", "Part", "bytes_of", "macs_of"]

MATRIX_PRODUCTS = {
    f"aten::{name}": place
    for name, place in (("linear", 0), ("mm", 0), ("matmul", 0), ("bmm", 0), ("addmm", 1), ("baddbmm", 1))
}
"""Products and which of their tensors ends in the dim that is summed over."""
CONVOLUTIONS = {f"aten::conv{n}d" for n in (1, 2, 3)}
BACKWARD = 2
"""Cost of a backward over that of its forward."""
WEIGHTS_BACKWARD = 5
"""How often a backward moves the weights: read, their gradient written, read and added to the sum."""


def macs_of(locality: Locality, node: str) -> int:
    """Multiply-accumulates of an operator at full size: local ones by their rule, others if they are products."""
    footprint, meta = locality.verdicts[node].footprint, locality.metas[node]
    if footprint is not None or not isinstance(meta, Shape):
        return footprint.macs if footprint is not None else 0
    operator = locality.verdicts[node].operator
    original = locality.nodes[node]
    shapes = [m.shape for n in original.all_input_nodes if isinstance(m := locality.metas.get(n.name), Shape)]
    if operator in MATRIX_PRODUCTS and len(shapes) > 1:
        return meta.elements * shapes[MATRIX_PRODUCTS[operator]][-1]
    if operator in CONVOLUTIONS and len(shapes) > 1:
        return meta.elements * math.prod(shapes[1][1:])
    if operator == "aten::scaled_dot_product_attention" and len(shapes) > 2:
        return (math.prod(shapes[0]) + meta.elements) * shapes[1][-2]
    return 0


@dataclass(frozen=True, slots=True)
class Machine:
    """Multiply-accumulates and bytes per second, seconds per operator, bytes per second between ranks.

    `fresh` are bytes per second of memory that is new to the process: every allocation above `REUSED`. `host` are
    bytes per second between the device and host memory.
    """

    macs: float
    bandwidth: float
    call: float
    link: float = 1e9
    fresh: float = math.inf
    host: float = math.inf

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """A typical machine of this kind. Only ratios matter: they weigh recomputation against traffic."""
        if device.type == "cuda":
            return cls(5e13, 2e12, 3e-5, 2e11, host=2e10)
        threads = torch.get_num_threads()
        fresh = 1.25e9 * threads if allocates_afresh() else math.inf
        return cls(5e10 * threads, 1.25e10 * threads, 1e-5, fresh=fresh)

    def writing(self, count: float) -> float:
        """Seconds to fill a buffer of so many bytes."""
        return count / self.bandwidth + (count / self.fresh if count > REUSED else 0.0)


class Costs:
    """The costs of a run of operators, in the order of the graph; `part` gives those of a stretch of it.

    With `plain` operators take over their input's memory where the model calls them in place, else where they may.
    """

    def __init__(
        self,
        locality: Locality,
        machine: Machine,
        saved: Mapping[str, Saved],
        nodes: Sequence[str],
        plain: bool = False,
    ) -> None:
        self.machine = machine
        self.nodes = tuple(nodes)
        self.place = {name: i for i, name in enumerate(self.nodes)}
        self._locality, self._saved, self._plain = locality, saved, plain
        self.macs = _vector(macs_of(locality, name) for name in self.nodes)
        self.sizes = [bytes_of(locality, name) for name in self.nodes]
        self.calls = _vector(saved[name].views is None for name in self.nodes)
        self.weights = _vector(sum(self._weights(name).values()) for name in self.nodes)
        self.moved = _vector(self._moved(name) for name in self.nodes) * self.calls
        self.results, self.gradients, self.temporaries = self._lifetimes()
        self.outer: dict[str, int] = {}
        """The values that the run reads from outside, and the place of the last operator that reads each."""
        for i, name in enumerate(self.nodes):
            for given in locality.nodes[name].all_input_nodes:
                if given.name not in self.place and locality.depends_on_image(given.name):
                    self.outer[given.name] = i
        first: dict[str, str] = {}
        self.weight_bytes: dict[str, int] = {}
        """The parameters that the run reads."""
        for name in self.nodes:
            for weight, size in self._weights(name).items():
                first.setdefault(weight, name)
                self.weight_bytes[weight] = size
        self.weight_gradients = _vector(
            sum(size for weight, size in self._weights(name).items() if first[weight] == name)
            for name in self.nodes
        )

    def part(self, start: int = 0, stop: int | None = None) -> Part:
        """The operators from `start` up to, not including, `stop`."""
        return Part(self, start, len(self.nodes) if stop is None else stop)

    def _weights(self, name: str) -> dict[str, int]:
        """The parameters that a node reads and their bytes; running statistics count too, and are small."""
        return {
            given.name: bytes_of(self._locality, given.name)
            for given in self._locality.nodes[name].all_input_nodes
            if given.op == "placeholder" and not self._locality.depends_on_image(given.name)
        }

    def _moved(self, name: str) -> int:
        given = self._locality.nodes[name].all_input_nodes
        return sum(bytes_of(self._locality, n) for n in (name, *(g.name for g in given)))

    def _lifetimes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three kinds of lifetimes of note 2 as rows of node places, bytes last.

        Results: owner, last reader, first reader that keeps it. Gradients: owner, last reader, first value that
        has a view of it. Gradients that are new memory until they are added to another: owner, reader.
        """
        count, locality = len(self.nodes), self._locality
        inputs, users, roots = self._edges()
        self.allocated = self._allocated(inputs, roots)
        leaves = [is_read_outside(locality, name, self.place) for name in self.nodes]
        last, keeper, first = list(range(count + 1)), [count] * (count + 1), list(range(count))
        for i, name in enumerate(self.nodes):
            if leaves[i]:
                last[roots[i]] = count
            saved = self._saved[name]
            for j in (*(inputs[i][k] for k in saved.inputs if k < len(inputs[i])), *[i] * saved.result):
                keeper[roots[j]] = min(keeper[roots[j]], i)
            for j in inputs[i]:
                last[roots[j]] = max(last[roots[j]], i)
        groups = list(range(count))
        for i in reversed(range(count)):
            if len(users[i]) == 1 and self._saved[self.nodes[users[i][0]]].passes_on:
                groups[i] = groups[users[i][0]]
            first[groups[i]] = min(first[groups[i]], i)
        sizes = self.sizes
        results = [(i, last[i], keeper[i], sizes[i]) for i in range(count) if roots[i] == i]
        for i, name in enumerate(self.nodes):
            if extra := self._saved[name].extra:
                elements = sum(shape.elements for shape in _shapes_of(locality, name))
                results.append((i, i, i, round(extra * elements)))
        floats = [self._has_gradient(name) for name in self.nodes]
        gradients = [
            (i, count if leaves[i] else users[i][-1], first[i], sizes[i])
            for i in range(count)
            if groups[i] == i and floats[i] and (users[i] or leaves[i])
        ]
        temporaries = [
            (j, i, sizes[j])
            for i, name in enumerate(self.nodes)
            for j in inputs[i]
            if j >= 0 and floats[j] and users[j][-1] != i and not self._saved[name].passes_on
        ]
        for i, name in enumerate(self.nodes):
            if between := self._saved[name].between:
                elements = sum(shape.elements for shape in _shapes_of(locality, name))
                temporaries.append((i, i, round(between * elements)))
        self.kept = frozenset(name for i, name in enumerate(self.nodes) if keeper[roots[i]] < count)
        """The nodes whose results autograd keeps for some operator of the run."""
        return (
            torch.tensor(results, dtype=torch.int64).view(-1, 4),
            torch.tensor(gradients, dtype=torch.int64).view(-1, 4),
            torch.tensor(temporaries, dtype=torch.int64).view(-1, 3),
        )

    def _allocated(self, inputs: list[list[int]], roots: list[int]) -> torch.Tensor:
        """What each operator allocates, as rows: its place, the place of the value as large as that, its bytes."""
        rows = []
        for i, name in enumerate(self.nodes):
            rows += [(i, i, self.sizes[i])] * (roots[i] == i)
            if self._locality.verdicts[name].operator in CONVOLUTIONS:
                rows += [(i, j, self.sizes[j]) for j in (i, *inputs[i]) if j >= 0]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def _edges(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Per node the places of its inputs (-1 outside) and its readers, and the place whose memory it is."""
        users: list[list[int]] = [[] for _ in self.nodes]
        inputs, roots = [], list(range(len(self.nodes) + 1))
        for i, name in enumerate(self.nodes):
            node = self._locality.nodes[name]
            inputs.append([self.place.get(n.name, -1) for n in node.all_input_nodes])
            for j in inputs[i]:
                if j >= 0:
                    users[j].append(i)
            saved = self._saved[name]
            # Autograd copies what an operator keeps and then changes in place.
            was = WAS_IN_PLACE in node.meta and 0 not in saved.inputs
            in_place = was if self._plain else takes_over(self._locality, self._saved, name)
            viewed = 0 if in_place else saved.views
            if viewed is not None and viewed < len(inputs[i]):
                roots[i] = roots[inputs[i][viewed]]
        return inputs, users, roots

    def _has_gradient(self, name: str) -> bool:
        meta = self._locality.metas[name]
        return not isinstance(meta, Shape) or meta.has_gradient


class Part:
    """A stretch of a run. Shares are a vector over the nodes of the whole run: what a tile holds of each."""

    def __init__(self, costs: Costs, start: int, stop: int) -> None:
        self.costs, self.start, self.stop = costs, start, stop
        self.turn = stop - start
        """The moment between forward and backward."""
        results, gradients, temporaries = (
            rows[(rows[:, 0] >= start) & (rows[:, 0] < stop)]
            for rows in (costs.results, costs.gradients, costs.temporaries)
        )
        gradients = gradients[gradients[:, 1] < stop]
        temporaries = temporaries[temporaries[:, 1] < stop]
        weights = torch.arange(start, stop)
        forward, backward = weights - start, 2 * self.turn - 1 - (weights - start)
        never = torch.tensor(2 * self.turn)

        def moment(places: torch.Tensor, of: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
            return torch.where(places < stop, of[(places - start).clamp(0, self.turn - 1)], otherwise)

        read = moment(results[:, 1], forward, never)
        kept_until = torch.maximum(read, moment(results[:, 2], backward, torch.tensor(0)))
        self._results, self._read_until = results, read
        allocated = costs.allocated
        self._allocated = allocated[(allocated[:, 0] >= start) & (allocated[:, 0] < stop)]
        self._owner = torch.cat([results[:, 0], gradients[:, 0], temporaries[:, 0], weights])
        self._bytes = torch.cat([results[:, 3], gradients[:, 3], temporaries[:, 2]]).double()
        self._scaled = len(self._bytes)
        self._bytes = torch.cat([self._bytes, costs.weight_gradients[start:stop]])
        self._begin = torch.cat(
            [
                results[:, 0] - start,
                moment(gradients[:, 1], backward, never),
                moment(temporaries[:, 1], backward, never),
                backward,
            ]
        )
        self._until = torch.cat(
            [
                kept_until,
                moment(gradients[:, 2].clamp(min=start), backward, never),
                moment(temporaries[:, 1], backward, never),
                never.expand(len(weights)),
            ]
        )

    def profile(self, shares: torch.Tensor, outer: Mapping[str, float] | None = None) -> torch.Tensor:
        """Bytes at each moment of one forward and backward of a tile with these shares, recorded.

        `shares` may have further dims in front, one tile each; so has the result. `outer` are bytes of gradients
        of values from outside, which are there from the backward of their last reader on.
        """
        amounts = self._bytes * shares[..., self._owner]
        amounts[..., self._scaled :] = self._bytes[self._scaled :]
        levels = self._levels(self._begin, self._until, amounts)
        for name, size in (outer or {}).items():
            levels[..., 2 * self.turn - 1 - (self.costs.outer[name] - self.start) :] += size
        return levels

    def held(self, shares: torch.Tensor) -> torch.Tensor:
        """Bytes that are there between that forward and its backward."""
        amounts = self._bytes * shares[..., self._owner]
        across = (self._begin < self.turn) & (self._until >= self.turn)
        return amounts[..., across].sum(-1)

    def profile_unrecorded(self, shares: torch.Tensor) -> torch.Tensor:
        """The same for one forward that nothing is kept of."""
        amounts = self._results[:, 3] * shares[..., self._results[:, 0]]
        return self._levels(self._results[:, 0] - self.start, self._read_until, amounts)[..., : self.turn]

    def _levels(self, begin: torch.Tensor, until: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        change = amounts.new_zeros(*amounts.shape[:-1], 2 * self.turn + 2)
        change.index_add_(-1, begin, amounts)
        change.index_add_(-1, until + 1, -amounts)
        return change.cumsum(-1)[..., :-1]

    def seconds(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted seconds of one forward and of one backward of a tile with these shares (note 1)."""
        stretch, machine = slice(self.start, self.stop), self.costs.machine
        held = shares[..., stretch]
        present = (held > 0).double()
        work = held @ (self.costs.macs[stretch] / machine.macs + self.costs.moved[stretch] / machine.bandwidth)
        work = work + present @ self.costs.calls[stretch] * machine.call
        if machine.fresh < math.inf:
            by, like, size = self._allocated.unbind(-1)
            allocated = size * shares[..., like] * (shares[..., by] > 0)
            work = work + (allocated * (allocated > REUSED)).sum(-1) / machine.fresh
        read = present @ self.costs.weights[stretch] / machine.bandwidth
        return work + read, BACKWARD * work + WEIGHTS_BACKWARD * read


def bytes_of(locality: Locality, name: str) -> int:
    """Bytes of a node's result, of all of them where there are several."""
    return sum(shape.bytes for shape in _shapes_of(locality, name))


def _shapes_of(locality: Locality, name: str) -> list[Shape]:
    meta = locality.metas.get(name)
    return [m for m in (meta if isinstance(meta, tuple) else (meta,)) if isinstance(m, Shape)]


def _vector(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
