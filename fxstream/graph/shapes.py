"""How the graph depends on the image size: constants that move with it, and all shapes at one size.

A static capture bakes sizes into arguments (``view(x, [2, 512, 49])``). Further captures at other sizes show
exactly which integers move; each is explained as a size of a tensor of the graph, a product of such sizes, or
a fixed fraction of one, and replaced by ``sym_size`` arithmetic. An integer that moves and has no explanation
makes the capture bound to its size. `shapes_at` then runs the graph on fake tensors (no memory, no compute)
and returns every node's shape at the size at hand.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxstream.errors import InputError

__all__ = [
    "Shape",
    "Shapes",
    "explain_sizes",
    "fold_integers",
    "is_image",
    "is_library_file",
    "moving_constants",
    "shapes_at",
    "source_line",
    "stream_dims",
]

LARGEST_DENOMINATOR = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and type of a tensor of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Numbers that the tensor holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that the tensor holds."""
        return self.elements * self.dtype.itemsize

    @property
    def has_gradient(self) -> bool:
        """Whether a tensor of this type can have a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex


Meta = Shape | int | tuple["Shape | int", ...] | None
"""What is known of a node's value at a size: a tensor's shape, an integer, several, or nothing."""


def is_image(tensor: torch.Tensor | Shape) -> bool:
    """Whether an input has stream axes: batch, channels, and at least one spatial dim."""
    return len(tensor.shape) >= 3


def stream_dims(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The stream dims of each input of the model: all after batch and channels.

    An input without channels beside an image (a map of classes, a mask) has one dim less, which are the batch and
    the pixels of the image.

    >>> stream_dims([(2, 3, 64, 48), (2, 64, 48), (2, 10)])
    [(2, 3), (1, 2), ()]
    """
    rank = max(map(len, shapes), default=0)
    masks = {(shape[0], *shape[2:]) for shape in shapes if len(shape) == rank >= 3}
    return [tuple(range(1 if tuple(shape) in masks else 2, len(shape))) for shape in shapes]


@dataclass(frozen=True, slots=True)
class Moving:
    """One integer argument that differs between captures: its node, its place and its value in each."""

    node: fx.Node
    place: int
    values: tuple[int, ...]


def source_line(node: fx.Node) -> str:
    """The last line of the user's own code that led to the node, as ``file:line``, or an empty string."""
    return _innermost(node.meta.get("stack_trace") or "")


def is_library_file(path: str) -> bool:
    """Whether a source file is torch's or ours, and so not the user's."""
    return path.startswith((f"{torch.__path__[0]}/", f"{Path(__file__).parent.parent}/", "<"))


def _innermost(trace: str) -> str:
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    own = [line for line in lines if not is_library_file(line.split('"')[1])]
    if not own:
        return ""
    file, number = own[-1].split('"')[1], own[-1].split("line ")[1].split(",")[0]
    return f"{file}:{number}"


def moving_constants(graphs: Sequence[fx.Graph]) -> list[Moving] | None:
    """The integers that differ between captures of one model, or None where more than integers differ."""
    places = [{node: i for i, node in enumerate(graph.nodes)} for graph in graphs]
    moving: list[Moving] = []
    columns = [list(graph.nodes) for graph in graphs]
    if len({len(column) for column in columns}) != 1:
        return None
    for row in zip(*columns, strict=True):
        if len({(node.op, str(node.target)) for node in row if node.op != "placeholder"}) > 1:
            return None
        if row[0].op == "get_attr" and moving_constants([_graph_of(node) for node in row]) != []:
            return None
        leaves = [_leaves(node, place) for node, place in zip(row, places, strict=True)]
        if len({len(found) for found in leaves}) != 1:
            return None
        for i, values in enumerate(zip(*leaves, strict=True)):
            if all(value == values[0] and type(value) is type(values[0]) for value in values):
                continue
            if not all(type(value) is int for value in values):
                return None
            moving.append(Moving(row[0], i, values))
    return moving


def _graph_of(node: fx.Node) -> fx.Graph:
    """The graph of the module that a get_attr node holds; an empty one for anything else."""
    held = getattr(node.graph.owning_module, str(node.target), None)
    return held.graph if isinstance(held, fx.GraphModule) else fx.Graph()


