"""Pixels of an image that are not read, because the user says that nothing is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxstream.errors import InputError

__all__ = ["Skip"]


@dataclass(frozen=True, slots=True)
class Skip:
    """A mask of an image's axes, and what the image is where it is true: one number per channel.

    A pixel belongs to entry ``pixel * len(mask) // extent`` of the mask, along each axis.
    """

    mask: torch.Tensor
    fill: torch.Tensor
    extents: tuple[int, ...]

    @classmethod
    def of_mask(cls, mask: Any, fill: float | Sequence[float], shape: Sequence[int], dtype: torch.dtype) -> Skip:
        """The mask for an image [N, C, spatial dims...]. Raises `InputError` for one that does not fit."""
        extents = tuple(shape[2:])
        try:
            pixels, values = torch.as_tensor(mask), torch.as_tensor(fill, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"skip needs a mask and a number, or one per channel, as fill: {error}") from error
        fits = pixels.ndim == len(extents) and all(0 < m <= e for m, e in zip(pixels.shape, extents, strict=True))
        if pixels.dtype != torch.bool or not fits:
            raise InputError(
                f"skip is {pixels.dtype} {list(pixels.shape)}: give a bool mask of the axes of the image, of at"
                f" most {list(extents)}"
            )
        if shape[0] > 1:
            raise InputError(f"skip is for one image, and this is a batch of {shape[0]}")
        if values.numel() not in (1, shape[1]) or values.ndim > 1:
            raise InputError(f"fill={fill!r} is no number, and not one per channel of {shape[1]}")
        stored = values.to(dtype)
        if not torch.equal(stored.double(), values):
            raise InputError(f"fill={fill!r} is no value of an image of type {dtype}")
        return cls(pixels.cpu(), stored.reshape(-1).expand(shape[1]), extents)

    def of(self, bounds: Sequence[range]) -> torch.Tensor:
        """The mask of a box, bool [spatial dims...].

        >>> Skip(torch.tensor([True, False]), torch.zeros(1), (5,)).of([range(1, 5)]).tolist()
        [True, True, False, False]
        """
        mask = self.mask
        for axis, (part, extent) in enumerate(zip(bounds, self.extents, strict=True)):
            pixels = torch.arange(part.start, part.stop) * self.mask.shape[axis] // extent
            mask = mask.index_select(axis, pixels)
        return mask

    def filled(self, dtype: torch.dtype, entries: int, bounds: Sequence[range]) -> torch.Tensor:
        """A box [entries, C, spatial dims...] of nothing else than the fill."""
        channels, *rest = bounds
        values = self.fill[channels.start : channels.stop].to(dtype).view(1, -1, *[1] * len(rest))
        return values.expand(entries, *map(len, bounds))
