"""The shape and type of every node of a graph at one size of the inputs, and which dims of an input are tiled.

`shapes_at` allocates and computes nothing: see `results`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from fxstream.errors import InputError
from fxstream.graph.results import Flops, Shape, result_of_call, value_of
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


class _Walk:
    """The walk over a graph of operators and integers; `values` has a `Shape` in place of every tensor."""

    def __init__(self, module: fx.GraphModule, tensors: Sequence[Any]) -> None:
        self._graph = module.graph
        devices = (tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.ndim)
        self._device = next(devices, torch.device("cpu"))
        kind = self._device.type
        can_cast = torch.amp.is_autocast_available(kind)  # type: ignore[attr-defined]
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) if can_cast else ()
        self._state = (self._device, autocast, torch.get_default_dtype())
        names = (node.name for node in self._graph.nodes if node.op == "placeholder")
        self.values: dict[str, Any] = {n: value_of(tensor) for n, tensor in zip(names, tensors, strict=False)}
        self.macs: dict[str, int] = {}

    def run(self) -> Shapes:
        """All nodes. Raises `InputError` for one that refuses its inputs."""
        for node in self._graph.nodes:
            if node.op == "call_function":
                try:
                    self._add(node)
                except Exception as error:
                    raise _refusal(node, error) from error
        return Shapes({name: _meta(value) for name, value in self.values.items()}, self.macs)

    def _add(self, node: fx.Node) -> None:
        args = tuple(self._argument(one) for one in node.args)
        kwargs = {name: self._argument(one) for name, one in node.kwargs.items()}
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            self.values[node.name] = target(*args, **kwargs)
        elif target is torch.ops.aten.sym_size.int:
            self.values[node.name] = args[0].shape[args[1]]
        else:
            self.values[node.name], macs = result_of_call(target, args, kwargs, self._device, self._state)
            if _may_multiply(node):
                self.macs[node.name] = macs

    def _argument(self, argument: Any) -> Any:
        """An argument with values in place of nodes, and tuples, which can be keys, in place of lists."""
        if isinstance(argument, fx.Node):
            return self.values[argument.name]
        if isinstance(argument, (list, tuple)):
            return tuple(self._argument(one) for one in argument)
        return argument


def _refusal(node: fx.Node, error: Exception) -> InputError:
    line = source_line(node)
    return InputError(
        f"the model cannot take this input: `{node.name}` ({node.target}){f' at {line}' if line else ''}"
        f" fails with: {str(error).splitlines()[0]}"
    )


class _Interpreter(fx.Interpreter):
    """Runs a graph that calls more than operators on fake tensors, and collects values and arithmetic.

    Torch's `FakeTensorProp` would write into the ``meta`` of the captured nodes instead.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.metas: dict[str, Meta] = {}
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = self._counted(n) if _may_multiply(n) else super().run_node(n)
        except Exception as error:
            raise _refusal(n, error) from error
        self.metas[n.name] = _meta(value)
        return value

    def _counted(self, n: fx.Node) -> Any:
        """The value of a node whose multiply-accumulates count; a FLOP of torch's counter is half of one."""
        with Flops() as counter:
            value = super().run_node(n)
        self.macs[n.name] = counter.flops // 2
        return value


def _may_multiply(node: fx.Node) -> bool:
    """Whether an operator takes several tensors and is not pointwise, as all products are."""
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return is_operator and len(node.all_input_nodes) > 1 and torch.Tag.pointwise not in node.target.tags  # type: ignore[union-attr]


def _meta(value: Any) -> Meta:
    if isinstance(value, torch.Tensor):
        return Shape(tuple(value.shape), value.dtype)
    if isinstance(value, (int, Shape)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(m for m in map(_meta, value) if isinstance(m, (Shape, int)))
    return None


def shapes_at(module: fx.GraphModule, tensors: Sequence[Any]) -> Shapes:
    """`Meta` and arithmetic of every node by name, for these values of the placeholders.

    Of tensors only the shapes matter.

    Raises `InputError`, with the node and the user's line, if an operator refuses the size.
    """
    strided = all(t.layout == torch.strided for t in tensors if isinstance(t, torch.Tensor))
    if strided and all(map(_is_plain, module.graph.nodes)):
        return _Walk(module, tensors).run()
    interpreter = _Interpreter(module)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        interpreter.run(*map(_fake, tensors))
    return Shapes(interpreter.metas, interpreter.macs)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is an input, an output, an operator, or arithmetic on integers."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    return isinstance(node.target, torch._ops.OpOverload) or getattr(node.target, "__module__", "") in ARITHMETIC


ARITHMETIC = ("_operator", "math", "builtins")


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
