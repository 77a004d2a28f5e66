"""Views of arrays as images: flips, strides, turns, orders of bytes and types, against the pixels as a tensor."""

import random

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
