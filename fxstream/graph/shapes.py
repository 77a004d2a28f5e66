"""The shape and type of every node of a graph at one size of the inputs, and which dims of an input are tiled.

`shapes_at` runs the graph on fake tensors: it allocates and computes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxstream.errors import InputError
from fxstream.graph.user_code import source_line

__all__ = [
    "Meta",
    "Shape",
    "Shapes",
    "fake_tensor_log_silenced",
    "fold_integers",
    "is_image",
    "shapes_at",
    "stream_dims",
]


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and type of a tensor of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of the elements in bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def has_gradient(self) -> bool:
        """Whether a tensor of this type can have a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex


Meta = Shape | int | tuple["Shape | int", ...] | None
"""The value of a node at one size: the shape of a tensor, an integer, several of these, or None for others."""


def is_image(tensor: torch.Tensor | Shape) -> bool:
    """Whether an input has dims that can be tiled: a batch dim, channels, and at least one spatial dim."""
    return len(tensor.shape) >= 3


def stream_dims(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The dims of each input of the model that are tiled: all after batch and channels.

    An input without channels beside an image (a class map, a mask) has one dim less: the batch and the pixels of
    that image.

    >>> stream_dims([(2, 3, 64, 48), (2, 64, 48), (2, 10)])
    [(2, 3), (1, 2), ()]
    """
    rank = max(map(len, shapes), default=0)
    masks = {(shape[0], *shape[2:]) for shape in shapes if len(shape) == rank >= 3}
    return [tuple(range(1 if tuple(shape) in masks else 2, len(shape))) for shape in shapes]


class Shapes(NamedTuple):
    """Of every node at one size: shape and type, and multiply-accumulates where it has any."""

    metas: Mapping[str, Meta]
    macs: Mapping[str, int]


class _Flops(TorchDispatchMode):
    """Counts FLOPs by torch's formulas. Torch's own counter hooks every module of the process, of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, formula = kwargs or {}, flop_registry.get(func._overloadpacket)
        result = NotImplemented
        if formula is None and func.namespace == "aten":
            with self:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self.flops += 0 if formula is None else formula(*args, **kwargs, out_val=result)
        return result


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and collects the `Meta` of each node, and the arithmetic of products.

    Torch's `FakeTensorProp` would write into the ``meta`` of the captured nodes instead.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.metas: dict[str, Meta] = {}
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        is_batch_norm = n.target is torch.ops.aten.batch_norm.default
        try:
            if is_batch_norm:
                value = self._batch_norm(n)
            else:
                value = self._counted(n) if _may_multiply(n) else super().run_node(n)
        except Exception as error:
            line = source_line(n)
            raise InputError(
                f"the model cannot take this input: `{n.name}` ({n.target}){f' at {line}' if line else ''}"
                f" fails with: {str(error).splitlines()[0]}"
            ) from error
        self.metas[n.name] = _meta(value)
        return value

    def _counted(self, n: fx.Node) -> Any:
        """The value of a node whose multiply-accumulates count; a FLOP of torch's counter is half of one."""
        with _Flops() as counter:
            value = super().run_node(n)
        self.macs[n.name] = counter.flops // 2
        return value

    def _batch_norm(self, n: fx.Node) -> Any:
        """Batch norm without torch's decomposition, which takes most of the time of a run on fake tensors."""
        (image, *weights), _ = self.fetch_args_kwargs_from_env(n)
        fits = all(w.shape == image.shape[1:2] for w in weights[:4] if isinstance(w, torch.Tensor))
        is_training = n.args[5]
        return torch.empty_like(image) if fits and not is_training else super().run_node(n)


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
    """`Meta` and arithmetic of every node by name, for these values of the placeholders.

    Of tensors only the shapes matter.

    Raises `InputError`, with the node and the user's line, if an operator refuses the size.
    """
    interpreter = _ShapeInterpreter(module)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        interpreter.run(*map(_fake, tensors))
    return Shapes(interpreter.metas, interpreter.macs)


def _fake(value: Any) -> Any:
    """A fake tensor of the current mode for a tensor, whose values, gradient and memory do not matter."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def fold_integers(node: fx.Node, metas: Mapping[str, Meta]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with every integer-valued node replaced by its value in `metas`."""

    def folded(argument: fx.Node) -> Any:
        meta = metas.get(argument.name)
        return meta if isinstance(meta, int) else argument

    return map_arg(node.args, folded), map_arg(dict(node.kwargs), folded)


@contextlib.contextmanager
def fake_tensor_log_silenced() -> Iterator[None]:
    """Drops torch's log of operators that refuse fake tensors: if a size is only tried, that is an answer."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
