"""Random networks within random memories: with dropout, functions of the user, buffers and several inputs.

A plan may be refused with a `PlanError`; nothing else may be raised, and what it is of computes what the plain
network does.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from small_networks import Doubled
from torch import nn

import fxstream
from fxstream.tools.check import step

CHANNELS = 8


class Block(nn.Module):
    """One layer of a random network; `others` are the further inputs."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.point = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.layer_norm = nn.LayerNorm(CHANNELS)
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.register_buffer("mean", torch.rand(1, CHANNELS, 1, 1))
        self.register_buffer("scale", torch.rand(1, CHANNELS, 1, 1) + 0.5)

    def forward(self, x, others):
        return BLOCKS[self.kind](self, x, others)


def same_size(a, x):
    return F.interpolate(a, size=x.shape[-2:], mode="bilinear")


def without_gradient(m, x, others):
    with torch.no_grad():
        y = m.conv(x)
    return x + y


BLOCKS = {
    "convolution": lambda m, x, others: F.relu(m.conv(x)),
    "normalised": lambda m, x, others: F.relu(m.norm(m.conv(x))),
    "residual": lambda m, x, others: x + F.relu(m.point(F.relu(m.conv(x)))),
    "function in a residual": lambda m, x, others: x + F.relu(m.conv(Doubled.apply(x))),
    "function": lambda m, x, others: Doubled.apply(m.point(x)),
    "dropout": lambda m, x, others: F.dropout(m.conv(x), 0.3, m.training),
    "dropout of features": lambda m, x, others: F.dropout2d(F.relu(m.conv(x)), 0.3, m.training),
    "dropout in a residual": lambda m, x, others: x + F.dropout(F.relu(m.conv(x)), 0.2, m.training),
    "buffers": lambda m, x, others: m.conv((x - m.mean) / m.scale),
    "gate": lambda m, x, others: x * torch.sigmoid(m.point(x.mean((2, 3), keepdim=True))),
    "channels last": lambda m, x, others: x + m.linear(m.layer_norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
    "down": lambda m, x, others: F.max_pool2d(F.relu(m.conv(x)), 2) if min(x.shape[-2:]) > 7 else x,
    "up": lambda m, x, others: F.interpolate(m.point(x), scale_factor=2.0),
    "half and back": lambda m, x, others: x + same_size(m.conv(F.avg_pool2d(x, 2)), x),
    "another image": lambda m, x, others: x + same_size(others[0], x) * m.scale,
    "a mask": lambda m, x, others: torch.where(same_size(others[0], x) > 0.5, m.conv(x), x),
    "a vector": lambda m, x, others: x + m.linear(others[1])[:, :, None, None],
    "without a gradient": without_gradient,
    "detached": lambda m, x, others: x + m.conv(x.detach()),
    "sorted": lambda m, x, others: m.conv(x.sort(-1).values),
}
"""What a layer does with a map, by name."""


class RandomNetwork(nn.Module):
    """Some blocks, one after the other."""

    def __init__(self, kinds):
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(map(Block, kinds))
        self.last = nn.Conv2d(CHANNELS, 2, 1)

    def forward(self, image, *others):
        x = self.first(image.to(self.first.weight.dtype))
        for block in self.blocks:
            x = block(x, others)
        return self.last(x)


def check_random_plan(seed):
    """Plan a random network within a random share of what the plain one needs, and run it against that."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [chosen.choice(list(BLOCKS)) for _ in range(chosen.randint(2, 7))]
    draws = any(kind.startswith("dropout") for kind in kinds)
    model = RandomNetwork(kinds).train(chosen.random() < 0.8).double()
    batch, extents = chosen.choice([1, 2]), (chosen.randint(24, 70), chosen.randint(24, 70))
    image = torch.rand(batch, 3, *extents, dtype=torch.float64)
    images = [image, torch.rand(batch, CHANNELS, *extents).double(), torch.rand(batch, CHANNELS).double()]
    share, is_recorded = chosen.choice([0.9, 0.7, 0.5, 0.35, 0.2]), chosen.random() < 0.8
    plain, images[0].requires_grad = copy.deepcopy(model), chosen.random() < 0.5
    most = fxstream.compile(copy.deepcopy(model), memory="1GiB", verify=False)
    with torch.set_grad_enabled(is_recorded):
        most(*images)
        budget = int(share * most.plan.prediction.plain_bytes)
        compiled = fxstream.compile(model, memory=budget)
        try:
            if not is_recorded:
                result = compiled(*images)
                assert draws or torch.allclose(result, plain(*images), atol=1e-10), kinds
            elif model.training and draws:
                compiled(*images).sum().backward()
            else:
                assert_same(step(compiled, model, images), step(plain, plain, images), 1e-10)
        except fxstream.PlanError:
            pass


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("seed", range(20))
def test_random_plans_within_a_memory(seed):
    check_random_plan(seed)


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("seed", range(20, 200))
def test_campaign_of_random_plans_within_a_memory(seed):
    check_random_plan(seed)
