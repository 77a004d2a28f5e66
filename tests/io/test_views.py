"""Views of arrays as images: flips, strides, turns, orders of bytes and types, against the pixels as a tensor."""

import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import fxstream

TYPES = ("u1", "i1", "?", "<u2", ">u2", "<i4", ">i4", ">i8", "<f2", ">f2", "<f4", ">f4", ">f8")
SIZE = (23, 29, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()


def view(rng, shape):
    """A view of another array, [H, W, 3], with everything that a view can differ in; and what was drawn."""
    dtype = np.dtype(rng.choice(TYPES))
    steps = [rng.choice((1, 1, 2, 3, -1, -2)) for _ in shape[:2]] + [rng.choice((1, -1))]
    base = np.random.default_rng(rng.randrange(2**32)).integers(0, 100, [3 * size for size in shape])
    array = np.asarray(base.astype(dtype), order=rng.choice("CF"))
    is_field = rng.random() < 0.2
    if is_field:  # strides that are no multiple of the item
        fields = np.zeros(array.shape, [("pad", "u1"), ("value", dtype)])
        fields["value"] = array
        array = fields["value"]
    array = array[tuple(slice(None, None, step) for step in steps)]
    turns, transposed, frozen = rng.randrange(4), rng.random() < 0.3, rng.random() < 0.3
    array = np.rot90(array, turns)
    array = array.swapaxes(0, 1) if transposed else array
    array = array[: shape[0], : shape[1], : shape[2]]
    if frozen:
        array.flags.writeable = False
    return array, f"{dtype.str} {steps} {turns=} {transposed=} {frozen=} {is_field=}"


def native(array):
    """The same pixels as a double tensor [1, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(array).astype("f8")).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def module(model):
    return fxstream.compile(model, tile=13, segments=1)


@pytest.mark.parametrize("seed", range(100))
def test_a_view_gives_what_its_pixels_give(seed, model, module):
    rng = random.Random(seed)
    array, drawn = view(rng, SIZE)
    way = rng.choice(("layout", "batch", "several"))
    if way == "batch":
        stack = np.stack([array, array])[::-1]
        image = fxstream.source(stack, layout="NHWC", batch=[1], dtype=torch.float64)
    elif way == "several":
        image = fxstream.source(array, array[:, ::-1], layout="HWC", dtype=torch.float64)
    else:
        image = fxstream.source(array, layout="HWC", dtype=torch.float64)
    expected = native(array) if way != "several" else torch.cat([native(array), native(array[:, ::-1])])
    with torch.no_grad():
        torch.testing.assert_close(module(image), model(expected), rtol=1e-10, atol=1e-10, msg=drawn)


@pytest.mark.parametrize("flip", [1, 2, 3])
def test_a_flipped_array_as_an_argument(flip, model, module):
    stored = np.random.default_rng(0).standard_normal((1, 3, 23, 29))
    array = np.flip(stored, flip)
    with torch.no_grad():
        torch.testing.assert_close(module(array), model(torch.from_numpy(array.copy())), rtol=1e-10, atol=1e-10)


def plain(shape=SIZE, dtype="f8"):
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def stored(tmp_path, array, kind):
    """The array in a store that has chunks."""
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        made = zarr.create_array(str(tmp_path / "z"), shape=array.shape, dtype=array.dtype, chunks=(7, 8, 2))
    else:
        h5py = pytest.importorskip("h5py")
        made = h5py.File(tmp_path / "h.h5", "w").create_dataset(
            "image", array.shape, array.dtype, chunks=(7, 8, 2)
        )
    made[:] = array
    return made


SOURCES = {
    "flipped": lambda: plain()[::-1, ::-1],
    "rotated": lambda: np.rot90(plain()),
    "strided": lambda: plain((46, 87, 3))[::2, ::3],
    "transposed": lambda: plain().swapaxes(0, 1),
    "broadcast": lambda: np.broadcast_to(plain((23, 1, 3)), SIZE),
    "byte-swapped": lambda: plain(dtype=">f4"),
    "float16": lambda: plain(dtype="f2"),
    "unsigned": lambda: plain(dtype="u2"),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("kind", SOURCES)
def test_kinds_of_views(kind, readers, frozen, model, module):
    array = SOURCES[kind]()
    if frozen:
        array.flags.writeable = False
    image = fxstream.source(array, layout="HWC", dtype=torch.float64, readers=readers)
    with torch.no_grad():
        torch.testing.assert_close(module(image), model(native(array)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("store", ["zarr", "h5py"])
@pytest.mark.parametrize("dtype", [">f4", "<f2", ">u2", "i1"])
def test_kinds_of_stores(store, dtype, tmp_path, model, module):
    array = plain(dtype=dtype)
    made = stored(tmp_path, array, store)
    image = fxstream.source(made, layout="HWC", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(image), model(native(array)), rtol=1e-10, atol=1e-10)
    if store == "h5py":
        made.file.close()


def test_an_array_without_an_axis_of_channels():
    single = nn.Conv2d(1, 2, 3).double()
    for array in (plain((23, 29)), plain((23, 29), ">f4"), plain((23, 29))[:, ::-1]):
        image = fxstream.source(array, layout="YX", dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(
                fxstream.compile(single, tile=13, segments=1, verify=False)(image),
                single(torch.from_numpy(array.astype("f8"))[None, None]),
                rtol=1e-10,
                atol=1e-10,
            )


def test_float16_in_a_network_of_float16():
    half = nn.Conv2d(3, 2, 3).half()
    array = plain(dtype="f2")
    image = torch.from_numpy(array).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = fxstream.compile(half, tile=13, segments=1, verify=False)(fxstream.source(array, layout="HWC"))
        torch.testing.assert_close(found, half(image), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("shape", [(23, 29, 0), (0, 29, 3)])
def test_an_array_of_nothing(shape):
    with pytest.raises(fxstream.InputError, match=r"the image is empty: its shape is \[1, "):
        fxstream.source(np.zeros(shape), layout="HWC")


@pytest.mark.parametrize("array", [np.zeros(()), np.float64(3), np.zeros((2, 3))])
def test_an_array_of_no_axes(array):
    with pytest.raises(fxstream.InputError, match=r"layout=None does not fit|needs shape, dtype and slicing"):
        fxstream.source(array)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_store_that_vanishes(when, tmp_path, model, module):
    """zarr gives its fill value for chunks that are not there: that is not the image."""
    pytest.importorskip("zarr")
    made = stored(tmp_path, plain(), "zarr")
    image = fxstream.source(made, layout="HWC", dtype=torch.float64)
    if when == "meanwhile":
        with torch.no_grad():
            module(image)
    shutil.rmtree(tmp_path / "z")
    with torch.no_grad(), pytest.raises(fxstream.StreamError, match=r"zarr.Array .* is gone since it was opened"):
        module(image)
    with pytest.raises(fxstream.StreamError, match=r"is gone since it was opened"):
        image[()]


def test_a_zarr_store_without_some_chunks(tmp_path, model, module):
    """Chunks that were never written are the fill value."""
    zarr = pytest.importorskip("zarr")
    made = zarr.create_array(str(tmp_path / "z"), shape=SIZE, dtype="f8", chunks=(7, 8, 3), fill_value=5)
    made[7:14, 8:16] = 2
    array = np.full(SIZE, 5.0)
    array[7:14, 8:16] = 2
    with torch.no_grad():
        torch.testing.assert_close(module(fxstream.source(made, layout="HWC")), model(native(array)))
