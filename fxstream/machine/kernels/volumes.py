"""Convolutions of one volume on the CPU, by the kernel that torch takes for several.

For one volume whose channels, planes and rows are few, torch (2.13) leaves oneDNN and takes a kernel that copies
every window: several times slower, and with as many bytes as the kernel has elements for each of the result. Tiles
are such volumes. So a tile is convolved as a batch of two: its halves along the rows, which overlap by the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxstream.machine.operators import operator, overload

__all__ = ["VOLUME_CONVOLUTION", "convolved_in_halves", "is_in_halves", "is_slow"]

aten = torch.ops.aten
FEW = 20480
"""Channels times planes times rows of one volume up to which torch takes the slow kernel."""
LARGE_KERNEL = 3
"""A kernel of more rows and more columns than that is a fast one."""
LEAST_MACS = 2**22
"""Multiply-accumulates of a convolution from which on two more copies are less than what they save."""
ROWS = 3
"""The dim that is halved. The kernel is slow whatever the columns, so these stay together."""


@operator(
    "volume_convolution(Tensor image, Tensor weight, Tensor? bias=None, int[3] stride=1, int[3] padding=0,"
    " int[3] dilation=1, int groups=1) -> Tensor"
)
def _volume_convolution(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """The result of `aten::conv3d` for the same arguments, to rounding; image [N, C, D, H, W] or [C, D, H, W]."""
    if groups == 1 and is_in_halves(image, weight):
        return convolved_in_halves(image, weight, bias, stride, padding, dilation)
    result: torch.Tensor = aten.conv3d.default(image, weight, bias, stride, padding, dilation, groups)
    return result


VOLUME_CONVOLUTION = overload("volume_convolution")


def is_in_halves(image: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an ungrouped convolution of this image is faster in halves, by its shapes, type and device."""
    if image.device.type != "cpu" or image.dtype != torch.float32 or image.ndim != 5 or image.shape[0] != 1:
        return False
    has_other = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    macs = weight.numel() * math.prod(image.shape[2:])
    return macs >= LEAST_MACS and has_other and is_slow(image.shape, weight.shape)


def is_slow(image: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether torch has a slow kernel for one image and a weight of these shapes, ungrouped, on the CPU."""
    is_small = image[0] == 1 and math.prod(image[: ROWS + 1]) <= FEW
    return is_small and min(weight[ROWS:]) <= LARGE_KERNEL and max(weight[ROWS:]) > 1


def convolved_in_halves(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """The convolution of one volume as that of a batch of two: the upper and the lower half of its rows."""
    (planes, rows, columns), step = padding, stride[1]
    reach = dilation[1] * (weight.shape[ROWS] - 1) + 1
    count = (image.shape[ROWS] + 2 * rows - reach) // step + 1
    half = -(-count // 2)
    read = (half - 1) * step + reach
    padded = aten.constant_pad_nd.default(image, [0, 0, rows, rows]) if rows else image
    halves = torch.cat([padded.narrow(ROWS, start, read) for start in (0, (count - half) * step)])
    del padded
    numbers = stride, (planes, 0, columns), dilation
    upper, lower = aten.conv3d.default(halves, weight, bias, *numbers).chunk(2)
    return torch.cat([upper, lower.narrow(ROWS, 2 * half - count, count - half)], ROWS)
