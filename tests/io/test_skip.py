"""A mask of pixels that are not read: the image is the fill there, in every way of reading it."""

import numpy as np
import pytest
import torch
from compare import make_integer
from counted import Chunked
from torch import nn

import fxstream
from fxstream.io.skip import Skip


def image(*shape):
    return np.random.default_rng(0).integers(0, 9, shape, dtype=np.uint8)


def filled(array, mask, fill):
    """The array with the fill where the mask, drawn out to its pixels, is true."""
    rows, columns = (np.arange(size) * m // size for size, m in zip(array.shape[:2], mask.shape, strict=True))
    return np.where(mask[rows][:, columns][..., None], np.asarray(fill, np.uint8), array)


@pytest.mark.parametrize("mask_shape", [(5, 3), (43, 58), (1, 2), (7, 58)])
@pytest.mark.parametrize("fill", [0, 255, (1, 2, 3)])
def test_the_image_is_the_fill(mask_shape, fill):
    array, mask = image(43, 58, 3), np.random.default_rng(1).random(mask_shape) < 0.5
    source = fxstream.source(array, layout="HWC", skip=mask, fill=fill, dtype=torch.float64)
    expected = torch.from_numpy(filled(array, mask, fill)).permute(2, 0, 1)[None].double()
    assert torch.equal(source[()], expected)
    assert torch.equal(source[:, 1:, 3:40, 50:], expected[:, 1:, 3:40, 50:])
    model = make_integer(nn.Conv2d(3, 2, 3, padding=1))
    module = fxstream.compile(model, tile=13, segments=1, verify=False)
    found = [module(source), *grads(module(source), model)]
    for one, other in zip(found, [model(expected), *grads(model(expected), model)], strict=True):
        assert torch.equal(one, other)


def grads(output, model):
    return torch.autograd.grad(output.square().sum(), list(model.parameters()))


def test_chunks_that_are_skipped_are_not_read(monkeypatch):
    """And tiles of nothing else are computed once."""
    monkeypatch.setattr("fxstream.io.blocks.LARGE", 1)
    array, mask = Chunked(image(128, 128, 3), (16, 16, 3)), np.ones((8, 8), bool)
    mask[2:4, 5] = False
    model = make_integer(nn.Conv2d(3, 2, 3))
    module = fxstream.compile(model, tile=18, segments=1, verify=False)
    with torch.no_grad():
        found = module(fxstream.source(array, layout="HWC", skip=mask, fill=9, dtype=torch.float64))
        expected = torch.from_numpy(filled(array.array, mask, 9)).permute(2, 0, 1)[None].double()
        assert torch.equal(found, model(expected))
    assert array.decoded == {(2, 5, 0): 1, (3, 5, 0): 1}
    (stream,) = (child.stream for child in fxstream.inspect(module).last.streamed.children())
    assert stream.schedule.repeated > 40


def test_volumes_and_tensors_as_masks():
    array, mask = image(6, 10, 12), torch.zeros(3, 1, 4, dtype=torch.bool)
    mask[1, 0, 2:] = True
    source = fxstream.source(array, layout="ZYX", skip=mask, fill=7)
    expected = torch.from_numpy(array.copy())
    expected[2:4, :, 6:] = 7
    assert torch.equal(source[()][0, 0], expected)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"skip": np.zeros((4, 4))}, r"skip is torch.float64 \[4, 4\]: give a bool mask of the axes of the image"),
        ({"skip": np.zeros((4, 4, 1), bool)}, r"give a bool mask of the axes of the image, of at most \[43, 58\]"),
        ({"skip": np.zeros((44, 4), bool)}, r"skip is torch.bool \[44, 4\].* of at most \[43, 58\]"),
        ({"skip": np.zeros((0, 4), bool)}, r"skip is torch.bool \[0, 4\]"),
        ({"skip": "blank"}, r"skip needs a mask and a number, or one per channel, as fill"),
        (
            {"skip": np.zeros((4, 4), bool), "fill": (1, 2)},
            r"fill=\(1, 2\) is no number, and not one per channel of 3",
        ),
        ({"skip": np.zeros((4, 4), bool), "fill": 256}, "fill=256 is no value of an image of type torch.uint8"),
        ({"skip": np.zeros((4, 4), bool), "fill": 0.5}, r"fill=0.5 is no value of an image of type torch.uint8"),
    ],
)
def test_masks_that_do_not_fit(arguments, match):
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.source(image(43, 58, 3), layout="HWC", **arguments)


def test_a_mask_is_of_one_image():
    with pytest.raises(fxstream.InputError, match="skip is for one image, and this is a batch of 2"):
        fxstream.source(image(2, 43, 58, 3), layout="NHWC", skip=np.zeros((4, 4), bool))


def test_a_box_of_the_mask():
    skip = Skip.of_mask(torch.tensor([[True, False]]), 3, (1, 2, 4, 5), torch.uint8)
    assert skip.of([range(1, 3), range(1, 5)]).tolist() == [[True, True, False, False]] * 2
    assert skip.filled(torch.int16, 1, [range(2), range(1), range(2)]).tolist() == [[[[3, 3]], [[3, 3]]]]
