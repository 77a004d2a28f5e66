"""Random modules that mix what Python does in a forward, and random changes between calls, from a seed.

A piece is a statement of a forward, with the attributes that it needs and what a user may change of them.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn


class Box:
    """An object with attributes that is no module."""

    def __init__(self, **values):
        self.__dict__ |= values

    def __eq__(self, other):
        return self.__dict__ == other.__dict__

    __hash__ = None


def _counter(m, x, o):
    m.count += 1
    return x * (1 + m.count % 3)


def _unread_counter(m, x, o):
    m.calls += 1
    return x


def _threshold(m, x, o):
    m.steps += 1
    return x if m.steps < 4 else -x


def _annealed(m, x, o):
    m.tau = m.tau * 0.75
    return x * m.tau


def _nested(m, x, o):
    return x * m.table["a"]["b"] + m.table["c"][0]


def _listed(m, x, o):
    for scale in m.scales:
        x = x * scale
    return x


def _flagged(m, x, o):
    return x.abs() if m.flag else x


def _training(m, x, o):
    return x * 2 if m.training else x


def _object(m, x, o):
    return x + m.box.shift


def _stored(m, x, o):
    m.features = x
    return x


def _history(m, x, o):
    m.history.append(x.detach().mean())
    if len(m.history) > 2:
        del m.history[0]
    return x


def _average(m, x, o):
    m.average.mul_(0.5).add_(x.detach().mean() * 0.5)
    return x - m.average


def _lazy(m, x, o):
    if m.cache is None:
        m.cache = torch.full((3, 1, 1), 2.0, dtype=x.dtype)
    return x * m.cache


def _drawn(m, x, o):
    return x * torch.rand(x.shape[0], 3, 1, 1, dtype=x.dtype)


def _dropped(m, x, o):
    return F.dropout2d(x, 0.5, m.training)


def _optional(m, x, o):
    return x if o.get("scale") is None else x * o["scale"]


def _mode(m, x, o):
    return x.sigmoid() if o.get("mode") == "b" else x


def _gradient(m, x, o):
    return x if torch.is_grad_enabled() else x * 3


def _frozen(m, x, o):
    with torch.no_grad():
        y = m.extra(x)
    return x + y


def _checked(m, x, o):
    return torch.utils.checkpoint.checkpoint(m.extra, x, use_reentrant=False)


def _type(m, x, o):
    return x * 2 if x.dtype == torch.float64 else x


def _sized(m, x, o):
    return x * (2 if x.shape[-1] % 2 else 1)


def _format(m, x, o):
    return x + (1 if o["image"].is_contiguous() else 0)


PIECES = {
    _counter: (lambda: {"count": 0}, [lambda m, r: setattr(m, "count", r.randint(0, 5))]),
    _unread_counter: (lambda: {"calls": 0}, []),
    _threshold: (lambda: {"steps": 0}, [lambda m, r: setattr(m, "steps", 0)]),
    _annealed: (lambda: {"tau": 1.0}, [lambda m, r: setattr(m, "tau", 2.0)]),
    _nested: (
        lambda: {"table": {"a": {"b": 2.0}, "c": [1.0]}},
        [lambda m, r: m.table["a"].update(b=r.choice([1.0, 3.0])), lambda m, r: m.table["c"].__setitem__(0, 2.0)],
    ),
    _listed: (lambda: {"scales": [2.0]}, [lambda m, r: m.scales.append(0.5), lambda m, r: m.scales.clear()]),
    _flagged: (lambda: {"flag": False}, [lambda m, r: setattr(m, "flag", not m.flag)]),
    _training: (dict, [lambda m, r: m.train(not m.training)]),
    _object: (lambda: {"box": Box(shift=1.0)}, [lambda m, r: setattr(m.box, "shift", r.choice([0.0, 2.0]))]),
    _stored: (lambda: {"features": None}, []),
    _history: (lambda: {"history": []}, [lambda m, r: m.history.clear()]),
    _average: (dict, []),
    _lazy: (lambda: {"cache": None}, [lambda m, r: setattr(m, "cache", None)]),
    _drawn: (dict, []),
    _dropped: (dict, [lambda m, r: m.train(not m.training)]),
    _optional: (dict, []),
    _mode: (dict, []),
    _gradient: (dict, []),
    _frozen: (dict, []),
    _checked: (dict, []),
    _type: (dict, []),
    _sized: (dict, []),
    _format: (dict, []),
}


def _doubled(module, inputs, output):
    return output * 2


class RandomModule(nn.Module):
    """Two convolutions with some pieces between them."""

    def __init__(self, pieces):
        super().__init__()
        self.first, self.extra, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 3)
        self.register_buffer("average", torch.zeros(()))
        self.pieces = tuple(pieces)
        for piece in pieces:
            for name, value in PIECES[piece][0]().items():
                setattr(self, name, value)

    def forward(self, x, **options):
        options["image"] = x
        x = torch.relu(self.first(x))
        for piece in self.pieces:
            x = piece(self, x, options)
        return self.last(x), x.mean((2, 3))


class Scenario:
    """A random module, and what is done to it before each of some calls."""

    def __init__(self, seed, calls=20):
        self._random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = RandomModule(self._random.sample(list(PIECES), self._random.randint(2, 5))).double()
        self.calls = calls
        self.hook = None

    def change(self, *models):
        """Change all models in the same way, or not at all; returns what was done."""
        changes = [change for piece in models[0].pieces for change in PIECES[piece][1]]
        changes += [lambda m, r: m.extra.requires_grad_(not m.extra.weight.requires_grad), _hooked]
        if self._random.random() < 0.6:
            return
        change, state = self._random.choice(changes), self._random.getstate()
        for model in models:
            self._random.setstate(state)
            change(model, self._random)

    def call(self):
        """The arguments of a call, whether gradients are recorded, and the seed of its draws."""
        r = self._random
        image = torch.randn(r.choice([1, 2]), 2, r.choice([11, 20]), r.choice([14, 19, 24]), dtype=torch.double)
        if r.random() < 0.2:
            image = image.to(memory_format=torch.channels_last)
        options = {}
        if r.random() < 0.5:
            options["scale"] = r.choice([None, 0.5, 2.0])
        if r.random() < 0.5:
            options["mode"] = r.choice("ab")
        return image, options, r.random() < 0.7, r.randint(0, 10**6)


def _hooked(model, r):
    """Register a hook, or remove those that there are."""
    if model.first._forward_hooks:
        model.first._forward_hooks.clear()
    else:
        model.first.register_forward_hook(_doubled)
