"""Random modules whose code reads sizes, at random sizes: compiled and plain do the same at each.

Each step of a module takes a map with three channels and returns one; `STEPS` draw one with its own numbers.
"""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, integer_image, make_integer, step
from torch import nn

import fxstream


def condition(draw):
    """Something that is asked of a shape."""
    n, k, d = draw.randint(14, 40), draw.randint(2, 5), draw.choice((0, 2, 3))
    return draw.choice((
        lambda s: s[d] > n,
        lambda s: s[2] * s[3] >= n * n,
        lambda s: s[2] % k == draw_of(n, k),
        lambda s: s[2] == s[3],
        lambda s: s[2] > s[3],
        lambda s: s[0] == 1,
        lambda s: s[0] > 2 and s[3] < n,
        lambda s: s[3] in (n, n + 1, n + 3),
        lambda s: (s[2] // k) % 2 == 0,
        lambda s: s[2] + 2 * s[3] < 3 * n,
        lambda s: max(s[2], s[3]) > n,
        lambda s: len(s) == 4 and divmod(s[3], k)[1] != 0,
    ))  # fmt: skip


def draw_of(n, k):
    return n % k


def branch(draw):
    holds, factor = condition(draw), draw.randint(2, 3)
    return lambda x: x * factor if holds(x.shape) else -x


def chosen(draw):
    holds, kernel = condition(draw), draw.choice((2, 3))
    return lambda x: F.max_pool2d(x, kernel, 1) if holds(tuple(x.size())) else F.relu(x)


def number(draw):
    k, dim = draw.randint(2, 7), draw.choice((0, 2, 3, -1))
    of = draw.choice((
        lambda x: x.shape[dim] // k,
        lambda x: x.size(dim) % k,
        lambda x: min(x.shape[2], x.shape[3]),
        lambda x: x.shape[2] - x.shape[3],
        lambda x: x.numel() % k,
        lambda x: len(x),
        lambda x: x[:, 0].numel() // x.shape[0] % k,
        lambda x: x.shape[-2:].numel() % k,
    ))  # fmt: skip
    return lambda x: x + of(x)


def padded(draw):
    k = draw.choice((2, 4, 5))
    return lambda x: F.pad(x, (0, -x.shape[3] % k, 0, -x.shape[2] % k))


def cropped(draw):
    k, n = draw.choice((2, 3, 4)), draw.randint(12, 30)
    return draw.choice((
        lambda x: x[:, :, : x.shape[2] // k * k, : x.shape[3] // k * k],
        lambda x: x[..., : min(x.shape[3], n)],
        lambda x: x[:, :, : max(8, x.shape[2] - k)],
        lambda x: x.narrow(2, 0, x.size(2) - x.size(2) % k),
    ))  # fmt: skip


def resized(draw):
    k = draw.choice((2, 3))
    mode = draw.choice(("nearest", "bilinear"))
    return draw.choice((
        lambda x: F.interpolate(F.avg_pool2d(x, k) * k * k, x.shape[2:], mode=mode),
        lambda x: F.interpolate(x, (x.shape[2] * 2, x.shape[3] * 2), mode=mode),
        lambda x: F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2)),
    ))  # fmt: skip


def reshaped(draw):
    return draw.choice((
        lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[3], 3).permute(0, 3, 1, 2),
        lambda x: x.view(x.shape[0] * 3, 1, *x.shape[2:]).reshape(x.shape),
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, 3).view(*x.shape[:1], *x.shape[2:], 3).movedim(-1, 1),
        lambda x: torch.cat([one * (i + 1) for i, one in enumerate(x.chunk(3, 1))], 1),
        lambda x: torch.stack([row * 2 for row in x]),
        lambda x: x * torch.ones(x.size(0), 1, 1, 1, dtype=x.dtype),
        lambda x: x + torch.zeros(x.shape[2], 1, dtype=x.dtype) + torch.arange(x.shape[3], dtype=x.dtype),
    ))  # fmt: skip


def averaged(draw):
    """What drops a dim of one, or scales by how many pixels there are."""
    return draw.choice((
        lambda x: x * x.detach().amax((2, 3)).squeeze().ndim,
        lambda x: x + x.sum((2, 3), keepdim=True) * (x.shape[2] % 2),
        lambda x: x * (2 if x.mean(1, keepdim=True).squeeze(0).dim() == 3 else 1),
        lambda x: x if x.is_contiguous() else x * 2,
    ))  # fmt: skip


STEPS = (branch, branch, chosen, number, padded, cropped, resized, reshaped, averaged)


class Reading(nn.Module):
    """Convolutions, and steps between them."""

    def __init__(self, draw):
        super().__init__()
        self.steps = [draw.choice(STEPS)(draw) for _ in range(draw.randint(1, 3))]
        self.first, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.first(x))
        for one in self.steps:
            x = one(x)
        return self.last(x)


def sizes(draw, count):
    """Batches and extents: some seen before, some of one image, some square."""
    seen = []
    for _ in range(count):
        batch, height, width = draw.choice((1, 1, 2, 3)), draw.randint(14, 44), draw.randint(14, 44)
        square = draw.random() < 0.2
        seen.append((batch, 2, height, height if square else width))
        if draw.random() < 0.2:
            seen.append(draw.choice(seen))
    return seen


def run(seed, count):
    """Compare one module at so many sizes; at which of them it was streamed."""
    draw = random.Random(seed)
    model = make_integer(Reading(draw))
    module, streamed = fxstream.compile(model, tile=draw.choice((24, 30)), verify=False), 0
    for size in sizes(draw, count):
        image = integer_image(*size)
        try:
            wanted = step(model, model, [image])
        except (RuntimeError, ValueError, ZeroDivisionError):
            continue
        assert_same(step(module, model, [image]), wanted, 1e-12)
        streamed += not module.plan.is_trivial
    return streamed


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.campaign) for n in range(5, 500))]
)
def test_compiled_and_plain_do_the_same_at_every_size(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)
        assert run(seed, 6)
