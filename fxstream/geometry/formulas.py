"""The shape of an operator's result by arithmetic, from the shapes of its tensors.

A formula is given the operator's arguments by position, shapes in place of tensors, and returns the shape of its
result, or None where it has none for these: the operator is then run on fake tensors, which also says what is
wrong with shapes that do not fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["FORMULAS", "Dims", "broadcast", "work"]

Dims = tuple[int, ...]
Formula = Callable[..., "Dims | None"]


def broadcast(*shapes: Dims) -> Dims | None:
    """The common shape of several that are broadcast.

    >>> broadcast((2, 1, 5), (4, 1)), broadcast((2,), (3,))
    ((2, 4, 5), None)
    """
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    common = []
    for sizes in itertools.zip_longest(*map(reversed, shapes), fillvalue=1):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            return None
        common.append(wide.pop() if wide else 1)
    return tuple(reversed(common))


def _along(value: Any, count: int) -> Sequence[int] | None:
    """One number per axis of an argument that may be one number for all."""
    if isinstance(value, int):
        return (value,) * count
    if not isinstance(value, (list, tuple)) or not all(isinstance(n, int) for n in value):
        return None
    return tuple(value) if len(value) == count else tuple(value) * count if len(value) == 1 else None


def _windows(
    extents: Dims, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool = False
) -> Dims | None:
    numbers = [_along(value, len(extents)) for value in (kernel, stride, padding, dilation)]
    if None in numbers:
        return None
    results = []
    each: Any = zip(extents, *numbers, strict=True)  # type: ignore[arg-type]
    for extent, k, s, p, d in each:
        rest = extent + 2 * p - d * (k - 1) - 1
        if rest < 0:
            return None
        count = -(-rest // s) + 1 if ceil else rest // s + 1
        results.append(count - 1 if ceil and (count - 1) * s >= extent + p else count)
    return tuple(results)


def _convolution(
    image: Dims,
    weight: Dims,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims | None:
    axes = len(weight) - 2
    if len(image) != axes + 2 or image[1] != weight[1] * groups:
        return None
    extents = _windows(image[2:], weight[2:], stride, padding, dilation)
    return None if extents is None else (image[0], weight[0], *extents)


def _transposed_convolution(
    image: Dims,
    weight: Dims,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Dims | None:
    axes = len(weight) - 2
    numbers = [_along(value, axes) for value in (stride, padding, output_padding, dilation)]
    if len(image) != axes + 2 or image[1] != weight[0] or None in numbers:
        return None
    each: Any = zip(image[2:], weight[2:], *numbers, strict=True)  # type: ignore[arg-type]
    extents = [(extent - 1) * s - 2 * p + d * (k - 1) + o + 1 for extent, k, s, p, o, d in each]
    return (image[0], weight[1] * groups, *extents) if min(extents) > 0 else None


def work(operator: str, result: Dims, args: Sequence[Any]) -> int:
    """Multiply-accumulates of an operator that has a formula.

    >>> work("aten::linear", (2, 5), [(2, 3), (5, 3)])
    30
    """
    formula = FORMULAS.get(operator)
    if formula not in (_convolution, _linear, _transposed_convolution):
        return 0
    pixels: Dims = args[0] if formula is _transposed_convolution else result
    weight: Dims = args[1]
    return math.prod(pixels) * math.prod(weight[1:])


def _pooling(axes: int) -> Formula:
    def of(
        image: Dims, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
    ) -> Dims | None:
        largest = kernel if isinstance(kernel, int) else max(kernel)
        if len(image) != axes + 2 or min(image[2:]) < largest:  # which torch may refuse
            return None
        extents = _windows(image[2:], kernel, stride or kernel, padding, dilation, ceil)
        return None if extents is None else (*image[:2], *extents)

    return of


def _average(axes: int) -> Formula:
    pooling = _pooling(axes)
    return lambda image, kernel, stride=(), padding=0, ceil=False, *_: pooling(
        image, kernel, stride, padding, 1, ceil
    )


def _joined(shapes: Sequence[Dims], dim: int = 0) -> Dims | None:
    first = shapes[0]
    dim %= len(first)
    if any(len(s) != len(first) or s[:dim] != first[:dim] or s[dim + 1 :] != first[dim + 1 :] for s in shapes):
        return None
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


def _reduced(image: Dims, dims: Any = None, keepdim: bool = False, *_: Any) -> Dims | None:
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    over = {dim % len(image) for dim in dims}
    kept = ((1 if d in over else n) for d, n in enumerate(image) if keepdim or d not in over)
    return tuple(kept)


def _viewed(image: Dims, size: Sequence[int]) -> Dims | None:
    rest = math.prod(n for n in size if n != -1)
    if -1 not in size:
        return tuple(size) if rest == math.prod(image) else None
    if list(size).count(-1) > 1 or not rest or math.prod(image) % rest:
        return None
    return tuple(math.prod(image) // rest if n == -1 else n for n in size)


def _expanded(image: Dims, size: Sequence[int], *_: Any) -> Dims | None:
    padded = (*[1] * (len(size) - len(image)), *image)
    if len(padded) != len(size) or any(n not in (-1, m) and m != 1 for n, m in zip(size, padded, strict=True)):
        return None
    return tuple(m if n == -1 else n for n, m in zip(size, padded, strict=True))


def _permuted(image: Dims, dims: Sequence[int]) -> Dims | None:
    return tuple(image[d] for d in dims) if len(dims) == len(image) else None


def _transposed(image: Dims, a: int, b: int) -> Dims:
    order = list(range(len(image)))
    order[a], order[b] = order[b], order[a]
    return tuple(image[d] for d in order)


def _linear(image: Dims, weight: Dims, bias: Any = None) -> Dims | None:
    return (*image[:-1], weight[0]) if len(weight) == 2 and image[-1] == weight[1] else None


def _normalised(image: Dims, weight: Any = None, bias: Any = None, *others: Any) -> Dims | None:
    """Of a batch norm: its weights and statistics have the channels of the image."""
    of_channels = (weight, bias, *others[:2])
    fits = all(one is None or one == image[1:2] for one in of_channels)
    return image if fits else None


def _layer_normalised(image: Dims, shape: Sequence[int], *_: Any) -> Dims | None:
    return image if tuple(shape) == image[len(image) - len(shape) :] else None


def _moments(image: Dims, dims: Sequence[int]) -> Dims | None:
    reduced = _reduced(image, dims)
    return None if reduced is None else (3, *reduced)


def _same(image: Dims, *_: Any) -> Dims:
    return image


FORMULAS: dict[str, Formula] = {
    **{f"aten::conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten::max_pool{n}d": _pooling(n) for n in (1, 2, 3)},
    **{f"aten::avg_pool{n}d": _average(n) for n in (2, 3)},
    **{
        f"aten::{name}": _same
        for name in ("detach", "dropout", "clone", "alias", "contiguous", "copy_", "bernoulli")
    },
    **{f"aten::{name}": _same for name in ("ones_like", "zeros_like", "softmax", "_to_copy")},
    **{f"aten::{name}": _reduced for name in ("mean", "sum", "amax", "amin")},
    **{f"aten::{name}": _viewed for name in ("view", "reshape", "_unsafe_view")},
    **{f"aten::conv_transpose{n}d": _transposed_convolution for n in (1, 2, 3)},
    "fxstream::moments": _moments,
    "aten::batch_norm": _normalised,
    "aten::layer_norm": _layer_normalised,
    "aten::cat": _joined,
    "aten::expand": _expanded,
    "aten::linear": _linear,
    "aten::permute": _permuted,
    "aten::transpose": _transposed,
}
"""Formulas by the name of an operator; pointwise operators have `broadcast`."""
