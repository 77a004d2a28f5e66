"""The key of a call: what a capture depends on changes it, sizes do not."""

import torch
from torch import nn

from fxstream.graph.guards import mode_key


def key(model, *args, **kwargs):
    return mode_key(model, args, kwargs)


def test_what_changes_the_key_of_a_call():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    image = torch.zeros(1, 3, 20, 20)
    first = key(model, image)
    assert key(model, torch.zeros(2, 3, 31, 17)) == first
    keys = [
        first,
        key(model, image.to(torch.uint8)),
        key(model, image[:, :2]),
        key(model, image[..., None]),
        key(model, image, 1),
        key(model, image, 1.0),
        key(model, image, True),
        key(model, image=image),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(key(model, image))
    keys.append(key(model.eval(), image))
    model[1].p = 0.25
    keys.append(key(model, image))
    model[1].register_forward_hook(lambda *_: None)
    keys.append(key(model, image))
    keys.append(key(model.double(), image))
    assert len(set(keys)) == len(keys)


def test_attributes_that_are_not_guarded_are_left_out():
    model = nn.Sequential(nn.Dropout())
    before = mode_key(model, (), {}, {"0.p"})
    model[0].p = 0.25
    assert mode_key(model, (), {}, {"0.p"}) == before
