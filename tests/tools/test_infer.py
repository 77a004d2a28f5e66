"""Prediction into arrays: the same values, never held, resumed after a kill at any moment."""

import numpy as np
import pytest
import torch
from compare import integer_image, make_integer
from torch import nn

import fxstream
from fxstream.runtime import forward
from fxstream.tools import infer as inference


def decoder():
    return make_integer(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, padding=1)
        )
    )


class Twice(nn.Module):
    """Two maps of different resolutions and their pooled result."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2, 3, 2), nn.Conv2d(2, 2, 3)

    def forward(self, image):
        half = self.first(image)
        return {"map": self.last(half), "half": half * 2}


@pytest.mark.parametrize("request_", [{"tile": 15, "segments": 1}, {"memory": "80KiB"}, {"memory": "1GiB"}])
def test_written_is_what_the_model_returns(request_):
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    out = np.full((1, 2, 38, 46), np.nan)
    module = fxstream.compile(model, **request_)
    assert fxstream.infer(module, image, out=out) is out
    assert torch.equal(torch.from_numpy(out), model(image))


def test_the_result_is_never_held(monkeypatch):
    allocated = []
    allocate = forward._allocate
    monkeypatch.setattr(
        forward, "_allocate", lambda tile, shape, place: allocated.append(shape) or allocate(tile, shape, place)
    )
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    fxstream.infer(module, image, out=np.zeros((1, 2, 38, 46)))
    assert allocated == []
    module.eval()(image)
    assert allocated == [(1, 2, 38, 46)]


def test_a_large_result_within_a_small_memory():
    model = nn.Conv2d(1, 64, 3, padding=1)
    image = torch.randn(1, 1, 300, 300)
    out = np.zeros((1, 64, 300, 300), np.float32)  # 22 MiB
    module = fxstream.compile(model, memory="1MiB", verify=False)
    fxstream.infer(module, image, out=out)
    assert module.plan.prediction.bytes < 2**20
    torch.testing.assert_close(torch.from_numpy(out), model(image).detach())


def test_several_results():
    model, image = make_integer(Twice()), integer_image(1, 3, 37, 41, requires_grad=False)
    wanted = model(image)
    out = {"map": np.zeros(wanted["map"].shape), "half": None}
    found = fxstream.infer(fxstream.compile(model, tile=15, segments=1, verify=False), image, out=out)
    assert found["map"] is out["map"]
    assert torch.equal(torch.from_numpy(out["map"]), wanted["map"])
    assert torch.equal(found["half"], wanted["half"])


class Nested(nn.Module):
    """Results of one shape and type in a structure, so that only their keys tell them apart."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, image):
        first = self.conv(image)
        return {"b": first, "a": (first * 2, {"d": first * 3, "c": first * 4})}


@pytest.mark.parametrize("request_", [{"tile": 15, "segments": 1}, {"memory": "1GiB"}])
def test_results_are_paired_by_their_keys(request_):
    """Whatever their order, and a whole part of them may be returned."""
    model, image = make_integer(Nested()), integer_image(1, 3, 37, 41, requires_grad=False)
    first = model(image)["b"]
    module = fxstream.compile(model, **request_, verify=False)
    out = {"a": [np.zeros(first.shape), {"c": np.zeros(first.shape), "d": None}], "b": None}
    results = fxstream.infer(module, image, out=out)
    assert torch.equal(torch.from_numpy(out["a"][0]), first * 2)
    assert torch.equal(torch.from_numpy(out["a"][1]["c"]), first * 4)
    assert list(results) == ["b", "a"]
    assert results["a"][1]["c"] is out["a"][1]["c"]
    assert torch.equal(results["a"][1]["d"], first * 3)
    out = {"b": np.zeros(first.shape), "a": None}
    results = fxstream.infer(module, image, out=out)
    assert torch.equal(torch.from_numpy(out["b"]), first)
    assert torch.equal(results["a"][1]["c"], first * 4)


