"""Convolutions of one volume on the CPU, by the kernel that torch takes for several.

For one volume whose channels, planes and rows are few, torch (2.13) leaves oneDNN and takes a kernel that copies
every window: several times slower, and with as many bytes as the kernel has elements for each of the result. Tiles
are such volumes. So a tile is convolved as a batch of two: its halves along the rows, which overlap by the kernel.
Where nothing is recorded, the kernel of oneDNN is called itself, with the same results bit by bit; recorded, torch
would take the slow one for its backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxstream.machine.operators import operator, overload

__all__ = ["VOLUME_CONVOLUTION", "convolved_in_halves", "is_halved", "is_in_halves"]

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
    if is_in_halves(image, weight):
        if not torch.is_grad_enabled() and type(image) is torch.Tensor:  # others are traced
            whole: torch.Tensor = aten.mkldnn_convolution(image, weight, bias, padding, stride, dilation, 1)
            return whole
        return convolved_in_halves(image, weight, bias, stride, padding, dilation)
    result: torch.Tensor = aten.conv3d.default(image, weight, bias, stride, padding, dilation, groups)
    return result


VOLUME_CONVOLUTION = overload("volume_convolution")


def is_in_halves(image: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a convolution of this image is faster in halves, by its shapes, type and device."""
    if image.device.type != "cpu" or image.dtype != torch.float32:
        return False
    has_other = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_other and is_halved(image.shape, weight.shape)


def is_halved(image: Sequence[int], weight: Sequence[int]) -> bool:
    """The same by the shapes alone, on a CPU and in float32; torch has a fast kernel for groups."""
    if len(image) != 5 or image[0] != 1 or image[1] != weight[1]:
        return False
    is_slow = math.prod(image[: ROWS + 1]) <= FEW
    is_windowed = min(weight[ROWS:]) <= LARGE_KERNEL and max(weight[ROWS:]) > 1
    return is_slow and is_windowed and math.prod(weight) * math.prod(image[2:]) >= LEAST_MACS


def convolved_in_halves(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """The convolution of one volume as that of a batch of two: the upper and the lower half of its rows.

    Both halves are as large, and padded on both sides, so that rows at the cut are computed in excess.
    """
    kernel, step, pad, length = weight.shape[ROWS], stride[1], padding[1], image.shape[ROWS]
    count = (length + 2 * pad - dilation[1] * (kernel - 1) - 1) // step + 1
    upper = -(-count // 2)
    first = count - upper - -(-pad // step)  # the row of the result that the lower half would begin with
    if first < 1:
        return torch.conv3d(image, weight, bias, stride, padding, dilation)
    # [1, C, D, 2, W, rows] to a batch of two; a view
    halves = image.unfold(ROWS, length - first * step, first * step).squeeze(0).permute(2, 0, 1, 4, 3)
    above, below = aten.conv3d.default(halves, weight, bias, stride, padding, dilation).chunk(2)
    return torch.cat([above.narrow(ROWS, 0, upper), below.narrow(ROWS, upper - first, count - upper)], ROWS)
