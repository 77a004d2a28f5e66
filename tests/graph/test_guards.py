"""What a capture depends on, and what it does not: the key of a call."""

import pytest
import torch
from torch import nn

from fxstream.graph.guards import attributes, mode_key


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.depth, self.sizes, self.table = 2, (1, 2), torch.ones(2)

    def forward(self, x, scale=1):
        return self.norm(self.conv(x)) * scale


def key(model, *args, **kwargs):
    return mode_key(model, args or (torch.zeros(1, 3, 20, 20),), kwargs)


def test_size_and_batch_are_no_part_of_it():
    model = Scaled()
    keys = {key(model, torch.zeros(*shape)) for shape in ((1, 3, 20, 20), (2, 3, 20, 20), (1, 3, 31, 20))}
    assert len(keys) == 1


def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return key(model)


def autocast_to_another_type(model):
    with torch.autocast("cpu", torch.float16):
        return key(model)


OTHERS = {
    "channels": lambda model: key(model, torch.zeros(1, 4, 20, 20)),
    "number of dims": lambda model: key(model, torch.zeros(1, 3, 20, 20, 20)),
    "type of the image": lambda model: key(model, torch.zeros(1, 3, 20, 20, dtype=torch.float64)),
    "device of the image": lambda model: key(model, torch.zeros(1, 3, 20, 20, device="meta")),
    "type of the weights": lambda model: key(model.bfloat16()),
    "an argument": lambda model: key(model, torch.zeros(1, 3, 20, 20), 2),
    "an argument by name": lambda model: key(model, torch.zeros(1, 3, 20, 20), scale=1),
    "the type of an argument": lambda model: key(model, torch.zeros(1, 3, 20, 20), True),
    "training": lambda model: key(model.eval()),
    "training of a part": lambda model: model.norm.eval() and key(model),
    "a number": lambda model: setattr(model, "depth", 3) or key(model),
    "the type of a number": lambda model: setattr(model, "depth", 2.0) or key(model),
    "a tuple": lambda model: setattr(model, "sizes", (1, 3)) or key(model),
    "a tensor": lambda model: setattr(model, "table", torch.zeros(2)) or key(model),
    "a module": lambda model: setattr(model, "conv", nn.Conv2d(3, 4, 3)) or key(model),
    "a hook": lambda model: model.conv.register_forward_hook(print) and key(model),
    "a hook before": lambda model: model.conv.register_forward_pre_hook(print) and key(model),
    "autocast": autocast,
    "autocast to another type": autocast_to_another_type,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_change_of_what_a_capture_depends_on_changes_the_key(other):
    model = Scaled()
    before = {key(model), key(model, torch.zeros(1, 3, 20, 20), 1)}
    before |= set() if other == "autocast" else {autocast(model)}
    assert len(before) == 2 + (other != "autocast")
    assert OTHERS[other](model) not in before


def test_what_is_volatile_is_left_out():
    model = Scaled()
    before = mode_key(model, (), {}, {".depth"})
    model.depth = 7
    assert mode_key(model, (), {}, {".depth"}) == before
    assert attributes(model)[".depth"] == (int, 7)
