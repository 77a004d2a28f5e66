"""Sizes that a static capture turned into constants, written as sizes of tensors of the graph again.

A static capture has sizes in its arguments, as in ``view(x, [2, 512, 49])``. Captures at other sizes show which
integers depend on the size. Each is explained as a size of a tensor, a product of sizes of one tensor, a size
times a fraction, or what a size lacks to a multiple, and is replaced by ``sym_size`` and integer arithmetic. If
one of them cannot be explained, the capture is specialised to its size.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.graph.effects import subgraphs

__all__ = ["SizeDependentConstant", "explain_sizes", "size_dependent_constants"]

LARGEST_DENOMINATOR = 64
"""Numerator and denominator of a fraction are at most this, since any two sizes have some fraction."""


@dataclass(frozen=True, slots=True)
class SizeDependentConstant:
    """An integer argument that differs between captures: its node, its index in the flat arguments, its values."""

    node: fx.Node
    index: int
    values: tuple[int, ...]


def size_dependent_constants(graphs: Sequence[fx.Graph]) -> list[SizeDependentConstant] | None:
    """The integers that differ between captures of one model, or None if anything else differs.

    The nodes are those of the first graph, the values one per graph.
    """
    if len({len(graph.nodes) for graph in graphs}) > 1:
        return None
    indices = [{node: i for i, node in enumerate(graph.nodes)} for graph in graphs]
    constants: list[SizeDependentConstant] = []
    for nodes in zip(*(graph.nodes for graph in graphs), strict=True):
        of_node = _differing_integers(nodes, indices)
        if of_node is None:
            return None
        constants += of_node
    return constants


def _is_same(one: object, other: object) -> bool:
    """Whether two constants of one type are the same, also if they are not a number."""
    return one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))


def _differing_integers(
    nodes: Sequence[fx.Node], indices: Sequence[Mapping[fx.Node, int]]
) -> list[SizeDependentConstant] | None:
    """The same for one node of each graph; `indices` are those of the nodes in their graphs."""
    arguments = [_flat_arguments(node, index) for node, index in zip(nodes, indices, strict=True)]
    if not _same_operators(nodes) or len(set(map(len, arguments))) > 1:
        return None
    differing = [
        (i, values)
        for i, values in enumerate(zip(*arguments, strict=True))
        if not all(type(value) is type(values[0]) and _is_same(value, values[0]) for value in values)
    ]
    if not all(type(value) is int for _, values in differing for value in values):
        return None
    return [SizeDependentConstant(nodes[0], i, values) for i, values in differing]  # type: ignore[arg-type]


def _same_operators(nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes of several captures do the same; subgraphs must be equal in every constant."""
    if len({(node.op, "" if node.op == "placeholder" else str(node.target)) for node in nodes}) > 1:
        return False
    inner = zip(*map(subgraphs, nodes), strict=False)
    return all(size_dependent_constants(graphs) == [] for graphs in inner)


