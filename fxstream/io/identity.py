"""What a prediction is made of, in few characters, so that a journal can tell one prediction from another.

Weights are compared by all of their values, and images as well up to `WHOLE` bytes. Of larger ones `SAMPLES`
pieces of `EDGE` pixels per axis are compared, evenly spread: another image is seen, a change between the
pieces is not.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from fxstream.io.source import Source

__all__ = ["values_of", "weights_of"]

WHOLE, STRIP = 2**28, 2**24
"""Bytes of an image that is compared by all of its values, and of what is read of it at once."""

SAMPLES, EDGE, ENTRIES = 64, 32, 8
"""Pieces of a larger image, their pixels per axis, and the entries of a batch that they are taken of."""


def values_of(image: torch.Tensor | Source) -> str:
    """A digest of the values of an image or of another tensor."""
    pieces = _pieces(tuple(image.shape), image.dtype.itemsize)
    if isinstance(image, Source):
        return _digest(image.read(piece) for piece in pieces)
    return _digest(image.detach()[piece] for piece in pieces)


def weights_of(model: nn.Module) -> str:
    """A digest of the parameters and buffers of a model."""
    tensors = dict(sorted(model.state_dict().items()))
    names = hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16]
    return f"{names} {_digest(tensors.values())}"


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _pieces(shape: Sequence[int], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """The boxes of an image that are compared.

    >>> list(_pieces((1, 3, 8, 5), 1))
    [(slice(0, 1, None), slice(0, 3, None), slice(0, 8, None), slice(0, 5, None))]
    """
    size = math.prod(shape) * itemsize
    longest = max(range(len(shape)), key=lambda axis: shape[axis], default=0)
    axes: list[list[slice]] = [[slice(0, extent)] for extent in shape]
    if size > WHOLE and len(shape) > 2:
        per_axis = round(SAMPLES ** (1 / (len(shape) - 2)))
        axes[0] = _spread(shape[0], 1, ENTRIES)
        axes[2:] = [_spread(extent, EDGE, per_axis) for extent in shape[2:]]
    elif size > STRIP:
        rows = max(1, shape[longest] * STRIP // size)
        axes[longest] = [slice(at, min(at + rows, shape[longest])) for at in range(0, shape[longest], rows)]
    return itertools.product(*axes)


def _spread(extent: int, edge: int, count: int) -> list[slice]:
    """Pieces of an axis from its start to its end.

    >>> _spread(100, 20, 3)
    [slice(0, 20, None), slice(40, 60, None), slice(80, 100, None)]
    """
    edge = min(edge, extent)
    starts = sorted({place * (extent - edge) // max(1, count - 1) for place in range(count)})
    return [slice(start, start + edge) for start in starts]
