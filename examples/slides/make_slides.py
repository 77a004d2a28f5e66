"""Synthetic slides: small pyramidal TIFFs with tissue-like texture, and a CSV with a label that is in the image.

    python examples/slides/make_slides.py FOLDER [--count 12] [--plot FILE]

Each slide is a blob of tissue, tiled from scikit-image's photograph of stained tissue, on a white background, with
dark nuclei painted into it. The label is their density: nuclei per 1000 square micrometres of tissue. All is drawn
from the seed. The picture shows the slides with the lowest and the highest label and the boxes of their tissue.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import tifffile
from data import read_rows, tissue_box
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pyramid import open_slide
from skimage import data, draw
from skimage.filters import gaussian
from skimage.transform import downscale_local_mean

SPACING = 1.0
"""micrometres per pixel of the finest level"""
NUCLEUS = np.array([70, 45, 110])
RADII = (2.5, 5.0)
DENSITIES = (0.2, 3.0)


def tissue_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A blob with a ragged edge around the middle, bool [H, W]."""
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    ragged = gaussian(random.standard_normal((height, width)), sigma=height / 20)
    distance = np.hypot(rows, columns)
    return (distance + 0.1 * ragged / ragged.std() < 0.6) & (distance < 0.8)


def tissue_texture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stained tissue, mirrored at its edges and shifted, without the strongest brown, uint8 [H, W, 3]."""
    photograph = data.immunohistochemistry()
    mirrored = np.pad(photograph, ((0, photograph.shape[0]), (0, photograph.shape[1]), (0, 0)), mode="reflect")
    shift = random.integers(0, mirrored.shape[0], 2)
    index = np.ix_(*((np.arange(n) + s) % mirrored.shape[0] for n, s in zip((height, width), shift, strict=True)))
    return np.uint8(0.5 * mirrored[index] + 0.5 * np.array([225, 175, 205]))


def make_slide(random: np.random.Generator, size: int, density: float) -> np.ndarray:
    """One slide with `density` nuclei per 1000 square micrometres of tissue, uint8 [H, W, 3]."""
    height, width = (int(n) for n in random.integers(round(0.8 * size), size + 1, 2))
    mask = tissue_mask(random, height, width)
    image = np.full((height, width, 3), 245, np.uint8)
    image[mask] = tissue_texture(random, height, width)[mask]
    places = np.argwhere(mask)
    count = round(density * len(places) * SPACING**2 / 1000)
    for row, column in random.choice(places, count, replace=False):
        radii = random.uniform(*RADII, 2) / SPACING
        painted = draw.ellipse(row, column, *radii, shape=mask.shape, rotation=random.uniform(0, np.pi))
        image[painted] = np.clip(NUCLEUS + random.normal(0, 12, 3), 0, 255)
    return np.uint8(np.clip(image + random.normal(0, 4, image.shape), 0, 255))


def write_pyramid(path: str | Path, image: np.ndarray, spacing: float, levels: int = 3) -> None:
    """A tiled TIFF with `levels` levels, each half the one before, its spacing in the resolution tags."""
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            factor = 2**level
            pixels = np.uint8(downscale_local_mean(image, (factor, factor, 1)).round()) if level else image
            file.write(
                pixels[: image.shape[0] // factor, : image.shape[1] // factor],
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                resolution=(1e4 / (spacing * factor),) * 2,
                resolutionunit="CENTIMETER",
                subifds=levels - 1 if not level else None,
                subfiletype=1 if level else 0,
            )


def make_slides(folder: str | Path, count: int = 12, size: int = 1024, seed: int = 0) -> Path:
    """Write the slides and `labels.csv` into `folder`; every third slide is to tune with. Returns the CSV."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    densities = np.linspace(*DENSITIES, count)
    rows = []
    for number, order in enumerate(np.random.default_rng(seed).permutation(count)):
        random = np.random.default_rng([seed, number])
        name = f"slide_{number:02d}.tif"
        write_pyramid(folder / name, make_slide(random, size, densities[order]), SPACING)
        split = "tune" if number % 3 == 2 else "train"
        rows.append({"slide": name, "label": f"{densities[order]:.4f}", "split": split})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["slide", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def draw_slides(labels: Path, path: str) -> None:
    """The slides with the lowest and the highest label, and the box that encloses their tissue."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    rows = sorted(read_rows(labels), key=lambda row: row.label)
    for axes, row in zip(figure.subplots(1, 2), (rows[0], rows[-1]), strict=True):
        slide = open_slide(row.path)
        pixels = slide.read(3 * SPACING).permute(1, 2, 0)
        top, left, bottom, right = (s * n for s, n in zip(tissue_box(slide), pixels.shape[:2] * 2))
        axes.imshow(pixels)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="C0", linewidth=2))
        axes.set_title(f"{row.path.name}: label {row.label:.2f}", fontsize=10)
        axes.set_axis_off()
    figure.savefig(path, dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--size", type=int, default=1024, help="pixels of the longest side that a slide may have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="where the picture is written")
    options = parser.parse_args()
    labels = make_slides(options.folder, options.count, options.size, options.seed)
    if options.plot:
        draw_slides(labels, options.plot)
    print(labels)


if __name__ == "__main__":
    main()
