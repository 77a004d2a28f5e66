"""A bar on a terminal while tiles are left, and nothing of it behind."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import fxstream
from fxstream.runtime import progress


def test_each_pass_has_a_bar():
    console = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, verify=False, progress=True)
    module.pipeline._watch._console = console
    module(torch.randn(1, 2, 26, 20)).sum().backward()
    text = console.export_text()
    assert "segment_0 forward" in text
    assert "segment_0 backward" in text
    assert "tiles/s" in text
    assert module.pipeline._watch._shown is None


def test_a_pass_that_fails_ends_its_bar(monkeypatch):
    ends = []
    monkeypatch.setattr(progress.Bar, "__call__", lambda self, what, done, total: ends.append(done == total))
    module = fxstream.compile(nn.Conv2d(2, 3, 3), tile=8, segments=1, verify=False, progress=True)
    image = torch.randn(1, 2, 26, 20)
    module(image)
    (stream,) = (child.stream for child in module.pipeline.last.streamed.children())
    stream.schedule.programs[:] = []
    with pytest.raises(IndexError):
        module(image)
    assert ends[-1]


def test_silent_in_a_pipe():
    file = io.StringIO()
    bar = progress.Bar(Console(file=file))
    bar("segment_0 forward", 1, 3)
    bar("segment_0 forward", 3, 3)
    assert file.getvalue() == ""
