"""Boundaries in host memory: planned for a device, and run on a second device that is made of Python."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import integer_image
from offloading import network, planned
from torch import nn
from torch.utils import backend_registration

import fxstream
from fxstream.compiler.analysis import analyze
from fxstream.tiling.request import Request
from fxstream.tools.zoo import build


def test_steps_on_a_second_device():
    """`second_device.py` in a process of its own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices in Python")
    path = Path(__file__).parent.parent / "second_device.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


def test_a_boundary_that_something_else_reads_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            y = self.first(x)
            return self.second(y), y.flatten(2).sort().values

    _, plan = planned(Twice(), Request(20, segments=("first",), offload=True), 40, 44)
    assert len(plan.segments) > 1
    assert plan.offloaded == frozenset()


def test_where_no_weights_say_where_to_compute_a_boundary_stays():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3), nn.MaxPool2d(2))
    _, plan = planned(model, Request(20, segments=("1",), offload=True), 40, 44)
    assert len(plan.segments) == 2
    assert plan.offloaded == frozenset()


def test_less_memory_is_needed_where_boundaries_are_elsewhere():
    model = fxstream.freeze_batch_norm(build("torchvision/resnet18")).train()
    least = []
    for offload in (False, True):
        with pytest.raises(fxstream.PlanError) as error:
            fxstream.plan(model, 4096, memory="1B", offload=offload, device="cuda", segments=4)
        least.append(error.value.least_bytes)
    assert least[1] < least[0]
    plan = fxstream.plan(model, 4096, memory=least[1], offload=True, device="cuda", segments=4)
    assert plan.prediction.bytes <= least[1]
    assert plan.prediction.offloaded == analyze(model, 4096).graph.activation_bytes(plan.offloaded)
    assert "in host memory: boundaries" in str(plan)


@pytest.mark.parametrize("memory", ["300MiB", "1GiB"])
def test_boundaries_move_only_where_that_is_faster(memory):
    model = fxstream.freeze_batch_norm(build("torchvision/resnet18")).train()
    near, away = (fxstream.plan(model, 6000, memory=memory, offload=o, device="cuda") for o in (False, True))
    assert away.prediction.seconds <= near.prediction.seconds
    if away.prediction.offloaded:
        assert away.prediction.seconds < near.prediction.seconds
    assert (len(away.offloaded) > 0) == (away.prediction.offloaded > 0)


def test_on_a_cpu_nothing_changes():
    model, image = network(), integer_image(1, 2, 32, 64)
    module = fxstream.compile(model, tile=20, segments=2, offload=True)
    assert torch.equal(module(image), model(image))
    assert module.plan.offloaded == frozenset()


def test_not_with_ranks_that_share_tiles():
    with pytest.raises(fxstream.InputError, match="exclude each other"):
        fxstream.compile(network(), tile=20, offload=True, mesh=object())
