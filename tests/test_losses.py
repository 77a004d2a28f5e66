"""Losses inside the module: streamed against plain, and no logits of the image's size are ever held."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams
from test_cases import Function, conv
from torch import nn

import fxstream
from fxstream.capture import capture
from fxstream.sizes import stream_dims


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def test_a_mask_beside_an_image_has_its_stream_axes():
    assert stream_dims([(2, 3, 9, 8), (2, 9, 8), (2, 9, 7), (2, 1, 9, 8), (2, 7)]) == [
        (2, 3),
        (1, 2),
        (2,),
        (2, 3),
        (),
    ]
    assert stream_dims([(2, 1, 9)]) == [(2,)]
    assert stream_dims([(2, 1, 9, 8, 7), (2, 9, 8, 7)]) == [(2, 3, 4), (1, 2, 3)]
    assert stream_dims([]) == []


def test_a_mask_beside_an_image_does_not_bind_the_capture_to_its_size():
    model = Function(lambda m, x, y: m.a(x) * y.unsqueeze(1), a=conv(2, 3, padding=1)).double()
    captured = capture(model, (image(1, 2, 20, 20), torch.zeros(1, 20, 20)), {})
    assert not captured.bound
    compiled = fxstream.compile(model, tile=9)
    for batch, height, width in ((1, 20, 20), (2, 20, 20), (3, 31, 17)):
        x, mask = image(batch, 2, height, width), torch.rand(batch, height, width).double()
        assert torch.allclose(compiled(x, mask), model(x, mask), atol=1e-12)
        assert compiled.plan.streamed_share == 1
    assert len(compiled._captures) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_masks_and_images_of_several_resolutions(batch):
    def forward(m, x, small, mask, other):
        return F.interpolate(m.b(small), scale_factor=2) * mask + m.a(x) * other.unsqueeze(1)

    model = Function(forward, a=conv(2, 3, padding=1), b=conv(1, 3, padding=1)).double()
    mask, other = image(batch, 1, 22, 26), torch.randint(0, 2, (batch, 22, 26)).bool()
    plan = assert_streams(model, image(batch, 2, 22, 26), image(batch, 1, 11, 13), mask, other, tile=9)
    assert plan.streamed_share == 1
