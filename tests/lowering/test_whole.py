"""Normalisations that run whole are the model's own operators again; running statistics change once."""

import copy
import dataclasses

import pytest
import torch
from compare import assert_same, replan, step, streams
from torch import nn

import fxstream
from fxstream.lowering.whole import with_statistics
from fxstream.tiling.parts import streamable_parts, whole_segment
from fxstream.tiling.passes import optimised
from fxstream.tiling.segment_plan import plan_whole

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, averages": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, no statistics": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "layer": lambda: nn.LayerNorm((4, 21, 19)),
}
IMAGE = (2, 3, 21, 19)


class Network(nn.Module):
    """Two normalisations around a convolution, the first of them called twice."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second = norm(), norm()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image):
        found = torch.relu(self.first(self.a(image)))
        found = torch.relu(self.second(self.b(found)))
        return self.b(self.first(found) if self.twice else found)

    twice = False


def compiled(model):
    module = fxstream.compile(model, tile=12, verify=False)
    module(torch.randn(IMAGE, dtype=torch.double, requires_grad=True))
    return module


def run_whole(module):
    """Replan: one checkpoint of all that can be tiled."""
    graph, plan = fxstream.inspect(module).last.analysis.graph, module.plan
    parts = (whole_segment(graph, f"segment_{i}", part) for i, part in enumerate(streamable_parts(graph)))
    replan(module, dataclasses.replace(plan, segments=tuple(plan_whole(optimised(part)) for part in parts)))


def run_dense(module):
    """Replan: no segment, all operators in the dense graph."""
    replan(module, dataclasses.replace(module.plan, segments=()))


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:.*bound to the size")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("replanned", [run_dense, run_whole])
@pytest.mark.parametrize("norm", NORMS)
def test_runs_the_operator_of_the_model(norm, replanned, twice):
    model = Network(NORMS[norm]).double()
    model.twice = twice
    plain = copy.deepcopy(model)
    module = compiled(model)
    model.load_state_dict(plain.state_dict())
    replanned(module)
    image = torch.randn(IMAGE, dtype=torch.double, requires_grad=True)
    for _ in range(2):
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
    ran = targets(module.graph)
    for stream in streams(module):
        assert not stream.plan.axes
        ran += targets(stream.schedule.programs[0].forward.graph)
    assert not any("moments" in target or "affine" in target for target in ran)
    assert sum("_norm" in target or "with_statistics" in target for target in ran) == 2 + twice


def test_statistics_come_with_the_result():
    image = torch.randn(2, 3, 5, 4, dtype=torch.double)
    arguments = (image, None, None, None, None, True, 0.1, 1e-5, False)
    result, moments = with_statistics(torch.ops.aten.batch_norm.default, (3, 3), torch.double, *arguments)
    torch.testing.assert_close(result, torch.nn.functional.batch_norm(image, None, None, training=True))
    variance, mean = torch.var_mean(image, (0, 2, 3))
    torch.testing.assert_close(moments[::2], torch.stack([mean, variance]))


def test_draws_between_normalisations_wait_for_no_statistics():
    """An update of statistics before a draw, both around one checkpoint that makes the one and reads the other."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    module = compiled(nn.Sequential(*layers).double())
    run_whole(module)
    module(torch.randn(IMAGE, dtype=torch.double, requires_grad=True)).sum().backward()
    assert [stream.plan.axes for stream in streams(module)] == [()]


@pytest.mark.parametrize("replanned", [run_dense, run_whole])
def test_moments_of_a_map_and_the_wide_one_normalised(replanned):
    """As behind circular padding, which moves up: both are not the model's operator again."""
    layers = []
    for planes, stride in ((3, 1), (4, 2), (4, 1)):
        convolution = nn.Conv2d(planes, 4, 3, stride, padding=1, padding_mode="circular")
        layers += [convolution, nn.InstanceNorm2d(4, affine=True), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    plain, module = copy.deepcopy(model), compiled(model)
    replanned(module)
    image = torch.randn(IMAGE, dtype=torch.double, requires_grad=True)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
