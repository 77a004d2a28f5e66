"""Flattened positions, taken apart again: what follows a flatten works on the tensor before it.

NOTE [positions]
1. A reshape that joins all stream axes in one dim has a source: the tensor before it (or a reshape of that which
   leaves the stream axes alone).
2. An operator that treats this dim as positions works on the source, and its result, flattened, takes the place
   of what it was: that has a source in turn. So whatever else reads a flat tensor gets it, and what nothing reads
   is not computed.
3. A reshape that takes the positions apart again, by the sizes of a map that had them, is one of the source.
4. Softmax over positions is a logarithm of a sum of exponentials and a map; products that sum over positions are
   `fxstream::contract`. Both are reductions over space.
5. The rewritten graph holds at every size. So nothing is concluded from sizes that are equal at this one: a dim of
   one pixel, a squeezed batch, or a size that is not that of a stream axis by its origin leave the graph as it is.
6. A reshape that splits a stream axis in windows of a constant size, or in a constant number of parts, or joins
   them again, is `unflatten` and `flatten` of this axis. The windows of all axes, joined, are positions as any
   others.
7. A node that had no stream axes may have some once what it reads has been rewritten. So the graph is typed and
   rewritten again, until nothing changes.
8. Where two tensors of a product are flat in different dims, as queries and keys of attention, the positions of
   one stay apart, and the other is read whole, as it is.
9. Positions that cannot be followed, as beside a token of another kind, are one stream axis of their own from the
   flatten on: a tensor with one stream axis is its own source.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxstream.graph.captured import Captured
from fxstream.graph.effects import UNSTREAMED, is_random, remove_dead_nodes, updates_statistics
from fxstream.graph.nodes import name_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering.proxy import Draft, Operator, Proxy
from fxstream.rules import rule_of
from fxstream.rules.channelwise import PIXEL_LOSSES

__all__ = ["FlatOperator", "Handler", "Result", "Unflattened", "adapted", "unflattened"]

NOT_POINTWISE = ("prelu", "rrelu", "broadcast_tensors")
"""Operators with a pointwise rule, but with arguments per channel, or several results."""


@dataclass(frozen=True, slots=True)
class Unflattened:
    """Dims `place`, `place + 1`, ... of `tensor`, of sizes `extents`, are dim `place` of the flat tensor.

    `space` are those of them that are stream axes, in the order of the axes, counted from `place`.
    """

    tensor: Proxy
    place: int
    extents: tuple[int, ...]
    space: tuple[int, ...]

    @property
    def joined(self) -> list[int]:
        """The dims that are one in the flat tensor."""
        return list(range(self.place, self.place + len(self.extents)))

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last of them."""
        return self.joined[0], self.joined[-1]

    @property
    def dims(self) -> tuple[int, ...]:
        """The stream dims."""
        return tuple(self.place + offset for offset in self.space)

    def shape(self, flat: Sequence[int]) -> tuple[int, ...]:
        """Its shape, from that of the flat tensor."""
        return (*flat[: self.place], *self.extents, *flat[self.place + 1 :])

    def dim(self, flat: int) -> int:
        """Where a dim of the flat tensor is, or the first of the positions."""
        return flat if flat <= self.place else flat + len(self.extents) - 1

    def apart(self, flat: Sequence[int]) -> list[int]:
        """Where dims of the flat tensor are, with all positions for theirs."""
        return [d for f in flat for d in (self.joined if f == self.place else [self.dim(f)])]

    def at(self, tensor: Proxy, place: int | None = None) -> Unflattened:
        """A result with the same positions."""
        return replace(self, tensor=tensor, place=self.place if place is None else place)

    def fits(self, other: Unflattened) -> bool:
        """Whether both have the same positions."""
        return self.extents == other.extents and self.space == other.space


class FlatOperator(Operator):
    """An operator of flat tensors; `sources` has what each flat tensor of the graph was before."""

    def __init__(self, node: fx.Node, draft: Draft, sources: dict[fx.Node, Unflattened], bound: bool) -> None:
        super().__init__(node, draft)
        self.sources, self.bound = sources, bound

    def source(self, tensor: Proxy) -> Unflattened | None:
        """What a tensor was before it was flattened; None if it is not flat."""
        source = self.sources.get(tensor.node)
        return source and source.at(Proxy(source.tensor.node, self))

    def positions(self, tensor: Proxy) -> Unflattened | None:
        """The source of a tensor, the tensor itself where it has one stream axis (rule 9)."""
        source = self.source(tensor)
        if source is not None or len(tensor.dims) != 1:
            return source
        return Unflattened(tensor, tensor.dims[0], (tensor.shape[tensor.dims[0]],), (0,))

    def whole(self, tensor: Proxy) -> Proxy:
        """The tensor at all positions (rule 8)."""
        source = self.positions(tensor)
        return tensor if source is None else self.call("fxstream::whole", source.tensor, *source.ends)

    def only(self, argument: str) -> Unflattened | None:
        """The source of a tensor, or of the first of a list with the same positions, if no other input is flat."""
        tensors = self.arguments[argument]
        tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
        flat = {node for node in self.node.all_input_nodes if node in self.sources}
        if flat != {tensor.node for tensor in tensors}:
            return None
        first, *others = (self.sources[tensor.node] for tensor in tensors)
        is_alike = all(first.fits(other) and first.place == other.place for other in others)
        return self.source(tensors[0]) if is_alike else None

    def again(self, /, **replaced: Any) -> Proxy:
        """Write the same operator on the sources of its flat inputs, with some of its arguments replaced."""
        return super().again(**map_aggregate(self.arguments | replaced, self._unflattened))  # type: ignore[arg-type]

    def _unflattened(self, leaf: Any) -> Any:
        return self.sources[leaf.node].tensor if isinstance(leaf, Proxy) and leaf.node in self.sources else leaf


