"""How much memory there is, and what a request for memory means."""

import pytest
import torch

from fxstream.machine import device

CPU = torch.device("cpu")


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """A container's limit and use, as files that the test writes."""
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(device, "LIMITS", ((limit, used),))
    return limit, used


def test_budgets(monkeypatch):
    monkeypatch.setattr(device, "total_bytes", lambda place: 1000)
    monkeypatch.setattr(device, "free_bytes", lambda place: 500)
    requests = {None: 400, 0.25: 250, 0.999: 999, 1: 1, 4096: 4096, 77.0: 77}
    assert {memory: device.budget_of(memory, CPU) for memory in requests} == requests


def test_a_container_has_what_its_limit_leaves(limits):
    limit, used = limits
    whole, free = device.total_bytes(CPU), device.free_bytes(CPU)
    limit.write_text("4096\n")
    used.write_text("1024\n")
    assert (device.total_bytes(CPU), device.free_bytes(CPU)) == (4096, 3072)
    limit.write_text("max\n")  # none
    assert device.total_bytes(CPU) == whole
    assert 0.5 * free < device.free_bytes(CPU) < 2 * free
    assert 2**20 < free <= whole
