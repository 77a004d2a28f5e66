"""Train a network on whole slides with one label each, as in the paper's Sections VI and VII.

    python examples/slides/train.py labels.csv --size 4096 --spacing 4 --layers 25 --memory 10GiB

The CSV has the columns `slide`, `label` and, if wanted, `split` (see `data.py`); slides are pyramidal TIFFs.
Without `--classes` the label is a number (Huber loss, Spearman's correlation, as for TUPAC16), with it a class
(cross entropy, AUC of each class). The paper's spacings: 8 micrometres per pixel for 2048 pixels (22 layers), 4
for 4096 (25), 2 for 8192 (28). For CAMELYON17 it had no dropout, no BatchNorm and weight decay:
`--classes 4 --dropout 0 --no-norm --weight-decay 1e-6` (and another initialisation, LSUV, which is not here).

In `--folder` are `last.pt`, written after every epoch, and `best.pt`, the epoch with the best score on the slides
that tune. The same command again goes on from `last.pt`; on one machine and with the same `--memory` or `--tile`
it ends bit for bit where an uninterrupted run ends.

BatchNorm needs no care: its batch statistics are streamed exactly. They are those of `--together` images, since
the gradients of a batch are accumulated.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoint
import torch
from data import SlideImages, moments, read_rows
from metrics import auc_per_class, spearman
from network import REPEATS, slide_network
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fxstream

FREE = ("labels", "folder", "epochs", "workers", "cache", "device")
"""Options that may change when a run is resumed."""


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="the CSV")
    parser.add_argument("--folder", default="run", help="where the checkpoints are")
    parser.add_argument("--size", type=int, default=2048, help="pixels of the input, per side")
    parser.add_argument("--spacing", type=float, default=8.0, help="micrometres per pixel")
    parser.add_argument("--layers", type=int, default=22, choices=sorted(REPEATS))
    parser.add_argument("--width", type=int, default=32, help="channels of the first layers")
    parser.add_argument("--classes", type=int, default=0, help="number of classes; 0 for a label that is a number")
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--no-norm", action="store_true", help="no BatchNorm at the end of the network")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="images in a step of the optimiser")
    parser.add_argument("--together", type=int, default=1, help="images in a call of the network")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--decay", type=float, default=0.99, help="of the learning rate, per epoch")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument(
        "--tune-share", type=float, default=0.2, help="of the slides, where the CSV has no `split`"
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--memory", help="what a step may allocate, such as 8GiB; by default what is free")
    memory.add_argument("--tile", type=int, help="pixels of a tile, instead")
    parser.add_argument("--cache", help="a folder in which the tissue at this spacing is kept")
    parser.add_argument("--workers", type=int, default=0, help="processes that read slides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train as the command line says; returns what is known of each epoch."""
    options = options_of(arguments)
    console, folder = Console(), Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = fxstream.compile(network_of(options), memory=options.memory, tile=options.tile)  # the one line
    optimiser = torch.optim.Adam(model.parameters(), options.rate, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, options.decay)
    parts = {"model": model, "optimiser": optimiser, "scheduler": scheduler}
    train, tune = image_sets(options)
    history: list[dict[str, Any]] = []
    if (folder / "last.pt").exists():
        history = resume(folder / "last.pt", parts, train, options)
        console.print(f"resumed after epoch {len(history)}")
    else:
        train.moments = moments(train)
    tune.moments = train.moments
    for epoch in range(len(history), options.epochs):
        train.epoch = epoch
        loss = train_epoch(model, optimiser, train, options)
        if not history:
            console.print(str(model.plan), highlight=False)
        scheduler.step()
        history.append({"epoch": epoch + 1, "loss": loss, **evaluate(model, tune, options)})
        console.print("  ".join(f"{name} {value:.4g}" for name, value in history[-1].items()), highlight=False)
        save(folder, parts, train, options, history)
    console.print(f"best epoch {best(history)}, {folder / 'best.pt'}", highlight=False)
    return history


def network_of(options: argparse.Namespace) -> nn.Module:
    """The network that the options describe, on their device."""
    network = slide_network(
        options.layers,
        options.classes or 1,
        width=options.width,
        dropout=options.dropout,
        norm=not options.no_norm,
    )
    return network.to(options.device)


