"""Image files by their formats, opened without reading them: TIFF and slides, zarr and OME-Zarr, npy, PNG and
JPEG.

PNG, JPEG and BMP cannot be read in parts: they are decoded whole, into host memory. The files `tiff` and
`ome_zarr` have the formats that need more than a few lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from fxstream.errors import InputError
from fxstream.io.slides import openslide_array
from fxstream.prediction.libraries import has_library, library
from fxstream.prediction.ome_zarr import open_zarr
from fxstream.prediction.picture import Level, Picture, layout_of
from fxstream.prediction.tiff import is_decodable, open_tiff

__all__ = ["open_image", "stem_of"]

TIFFS = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".scn", ".qptiff", ".lsm", ".stk")
SLIDES = (".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".zvi", ".czi")
WHOLE = (".png", ".jpg", ".jpeg", ".bmp")


def open_image(path: Path, layout: str | None = None) -> Picture:
    """The image of a file, or of a folder that is a zarr store. `layout` names its axes where the file does not.

    Raises `InputError` for a file that is none, and for a format whose library is not installed.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}")
    try:
        return _opener(path)(path, layout)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be opened: {type(error).__name__}: {error}") from error


def stem_of(path: Path) -> str:
    """The name of an image without what says its format.

    >>> [stem_of(Path(name)) for name in ("a/one.ome.tif", "two.zarr", "v1.2.svs", "three")]
    ['one', 'two', 'v1.2', 'three']
    """
    return path.stem.removesuffix(".ome") if path.suffix else path.name


def _opener(path: Path) -> Callable[[Path, str | None], Picture]:
    suffix = path.suffix.lower()
    if path.is_dir():
        return open_zarr
    if suffix in TIFFS:
        return _open_tiff
    if suffix in SLIDES:
        return _open_slide
    if suffix == ".npy":
        return _open_npy
    if suffix in WHOLE:
        return _open_whole
    formats = " ".join((*TIFFS[:6], *SLIDES, ".zarr", ".npy", *WHOLE))
    raise InputError(f"{path} is of no format that is read here: {formats}")


def _open_tiff(path: Path, layout: str | None) -> Picture:
    """By tifffile; by OpenSlide where only that can decode the slide."""
    if has_library("openslide") and not (has_library("tifffile") and is_decodable(path)):
        return _open_slide(path, layout)
    return open_tiff(path, layout)


def _open_slide(path: Path, layout: str | None) -> Picture:
    openslide = library("openslide", f"{path.suffix} ({path.name})")
    slide = openslide.OpenSlide(str(path))
    finest = [slide.properties.get(f"openslide.mpp-{axis}") for axis in ("y", "x")]
    levels = []
    for number, scale in enumerate(slide.level_downsamples):
        spacing = {} if None in finest else {a: float(s) * scale for a, s in zip("YX", finest, strict=True)}
        levels.append(Level(openslide_array(slide, number), layout or "YXC", spacing))
    return Picture(path.name, levels, slide.close)


def _open_npy(path: Path, layout: str | None) -> Picture:
    array = library("numpy", ".npy").load(path, mmap_mode="r")
    return Picture(path.name, [Level(array, layout_of(array, layout, path.name))])


def _open_whole(path: Path, layout: str | None) -> Picture:
    pillow, numpy = library("PIL.Image", path.suffix), library("numpy", path.suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with pillow.open(path) as image:
                array = numpy.asarray(
                    image if image.mode in ("L", "RGB", "RGBA", "I;16") else image.convert("RGB")
                )
        except pillow.DecompressionBombError as error:
            raise InputError(
                f"{path.name} is too large to be decoded whole, as {path.suffix} must be ({error}): convert it"
                " to a tiled TIFF"
            ) from error
    return Picture(path.name, [Level(array, layout or ("YX" if array.ndim == 2 else "YXC"))])
