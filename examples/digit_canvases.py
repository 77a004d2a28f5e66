"""Large canvases whose label is in fine detail: are there more eights than ones among the scattered digits?

The digits are scikit-learn's, real handwriting of 8 x 8 pixels. Every one is scaled to the same amount of ink, so
that brightness tells nothing; digits of the other classes, clouds of texture and noise are in the way. Canvases to
train with and canvases to test with share no digit.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

DIGIT, CELL, CLOUD = 8, 16, 8
"""Pixels of a digit, of the cell in which it has a random place, and from one draw of the clouds to the next."""
CLASSES = (1, 8)
INK = 20.0


@dataclass(frozen=True)
class Canvases:
    """How canvases of `size` pixels are drawn; one canvas is a function of the seed, the part and its number.

    `density` is the share of cells with a digit. Half of these are of the two classes that count, `majority` of
    them of the class that the label names. `clouds` and `noise` are standard deviations; a digit's pixels are
    about 0.3 on average.
    """

    size: int = 1024
    seed: int = 0
    density: float = 0.2
    majority: float = 0.65
    clouds: float = 0.2
    noise: float = 0.2

    def draw(self, number: int, *, train: bool) -> tuple[torch.Tensor, int]:
        """Canvas float32 [1, size, size] and label; the labels of even numbers are 0, of odd ones 1."""
        random = np.random.default_rng([self.seed, int(train), number])
        across, label = self.size // CELL, number % 2
        count = round(self.density * across**2 / 2)
        eights = round(count * (self.majority if label else 1 - self.majority))
        ones, eight, others = pools(train)
        digits = np.concatenate(
            [
                eight[random.integers(len(eight), size=eights)],
                ones[random.integers(len(ones), size=count - eights)],
                others[random.integers(len(others), size=count)],
            ]
        )
        clouds = torch.from_numpy(random.standard_normal((1, 1, *(self.size // CLOUD,) * 2)).astype(np.float32))
        canvas = self.clouds * F.interpolate(clouds, scale_factor=CLOUD, mode="bicubic")[0, 0].numpy()
        canvas += self.noise * random.standard_normal(canvas.shape, dtype=np.float32)
        cells = random.choice(across**2, len(digits), replace=False)
        places = np.stack(np.divmod(cells, across), 1) * CELL + random.integers(
            CELL - DIGIT + 1, size=(len(cells), 2)
        )
        for (row, column), digit in zip(places, digits, strict=True):
            canvas[row : row + DIGIT, column : column + DIGIT] += digit
        return torch.from_numpy(canvas)[None], label


@cache
def pools(train: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ones, eights and all other digits of one half of the data, each with the same sum, [N, 8, 8]."""
    digits = load_digits()
    images = (INK * digits.images / digits.images.sum((1, 2), keepdims=True)).astype(np.float32)
    half = np.arange(len(images)) % 2 == int(train)
    first, second = (digits.target == c for c in CLASSES)
    return images[half & first], images[half & second], images[half & ~first & ~second]


def at_resolution(canvas: torch.Tensor, factor: int) -> torch.Tensor:
    """The canvas with `factor` times fewer pixels a side, each their mean; then brought to mean 0, deviation 1."""
    reduced = F.avg_pool2d(canvas, factor)
    return (reduced - reduced.mean()) / reduced.std()
