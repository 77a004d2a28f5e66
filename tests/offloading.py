"""A network of several segments, and its plan for a device: of the tests of boundaries in host memory."""

import torch
from compare import make_integer
from torch import nn

from fxstream.compiler.analysis import analyze
from fxstream.planning.plan import make_plan


def network():
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1)]
    return make_integer(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1)))


def planned(model, request, *size):
    analysis = analyze(model, size, channels=2, batch=2)
    return analysis, make_plan(analysis.graph, request, device=torch.device("cuda"))
