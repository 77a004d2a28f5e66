"""The prediction of one image: opened, planned, streamed into its work folder, finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxstream.compiler.compile as compiler
from fxstream.compiler.module import StreamedModule, inspect
from fxstream.io.inputs import inputs_of
from fxstream.io.source import source, torch_dtype
from fxstream.io.target import target
from fxstream.prediction.images import open_image, stem_of
from fxstream.prediction.network import Moments, Normalised
from fxstream.prediction.picture import Level
from fxstream.prediction.results import FORMATS, finished, form_of, opened
from fxstream.runtime.ranks import Ranks, together
from fxstream.tools.infer import infer

__all__ = ["Predictor"]


@dataclass(slots=True)
class Predictor:
    """What predicts images, one after the other, with one network.

    `request` are options of `compile`, `reading` are level, spacing and layout. `ranks` share the tiles of each
    image. `modules` are the compiled networks by what images are divided by and by the number of their axes.
    """

    network: nn.Module
    moments: Moments | None
    request: dict[str, Any]
    reading: dict[str, Any]
    format: str
    dtype: str | None
    ranks: Ranks | None = None
    modules: dict[tuple[float, int], StreamedModule] = field(default_factory=dict)

    def __call__(self, image: Path, folder: Path, accept: Callable[[str], None]) -> tuple[Path, str]:
        """Compute the result of an image in a work folder: where it is, and the name that it is to have.

        `accept` is called with the name before anything is computed. Of ranks that share the tiles every one calls
        this, with the same folder, and the first one finishes the result.
        """
        ranks = self.ranks
        is_first = ranks is None or not ranks.rank
        with contextlib.ExitStack() as stack:
            with together(ranks):
                level = self._level(image, stack)
                module = self._module(level)
                pixels = source(level.array, layout=level.layout, dtype=_floating(self.network))
            with torch.no_grad():
                ready = inspect(module).ready(inputs_of(module, (pixels,), {}), [0])
            with together(ranks):
                form = form_of(ready, level, self.dtype)
                name = stem_of(image) + (FORMATS[self.format] if form.letters else ".npy")
                accept(name)
                array = opened(folder, form, True) if is_first else None
            with together(ranks):
                array = opened(folder, form, False) if array is None else array
                out = target(array, (None, ...) if form.dropped else ...)
            options = {"restart": True, "saturate": self.dtype is not None}
            infer(module, pixels, out=out, journal=folder / "journal", **options)
            with together(ranks):
                self._level(image, stack)  # is it still there? Chunks of a store that is gone are read as zeros
        return (finished(folder, form, self.format, stem_of(image)) if is_first else folder), name

    def _level(self, image: Path, stack: contextlib.ExitStack) -> Level:
        """The level of an image that is read; the file is closed with the stack."""
        picture = open_image(image, self.reading["layout"])
        stack.callback(picture.close)
        return picture.level(self.reading["level"], self.reading["spacing"])

    def _module(self, level: Level) -> StreamedModule:
        """The compiled network for images like this one."""
        largest, axes = 1.0, len(level.axes)
        if self.moments is not None:
            dtype = torch_dtype(level.array.dtype)
            largest = 1.0 if dtype.is_floating_point or dtype == torch.bool else float(torch.iinfo(dtype).max)
        if (largest, axes) not in self.modules:
            network = self.network
            if self.moments is not None:
                network = Normalised(network, self.moments, largest, axes)
            self.modules[largest, axes] = compiler.compile(network, **self.request)
        return self.modules[largest, axes]


def _floating(network: nn.Module) -> torch.dtype | None:
    """The type of the network's weights, which its images are converted to; None where it has none."""
    return next((tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()), None)
