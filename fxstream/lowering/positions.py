"""Flattened positions, taken apart again: what follows a flatten runs on the tensor before it.

NOTE [twins]
1. A reshape that joins all stream axes in one dim has a twin, the tensor before it (or a reshape of that which
   leaves the stream axes alone).
2. An operator that treats this dim as positions runs on the twin, and its result, flattened, takes the place of
   what it was: its twin is known in turn. So whatever else reads a flat tensor gets it, and what nothing reads is
   not computed.
3. A reshape that takes the positions apart again, by the sizes of a map that had them, is one of the twin.
4. Softmax over positions is a logarithm of a sum of exponentials and a map; products that sum over positions are
   `fxstream::contract`. Both are reductions over space.
5. The rewritten graph holds at every size. So nothing is concluded from sizes that are equal at this one: a dim of
   one pixel, a squeezed batch, or a size that is not that of a stream axis by its origin leave the graph as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.graph.capture import Captured
from fxstream.graph.effects import UNSTREAMED, is_random, remove_dead_nodes, updates_statistics
from fxstream.graph.shapes import Meta, Shape
from fxstream.graph.typed_graph import Locality
from fxstream.lowering.twins import Twin, blocks
from fxstream.lowering.writer import Lowering, Writer, copied
from fxstream.rules import Value, rule_of
from fxstream.rules.channelwise import KEEPING, REDUCING, SPLITTING
from fxstream.rules.classes import CLASS_LOSSES, PIXEL_LOSSES
from fxstream.rules.ops import overload

__all__ = ["LOWERINGS", "with_positions"]

aten = torch.ops.aten
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CONVOLUTIONS = {2: aten.conv2d.default, 3: aten.conv3d.default}
PER_CHANNEL = {"batch_norm", "prelu", "rrelu"}
Found = Twin | fx.Node | None
"""The twin of a result, or the result itself where it is not flat; None where the operator stays as it is."""


def with_positions(captured: Captured, locality: Locality) -> Captured:
    """The same model with its positions apart wherever that is possible; the same object where nothing changes."""
    graph, _ = copied(captured.graph)
    rewriting = _Rewriting(graph, locality, captured.bound)
    for node in list(graph.nodes):
        rewriting.visit(node)
    if not rewriting.changed:
        return captured
    remove_dead_nodes(graph)
    graph.lint()
    root = {n.target: getattr(captured.module, n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(captured, module=fx.GraphModule(root, graph))


class _Rewriting:
    """The walk over the graph, node by node; `twins` are those of the flat tensors so far."""

    def __init__(self, graph: fx.Graph, locality: Locality, bound: bool) -> None:
        self.changed = False
        self._graph, self._bound = graph, bound
        self._metas: dict[str, Meta] = dict(locality.metas)
        self._values = locality.values
        self._twins: dict[fx.Node, Twin] = {}
        self._apart: dict[fx.Node, tuple[int, ...]] = {}

    def visit(self, node: fx.Node) -> None:
        """Rule 2 for one operator."""
        read = node.all_input_nodes[:1] if updates_statistics(node) else node.all_input_nodes
        if node.op != "call_function" or any(UNSTREAMED in n.meta for n in (node, *read)):
            return
        found: Found = None
        if node.target is operator.getitem:
            found = self._item(node)
        elif isinstance(node.target, torch._ops.OpOverload) and not is_random(node):
            name = node.target._schema.name.split("::")[1]
            handler = self._handler(name, node)
            found = handler(name, Writer(self._graph, node, self._metas, ())) if handler is not None else None
        if isinstance(found, Twin):
            self._flatten_again(node, found)
        elif found is not None and found is not node:
            self._metas[found.name] = self._metas[node.name]
            node.replace_all_uses_with(found)
            self._graph.erase_node(node)
            self.changed = True

    def _handler(self, name: str, node: fx.Node) -> Callable[[str, Writer], Found] | None:
        if name in RESHAPES:
            return self._reshape
        if name in PIXEL_LOSSES:
            self._broadcast_by_itself(node)
        if name in CONTRACTIONS:
            return self._contract
        if name == "broadcast_tensors" or not any(given in self._twins for given in node.all_input_nodes):
            return None
        rule = rule_of(node.target)
        if name in PIXEL_LOSSES or (rule is not None and rule.family == "pointwise" and name not in PER_CHANNEL):
            return self._pointwise
        return next((getattr(self, handler) for names, handler in HANDLERS.items() if name in names), None)

    def _flatten_again(self, node: fx.Node, twin: Twin) -> None:
        """Put the flattened twin in the place of what the operator was."""
        if twin.node in node.all_input_nodes or isinstance(self._metas[node.name], tuple):
            self._twins[node] = twin
            return
        with self._graph.inserting_before(node):
            flat = self._graph.call_function(aten.flatten.using_ints, (twin.node, twin.joined[0], twin.joined[-1]))
        flat.meta = dict(twin.node.meta)
        self._metas[flat.name] = self._metas[node.name]
        self._twins[flat] = twin
        node.replace_all_uses_with(flat)
        self._graph.erase_node(node)
        self.changed = True

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        meta = self._metas[node.name]
        return meta.shape if isinstance(meta, Shape) else ()

    def _dims(self, node: fx.Node) -> tuple[int, ...]:
        """The stream dims of a tensor that is not flat."""
        value = self._values.get(node.name)
        return self._apart.get(node, value.dims if isinstance(value, Value) else ())

    def _item(self, node: fx.Node) -> Found:
        several, index = node.args
        twin = self._twins.get(several) if isinstance(several, fx.Node) else None
        if twin is None:
            return None
        with self._graph.inserting_before(node):
            item = self._graph.call_function(operator.getitem, (twin.node, index))
        item.meta = dict(node.meta)
        return twin.at(item)

    def _broadcast_by_itself(self, node: fx.Node) -> None:
        """Give a loss what was broadcast for it, which it does itself."""
        items = node.args[:2]
        makers = {item.args[0] for item in items if isinstance(item, fx.Node) and item.target is operator.getitem}
        maker = next(iter(makers), None)
        if (
            len(makers) != 1
            or not isinstance(maker, fx.Node)
            or maker.target is not aten.broadcast_tensors.default
        ):
            return
        (tensors,) = maker.args
        if all(isinstance(item, fx.Node) and item.args[0] is maker for item in items):
            node.args = (*(tensors[item.args[1]] for item in items), *node.args[2:])  # type: ignore
            self.changed = True

    def _size(self, name: str, writer: Writer) -> Found:
        """A size of a flat tensor, from its twin."""
        twin, dim = self._twins[writer["self"]], writer["dim"] % len(self._shape(writer["self"]))
        if dim != twin.place:
            return writer.size(twin.node, twin.dim(dim))
        sizes = [writer.size(twin.node, d) for d in twin.joined]
        return reduce(lambda one, other: writer.call(operator.mul, one, other), sizes)

    # ---- reshapes -------------------------------------------------------------------------------------------

    def _reshape(self, name: str, writer: Writer) -> Found:
        source = writer["self"]
        twin = self._twins.get(source)
        dims = twin.dims if twin else self._dims(source)
        shape = twin.shape(self._shape(source)) if twin else self._shape(source)
        if not dims or any(shape[d] == 1 for d in dims) or "dtype" in writer.given:
            return None
        if name == "flatten":
            return self._join(writer, source, twin, dims)
        sizes = self._sizes(name, writer)
        pairs = [pair for pair in blocks(shape, writer.result.shape) if set(pair[0]) & set(dims)]
        if all(len(one) == len(other) == 1 for one, other in pairs):
            return self._take_apart(writer, twin, {one[0]: other[0] for one, other in pairs}, sizes)
        if len(pairs) != 1 or len(pairs[0][1]) != 1 or sizes is None:
            return None
        joined, place = pairs[0][0], pairs[0][1][0]
        held = twin.node if twin else source
        extents = [writer.size(held, d) for d in joined]
        node = writer.call(aten.reshape.default, held, [*sizes[:place], *extents, *sizes[place + 1 :]])
        return Twin(node, place, tuple(shape[d] for d in joined), tuple(d - joined.start for d in dims))

    def _join(self, writer: Writer, source: fx.Node, twin: Twin | None, dims: tuple[int, ...]) -> Found:
        """Rule 1 for `flatten`, which names dims."""
        shape = self._shape(source)
        first, last = (writer[name] % len(shape) for name in ("start_dim", "end_dim"))
        if twin is None:
            if not all(first <= d <= last for d in dims):
                return None
            return Twin(source, first, shape[first : last + 1], tuple(d - first for d in dims))
        if first <= twin.place <= last:
            extents = twin.shape(shape)[first : last + twin.width]
            return Twin(twin.node, first, extents, tuple(d - first for d in twin.dims))
        node = writer.call(aten.flatten.using_ints, twin.node, twin.dim(first), twin.dim(last))
        return twin.at(node, twin.place - (last - first) * (last < twin.place))

    def _sizes(self, name: str, writer: Writer) -> list[Any] | None:
        """The sizes that a reshape is given for all dims; None where it is given another tensor."""
        if name in ("view", "reshape", "_unsafe_view"):
            return list(writer["size" if "size" in writer.given else "shape"])
        if name == "unflatten":
            rank = len(self._shape(writer["self"]))
            dim = writer["dim"] % rank
            others = [writer.size(writer["self"], d) if d != dim else 0 for d in range(rank)]
            return [*others[:dim], *writer["sizes"], *others[dim + 1 :]]
        return None

    def _take_apart(
        self, writer: Writer, twin: Twin | None, where: dict[int, int], sizes: list[Any] | None
    ) -> Found:
        """Rule 3; `where` the stream dims end up."""
        if twin is None:
            return None
        dims = tuple(where[d] for d in twin.dims)
        if sizes is None:
            other = writer["other"]
            if self._dims(other) != dims:
                return None
            sizes = [writer.size(other, d) for d in range(len(self._shape(other)))]
            node = writer.call(aten.reshape.default, twin.node, sizes)
        else:
            free = [d for d in dims if sizes[d] == -1]
            if len(free) > 1 or not all(d in free or self._is_extent(sizes[d], k, d) for k, d in enumerate(dims)):
                return None
            node = writer.call(aten.reshape.default, twin.node, sizes)
        self._apart[node] = dims
        return node

    def _is_extent(self, size: Any, axis: int, dim: int) -> bool:
        """Rule 5: whether a size is by its origin that of a stream axis."""
        if not isinstance(size, fx.Node):
            return self._bound
        if size.target is not aten.sym_size.int:
            return False
        tensor, of = size.args
        assert isinstance(tensor, fx.Node)
        dims = self._dims(tensor)
        return axis < len(dims) and dims[axis] == of

    # ---- operators on twins ---------------------------------------------------------------------------------

    def _only(self, writer: Writer, argument: str) -> Twin | None:
        """The twin of this argument, if no other tensor has one."""
        given = writer.given.get(argument)
        others = [n for n in writer.inputs if n in self._twins and n is not given]
        return self._twins.get(given) if isinstance(given, fx.Node) and not others else None

    def _pointwise(self, name: str, writer: Writer) -> Found:
        shapes = [self._shape(given) for given in writer.inputs if isinstance(self._metas[given.name], Shape)]
        rank = max(map(len, shapes))
        flat = [given for given in writer.inputs if given in self._twins]
        twins = [self._twins[given] for given in flat]
        places = {rank - len(self._shape(given)) + self._twins[given].place for given in flat}
        if len(places) != 1 or not all(twin.fits(twins[0]) for twin in twins):
            return None
        (place,) = places
        whole = twins[0].at(twins[0].node, place)
        adapted = {n: self._adapted(writer, n, twins[0], place - rank) for n in writer.inputs}
        if any(node is None for node in adapted.values()):
            return None
        given = {k: map_arg(v, lambda n: adapted.get(n, n)) for k, v in writer.given.items()}
        node = writer.again(**given)
        return node if writer.given.get("reduction", 0) and name in PIXEL_LOSSES else whole.at(node)

    def _adapted(self, writer: Writer, node: fx.Node, like: Twin, place: int) -> fx.Node | None:
        """An operand beside a twin, with as many dims for the positions; `place` is counted from behind."""
        if node in self._twins or not isinstance(self._metas[node.name], Shape):
            return self._twins[node].node if node in self._twins else node
        shape = self._shape(node)
        dim = len(shape) + place
        if dim < 0:
            return node
        if shape[dim] == 1:
            for _ in range(like.width - 1):
                node = writer.call(aten.unsqueeze.default, node, dim)
            return node
        if shape[dim] != math.prod(like.extents):
            return None
        sizes = [writer.size(node, d) for d in range(len(shape))]
        extents = [writer.size(like.node, d) for d in like.joined]
        return writer.call(aten.reshape.default, node, [*sizes[:dim], *extents, *sizes[dim + 1 :]])

    def _permute(self, name: str, writer: Writer) -> Found:
        twin = self._only(writer, "self")
        if twin is None:
            return None
        rank = len(self._shape(writer["self"]))
        order = list(range(rank))
        if name == "permute":
            order = [d % rank for d in writer["dims"]]
        else:
            names = ("dim0", "dim1") if "dim0" in writer.given else ("axis0", "axis1")
            one, other = (writer[n] % rank for n in names) if names[0] in writer.given else (0, rank - 1)
            order[one], order[other] = order[other], order[one]
        apart = [d for f in order for d in (twin.joined if f == twin.place else [twin.dim(f)])]
        return twin.at(writer.call(aten.permute.default, twin.node, apart), order.index(twin.place))

    def _unsqueeze(self, name: str, writer: Writer) -> Found:
        twin = self._only(writer, "self")
        if twin is None:
            return None
        new = writer["dim"] % (len(self._shape(writer["self"])) + 1)
        before = new <= twin.place
        node = writer.again(self=twin.node, dim=new if before else new + twin.width - 1)
        return twin.at(node, twin.place + before)

    def _dropping(self, name: str, writer: Writer) -> Found:
        """One dim less: `select` and `unbind` of any, `squeeze` of one that is not the batch's."""
        twin, dim = self._only(writer, "self"), writer.given.get("dim")
        if twin is None or not isinstance(dim, int):
            return None
        shape = self._shape(writer["self"])
        dim %= len(shape)
        if dim == twin.place or (name == "squeeze" and (dim == 0 or shape[dim] != 1)):
            return None
        return twin.at(writer.again(self=twin.node, dim=twin.dim(dim)), twin.place - (dim < twin.place))

    def _along(self, name: str, writer: Writer) -> Found:
        """An operator along a dim that its result keeps."""
        twin, dim = self._only(writer, "self"), writer.given.get("dim")
        if twin is None or not isinstance(dim, int):
            return None
        dim %= len(self._shape(writer["self"]))
        if dim != twin.place:
            return twin.at(writer.again(self=twin.node, dim=twin.dim(dim)))
        if name in ("softmax", "log_softmax"):
            return twin.at(_softmax(writer, twin.node, twin.joined, is_log=name == "log_softmax"))
        return None

    def _reduce(self, name: str, writer: Writer) -> Found:
        twin = self._only(writer, "self")
        if twin is None or "other" in writer.given:
            return None
        if "dim" not in writer.given:
            return writer.again(self=twin.node)
        rank, dim = len(self._shape(writer["self"])), writer["dim"]
        touched = [d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank))]
        if twin.place not in touched:
            apart = [twin.dim(d) for d in touched]
            node = writer.again(self=twin.node, dim=apart[0] if isinstance(dim, int) else apart)
            gone = 0 if writer.given.get("keepdim") else sum(d < twin.place for d in touched)
            return twin.at(node, twin.place - gone)
        if isinstance(dim, int):
            return None
        apart = [d for f in touched for d in (twin.joined if f == twin.place else [twin.dim(f)])]
        node = writer.again(self=twin.node, dim=apart)
        if not writer.given.get("keepdim"):
            return node
        return writer.call(aten.flatten.using_ints, node, twin.joined[0], twin.joined[-1])

    def _last_dims(self, name: str, writer: Writer) -> Found:
        """A matrix or a normalisation of the last dims."""
        twin = self._only(writer, "input")
        dims = len(writer["normalized_shape"]) if "normalized_shape" in writer.given else 1
        if twin is None or twin.place >= len(self._shape(writer["input"])) - dims:
            return None
        return twin.at(writer.again(input=twin.node))

    def _per_channel(self, name: str, writer: Writer) -> Found:
        """A normalisation per channel (dim 1) of positions behind it."""
        twin = self._only(writer, "input")
        return twin.at(writer.again(input=twin.node)) if twin is not None and twin.place == 2 else None

    def _convolution(self, name: str, writer: Writer) -> Found:
        """A convolution of single positions, in as many dims as these have."""
        twin, kernel = self._only(writer, "input"), self._shape(writer["weight"])
        single = kernel[2:] == (1,) and set(writer["stride"]) == {1} and set(writer["padding"]) <= {0}
        if twin is None or twin.place != 2 or not single or twin.width not in CONVOLUTIONS:
            return None
        weight = writer["weight"]
        for _ in range(twin.width - 1):
            weight = writer.call(aten.unsqueeze.default, weight, -1)
        ones, zeros = [1] * twin.width, [0] * twin.width
        target = CONVOLUTIONS[twin.width]
        return twin.at(writer.call(target, twin.node, weight, writer["bias"], ones, zeros, ones, writer["groups"]))

    def _concatenate(self, name: str, writer: Writer) -> Found:
        twins = [self._twins.get(given) for given in writer["tensors"]]
        known = [twin for twin in twins if twin is not None]
        first = known[0]
        if len(known) < len(twins) or any(not t.fits(first) or t.place != first.place for t in known):
            return None
        rank = len(self._shape(writer["tensors"][0])) + (name == "stack")
        dim = writer["dim"] % rank
        if name != "stack":
            same = dim == first.place
            return None if same else first.at(writer.again(tensors=[t.node for t in known], dim=first.dim(dim)))
        before = dim <= first.place
        node = writer.again(tensors=[t.node for t in known], dim=dim if before else dim + first.width - 1)
        return first.at(node, first.place + before)

    def _class_loss(self, name: str, writer: Writer) -> Found:
        """Classes in dim 1; of flat pixels [positions, classes] behind the positions."""
        image, target = self._twins.get(writer["self"]), self._twins.get(writer["target"])
        if image is None or target is None or not image.fits(target) or len(self._shape(writer["self"])) < 2:
            return None
        given = image.node
        same = len(self._shape(writer["self"])) == len(self._shape(writer["target"]))
        if image.place == 0:
            if same:
                return None
            rank = len(self._shape(writer["self"])) + image.width - 1
            order = [0, image.width, *(d for d in range(1, rank) if d != image.width)]
            given = writer.call(aten.permute.default, given, order)
        elif image.place == 1 or target.place != image.place - (not same):
            return None
        node = writer.again(self=given, target=target.node)
        return target.at(node, image.place - (image.place > 0)) if writer["reduction"] == 0 else node

    # ---- products -------------------------------------------------------------------------------------------

    def _contract(self, name: str, writer: Writer) -> Found:
        """Rule 4: a product of two tensors that sums over positions or leaves them."""
        terms = self._terms(name, writer)
        if terms is None:
            return None
        operands, letters, output = terms
        flat = {own[self._twins[n].place] for n, own in zip(operands, letters, strict=True) if n in self._twins}
        twins = [self._twins[n] for n in operands if n in self._twins]
        if len(flat) > 1 or not all(twin.fits(twins[0]) for twin in twins):
            return None
        if not twins:
            return self._contract_maps(writer, operands, letters, output)
        (position,) = flat
        is_matrix = name != "einsum" and len(letters[1]) == 2 and operands[1] not in self._twins
        if is_matrix and position in output:
            return twins[0].at(writer.call(aten.matmul.default, twins[0].node, operands[1]))
        if position not in output and not all(position in own for own in letters):
            return None
        new = [c for c in LETTERS if c not in {*letters[0], *letters[1]}][: twins[0].width]
        apart = [own.replace(position, "".join(new)) for own in (*letters, output)]
        adapted = [
            self._adapted(writer, n, twins[0], own.index(position) - len(own)) if position in own else n
            for n, own in zip(operands, letters, strict=True)
        ]
        if any(node is None for node in adapted):
            return None
        node = writer.call(overload("contract"), f"{apart[0]},{apart[1]}->{apart[2]}", *adapted)
        return twins[0].at(node, output.index(position)) if position in output else node

    def _contract_maps(
        self, writer: Writer, operands: Sequence[fx.Node], letters: Sequence[str], output: str
    ) -> Found:
        """A product of maps that are not flat, whose stream axes are summed or stay."""
        axes = {
            tuple(own[d] for d in self._dims(n)) for n, own in zip(operands, letters, strict=True) if self._dims(n)
        }
        if len(axes) != 1:
            return None
        (space,) = axes
        summed = not set(space) & set(output) and all(set(space) <= set(own) for own in letters)
        if not summed and not set(space) <= set(output):
            return None
        return writer.call(overload("contract"), f"{letters[0]},{letters[1]}->{output}", *operands)

    def _terms(self, name: str, writer: Writer) -> tuple[list[fx.Node], list[str], str] | None:
        """The two operands, a letter per dim of each, and those of the result."""
        if name == "einsum":
            equation, operands = writer["equation"].replace(" ", ""), list(writer["tensors"])
            inputs, arrow, output = equation.partition("->")
            letters = inputs.split(",")
            repeated = any(len(set(own)) < len(own) for own in letters)
            if not arrow or "." in equation or len(operands) != 2 or repeated:
                return None
            return operands, letters, output
        operands = [writer["self"], writer["mat2" if "mat2" in writer.given else "other"]]
        ranks = [len(self._shape(n)) for n in operands]
        if min(ranks) < 2:
            return None
        batch = LETTERS[: max(ranks) - 2]
        one, other = (batch[len(batch) - (rank - 2) :] for rank in ranks)
        return operands, [f"{one}xy", f"{other}yz"], f"{batch}xz"


