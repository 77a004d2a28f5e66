"""Tile programs through a stand-in of torch.compile whose results the next call overwrites, as CUDA graphs do."""

import copy

import pytest
import torch
from compare import assert_same, step
from torch import nn

import fxstream


def overwriting(program, **options):
    """The program; what a call without gradients returned is no number after the next call."""
    last = []

    def run(*tensors):
        for result in last:
            if not result.requires_grad:
                result.fill_(torch.nan)
        last[:] = [result for result in program(*tensors) if result is not None]
        return tuple(last)

    return run


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}]
)
def test_results_that_inductor_overwrites(monkeypatch, options):
    """Partial results of all tiles, and maps of what runs whole, outlast the next call."""
    monkeypatch.setattr(torch, "compile", overwriting)
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3),
        nn.AdaptiveAvgPool2d(1),
    ]
    model, image = nn.Sequential(*layers).double().train(), torch.randn(2, 3, 40, 36, dtype=torch.float64)
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=16, compile_tiles=options, verify=False)
    for _ in range(2):
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_two_kinds_of_graphs(mode):
    with pytest.raises(fxstream.InputError, match=f"compile_tiles={{'mode': '{mode}'}} exclude each other"):
        fxstream.compile(nn.Conv2d(1, 1, 1), tile=8, cuda_graphs=True, compile_tiles={"mode": mode})
    fxstream.compile(nn.Conv2d(1, 1, 1), tile=8, compile_tiles={"mode": mode})