def _flat_arguments(node: fx.Node, index: Mapping[fx.Node, int]) -> list[object]:
    """The arguments as a flat list in which nodes are their indices in the graph."""
    leaves, _ = _flatten_arguments(node)
    return [("node", index[leaf]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


def _flatten_arguments(node: fx.Node) -> tuple[list[object], pytree.TreeSpec]:
    return pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=lambda x: x is None)


@dataclass(frozen=True, slots=True)
class _SizeExpression:
    """The product of the sizes of some dims of a tensor, times a fraction, rounded down.

    With a `multiple` of it, what the product lacks to the next multiple of that, times `sign`.
    """

    tensor: fx.Node
    dims: tuple[int, ...]
    fraction: Fraction | None = None
    multiple: int | None = None
    sign: int = 1

    def write(self, graph: fx.Graph) -> fx.Node:
        """Insert the nodes that compute it; returns the last one."""
        product = self._size(graph, self.dims[0])
        for dim in self.dims[1:]:
            product = graph.call_function(operator.mul, (product, self._size(graph, dim)))
        if self.multiple is not None:
            lacking = graph.call_function(
                operator.mod, (graph.call_function(operator.mul, (product, -1)), self.multiple)
            )
            return lacking if self.sign > 0 else graph.call_function(operator.mul, (lacking, -1))
        if self.fraction is None:
            return product
        scaled = graph.call_function(operator.mul, (product, self.fraction.numerator))
        return graph.call_function(operator.floordiv, (scaled, self.fraction.denominator))

    def _size(self, graph: fx.Graph, dim: int) -> fx.Node:
        return graph.call_function(torch.ops.aten.sym_size.int, (self.tensor, dim))


def explain_sizes(graphs: Sequence[fx.Graph]) -> bool:
    """Make the first of several captures independent of sizes, in place; False, and unchanged, if it cannot be."""
    constants = size_dependent_constants(graphs)
    if constants is None:
        return False
    sizes = _TensorSizes(graphs)
    expressions = []
    for constant in constants:
        expression = sizes.explain(constant)
        if expression is None:
            return False
        expressions.append(expression)
    for constant, expression in zip(constants, expressions, strict=True):
        _replace(constant, expression)
    return True


def _replace(constant: SizeDependentConstant, expression: _SizeExpression) -> None:
    node = constant.node
    with node.graph.inserting_before(node):
        size = expression.write(node.graph)
    leaves, spec = _flatten_arguments(node)
    leaves[constant.index] = size
    node.args, node.kwargs = pytree.tree_unflatten(leaves, spec)


class _TensorSizes:
    """The size of every dim of every tensor in every capture, to explain constants by.

    The inputs of a constant's node are tried first, then all nodes before it, the nearest first, those that depend
    on an image before others.
    """

    def __init__(self, graphs: Sequence[fx.Graph]) -> None:
        rows = zip(*(graph.nodes for graph in graphs), strict=True)
        self._sizes = {nodes[0]: _sizes_per_dim(nodes) for nodes in rows}
        self._nodes = list(self._sizes)
        self._of_image = self._that_depend_on_an_image()

    def explain(self, constant: SizeDependentConstant) -> _SizeExpression | None:
        """The first expression that has the constant's value in every capture.

        A part of a size of the node's own inputs, as the windows in a map, comes before a size of another tensor,
        as of a mask that has as many.
        """
        simple = (self._sizes_equal_to, self._products_equal_to, self._parts_equal_to)
        every = (*simple, self._remainders_equal_to, self._fractions_equal_to)
        near = (find(constant, constant.node.all_input_nodes) for find in simple)
        far = (find(constant, self._tensors_near(constant.node)) for find in every)
        return next(itertools.chain.from_iterable(itertools.chain(near, far)), None)

    def _sizes_equal_to(
        self, constant: SizeDependentConstant, tensors: Iterable[fx.Node]
    ) -> Iterator[_SizeExpression]:
        for tensor in tensors:
            for dim, sizes in enumerate(self._sizes[tensor]):
                if sizes == constant.values:
                    yield _SizeExpression(tensor, (dim,))

    def _products_equal_to(
        self, constant: SizeDependentConstant, tensors: Iterable[fx.Node]
    ) -> Iterator[_SizeExpression]:
        for tensor in tensors:
            for count in (2, 3):
                for factors in itertools.combinations(enumerate(self._sizes[tensor]), count):
                    dims, sizes = zip(*factors, strict=True)
                    if tuple(map(math.prod, zip(*sizes, strict=True))) == constant.values:
                        yield _SizeExpression(tensor, dims)

    def _parts_equal_to(
        self, constant: SizeDependentConstant, tensors: Iterable[fx.Node]
    ) -> Iterator[_SizeExpression]:
        fractions = self._fractions_equal_to(constant, tensors)
        return (one for one in fractions if one.fraction and 1 in one.fraction.as_integer_ratio())

    def _fractions_equal_to(
        self, constant: SizeDependentConstant, tensors: Iterable[fx.Node]
    ) -> Iterator[_SizeExpression]:
        for tensor in tensors:
            for dim, sizes in enumerate(self._sizes[tensor]):
                fraction = _fraction(constant.values, sizes)
                if fraction is not None:
                    yield _SizeExpression(tensor, (dim,), fraction)

    def _remainders_equal_to(
        self, constant: SizeDependentConstant, tensors: Iterable[fx.Node]
    ) -> Iterator[_SizeExpression]:
        """None where all sizes lack to the same multiple: what is computed of that would look like a constant."""
        sign = -1 if min(constant.values) < 0 else 1
        values = [sign * value for value in constant.values]
        for tensor in tensors if min(values) >= 0 else ():
            for dim, sizes in enumerate(self._sizes[tensor]):
                multiple = _multiple(values, sizes)
                if multiple is not None and len(set(map(operator.add, sizes, values))) == 1:
                    return
                if multiple is not None:
                    yield _SizeExpression(tensor, (dim,), multiple=multiple, sign=sign)

    def _tensors_near(self, node: fx.Node) -> Iterator[fx.Node]:
        yield from node.all_input_nodes
        before = self._nodes[: self._nodes.index(node)][::-1]
        yield from (one for one in before if one in self._of_image)
        yield from (one for one in before if one not in self._of_image)

    def _that_depend_on_an_image(self) -> set[fx.Node]:
        """The inputs whose size differs between the captures, and all that is computed with them."""
        dependent: set[fx.Node] = set()
        for node, sizes in self._sizes.items():
            is_image = node.op == "placeholder" and any(len(set(of_dim)) > 1 for of_dim in sizes)
            if is_image or not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
        return dependent


def _sizes_per_dim(nodes: Sequence[fx.Node]) -> tuple[tuple[int, ...], ...]:
    """The size of each dim in each capture; empty if the node is not a tensor of the same rank in all of them."""
    values = [node.meta.get("val") for node in nodes]
    shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in values]
    return tuple(zip(*shapes, strict=True)) if len(set(map(len, shapes))) == 1 else ()


def _multiple(values: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The number of which each size lacks its value to a multiple, if one fits all; the least one.

    >>> _multiple((0, 5, 3), (14, 16, 18))
    7
    """
    numbers = range(max(values) + 1, LARGEST_DENOMINATOR + 1) if len(set(sizes)) > 1 else ()
    fitting = (k for k in numbers if all(-size % k == value for size, value in zip(sizes, values, strict=True)))
    return next(fitting, None)


def _fraction(values: Sequence[int], sizes: Sequence[int]) -> Fraction | None:
    """The positive fraction ``value / size``, if it is the same in all captures though the sizes differ.

    >>> _fraction((14, 21), (4, 6))
    Fraction(7, 2)
    """
    fractions = {Fraction(value, size) for value, size in zip(values, sizes, strict=True) if size}
    if len(fractions) != 1 or len(set(sizes)) == 1:
        return None
    (fraction,) = fractions
    is_simple = max(fraction.numerator, fraction.denominator) <= LARGEST_DENOMINATOR
    return fraction if fraction > 0 and is_simple else None
