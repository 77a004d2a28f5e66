"""Options of a plan: named once, checked once, the same wherever they are passed on."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import fxstream
from fxstream.compiler.options import RequestOptions, request_of
from fxstream.tiling.request import Request


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def test_every_option_is_a_field_of_a_request_and_an_argument_of_compile_and_plan():
    names = set(RequestOptions.__annotations__)
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    assert set(defaults) == names
    for function in (fxstream.compile, fxstream.plan):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in names} == defaults


def test_a_request_is_checked_and_brought_into_form():
    assert request_of() == Request()
    assert request_of(tile=[8, 9], segments=["a"]) == Request((8, 9), ("a",))
    assert request_of(memory="1kB", offload=True) == Request(memory=1000, offload=True)
    with pytest.raises(fxstream.InputError, match="give a tile or a memory, not both"):
        request_of(tile=8, memory=0.5)
    with pytest.raises(
        fxstream.InputError, match=r"global_ops must be one of 'auto', 'stream', 'cut'; found 'no'"
    ):
        request_of(global_ops="no", tile=8, memory=0.5)
    with pytest.raises(TypeError, match="tiles"):
        request_of(tiles=8)


def test_tools_pass_options_on():
    report = fxstream.check(network(), 40, tile=16, segments=("0", "2"), offload=True)
    assert report.ok
    assert len(report.plan.segments) == 2
    for wrong in ({"segments": 0}, {"tile": 0}, {"memory": "lots"}):
        with pytest.raises(fxstream.InputError):
            fxstream.check(network(), 40, **wrong)
        with pytest.raises(fxstream.InputError):
            fxstream.lsuv_(network(), [torch.randn(1, 3, 20, 20)], **wrong)
    with pytest.raises(TypeError, match="tiles"):
        fxstream.check(network(), 40, tiles=16)
