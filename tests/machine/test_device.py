"""How much memory there is, and what a request for memory means."""

import math

import pytest
import torch

from fxstream.errors import InputError
from fxstream.machine import device
from fxstream.machine.speeds import Machine

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


class Accelerator:
    """`torch.accelerator` of a machine that has an accelerator of this type, with its memory in bytes."""

    def __init__(self, kind):
        self.kind = kind

    def current_accelerator(self, check_available=False):
        return torch.device(self.kind)

    def current_device_index(self):
        return 3

    def get_memory_info(self, device):
        return 100, 1000

    def memory_reserved(self, device):
        return 50

    def memory_allocated(self, device):
        return 20


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator(kind, monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator(kind))
    there = torch.device(kind)
    assert device.is_accelerator(there)
    assert device.is_present(there)
    assert device.free_bytes(there) == 130
    assert device.total_bytes(there) == 1000
    assert device.budget_of(None, there) == 104
    assert device.budget_of(0.5, there) == 500
    assert device.current_device(kind) == torch.device(kind, 3)
    assert device.current_device("cpu") == CPU


def test_an_accelerator_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator("xpu"))
    missing = torch.device("cuda")
    assert not device.is_present(missing)
    assert device.budget_of(2**30, missing) == 2**30
    for memory in (None, 0.5):
        with pytest.raises(InputError, match="torch finds no cuda device here: give the memory in bytes"):
            device.budget_of(memory, missing)


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_what_the_host_computes(kind):
    there = torch.device(kind)
    assert not device.is_accelerator(there)
    assert device.is_present(there)
    assert device.total_bytes(there) == device.total_bytes(CPU)
    device.synchronize(there)


def test_a_typical_machine_of_each_type():
    assert Machine.of(torch.device("cuda")).host == 2e10
    assert Machine.of(torch.device("cuda", 1)) == Machine.of(torch.device("cuda"))
    assert Machine.of(torch.device("meta")) == Machine.of(CPU)
    assert Machine.of(CPU).host == math.inf
