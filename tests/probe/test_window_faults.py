"""Seeded faults in the rules that make windows of attention local: each makes the probe disagree."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstream
from fxstream.geometry.receptive_field import IDENTITY, AxisMap
from fxstream.probe.probe import probe
from fxstream.rules import Read, shuffled, windowed

WINDOW, SHIFT = 4, 2


class ShiftedWindows(nn.Module):
    """Attention inside windows that are shifted by a pad and a crop, with a mask that depends on the position."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        x = F.pad(F.relu(self.first(x)), (WINDOW,) * 4)[:, :, SHIFT : SHIFT - WINDOW, SHIFT : SHIFT - WINDOW]
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).view(n, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c).transpose(2, 3)
        q, k, v = self.qkv(y.reshape(n, h // WINDOW, w // WINDOW, WINDOW**2, c)).chunk(3, -1)
        rows, columns = torch.arange(h // WINDOW) % 3, torch.arange(w // WINDOW) % 2
        mask = (rows[:, None] + columns)[..., None, None].to(x) * torch.eye(WINDOW**2)
        y = (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v
        y = y.view(n, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).transpose(2, 3).reshape(n, h, w, c)
        return self.last(y.permute(0, 3, 1, 2))


def split(change):
    """Another read where an axis is split into windows."""

    def fault(patch):
        patch.setattr(shuffled, "AxisMap", lambda num, den, *reach: AxisMap(num, den, *change(num, den, *reach)))

    return fault


def late_mask(patch):
    """A table of fewer dims, without a batch, is read one window later."""
    rules = sys.modules["fxstream.rules.pointwise"]  # a rule has the same name
    read_of = rules.aligned_read

    def late(call, argument, index, value, dims):
        read = read_of(call, argument, index, value, dims)
        if len(value.shape) == len(call.shape) or not isinstance(read, Read):
            return read
        maps = tuple(AxisMap(1, 1, 1, 1) if one == IDENTITY else one for one in read.maps)
        return Read(argument, value, read.dims, maps, index)

    patch.setattr(rules, "aligned_read", late)


def forgotten_shift(patch):
    """A crop that reads from where the map begins."""
    patch.setattr(windowed, "AxisMap", Unshifted)


class Unshifted(AxisMap):
    """A map of one pixel to one without its offset."""

    def __new__(cls, num, den, first, last):
        return AxisMap(num, den, 0, 0) if first == last else AxisMap(num, den, first, last)


FAULTS = {
    "one window late": split(lambda p, q, first, last: (first + p, last + p) if p > 1 else (first, last)),
    "one pixel late": split(lambda p, q, first, last: (first + 1, last + 1) if p > 1 else (first, last)),
    "one pixel short": split(lambda p, q, first, last: (first, last - (p > 1))),
    "the next window's pixels": split(lambda p, q, first, last: (first + q, last + q) if q > 1 else (first, last)),
    "the mask of the next window": late_mask,
    "no shift": forgotten_shift,
}


def report():
    analysis = fxstream.analyze(ShiftedWindows(), 96)
    assert len(analysis.regions) == 1
    return probe(analysis.graph, analysis.regions[0].nodes)


def test_true_rules_agree():
    assert report().agrees, report()


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_are_found(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    assert report().mismatches
