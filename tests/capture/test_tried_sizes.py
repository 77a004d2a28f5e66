"""The sizes at which a model is captured again, to see what of it follows from the size."""

import math

import pytest
from torch import nn

import fxstream
from fxstream.capture import capture


@pytest.mark.parametrize("convolution, extents", [(nn.Conv2d, (16, 16)), (nn.Conv3d, (16, 16, 16))])
def test_no_volume_is_tried_that_is_too_large_to_make_a_mask_of(convolution, extents, monkeypatch):
    """A mask of 3 TB was asked for, and one of 6 GB made, for windows of SwinUNETR in three dimensions."""
    tried = []

    def refuse(traced, values, retrace, shift, images):
        tried.append(math.prod(extent + more for extent, more in zip(extents, shift, strict=False)))
        raise RuntimeError("too large")

    monkeypatch.setattr(capture, "_shifted_graph", refuse)
    fxstream.analyze(convolution(2, 3, 3), inputs=[(1, 2, *extents)])
    assert len(tried) >= 8
    assert max(tried) > 10**8
    if len(extents) == 3:
        assert max(tried) <= 2**29
