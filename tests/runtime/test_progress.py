"""A bar on a terminal while tiles are left, and nothing of it behind."""

import io
import logging
import re
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import fxstream
from fxstream.machine import progress


def test_each_pass_has_a_bar():
    console = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, verify=False, progress=True)
    fxstream.inspect(module).shared.watch._console = console
    module(torch.randn(1, 2, 26, 20)).sum().backward()
    text = console.export_text()
    assert "segment_0 forward" in text
    assert "segment_0 backward" in text
    assert "tiles/s" in text
    assert fxstream.inspect(module).shared.watch._shown is None


class Slow:
    """A store that takes a while for every box."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        time.sleep(0.02)
        return self.array[index]


def test_the_bar_says_when_the_computation_waits_for_reading():
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, verify=False, progress=True)
    fxstream.inspect(module).shared.watch._console = console
    with torch.no_grad():
        module(Slow(torch.randn(1, 2, 26, 20).numpy()))
        text = console.export_text()
        module(torch.randn(1, 2, 26, 20))
    assert re.search(r"segment_0 forward, reading \d+% of the time", text)
    assert "of the time" not in console.export_text()


def test_the_stages_of_the_first_call_are_shown_told_and_timed(caplog):
    """On a terminal, and without one in the log; the plan has their seconds, and a later size fewer of them."""
    console = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, progress=True)
    fxstream.inspect(module).shared.watch._console = console
    caplog.set_level(logging.INFO, "fxstream")
    module(torch.randn(1, 2, 26, 20))
    stages = ["capture", "analysis", "plan", "probe", "tile programs"]
    assert [name for name, _ in module.plan.prepared] == stages
    assert [m for m in caplog.messages if m.startswith("Conv2d: ")] == [f"Conv2d: {name}" for name in stages]
    shown = console.export_text()
    assert all(f"Conv2d: {name}" in shown for name in stages)
    seconds = sum(seconds for _, seconds in module.plan.prepared)
    assert 0 < seconds < 60
    assert f"prepared in {seconds:.1f} s: capture " in str(module.plan)
    module(torch.randn(1, 2, 27, 20))
    assert [name for name, _ in module.plan.prepared] == stages[2:]
    assert "prepared" not in str(fxstream.plan(nn.Conv2d(2, 3, 3), 26, channels=2, tile=8))


def test_a_pass_that_fails_ends_its_bar(monkeypatch):
    ends = []
    monkeypatch.setattr(progress.Bar, "__call__", lambda self, what, done, total: ends.append(done == total))
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, verify=False, progress=True)
    image = torch.randn(1, 2, 26, 20)
    module(image)
    (stream,) = (child.stream for child in fxstream.inspect(module).last.streamed.children())
    stream.schedule.programs[:] = []
    with pytest.raises(IndexError):
        module(image)
    assert ends[-1]


def test_silent_in_a_pipe():
    file = io.StringIO()
    bar = progress.Bar(Console(file=file))
    bar("segment_0 forward", 1, 3)
    bar("segment_0 forward", 3, 3)
    with bar.stage("Conv2d: probe"):
        pass
    assert file.getvalue() == ""
