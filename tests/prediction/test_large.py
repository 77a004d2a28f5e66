"""A slide of a gigapixel by the README's command, in a process of 3 GB; the results open where people look."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from segmenters import integer_segmenter, plain

zarr, tifffile = pytest.importorskip("zarr"), pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
TILE, LIMIT = 512, 3 * 10**9


def tiles(extent):
    """Tiles of tissue-like blobs, each with its own colours."""
    random = np.random.default_rng(0)
    blobs = np.kron(random.integers(0, 256, (64, 64, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    for _ in range((extent // TILE) ** 2):
        yield np.roll(blobs, tuple(random.integers(0, TILE, 2)), (0, 1)) ^ random.integers(
            0, 256, 3, dtype=np.uint8
        )


@pytest.fixture(scope="module", params=[2048, pytest.param(32768, marks=pytest.mark.campaign)])
def slide(request, tmp_path_factory):
    """A pyramid of JPEG tiles, half a micrometre per pixel, as scanners write them, and weights."""
    folder = tmp_path_factory.mktemp("large")
    options = {
        "tile": (TILE, TILE),
        "compression": "jpeg",
        "photometric": "rgb",
        "dtype": "uint8",
        "metadata": None,
    }
    with tifffile.TiffWriter(folder / "slide.tif", bigtiff=True) as file:
        for level in range(3):
            extent = request.param >> level
            options |= {
                "resolution": (20000 / 2**level,) * 2,
                "resolutionunit": "CENTIMETER",
                "subfiletype": int(level > 0),
            }
            file.write(tiles(extent), shape=(extent, extent, 3), **options)
    torch.save(integer_segmenter().state_dict(), folder / "model.pt")
    yield folder / "slide.tif"
    (folder / "slide.tif").unlink()


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


@pytest.mark.parametrize("format", ["ome-zarr", "tiff"])
def test_a_gigapixel_in_three_gigabytes(slide, format):
    segmenters = Path(__file__).parent / "segmenters.py"
    command = [sys.executable, "-m", "fxstream", "predict", f"{segmenters}:integer_segmenter", slide]
    command += ["--weights", slide.with_name("model.pt"), "--out", slide.with_name(format), "--format", format]
    command += ["--memory", "300MiB", "--device", "cpu"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, preexec_fn=limited, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    with contextlib.ExitStack() as stack:
        result = {"ome-zarr": of_zarr, "tiff": of_tiff}[format](slide.with_name(format), stack)
        pixels = opened(slide, stack)
        assert result.shape == (1, *pixels.shape[:2])
        compare(pixels, result)


def opened(path, stack):
    """The finest level of a TIFF as an array."""
    store = tifffile.imread(path, aszarr=True, level=0)
    stack.callback(store.close)
    return zarr.open(store, mode="r")


def compare(pixels, result):
    """Ten crops of a result with those of the plain network on the crops and their receptive field."""
    network, edge, halo, random = integer_segmenter(), 300, 16, np.random.default_rng(1)
    size = pixels.shape[0]
    for top, left in [(0, 0), (size - edge, size - edge), *random.integers(0, (size - edge) // 2, (8, 2)) * 2]:
        up, to = max(0, top - halo), max(0, left - halo)
        expected = plain(network, pixels[up : top + edge + halo, to : left + edge + halo])
        inside = expected[0, top - up : top - up + edge, left - to : left - to + edge]
        assert np.array_equal(result[0, top : top + edge, left : left + edge], inside)
        assert len(np.unique(inside)) > 1


def of_zarr(folder, stack):
    """The result, opened by ome-zarr where it is installed."""
    path = folder / "slide.ome.zarr"
    (scales,) = zarr.open_group(str(path), mode="r").attrs["ome"]["multiscales"]
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == pytest.approx([1, 0.5, 0.5], rel=1e-6)
    ome = pytest.importorskip("ome_zarr.io", reason="ome-zarr is not installed")
    from ome_zarr.reader import Multiscales, Reader

    nodes = list(Reader(ome.parse_url(str(path)))())
    assert any(isinstance(spec, Multiscales) for spec in nodes[0].specs)
    extents = [level.shape[-1] for level in nodes[0].data]
    assert extents == [extents[0] >> level for level in range(len(extents))]
    assert extents[-1] == 1024
    return zarr.open_array(str(path / "0"), mode="r")


def of_tiff(folder, stack):
    """The result, opened by OpenSlide where it is installed."""
    path = folder / "slide.tif"
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(path) as slide:
        levels = [extents[0] for extents in slide.level_dimensions]
        assert levels == [levels[0] >> level for level in range(len(levels))]
        assert levels[-1] == 1024
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-3)
        region = np.asarray(slide.read_region((512, 1024), 0, (64, 64)))[..., 0]
    with tifffile.TiffFile(path) as file:
        assert [level.shape[-1] for level in file.series[0].levels] == levels
    array = opened(path, stack)
    assert np.array_equal(array[1024:1088, 512:576], region)
    return _Plane(array)


class _Plane:
    """A plane as the only channel of an array."""

    def __init__(self, array):
        self.array, self.shape = array, (1, *array.shape)

    def __getitem__(self, index):
        return self.array[index[1:]]