Result = Unflattened | Proxy | None
"""A result that was flat, one that never was, or None where the operator stays as it is."""
Handler = Callable[[FlatOperator], Result]


def unflattened(captured: Captured, typed: TypedGraph, handlers: Mapping[str, Handler]) -> Captured:
    """The same model with its positions apart wherever that is possible; the same object where nothing changes.

    `handlers` are those of operators by name; pointwise operators need none.
    """
    draft = Draft.of(captured, typed)
    sources: dict[fx.Node, Unflattened] = {}
    is_changed = False
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and not _is_ordered(node):
            is_changed |= _unwrap_broadcast(node)
            handler = _handler(node, handlers, sources)
            if handler is not None:
                is_changed |= _rewrite(handler, FlatOperator(node, draft, sources, captured.bound))
    if not is_changed:
        return captured
    remove_dead_nodes(draft.graph)
    return draft.finished(captured)


def _is_ordered(node: fx.Node) -> bool:
    """Whether the order of a node is part of the model's meaning."""
    read = node.all_input_nodes[:1] if updates_statistics(node) else node.all_input_nodes
    return is_random(node) or any(UNSTREAMED in n.meta for n in (node, *read))


def _unwrap_broadcast(node: fx.Node) -> bool:
    """Bypass an explicit `broadcast_tensors` before a loss of pixels; the loss broadcasts itself."""
    pair = node.args[:2]
    makers = {n.args[0] if isinstance(n, fx.Node) and n.target is operator.getitem else None for n in pair}
    maker = next(iter(makers), None)
    is_broadcast = isinstance(maker, fx.Node) and maker.target is torch.ops.aten.broadcast_tensors.default
    if not is_broadcast or len(makers) > 1 or name_of(node) not in PIXEL_LOSSES:
        return False
    node.args = (*(maker.args[0][n.args[1]] for n in pair), *node.args[2:])  # type: ignore[union-attr, index]
    return True


def _handler(
    node: fx.Node, handlers: Mapping[str, Handler], sources: Mapping[fx.Node, Unflattened]
) -> Handler | None:
    name, is_flat = name_of(node), any(n in sources for n in node.all_input_nodes)
    if name in handlers or not is_flat:
        return handlers.get(name)
    if node.target is operator.getitem:
        return _item
    rule = rule_of(node.target)
    is_pointwise = rule is not None and rule.family == "pointwise" and name not in NOT_POINTWISE
    return _pointwise if is_pointwise or name in PIXEL_LOSSES else None


def _rewrite(handler: Handler, op: FlatOperator) -> bool:
    """Rule 2 for one operator; whether the graph changes."""
    with op.draft.graph.inserting_before(op.node):
        result = handler(op)
        if isinstance(result, Unflattened):
            is_view = result.tensor.node in op.node.all_input_nodes
            if is_view or isinstance(op.draft.values[op.node], tuple):
                op.sources[op.node] = result
                return False
            flat = result.tensor.flatten(*result.ends)
            op.sources[flat.node] = result
            result = flat
    if result is not None:
        op.draft.replace(op.node, result)
    return result is not None


def _pointwise(op: FlatOperator) -> Result:
    """An operator on tensors that broadcast, with all positions in the same dim."""
    inputs: list[Proxy] = [op.proxy(node) for node in op.node.all_input_nodes]
    rank = max(tensor.ndim for tensor in inputs)
    sources = [(tensor, source) for tensor in inputs if (source := op.source(tensor)) is not None]
    first, places = sources[0][1], {rank - tensor.ndim + source.place for tensor, source in sources}
    if len(places) != 1 or not all(source.fits(first) for _, source in sources):
        return None
    place = places.pop()
    operands = {tensor.node: adapted(op, tensor, first, place - rank) for tensor in inputs}
    if None in operands.values():
        return None
    arguments = map_aggregate(op.arguments, lambda a: operands[a.node] if isinstance(a, Proxy) else a)
    result = op.again(**arguments)  # type: ignore[arg-type]
    return result if op.name in PIXEL_LOSSES and op.arguments.get("reduction") else first.at(result, place)


def adapted(op: FlatOperator, tensor: Proxy, like: Unflattened, place: int) -> Proxy | None:
    """An operand beside an unflattened tensor, with as many dims for positions; `place` is counted from the end.

    None where its dim there is neither one nor the positions.
    """
    source, dim = op.source(tensor), tensor.ndim + place
    if source is not None or dim < 0:
        return tensor if source is None else source.tensor
    if tensor.shape[dim] == 1:
        for _ in like.extents[1:]:
            tensor = tensor.unsqueeze(dim)
        return tensor
    if tensor.shape[dim] != math.prod(like.extents):
        return None
    sizes = [tensor.size(d) for d in range(tensor.ndim)]
    return tensor.reshape([*sizes[:dim], *(like.tensor.size(d) for d in like.joined), *sizes[dim + 1 :]])


def _item(op: FlatOperator) -> Result:
    """One of several results."""
    several, index = op.node.args
    source = op.source(op.proxy(several))
    return source and source.at(op.call(operator.getitem, source.tensor, index))
