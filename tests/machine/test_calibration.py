"""Rates of a device: measured once, kept in the user's cache directory, and what a planner makes of them."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import fxstream
from fxstream.machine import calibration
from fxstream.machine.speeds import ACCELERATORS, LARGE, Machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache directory, and a process that has read nothing of it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration.rates_of.cache_clear()
    yield tmp_path
    calibration.rates_of.cache_clear()


def test_measured_once_and_read_by_the_next_process(cache, monkeypatch):
    rates = calibration.rates_of(CPU, 2**12)
    assert all(value > 0 for value in dataclasses.asdict(rates).values())
    (file,) = (cache / "fxstream").iterdir()
    assert json.loads(file.read_text()) == dataclasses.asdict(rates)
    calibration.rates_of.cache_clear()
    monkeypatch.setattr(calibration, "_measured", None)
    assert calibration.rates_of(CPU, 2**12) == rates


@pytest.mark.parametrize("text", ["", "[]", '{"macs": 1}'])
def test_a_file_that_is_no_result_is_measured_anew(text):
    file = calibration.cache_file(CPU)
    file.parent.mkdir()
    file.write_text(text)
    rates = calibration.rates_of(CPU, 2**12)
    assert json.loads(file.read_text()) == dataclasses.asdict(rates)


def test_a_cache_that_cannot_be_written_is_none(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibration.rates_of(CPU, 2**12).macs > 0


def test_another_version_of_torch_is_another_device(monkeypatch):
    before = calibration.cache_file(CPU)
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert calibration.cache_file(CPU) != before


def test_rates_are_by_type():
    machine = Machine(2.0, 1.0, 1.0, wide_macs=1.0)
    rates = [machine.rate(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert rates == [2.0, 1.0, 1.0]
    assert Machine(2.0, 1.0, 1.0).rate(torch.float32) == 2.0


def test_no_tensor_of_a_tile_has_too_many_elements():
    """64 channels at 8192 pixels are 2^32 elements: also where the memory is there, tiles are smaller."""
    model = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 3), (3, 64), (64, 3))))
    assert ACCELERATORS["cuda"].beyond > 1
    for memory in ("80GiB", "12GiB", "4GiB"):
        plan = fxstream.plan(model, 8192, memory=memory, device="cuda")
        (segment,) = plan.segments
        largest = [64 * plan_of[0] * plan_of[1] for plan_of in [segment.largest(segment.segment.nodes[1])]]
        assert max(largest) < LARGE
        assert plan.prediction.time_ratio < 0.5