def _leaves(node: fx.Node, place: Mapping[fx.Node, int]) -> list[object]:
    """The arguments as a flat list in which nodes are their places in the graph."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)), is_leaf=lambda x: x is None)
    return [("node", place[leaf]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


Expression = Callable[[fx.Graph], fx.Node]


def explain_sizes(graphs: Sequence[fx.Graph]) -> bool:
    """Make the first graph independent of sizes, in place; False (graph untouched) where it cannot be."""
    moving = moving_constants(graphs)
    if moving is None:
        return False
    sizes = _SizesOfTensors(graphs)
    expressions: list[tuple[Moving, Expression]] = []
    for constant in moving:
        expression = sizes.explain(constant)
        if expression is None:
            return False
        expressions.append((constant, expression))
    for constant, expression in expressions:
        node = constant.node
        with graphs[0].inserting_before(node):
            new = expression(graphs[0])
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=lambda x: x is None)
        leaves[constant.place] = new
        node.args, node.kwargs = pytree.tree_unflatten(leaves, spec)
    return True


class _SizesOfTensors:
    """The sizes of every tensor in every capture, for explaining moving constants."""

    def __init__(self, graphs: Sequence[fx.Graph]) -> None:
        self._nodes = list(graphs[0].nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._shapes = [
            [
                tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), torch.Tensor) else ()
                for node in graph.nodes
            ]
            for graph in graphs
        ]

    def explain(self, constant: Moving) -> Expression | None:
        """An expression in tensor sizes that has the constant's value in every capture."""
        own = [self._place[n] for n in constant.node.all_input_nodes]
        earlier = range(self._place[constant.node] - 1, -1, -1)
        for place, dim, sizes in self._dims(itertools.chain(own, earlier)):
            if sizes == constant.values:
                return self._size(place, dim)
        for place in own:
            dims = [(d, sizes) for _, d, sizes in self._dims([place])]
            for count in (2, 3):
                for chosen in itertools.combinations(dims, count):
                    products = tuple(map(math.prod, zip(*(sizes for _, sizes in chosen), strict=True)))
                    if products == constant.values:
                        return self._product(place, [d for d, _ in chosen])
        for place, dim, sizes in self._dims(itertools.chain(own, earlier)):
            ratios = {Fraction(c, s) for c, s in zip(constant.values, sizes, strict=True) if s}
            if len(ratios) == 1 and len(set(sizes)) > 1:
                (ratio,) = ratios
                if ratio > 0 and max(ratio.numerator, ratio.denominator) <= LARGEST_DENOMINATOR:
                    return self._fraction(place, dim, ratio)
        return None

    def _dims(self, places: Any) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(place of the node, dim, its size in each capture) for tensors of equal rank in all captures."""
        for place in places:
            shapes = [capture[place] for capture in self._shapes]
            if len({len(shape) for shape in shapes}) == 1:
                for dim, sizes in enumerate(zip(*shapes, strict=True)):
                    yield place, dim, sizes

    def _size(self, place: int, dim: int) -> Expression:
        return lambda graph: graph.call_function(torch.ops.aten.sym_size.int, (self._nodes[place], dim))

    def _product(self, place: int, dims: list[int]) -> Expression:
        def build(graph: fx.Graph) -> fx.Node:
            result = self._size(place, dims[0])(graph)
            for dim in dims[1:]:
                result = graph.call_function(operator.mul, (result, self._size(place, dim)(graph)))
            return result

        return build

    def _fraction(self, place: int, dim: int, ratio: Fraction) -> Expression:
        def build(graph: fx.Graph) -> fx.Node:
            scaled = graph.call_function(operator.mul, (self._size(place, dim)(graph), ratio.numerator))
            return graph.call_function(operator.floordiv, (scaled, ratio.denominator))

        return build


class Shapes(NamedTuple):
    """Of every node at one size: shape and type, and multiply-accumulates where it has any."""

    metas: Mapping[str, Meta]
    macs: Mapping[str, int]


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps what is known of each node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.metas: dict[str, Meta] = {}
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            if n.target is torch.ops.aten.batch_norm.default:
                value = self._kept_shape(n)
            else:
                value = self._counted(n) if _may_multiply(n) else super().run_node(n)
        except Exception as error:
            place = source_line(n)
            raise InputError(
                f"the model cannot take this input: `{n.name}` ({n.target}){f' at {place}' if place else ''}"
                f" fails with: {str(error).splitlines()[0]}"
            ) from error
        self.metas[n.name] = _meta(value)
        return value

    def _counted(self, n: fx.Node) -> Any:
        """The value of a node whose multiply-accumulates count; a FLOP of torch's counter is half of one."""
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.macs[n.name] = counter.get_total_flops() // 2
        return value

    def _kept_shape(self, n: fx.Node) -> Any:
        """BatchNorm without torch's decomposition, which takes most of the time of a run on fake tensors."""
        (image, *weights), _ = self.fetch_args_kwargs_from_env(n)
        fits = all(w.shape == image.shape[1:2] for w in weights[:4] if isinstance(w, torch.Tensor))
        return torch.empty_like(image) if fits and not n.args[5] else super().run_node(n)


def _may_multiply(node: fx.Node) -> bool:
    """Whether an operator takes several tensors and is not pointwise, as all products are."""
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return is_operator and len(node.all_input_nodes) > 1 and torch.Tag.pointwise not in node.target.tags  # type: ignore[union-attr]


def _meta(value: Any) -> Meta:
    if isinstance(value, torch.Tensor):
        return Shape(tuple(value.shape), value.dtype)
    if isinstance(value, int):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(m for m in map(_meta, value) if isinstance(m, (Shape, int)))
    return None


def shapes_at(module: fx.GraphModule, tensors: Sequence[Any]) -> Shapes:
    """Shape, type and arithmetic of every node for these inputs of the lifted graph; computes nothing.

    Raises `InputError`, naming node and source line, where an operator refuses the size.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [
        given
        if not isinstance(given, torch.Tensor) or isinstance(given, FakeTensor)
        else mode.from_tensor(given.detach(), static_shapes=True)
        for given in tensors
    ]
    interpreter = _ShapeInterpreter(module)
    interpreter.extra_traceback = False
    with mode, torch.no_grad():
        interpreter.run(*fake)
    return Shapes(interpreter.metas, interpreter.macs)


def fold_integers(node: fx.Node, metas: Mapping[str, Meta]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with every integer-valued node replaced by its value at this size."""

    def known(given: fx.Node) -> Any:
        meta = metas.get(given.name)
        return meta if isinstance(meta, int) else given

    return map_arg(node.args, known), map_arg(dict(node.kwargs), known)
