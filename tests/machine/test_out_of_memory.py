"""Allocations that fail are told from other errors, whatever their class."""

import gc
import weakref

import pytest
import torch

from fxstream.machine.out_of_memory import OutOfMemory, catch_oom


def failing(error):
    def fails():
        raise error

    return fails


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("could not create a memory object"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_what_is_out_of_memory(error):
    done = catch_oom(failing(error))
    assert isinstance(done, OutOfMemory)
    assert done.message == (str(error) or "MemoryError").splitlines()[0]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("a")])
def test_what_is_not(error):
    with pytest.raises(type(error)):
        catch_oom(failing(error))


def test_results_pass_and_nothing_of_a_failure_is_held():
    assert catch_oom(lambda: 3) == 3
    held = []

    def fails():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise MemoryError

    catch_oom(fails)
    gc.collect()
    assert held[0]() is None


def test_an_accelerator_whose_allocator_keeps_nothing(monkeypatch):
    """`torch.accelerator.empty_cache` raises where the allocator is not one that caches."""

    def raises():
        raise RuntimeError("Allocator for elsewhere is not a DeviceAllocator")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", raises)
    assert catch_oom(failing(MemoryError("full"))) == OutOfMemory("full")
