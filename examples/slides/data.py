"""Slides as training images: the tissue at a spacing, cropped or padded to the input size, augmented, normalised.

The CSV has a header and one row per slide: `slide` (a file, relative to the CSV), `label` (a number, or the
number of a class) and, if wanted, `split` (`train` or `tune`; without it a seeded share of the slides tunes). What
an image looks like in an epoch depends on the seed, the epoch and its place in the CSV alone, so that a resumed
run sees what an uninterrupted one sees.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from augment import augmentations
from pyramid import WHOLE, Box, Slide, open_slide
from skimage.color import rgb2hsv
from skimage.filters import median, threshold_otsu
from torch.utils.data import Dataset

OVERVIEW = 1024
"""Tissue is looked for on the coarsest level that has at least this many pixels on its longer side."""
LEAST_SATURATION = 0.05
"""Below this saturation nothing is tissue, whatever the threshold: a blank slide has none."""


@dataclass(frozen=True)
class Row:
    """One slide of the CSV."""

    path: Path
    label: float
    split: str


def read_rows(path: str | Path, tune_share: float = 0.2, seed: int = 0) -> list[Row]:
    """The rows of the CSV; where it has no column `split`, a seeded share of the slides is set aside to tune."""
    path = Path(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(seed).permutation(len(rows))
    tune = set(order[: round(tune_share * len(rows))].tolist())
    return [
        Row(
            path.parent / row["slide"], float(row["label"]), row.get("split") or ("tune" if i in tune else "train")
        )
        for i, row in enumerate(rows)
    ]


def tissue_box(slide: Slide) -> Box:
    """What encloses all tissue (Otsu's threshold on the saturation); the whole slide where there is none."""
    large_enough = [i for i, shape in enumerate(slide.shapes) if max(shape) >= OVERVIEW]
    overview = slide.read_level(large_enough[-1] if large_enough else 0)
    saturation = median(rgb2hsv(overview)[..., 1], np.ones((5, 5)))  # without specks of dust
    tissue = saturation > max(threshold_otsu(saturation), LEAST_SATURATION)
    if not tissue.any():
        return WHOLE
    spans = [np.flatnonzero(tissue.any(axis)) for axis in (1, 0)]
    (top, bottom), (left, right) = ((s[0] / n, (s[-1] + 1) / n) for s, n in zip(spans, tissue.shape, strict=True))
    return float(top), float(left), float(bottom), float(right)


def fit(image: torch.Tensor, size: int, *, centre: bool = False) -> torch.Tensor:
    """Each axis of [C, H, W] brought to `size`: cropped, at random or in the centre, or zero padded on both sides.

    >>> fit(torch.ones(3, 5, 2), 4, centre=True)[0].tolist()
    [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    """
    for axis in (1, 2):
        spare = image.shape[axis] - size
        if spare > 0:
            first = spare // 2 if centre else int(torch.randint(spare + 1, ()))
            image = image.narrow(axis, first, size)
    height, width = (size - extent for extent in image.shape[1:])
    return torch.nn.functional.pad(image, (width // 2, width - width // 2, height // 2, height - height // 2))


class SlideImages(Dataset):
    """Images float32 [3, size, size] and labels of the rows; `epoch` says which crops and augmentations are drawn.

    With `cache`, a folder, the tissue of each slide is decoded once and kept there as uint8.
    """

    def __init__(
        self,
        rows: list[Row],
        size: int,
        spacing: float,
        *,
        train: bool,
        seed: int = 0,
        cache: str | Path | None = None,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.rows, self.size, self.spacing, self.train, self.seed = rows, size, spacing, train, seed
        self.cache = None if cache is None else Path(cache)
        self.moments = moments
        self.augment = augmentations()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        tissue = self.tissue(index)
        with torch.random.fork_rng(devices=[]):
            key = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
            torch.manual_seed(int(key[0] >> np.uint64(1)))
            image = fit(tissue, self.size, centre=not self.train).float() / 255
            image = self.augment(image) if self.train else image
        if self.moments is not None:
            mean, deviation = self.moments
            image = (image - mean[:, None, None]) / deviation[:, None, None]
        return image, self.rows[index].label

    def tissue(self, index: int) -> torch.Tensor:
        """The tissue of one slide at the wanted spacing, uint8 [3, H, W]."""
        path = self.rows[index].path
        if self.cache is None:
            return read_tissue(path, self.spacing)
        kept = self.cache / f"{path.stem}_{self.spacing:g}.npy"
        if not kept.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part.npy")
            np.save(part, read_tissue(path, self.spacing).numpy())
            part.replace(kept)
        return torch.from_numpy(np.load(kept))


def read_tissue(path: Path, spacing: float) -> torch.Tensor:
    """The slide's tissue at a spacing in micrometres per pixel, background around it left out, uint8 [3, H, W]."""
    slide = open_slide(path)
    return slide.read(spacing, tissue_box(slide))


def moments(images: SlideImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all tissue of the slides, values 0..1."""
    sums, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for index in range(len(images)):
        for row in images.tissue(index).split(1024, dim=1):
            values = row.double() / 255
            sums += values.sum((1, 2))
            squares += values.square().sum((1, 2))
            count += values[0].numel()
    mean = sums / count
    return mean.float(), (squares / count - mean.square()).sqrt().float()
