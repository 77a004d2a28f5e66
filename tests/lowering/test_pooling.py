"""Poolings whose only window is the map: a reduction, at every size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream
from fxstream.tools.check import step

POOLS = {
    "average": lambda y: F.avg_pool2d(y, y.shape[2:]),
    "maximum": lambda y: F.max_pool2d(y, y.shape[2:]),
    "maximum with its own stride": lambda y: F.max_pool2d(y, y.shape[2:], stride=1),
    "generalised mean": lambda y: F.avg_pool2d(y.clamp(min=1e-6).pow(3), y.shape[2:]).pow(1 / 3),
    "norm": lambda y: F.lp_pool2d(y.square(), 3, y.shape[2:]),
}


def network(pool):
    parts = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3, 2)}
    return Function(lambda m, x: pool(m.b(F.relu(m.a(x)))).flatten(1), **parts)


@pytest.mark.parametrize("name", POOLS)
def test_a_window_of_the_size_of_the_map_is_a_reduction_at_any_size(name):
    model = network(POOLS[name]).double()
    compiled, plain = fxstream.compile(copy.deepcopy(model), tile=24), copy.deepcopy(model)
    for size in ((40, 52), (61, 45)):
        image = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
        assert_same(step(compiled, compiled.model, [image]), step(plain, plain, [image]), 1e-10)
        plan = compiled.plan.segments[-1]
        assert plan.tile_count > 1
        assert any(plan.segment.graph[output].reduces for output in plan.segment.outputs)
    assert not fxstream.inspect(compiled).last.analysis.captured.bound


def test_of_equal_maxima_the_first_gets_the_gradient():
    model = make_integer(network(POOLS["maximum"]))
    assert_streams(model, integer_image(2, 3, 30, 26), tile=14, tolerance=0)


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: F.avg_pool2d(y, 12),  # the size of the map at this size of the image alone
        lambda y: F.avg_pool2d(y, y.shape[2:], padding=1, stride=2),
        lambda y: F.avg_pool2d(y, (y.shape[2] // 2, y.shape[3])),
        lambda y: F.avg_pool2d(y, y.shape[2:], divisor_override=7),
        lambda y: F.max_pool2d(y, (5, y.shape[3])),
    ],
)
def test_other_windows_stay_windows(pool):
    analysis = fxstream.analyze(network(pool), 28)
    operators = {verdict.operator for verdict in analysis.verdicts}
    assert operators & {"aten::avg_pool2d", "aten::max_pool2d"}
