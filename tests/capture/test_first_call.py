"""Models that do something at their first call alone that no graph can hold, as those of transformers 5 do."""

import threading

import pytest
import torch
from torch import nn

import fxstream

LOCK = threading.Lock()


class Initialised(nn.Module):
    """Installs a hook and fills lists at its first call, under a lock."""

    def __init__(self):
        super().__init__()
        self.conv, self.is_ready, self.names = nn.Conv2d(2, 8, 3), False, []
        self.last = nn.Conv2d(8, 1, 3)

    def initialise(self, x):
        self.conv.register_forward_hook(lambda module, args, result: 2 * result)
        self.names.append("conv")
        self.is_ready = True

    def forward(self, x):
        if not self.is_ready:
            with LOCK:
                self.initialise(x)
        return self.last(self.conv(x).relu())


class Keeping(Initialised):
    """Keeps what it has made of its first image."""

    def initialise(self, x):
        super().initialise(x)
        self.mean = x.mean()


class Breaking(Initialised):
    """Breaks at every call."""

    def forward(self, x):
        self.names.append("call")
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_first_call_is_made_without_data():
    torch.manual_seed(0)
    model, plain = Initialised().double(), Initialised().double()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(1, 2, 30, 26).double()
    module = fxstream.compile(model, tile=16)
    torch.testing.assert_close(module(image), plain(image))
    assert not module.plan.is_trivial
    assert (model.is_ready, model.names, len(model.conv._forward_hooks)) == (True, ["conv"], 1)
    torch.testing.assert_close(model(image), plain(image))


@pytest.mark.parametrize("kind", [Keeping, Breaking])
def test_what_breaks_all_the_same_is_left_as_it_was(kind):
    model = kind()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(fxstream.GraphBreakError, match="not one graph"):
        fxstream.analyze(model, 32, channels=2)
    assert (model.is_ready, model.names, len(model.conv._forward_hooks)) == (False, [], 0)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
