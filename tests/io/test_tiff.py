"""TIFF files as arrays: the pixels that tifffile reads, by several threads; and files that are broken."""

import itertools
import os

import numpy as np
import pytest
import torch
from compare import make_integer
from torch import nn

import fxstream

tifffile = pytest.importorskip("tifffile")


def pixels(*shape, dtype="u1"):
    return np.random.default_rng(0).integers(0, 9, shape).astype(dtype)


@pytest.fixture
def opened():
    """Opens files, and closes them in the end."""
    files = []
    yield lambda path: files.append(tifffile.TiffFile(path)) or files[-1]
    for file in files:
        file.close()


KINDS = {
    "tiles": {"tile": (16, 32)},
    "strips": {"rowsperstrip": 7},
    "zlib": {"tile": (32, 16), "compression": "zlib"},
    "predictor": {"tile": (32, 16), "compression": "zlib", "predictor": True},
    "big-endian": {"tile": (16, 16), "byteorder": ">"},
    "BigTIFF": {"tile": (16, 16), "bigtiff": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("samples", [(), (3,)])
def test_boxes(kind, dtype, samples, tmp_path, opened):
    array = pixels(70, 50, *samples, dtype=dtype)
    if kind == "predictor":
        pytest.importorskip("imagecodecs")
    photometric = "rgb" if samples else "minisblack"
    tifffile.imwrite(tmp_path / "image.tif", array, photometric=photometric, **KINDS[kind])
    view = fxstream.tiff_array(opened(tmp_path / "image.tif"))
    assert view.shape == array.shape
    for rows, columns in itertools.product([(0, 70), (5, 6), (15, 33), (63, 70)], [(0, 50), (31, 49)]):
        index = (slice(*rows), slice(*columns), *(slice(0, size) for size in samples))
        assert torch.equal(view[index], torch.from_numpy(array[index].astype(dtype)))
    source = fxstream.source(view, layout="HWC" if samples else "HW", dtype=torch.float64, readers=4)
    model = make_integer(nn.Conv2d(3 if samples else 1, 2, 3, padding=1))
    whole = torch.from_numpy(np.atleast_3d(array).astype("f8")).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert torch.equal(fxstream.compile(model, tile=20, segments=1, verify=False)(source), model(whole))


def test_a_jpeg_pyramid(tmp_path, opened):
    pytest.importorskip("imagecodecs")
    base = pixels(400, 300, 3) * 20
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg"}
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(base, subifds=1, **options)
        file.write(base[::2, ::2].copy(), subfiletype=1, **options)
    file = opened(tmp_path / "slide.tif")
    for level in range(2):
        source = fxstream.source(fxstream.tiff_array(file, level), layout="HWC", readers=4)
        expected = tifffile.imread(tmp_path / "slide.tif", level=level)
        assert torch.equal(source[()], torch.from_numpy(expected).permute(2, 0, 1)[None])


def test_tiles_that_the_file_leaves_out(tmp_path, opened):
    tiles = [pixels(16, 16, 3), None, None, pixels(16, 16, 3)]
    tifffile.imwrite(
        tmp_path / "image.tif", iter(tiles), shape=(32, 32, 3), dtype="u1", tile=(16, 16), photometric="rgb"
    )
    file = opened(tmp_path / "image.tif")
    blank = fxstream.tiff_array(file, background=(1, 2, 3))[slice(0, 32), slice(0, 32), slice(0, 3)]
    assert torch.equal(blank[:16, :16], torch.from_numpy(tiles[0]))
    assert (blank[:16, 16:] == torch.tensor([1, 2, 3])).all()
    assert not fxstream.tiff_array(file)[slice(0, 16), slice(16, 32), slice(0, 3)].any()


def test_what_is_no_part_of_the_file(tmp_path, opened):
    tifffile.imwrite(tmp_path / "image.tif", pixels(3, 32, 32), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "stack.tif", pixels(3, 32, 32), photometric="minisblack")
    planes, stack = opened(tmp_path / "image.tif"), opened(tmp_path / "stack.tif")
    with pytest.raises(
        fxstream.InputError, match=r"are stored in planes of their own: read it with .*aszarr=True"
    ):
        fxstream.tiff_array(planes)
    assert fxstream.tiff_array(stack, page=2).shape == (32, 32)
    for arguments in ({"level": 1}, {"series": 3}, {"page": 3}, {"level": -1}):
        ((what, number),) = arguments.items()
        with pytest.raises(fxstream.InputError, match=rf"{what}={number}: stack.tif has {what} 0 to"):
            fxstream.tiff_array(stack, **arguments)


@pytest.mark.parametrize("compression", [None, "zlib", "jpeg"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_truncated_file(compression, when, tmp_path, opened):
    """One error that names the file and the part of it, and no pixels for those that are lost."""
    if compression == "jpeg":
        pytest.importorskip("imagecodecs")
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels(256, 256, 3) * 20, tile=(64, 64), photometric="rgb", compression=compression)
    module = fxstream.compile(make_integer(nn.Conv2d(3, 2, 3)), tile=70, segments=1, verify=False)
    file = opened(path)
    source = fxstream.source(fxstream.tiff_array(file), layout="HWC", dtype=torch.float64, readers=3)
    with torch.no_grad():
        if when == "meanwhile":
            module(source)
        os.truncate(path, os.path.getsize(path) * 2 // 3)
        with pytest.raises(
            fxstream.StreamError, match=r"reading \[.* of fxstream._Tiles image.tif .* behind the end"
        ):
            module(source)
