"""Nothing of the user's is changed: not by looking at a model, not by a call, nor one that fails or is stopped."""

import numpy
import pytest
import rich.style  # noqa: F401  which draws a random number when it is imported
import torch
from small_networks import CASES, conv
from torch import nn
from untouched import differences, snapshot

import fxstream


def image_of(name, model):
    channels = next(p for p in model.parameters() if p.ndim == 4).shape
    transposed = isinstance(model, nn.Sequential) and isinstance(model[0], nn.ConvTranspose2d)
    groups = getattr(model[0], "groups", 1) if isinstance(model, nn.Sequential) else 1
    if name == "positional parameter":
        channels = model.a.weight.shape
    return torch.randn(1, channels[0] if transposed else channels[1] * groups, 21, 17)


CHECKED = ("three convolutions", "unet", "shared module", "in place")
"""Networks that are compared in every tensor too, which takes a while."""


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("name", CASES)
def test_by_any_public_function(name):
    model = CASES[name].float().eval()
    model.marks, image = {"list": [1, torch.ones(2)]}, image_of(name, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model(image)  # what torch itself changes at its first call
    before = snapshot(model, image)
    options = {"inputs": [tuple(image.shape)]}
    calls = [
        lambda: fxstream.analyze(model, **options),
        lambda: fxstream.plan(model, tile=16, **options),
        lambda: fxstream.compile(model, tile=16)(image),
    ]
    if name in CHECKED:
        calls.append(lambda: fxstream.check(model, tile=16, **options))
    for call in calls:
        call()
        assert differences(before, snapshot(model, image)) == []


def normed():
    parts = (conv(2, 4), nn.BatchNorm2d(4, momentum=None), nn.Dropout(0.5), conv(4, 2))
    model = nn.Sequential(*parts)
    model(torch.randn(1, 2, 9, 9))
    return model


class Stops:
    """An array that can be read some times, and is then interrupted."""

    def __init__(self, error, reads):
        self.shape, self.dtype, self.error, self.reads = (1, 2, 40, 44), numpy.dtype("float32"), error, reads

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise self.error
        return numpy.zeros(self.shape, self.dtype)[index]


@pytest.mark.parametrize("reads", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("gone")])
def test_by_a_call_that_is_stopped(error, reads):
    model = normed().eval()
    before = snapshot(model)
    module, expected = fxstream.compile(model, tile=16), (fxstream.StreamError, KeyboardInterrupt)
    with torch.no_grad(), pytest.raises(expected):
        module(fxstream.source(Stops(error, reads)))
    assert differences(before, snapshot(model)) == []


class Stopping(nn.Module):
    """A model that is interrupted, or fails, while it is traced or while it runs."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = normed(), kind

    def forward(self, x):
        y = self.net(x)
        if self.kind == "type":
            y = torch.cat([y, x[..., 1:]])
        return y.view(-1, 7) if self.kind == "shape" else y


@pytest.mark.parametrize("kind", ["type", "shape", "tile", "traced"])
def test_by_a_call_that_fails(kind, monkeypatch):
    model, image = Stopping(kind), torch.randn(1, 2, 40, 44)
    module = fxstream.compile(model, tile=2 if kind == "tile" else 16)
    if kind == "traced":
        monkeypatch.setattr("fxstream.capture.trace.TracedGraph", lambda *args, **kwargs: 1 / 0)
    before = snapshot(model, image)
    with pytest.raises((fxstream.FxstreamError, ZeroDivisionError)):
        module(image)
    assert differences(before, snapshot(model, image)) == []


def test_a_difference_is_seen():
    model, image = normed(), torch.randn(1, 2, 9, 9)
    before = snapshot(model, image)
    model[1].momentum = 0.1
    torch.rand(1)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    found = " ".join(differences(before, snapshot(model, image)))
    assert all(name in found for name in ("momentum", "random", "weight"))
