"""The peak of live tensor bytes."""

import torch

from fxstream.machine.meter import PeakMemory, measure


def test_storages_count_once_and_for_as_long_as_they_live():
    with PeakMemory() as memory:
        x = torch.zeros(100)
        view = x[10:].view(9, 10)
        x += 1  # in place: nothing new
        assert memory.live == 400
        del x
        assert memory.live == 400  # the view holds it
        y = view + 1
        assert memory.live == 400 + 360
        del view, y
        assert memory.live == 0
    assert memory.peak == 760


def test_tensors_of_others_and_tensors_without_memory_do_not_count():
    before = torch.zeros(50)
    with PeakMemory() as memory:
        before.add_(1)
        torch.zeros(1000, device="meta")
    assert memory.peak == 0


def test_a_run_is_measured_with_its_result():
    done = measure(lambda: torch.zeros(256).sum().item())
    assert done.result == 0.0
    assert done.peak_bytes == 4 * 257
    assert done.seconds >= 0