def image_sets(options: argparse.Namespace) -> tuple[SlideImages, SlideImages]:
    """The slides that train and those that tune."""
    rows = read_rows(options.labels, options.tune_share, options.seed)
    shared = {"seed": options.seed, "cache": options.cache}
    train, tune = (
        SlideImages([r for r in rows if r.split == s], options.size, options.spacing, train=s == "train", **shared)
        for s in ("train", "tune")
    )
    return train, tune


def save(
    folder: Path,
    parts: dict[str, Any],
    train: SlideImages,
    options: argparse.Namespace,
    history: list[dict[str, Any]],
) -> None:
    """Write the checkpoint of the epoch that ended, and before it the best one if this is it."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "moments": train.moments, "options": vars(options)}
    state["random"] = checkpoint.random_state()
    if len(history) == best(history):
        checkpoint.write(folder / "best.pt", state)
    checkpoint.write(folder / "last.pt", state)


def resume(
    path: Path, parts: dict[str, Any], train: SlideImages, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Bring everything to where the checkpoint was written; its history. Raises `SystemExit` for other options."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    given = vars(options)
    changed = [n for n, value in state["options"].items() if n not in FREE and given[n] != value]
    if changed:
        raise SystemExit(f"{path} was trained with other options: {', '.join(changed)}. Give another --folder")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    train.moments = state["moments"]
    checkpoint.set_random_state(state["random"])
    return state["history"]


def batches(images: SlideImages, options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yields the shuffled images and labels of each call, and the number of images in its optimiser step.

    The order depends on seed and epoch alone.
    """
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(options.seed * 100003 + images.epoch)
    )
    calls = [
        (call.tolist(), len(step)) for step in order.split(options.batch) for call in step.split(options.together)
    ]
    loader = DataLoader(images, batch_sampler=[call for call, _ in calls], num_workers=options.workers)
    for (image, label), (_, count) in zip(loader, calls, strict=True):
        yield image.to(options.device), label.to(options.device), count


def loss_sum(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross entropy of classes, or Huber's loss of numbers, summed over the images."""
    if output.shape[1] > 1:
        return F.cross_entropy(output, label.long(), reduction="sum")
    return F.huber_loss(output[:, 0], label.to(output), reduction="sum", delta=1.0)


def train_epoch(
    model: nn.Module, optimiser: torch.optim.Optimizer, images: SlideImages, options: argparse.Namespace
) -> float:
    """One pass over the images; the gradients of a batch are accumulated. Returns the mean loss."""
    model.train()
    total, seen = 0.0, 0
    for image, label, count in batches(images, options):
        loss = loss_sum(model(image), label)
        (loss / count).backward()
        total, seen = total + loss.item(), seen + len(label)
        if seen % options.batch == 0 or seen == len(images):
            optimiser.step()
            optimiser.zero_grad()
    return total / len(images)


@torch.no_grad()
def evaluate(model: nn.Module, images: SlideImages, options: argparse.Namespace) -> dict[str, float]:
    """The loss on the images and the paper's measures; `score` is the one that chooses the best epoch."""
    model.eval()
    loader = DataLoader(images, batch_size=options.together, num_workers=options.workers)
    found = [(model(image.to(options.device)).cpu(), label) for image, label in loader]
    outputs, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    loss = loss_sum(outputs, labels).item() / len(images)
    if options.classes:
        areas = auc_per_class(outputs, labels.long())
        present = [area for area in areas if not math.isnan(area)]
        mean = sum(present) / len(present) if present else math.nan
        return {"tune_loss": loss, "score": mean} | {f"auc_{i}": area for i, area in enumerate(areas)}
    return {"tune_loss": loss, "score": spearman(outputs[:, 0], labels)}


def best(history: list[dict[str, Any]]) -> int:
    """The number of the first epoch with the highest score; one without a score counts least."""
    scores = [-math.inf if math.isnan(row["score"]) else row["score"] for row in history]
    return scores.index(max(scores)) + 1


if __name__ == "__main__":
    main()
