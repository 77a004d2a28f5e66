"""Checkpoints whose recomputation runs in parts."""

import copy
from dataclasses import replace

import pytest
import torch
from compare import assert_same
from torch import nn

import fxstream
from fxstream.machine import speeds
from fxstream.machine.meter import measure
from fxstream.planning.decision import Decision
from fxstream.tools.check import step
from fxstream.tools.zoo import build


class Block(nn.Module):
    """A bottleneck with batch statistics."""

    def __init__(self, channels, width, stride):
        super().__init__()
        layers = []
        for count, out, kernel, by in (
            (channels, width, 1, 1),
            (width, width, 3, stride),
            (width, 4 * width, 1, 1),
        ):
            layers += [nn.Conv2d(count, out, kernel, by, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.inside = nn.Sequential(*layers[:-1])
        same = stride == 1 and channels == 4 * width
        self.beside = nn.Identity() if same else nn.Conv2d(channels, 4 * width, 1, stride)

    def forward(self, image):
        return torch.relu(self.inside(image) + self.beside(image))


def network():
    torch.manual_seed(0)
    layers, channels = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 8
    for width, stride in ((8, 1), (8, 1), (8, 1), (16, 2), (16, 1), (16, 1), (32, 2), (32, 1)):
        layers.append(Block(channels, width, stride))
        channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).double().train()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Plans as for an accelerator and large images, on which a call costs next to nothing."""
    machine = replace(speeds.ACCELERATORS["cuda"], call=1e-6)
    monkeypatch.setattr(speeds.Machine, "of", staticmethod(lambda *_, **__: machine))


def nested(module):
    return [plan for plan in module.plan.segments if plan.parts]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("share", "batch", "size"), [(0.3, 1, (256, 256)), (0.35, 2, (150, 171))])
def test_all_gradients_and_statistics_are_those_of_the_plain_network(share, batch, size):
    model = network()
    image = torch.randn(batch, 3, *size, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(model)
    everything = fxstream.compile(copy.deepcopy(model), memory="40GiB")
    everything(image)
    module = fxstream.compile(model, memory=int(share * everything.plan.prediction.plain_bytes))
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
    assert nested(module)
    assert any(part.skips for plan in nested(module) for part in plan.parts)
    assert " in " in str(nested(module)[0])
    assert_needs_no_more_than_predicted(module, model, image)


def assert_needs_no_more_than_predicted(module, model, image):
    """Within a tenth: at such sizes what a process has besides tensors of maps counts."""

    def loss():
        model.zero_grad(set_to_none=True)
        image.grad = None
        module(image).square().sum().backward()

    loss()
    assert measure(loss, image.device).peak_bytes <= 1.1 * module.plan.prediction.bytes


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_decision_has_the_parts_and_holds_at_another_size():
    model = network()
    least = fxstream.plan(model, 192, memory="1GiB").prediction.plain_bytes
    decision = fxstream.plan(model, 192, memory=int(0.3 * least)).decision
    assert any(span.parts for span in decision.spans)
    assert Decision.from_json(decision.to_json()) == decision
    assert "recomputed in parts" in str(decision)
    module = fxstream.compile(model, memory=int(0.3 * least), plan=decision)
    image = torch.randn(1, 3, 181, 190, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(model)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
    assert nested(module)
    assert module.plan.decision == decision


def test_a_plan_of_an_earlier_version_has_no_parts():
    old = '{"offload": false, "spans": [["conv", "relu", [[64, 64]]], ["add", "mean", []]]}'
    assert [span.parts for span in Decision.from_json(old).spans] == [(), ()]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_parts_need_less_than_one_checkpoint_at_less_time_than_many_passes(monkeypatch):
    model = network()
    memory = int(0.3 * fxstream.plan(model, 256, memory="1GiB").prediction.plain_bytes)
    in_parts = fxstream.plan(model, 256, memory=memory).prediction
    monkeypatch.setattr("fxstream.planning.within_memory.SLOW", float("inf"))
    flat = fxstream.plan(model, 256, memory=memory).prediction
    assert in_parts.bytes <= memory
    assert in_parts.seconds < 0.8 * flat.seconds


class DenseBlock(nn.Module):
    """Layers that each read all maps before them: forward alone needs far more than a recomputation in parts."""

    def __init__(self, layers, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 3, padding=1) for i in range(layers))
        self.last = nn.Conv2d(width * (layers + 1), 3, 2, 2)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.last(x)


@pytest.mark.parametrize("blocks, size", [(2, 256), (3, 200)])
def test_the_least_that_works_is_the_least(blocks, size):
    model = nn.Sequential(*(DenseBlock(4, 8) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1)).train()
    with pytest.raises(fxstream.PlanError) as error:
        fxstream.plan(model, size, memory="1KiB")
    least = error.value.least_bytes
    assert fxstream.plan(model, size, memory=least).prediction.bytes <= least
    with pytest.raises(fxstream.PlanError):
        fxstream.plan(model, size, memory=least // 2)


def test_the_least_of_plans_that_are_estimated_alike():
    """With statistics on the way many plans have the same estimate, and need other amounts of memory."""
    model = build("torchvision/resnet18").train()
    with pytest.raises(fxstream.PlanError) as error:
        fxstream.plan(model, 256, memory="1KiB")
    with pytest.raises(fxstream.PlanError):
        fxstream.plan(model, 256, memory=int(0.9 * error.value.least_bytes))
