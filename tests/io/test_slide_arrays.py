"""Slides as arrays: one value per pixel whatever box it is read with, and a colour where there are no pixels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxstream
from fxstream.io import slides


def bytes_image(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


class Slide:
    """A pyramid as OpenSlide reads it: regions by an origin of level 0, resampled where that is between pixels."""

    def __init__(self, size, scale):
        self.properties = {}
        self.coarse = bytes_image(*size, 3)
        rows, columns = (round(extent * scale) for extent in size)
        self.level_dimensions, self.level_downsamples = ((columns, rows), size[::-1]), (1.0, scale)
        self.reads = []

    def read_region(self, origin, level, size):
        assert level == 1
        self.reads.append(size)
        pixels = self.coarse
        for axis, (start, extent) in enumerate(zip(origin[::-1], size[::-1], strict=True)):
            places = start / self.level_downsamples[1] + np.arange(extent)
            first = np.clip(np.floor(places).astype(int), 0, pixels.shape[axis] - 1)
            share = (places - np.floor(places)).reshape([-1 if k == axis else 1 for k in range(3)])
            second = np.minimum(first + 1, pixels.shape[axis] - 1)
            pixels = pixels.take(first, axis) * (1 - share) + pixels.take(second, axis) * share
        return Image.fromarray(np.round(pixels).astype(np.uint8), "RGB")


@pytest.mark.parametrize("scale", [2.0, 4.0001, 4.0025, 16.003])
def test_a_pixel_has_one_value_whatever_box_it_is_read_with(scale, monkeypatch):
    monkeypatch.setattr(slides, "BLOCK", 16)
    slide = Slide((61, 53), scale)
    array = fxstream.openslide_array(slide, level=1)
    whole = array[0:61, 0:53, 0:3]
    for top, bottom in pairwise((0, 1, 7, 16, 17, 40, 61)):
        for left, right in pairwise((0, 5, 31, 32, 53)):
            assert torch.equal(array[top:bottom, left:right, 0:3], whole[top:bottom, left:right])
    share = 0 if scale == 2 else 0.5 / scale + 0.01  # of a neighbour, along each axis: half a pixel of level 0
    assert (whole.int() - torch.from_numpy(slide.coarse).int()).abs().max() <= 255 * 2 * share


def test_the_streamed_result_is_that_of_the_level_read_whole():
    array = fxstream.openslide_array(Slide((300, 270), 4.0001), level=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    image = fxstream.source(array, layout="HWC", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            fxstream.compile(model, tile=47, segments=1)(image), model(image[()]), rtol=1e-10, atol=1e-10
        )


def test_no_more_is_read_than_the_blocks_of_a_box():
    slide = Slide((600, 600), 4.0001)
    fxstream.openslide_array(slide, level=1)[250:300, 10:20, 0:3]
    assert slide.reads == [(20, 256), (20, 44)]
    slide = Slide((600, 600), 4.0)
    fxstream.openslide_array(slide, level=1)[250:300, 10:20, 0:3]
    assert slide.reads == [(10, 50)]


def test_openslide_itself(tmp_path):
    openslide, tifffile = pytest.importorskip("openslide"), pytest.importorskip("tifffile")
    base = bytes_image(4001, 3003, 3)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(base, tile=(256, 256), photometric="rgb")
        file.write(base[:4000:4, :3000:4], tile=(256, 256), photometric="rgb", subfiletype=1)
    slide = openslide.OpenSlide(str(tmp_path / "slide.tif"))
    assert not slide.level_downsamples[1].is_integer()
    array = fxstream.openslide_array(slide, level=1)
    whole = array[0:1000, 0:750, 0:3]
    for rows, columns in ((slice(100, 400), slice(101, 402)), (slice(133, 701), slice(255, 258))):
        assert torch.equal(array[rows, columns, 0:3], whole[rows, columns])
    assert torch.equal(fxstream.openslide_array(slide)[7:300, 9:400, 0:3], torch.from_numpy(base[7:300, 9:400]))


class Sparse:
    """A slide without pixels in a corner, where OpenSlide gives transparent ones."""

    level_dimensions, level_downsamples = ((20, 30),), (1.0,)

    def __init__(self, **properties):
        self.properties = {f"openslide.{name}": value for name, value in properties.items()}

    def read_region(self, origin, level, size):
        pixels = np.full((30, 20, 4), (10, 20, 30, 255), np.uint8)
        pixels[:4, :5] = 0
        pixels[4, :5, 3] = 51
        left, top = origin
        return Image.fromarray(pixels[top : top + size[1], left : left + size[0]].copy(), "RGBA")


@pytest.mark.parametrize(
    "properties, arguments, color",
    [
        ({}, {}, (255, 255, 255)),
        ({"background_color": "F0E1D2"}, {}, (255, 255, 255)),
        ({"background-color": "F0E1D2"}, {}, (240, 225, 210)),
        ({"background-color": "F0E1D2"}, {"background": (1, 2, 3)}, (1, 2, 3)),
        ({}, {"background": "#000000"}, (0, 0, 0)),
    ],
)
def test_a_slide_has_a_background(properties, arguments, color):
    pixels = fxstream.openslide_array(Sparse(**properties), **arguments)[0:30, 0:20, 0:3]
    assert (pixels[:4, :5] == torch.tensor(color)).all()
    assert (pixels[5:] == torch.tensor((10, 20, 30))).all()
    mixed = (0.2 * torch.tensor((10.0, 20, 30)) + 0.8 * torch.tensor(color)).round()
    assert (pixels[4, :5] == mixed).all()


class Vips:
    """What pyvips gives for an image with bands."""

    def __init__(self, pixels):
        self.pixels, (self.height, self.width, self.bands) = pixels, pixels.shape

    def crop(self, left, top, width, height):
        return Vips(self.pixels[top : top + height, left : left + width])

    def write_to_memory(self):
        return self.pixels.tobytes()


def test_vips():
    pixels = bytes_image(40, 30, 4)
    image = torch.from_numpy(pixels)
    assert torch.equal(fxstream.pyvips_array(Vips(pixels))[3:21, 7:8, 0:4], image[3:21, 7:8])
    assert torch.equal(fxstream.pyvips_array(Vips(pixels[..., :3].copy()))[3:21, 7:8, 1:2], image[3:21, 7:8, 1:2])
    pixels[..., 3] = np.where(pixels[..., 0] > 99, 255, 0)
    array = fxstream.pyvips_array(Vips(pixels), background="0A0B0C")
    assert array.shape == (40, 30, 3)
    expected = np.where(pixels[..., 3:] > 0, pixels[..., :3], np.uint8([10, 11, 12]))
    assert torch.equal(fxstream.source(array, layout="HWC")[()], torch.from_numpy(expected).permute(2, 0, 1)[None])


@pytest.mark.parametrize("background", ["white", "FFFF", (1, 2), (1, 2, 300), 7])
def test_no_colour(background):
    with pytest.raises(fxstream.InputError, match=r"is no colour: give 3 bytes, as \(255, 255, 255\)"):
        fxstream.openslide_array(Sparse(), background=background)