@pytest.mark.parametrize(
    "out, match",
    [
        ({"map": None, "other": None}, "out has 'map', 'other', and the model returns 'b', 'a'"),
        ({"b": None}, "out has 'b', and the model returns 'b', 'a': give all of them"),
        ({"b": None, "a": None, "c": None}, "out has 'b', 'a', 'c', and the model returns 'b', 'a'"),
        ({"b": None, "a": (None,)}, r"out\['a'\] has 0, and the model returns 0, 1"),
        ({"b": None, "a": (None, {"d": None})}, r"out\['a'\]\[1\] has 'd', and the model returns 'd', 'c'"),
        ({"b": {}, "a": None}, r"out\['b'\] is a dict, and the model returns a tensor"),
        (np.zeros((1, 2, 35, 39)), "out has no members, and the model returns 'b', 'a'|out has 0, and the model"),
    ],
)
def test_other_structures_are_refused(out, match):
    module = fxstream.compile(make_integer(Nested()), tile=15, segments=1, verify=False)
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.infer(module, integer_image(1, 3, 37, 41, requires_grad=False), out=out)


def test_what_is_read_is_not_written():
    model, values = make_integer(nn.Conv2d(2, 2, 3, padding=1)), np.zeros((3, 2, 38, 46))
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    image = torch.from_numpy(values)[1:2]
    for read in (image, fxstream.source(values, batch=[1]), fxstream.source(values[1], layout="CHW")):
        with pytest.raises(fxstream.InputError, match="out is the memory, file or store of an image"):
            fxstream.infer(module, read, out=values[1:2])
    values[1] = 1
    fxstream.infer(module, image, out=values[2:])
    assert torch.equal(torch.from_numpy(values[2:]), model(image))


def test_results_have_arrays_of_their_own():
    module = fxstream.compile(make_integer(Nested()), tile=15, segments=1, verify=False)
    array = np.zeros((1, 2, 35, 39))
    with pytest.raises(fxstream.InputError, match="two results would be written into the same memory"):
        fxstream.infer(
            module, integer_image(1, 3, 37, 41, requires_grad=False), out={"b": array, "a": (array, None)}
        )


class Classes(nn.Module):
    """A class per pixel, int64 as torch's argmax."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 300, 1)

    def forward(self, image):
        return self.conv(image).argmax(1, keepdim=True)


def test_integers_do_not_wrap():
    torch.manual_seed(0)
    model, image = Classes(), torch.randn(1, 3, 37, 41)
    module, out = fxstream.compile(model, tile=15, segments=1, verify=False), np.zeros((1, 1, 37, 41), np.uint8)
    with pytest.raises(fxstream.InputError, match=r"type uint8 and the result torch.int64.*or give saturate=True"):
        fxstream.infer(module, image, out=out)
    fxstream.infer(module, image, out=out, saturate=True)
    assert model(image).max() > 255
    assert torch.equal(torch.from_numpy(out), model(image).clamp(0, 255).to(torch.uint8))


def test_types():
    model, image = nn.Conv2d(3, 2, 3), torch.randn(1, 3, 25, 31)
    module = fxstream.compile(model, tile=11, segments=1, verify=False)
    out = np.zeros((1, 2, 23, 29), np.float16)
    fxstream.infer(module, image, out=out)
    torch.testing.assert_close(torch.from_numpy(out), model(image).half(), rtol=2e-3, atol=2e-3)
    with pytest.raises(fxstream.InputError, match="convert in the model"):
        fxstream.infer(module, image, out=np.zeros((1, 2, 23, 29), np.uint8))


@pytest.mark.parametrize(
    "out, match",
    [
        (np.zeros((1, 2, 38, 45)), r"shape \[1, 2, 38, 45\], the result has \[1, 2, 38, 46\]"),
        ("result.zarr", "needs shape, dtype and assignment; found str|found str"),
        ([np.zeros((1, 2, 38, 46))] * 2, "out is a list, and the model returns a tensor"),
        ({"map": np.zeros((1, 2, 38, 46))}, "out is a dict, and the model returns a tensor"),
    ],
)
def test_bad_out(out, match):
    module = fxstream.compile(decoder(), tile=15, segments=1, verify=False)
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.infer(module, integer_image(1, 3, 38, 46, requires_grad=False), out=out)


def test_infer_needs_a_compiled_module():
    with pytest.raises(fxstream.InputError, match=r"made by fxstream.compile, found Conv2d"):
        inference.infer(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 9, 9), out=np.zeros((1, 1, 9, 9)))
