"""`predict`: a network over many images, by as many processes as are started on one folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxstream.errors import FxstreamError, InputError
from fxstream.io.identity import weights_of
from fxstream.machine.device import device_of
from fxstream.prediction.images import stem_of
from fxstream.prediction.job import Job, Lease
from fxstream.prediction.network import Normalise, moments_of, network_of
from fxstream.prediction.one_image import Predictor
from fxstream.prediction.results import FORMATS
from fxstream.runtime.ranks import Ranks

__all__ = ["Predictions", "predict"]

FileName = str | os.PathLike[str]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The results of images by their paths, and why others failed; `here` are those that this call computed."""

    done: dict[Path, Path] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    here: tuple[Path, ...] = ()

    def __str__(self) -> str:
        count = len(self.done) + len(self.failed)
        lines = [
            f"{count} images: {len(self.done)} done ({len(self.here)} by this process), {len(self.failed)} failed"
        ]
        return "\n".join(lines + [f"failed: {image}: {error}" for image, error in self.failed.items()])


def predict(
    model: nn.Module | str,
    images: FileName | Sequence[FileName],
    out: FileName,
    *,
    weights: FileName | None = None,
    memory: float | str | None = None,
    device: torch.device | str | None = None,
    level: int | None = None,
    spacing: float | None = None,
    layout: str | None = None,
    normalise: Normalise = None,
    format: str = "ome-zarr",
    dtype: str | None = None,
    mesh: Any = None,
    progress: bool = False,
    say: Say | None = None,
) -> Predictions:
    """Run a network over image files, and write a file for each into the folder `out`, tile by tile.

    No image and no result is in memory as a whole. The folder is a job: any number of processes may call this with
    it, on any machines that share it, at the same time or later. Each image is done once, by one of them; what a
    process that died was at is taken over and continued by another. A broken image does not stop the others.

    - `model`: a module in evaluation mode that returns one tensor, or the text that names one on the command line,
      with its `weights` (safetensors, or a state dict of torch).
    - `images`: paths of TIFF, OME-TIFF and slides (tifffile, OpenSlide), OME-Zarr, zarr, npy, PNG and JPEG. PNG
      and JPEG are decoded whole. `layout` names the axes of an array where the file does not, as ``"YXC"``.
    - `level`, or `spacing` in micrometres per pixel: which level of a pyramid is read, by default the finest.
      Images are not resampled: a spacing that no level has within 10% is an error.
    - `normalise`: ``"unit"`` divides integers by the largest value of their type, ``"imagenet"`` also takes away
      the mean and divides by the deviation of that data; so do a pair of means and deviations per channel, of
      values from 0 to 1. By default the network gets the values as they are stored, in its own type.
    - `format`: of maps, ``"ome-zarr"`` or ``"tiff"``, a BigTIFF, both with levels and the size of pixels. A vector
      is written as ``.npy``. `dtype` is the type that is stored, by default that of the result; integers become
      its limits where they exceed these.
    - `memory`: that of `compile`. With `device`, a module that a text names is put there.
    - `mesh`: one dimension of a DeviceMesh, whose ranks share the tiles of each image instead of the images.
    - `progress`: whether a bar is shown. `say` is called with a line for each image.

    Returns the results and failures of all images, whichever process they are of. Raises `InputError` for a job of
    another network, weights or settings in the folder, for two images of one name, and for settings that are none.
    """
    paths = [Path(images)] if isinstance(images, (str, os.PathLike)) else [Path(image) for image in images]
    _check(paths, level, spacing, format, dtype)
    network = network_of(model, weights, None if device is None else _of_process(device_of(str(device))))
    reading, writing = {"level": level, "spacing": spacing, "layout": layout}, {"format": format, "dtype": dtype}
    moments = moments_of(normalise)
    described = {"network": type(network).__name__, "weights": weights_of(network), "normalise": moments}
    job = Job(Path(out), described | reading | writing)
    ranks = None if mesh is None else Ranks(mesh)
    if ranks is not None and ranks.rank:
        progress, say = False, None
    request = {"memory": memory, "mesh": mesh, "progress": progress}
    predictor = Predictor(network, moments, request, reading, format, dtype, ranks)
    return _outcome(job, paths, tuple(_worked(job, paths, predictor, say or _silent)))


def _outcome(job: Job, paths: Sequence[Path], here: tuple[Path, ...]) -> Predictions:
    done = {path: result for path in paths if (result := job.result(path)) is not None}
    failed = {path: job.failure(path) or "not done" for path in paths if path not in done}
    return Predictions(done, failed, here)


def _check(
    paths: Sequence[Path], level: int | None, spacing: float | None, format: str, dtype: str | None
) -> None:
    """Raise `InputError` for what can be seen before anything is opened."""
    if not paths:
        raise InputError("predict needs an image")
    if level is not None and spacing is not None:
        raise InputError("give level or spacing, not both")
    if format not in FORMATS:
        raise InputError(f"format={format!r} is none: give {' or '.join(FORMATS)}")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype!r} is none: give uint8, int32, float16, float32 or another one of torch")
    names: dict[str, Path] = {}
    for path in paths:
        other = names.setdefault(stem_of(path), path)
        if other is not path:
            raise InputError(
                f"{other} and {path} would have results of one name ({stem_of(path)}): predict them into two"
                " folders"
            )


def _of_process(device: torch.device) -> torch.device:
    """The device of this process, where torchrun started several on one machine."""
    rank = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or device.index is not None or rank is None:
        return device
    return torch.device("cuda", int(rank) % max(1, torch.cuda.device_count()))


def _worked(job: Job, paths: Sequence[Path], predictor: Predictor, say: Say) -> Iterator[Path]:
    """The images that are predicted here, as they are done; of ranks the first one says which come next."""
    if predictor.ranks is not None and predictor.ranks.rank:
        while (work := predictor.ranks.gather(None)[0]) is not None:
            _try(predictor, *work)
        return
    leases = job.leases(paths)
    for image, lease in leases:
        if predictor.ranks is not None:
            predictor.ranks.gather((image, lease.folder))
        if _is_done(job, image, lease, predictor, say):
            yield image
    if predictor.ranks is not None:
        predictor.ranks.gather(None)


def _try(predictor: Predictor, image: Path, folder: Path) -> None:
    """Take part in an image; the first rank tells what is wrong with it."""
    try:
        predictor(image, folder, lambda _: None)
    except Exception as error:
        if "is gone" in str(error):
            raise


def _is_done(job: Job, image: Path, lease: Lease, predictor: Predictor, say: Say) -> bool:
    """Predict an image; whether that was possible. What it failed with is said, and noted in the job."""
    began = time.monotonic()
    try:
        made, name = predictor(image, lease.folder, lambda name: job.refuse_taken(image, name))
        job.finish(image, lease, made, name)
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if isinstance(error, FxstreamError) else f"{type(error).__name__}: {text}"
        if not lease.is_lost:
            job.fail(image, text)
        say(f"{image}: {'given up' if lease.is_lost else 'failed'}: {text}")
        return False
    say(f"{image} -> {job.folder / name}  {time.monotonic() - began:.1f} s")
    return True


def _silent(line: str) -> None:
    """Nobody listens."""
