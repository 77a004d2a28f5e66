"""Windows as columns and back (`im2col`, `col2im`): windows lie along channels, and their positions are flat.

A column is made of slices of the padded map, one per tap. Columns are summed up again by a transposed convolution
whose weights are one at one tap.
"""

from __future__ import annotations

import itertools

from fxstream.lowering.positions.unflatten import FlatOperator, Handler, Result, Unflattened

__all__ = ["HANDLERS"]


def _columns(op: FlatOperator) -> Result:
    """Every tap of every window, along channels."""
    if op.source(op.self) is not None or op.self.dims != (2, 3):
        return None
    kernel, dilation, stride = op.kernel_size, op.dilation, op.stride
    padded, taps = op.self.constant_pad_nd([p for p in reversed(op.padding) for _ in range(2)]), []
    for tap in itertools.product(*map(range, kernel)):
        tensor = padded
        for axis, i in enumerate(tap):
            end = (i - kernel[axis] + 1) * dilation[axis]
            tensor = tensor.slice(2 + axis, i * dilation[axis], end or None, stride[axis])
        taps.append(tensor)
    windows = zip(op.self.shape[2:], kernel, dilation, op.padding, stride, strict=True)
    extents = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in windows)
    return Unflattened(op.call("stack", taps, 2).flatten(1, 2), 2, extents, (0, 1))


def _sums(op: FlatOperator) -> Result:
    """The sum of all taps that lie at a position, of columns whose positions are known."""
    source, kernel = op.only("self"), op.kernel_size
    if source is None or source.place != 2 or source.space != (0, 1) or len(source.extents) != 2:
        return None
    numbers = list(zip(op.output_size, kernel, op.dilation, op.padding, op.stride, strict=True))
    beyond = [
        (source.tensor.size(2 + axis) - 1) * -s + (2 * p - d * (k - 1) - 1) + n
        for axis, (n, k, d, p, s) in enumerate(numbers)
    ]
    taps = kernel[0] * kernel[1]
    channels = op.self.shape[1] // taps
    one = op.call("eye", taps, dtype=op.value.dtype, device=op.device)
    weight = one.view([taps, 1, *kernel]).repeat([channels, 1, 1, 1])
    return op.call(
        "conv_transpose2d", source.tensor, weight, None, op.stride, op.padding, beyond, channels, op.dilation
    )


HANDLERS: dict[str, Handler] = {"im2col": _columns, "col2im": _sums}
"""Per operator, what it is made of."""