def _softmax(writer: Writer, image: fx.Node, dims: Sequence[int], is_log: bool) -> fx.Node:
    """Rule 4, in at least 32 bits."""
    own = writer.result.dtype
    wide = torch.promote_types(own, torch.float32)
    if writer.meta(writer["self"]).dtype != wide:
        image = writer.call(aten.to.dtype, image, wide)
    total = writer.call(aten.logsumexp.default, image, list(dims), True)
    found = writer.call(aten.sub.Tensor, image, total)
    if not is_log:
        found = writer.call(aten.exp.default, found)
    return found if own == wide else writer.call(aten.to.dtype, found, own)


def _softmax_of_map(is_log: bool, writer: Writer) -> fx.Node:
    return _softmax(writer, writer["self"], [writer["dim"]], is_log)


RESHAPES = ("flatten", "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "unflatten")
CONTRACTIONS = ("matmul", "bmm", "mm", "einsum")
HANDLERS = {
    ("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T"): "_permute",
    ("sym_size",): "_size",
    ("unsqueeze",): "_unsqueeze",
    ("select", "unbind", "squeeze"): "_dropping",
    (*KEEPING, *SPLITTING, "slice", "narrow"): "_along",
    REDUCING: "_reduce",
    ("linear", "layer_norm", "rms_norm"): "_last_dims",
    ("batch_norm", "instance_norm", "group_norm"): "_per_channel",
    ("conv1d",): "_convolution",
    ("cat", "concat", "concatenate", "stack"): "_concatenate",
    CLASS_LOSSES: "_class_loss",
}
"""Which method of `_Rewriting` treats an operator of flat tensors."""

LOWERINGS: dict[str, Lowering] = {
    "aten::softmax": partial(_softmax_of_map, False),
    "aten::log_softmax": partial(_softmax_of_map, True),
}
"""Softmax of a map over its only stream axis."""
