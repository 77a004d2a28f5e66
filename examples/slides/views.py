"""Slides of different sizes as images on disk, mirrored, turned and cropped by how they are read, without a copy.

`SlideSources` yields what a compiled module takes in the place of a tensor: an `fxstream.source` of bytes. What an
image looks like in an epoch depends on the seed, the epoch and its place in the list alone, so that a run that is
resumed sees what an uninterrupted one sees.
"""

import itertools
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile
import torch
import zarr
from data import Row
from pyramid import open_slide
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import fxstream


class View:
    """A part of an array [H, W, channels], maybe mirrored or turned, of which boxes are read.

    >>> view = View(np.arange(6).reshape(2, 3, 1)).turned(1).cropped(1, 0, 2, 2)
    >>> view.shape, view[0:2, 0:2, 0:1][..., 0].tolist()
    ((2, 2, 1), [[1, 4], [0, 3]])
    """

    def __init__(self, array: Any, rows: range | None = None, columns: range | None = None, swaps: bool = False):
        """`rows` and `columns` of the array, in the order that they are seen in; `swaps` exchanges the two."""
        self.array, self.dtype, self._swaps = array, array.dtype, swaps
        self._rows = range(array.shape[0]) if rows is None else rows
        self._columns = range(array.shape[1]) if columns is None else columns
        lengths = (len(self._rows), len(self._columns))
        self.shape = (*(lengths[::-1] if swaps else lengths), array.shape[2])

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...] | None:
        """How many pixels are seen of every chunk along each axis, as dask tells it; None without chunks."""
        sizes = getattr(self.array, "chunks", None)
        if sizes is None:
            return None
        lengths = tuple(map(_lengths, (self._rows, self._columns), sizes))
        return (*(lengths[::-1] if self._swaps else lengths), _lengths(range(self.shape[2]), sizes[2]))

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        first, second = index[1::-1] if self._swaps else index[:2]
        rows, columns = self._rows[first], self._columns[second]
        values = np.asarray(self.array[_hull(rows), _hull(columns), index[2]])
        values = values[:: rows.step, :: columns.step]
        return values.swapaxes(0, 1) if self._swaps else values

    def mirrored(self) -> "View":
        """Left and right exchanged."""
        if self._swaps:
            return View(self.array, self._rows[::-1], self._columns, True)
        return View(self.array, self._rows, self._columns[::-1])

    def turned(self, times: int) -> "View":
        """Turned by right angles, against the clock."""
        view = self
        for _ in range(times % 4):
            mirrored = view.mirrored()
            view = View(self.array, mirrored._rows, mirrored._columns, not view._swaps)
        return view

    def cropped(self, top: int, left: int, height: int, width: int) -> "View":
        """A part of it, in its own pixels."""
        box = slice(top, top + height), slice(left, left + width)
        first, second = box[::-1] if self._swaps else box
        return View(self.array, self._rows[first], self._columns[second], self._swaps)


def _hull(pixels: range) -> slice:
    return slice(min(pixels), max(pixels) + 1) if pixels else slice(0, 0)


def _lengths(pixels: range, size: int) -> tuple[int, ...]:
    """How many of these pixels lie in each chunk of so many, in the order in which they are seen."""
    return tuple(len(list(inside)) for _, inside in itertools.groupby(pixels, lambda pixel: pixel // size))


class SlideSources(Dataset):
    """Sources [1, 3, H, W] of bytes and labels; H and W are those of each slide at the spacing.

    In training a slide is mirrored and turned at random, and cropped to a `share` of each side.
    """

    def __init__(self, rows: Sequence[Row], spacing: float, *, train: bool, share: float = 0.9, seed: int = 0):
        self.rows, self.spacing, self.train, self.share = rows, spacing, train, share
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[fxstream.Source, torch.Tensor]:
        row = self.rows[index]
        level = open_slide(row.path).level(self.spacing)
        store = tifffile.imread(row.path, aszarr=True, level=level)
        array = zarr.open(store, mode="r")
        weakref.finalize(array, store.close)
        view = View(array)
        if self.train:
            random = np.random.default_rng([self.seed, self.epoch, index])
            view = view.mirrored() if random.random() < 0.5 else view
            view = view.turned(int(random.integers(4)))
            height, width = (max(1, round(self.share * extent)) for extent in view.shape[:2])
            spare = view.shape[0] - height, view.shape[1] - width
            top, left = (int(random.integers(pixels + 1)) for pixels in spare)
            view = view.cropped(top, left, height, width)
        readers = min(8, os.cpu_count() or 1)  # zarr and tifffile let threads read at once
        return fxstream.source(view, layout="HWC", readers=readers), torch.tensor([row.label])


def loader_of(images: SlideSources, replicas: int = 1, replica: int = 0) -> DataLoader:
    """One image at a time; replicas get different ones, processes that share the tiles of an image the same."""
    sampler = DistributedSampler(images, replicas, replica, shuffle=images.train, seed=images.seed)
    return DataLoader(images, batch_size=1, sampler=sampler, collate_fn=first_of)


def first_of(batch: list[Any]) -> Any:
    """The image of a batch of one: sources of different sizes are not stacked."""
    return batch[0]


class FromBytes(nn.Module):
    """A network behind the conversion of bytes to -1 .. 1, which is streamed with it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image.float() / 127.5 - 1)
