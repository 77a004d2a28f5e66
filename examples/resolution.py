"""More resolution, better result: the same network at three resolutions, within the same small memory.

    python examples/resolution.py --small
    python examples/resolution.py --seeds 3 --plot examples/pictures/resolution.png --results resolution.json

A canvas of 1024 x 1024 pixels has hundreds of handwritten digits in it, and the label says whether ones or eights
are the majority (`digit_canvases.py`). At full resolution a digit has 8 x 8 pixels, at a quarter 2 x 2. One
network is trained from canvases and their labels alone at full, half and quarter resolution, each with fxstream
within `--memory`, and tested on canvases of other digits with a closer majority. A miniature of the paper's
Tables IV and VI.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from digit_canvases import DIGIT, Canvases, at_resolution
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text

FACTORS = {1: "full", 2: "half", 4: "quarter"}


def network(width: int = 8) -> nn.Sequential:
    """Four convolutions, BatchNorm in the last two, the mean over all positions: [N, 1, H, W] -> [N, 1]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 1),
    )


def batch_of(canvases: Canvases, numbers: range, factor: int, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The canvases of these numbers at a resolution, [N, 1, H, W], and their labels, float32 [N]."""
    drawn = [canvases.draw(number, train=train) for number in numbers]
    images = torch.stack([at_resolution(canvas, factor) for canvas, _ in drawn])
    return images, torch.tensor([float(label) for _, label in drawn])


def train(model: nn.Module, canvases: Canvases, factor: int, options: argparse.Namespace, tell) -> dict:
    """Steps on fresh canvases; the peak memory and the median seconds of a step."""
    optimiser = torch.optim.Adam(model.parameters(), options.rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, total_steps=options.steps)
    model.train()
    seconds = []
    for step in range(options.steps):
        numbers = range(step * options.batch, (step + 1) * options.batch)
        images, labels = batch_of(canvases, numbers, factor, train=True)

        def take_step(images=images, labels=labels):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(model(images)[:, 0], labels).backward()

        started = time.perf_counter()
        take_step()
        seconds.append(time.perf_counter() - started)
        optimiser.step()
        scheduler.step()
        tell(1)
    return {"peak": measure(take_step).peak_bytes, "seconds": statistics.median(seconds)}


@torch.no_grad()
def test(model: nn.Module, canvases: Canvases, factor: int, options: argparse.Namespace) -> float:
    """AUC on canvases of digits that were not trained on."""
    model.eval()
    logits, labels = [], []
    for first in range(0, options.tests, options.batch):
        numbers = range(first, min(first + options.batch, options.tests))
        images, wanted = batch_of(canvases, numbers, factor, train=False)
        logits.append(model(images)[:, 0])
        labels.append(wanted)
    return float(roc_auc_score(torch.cat(labels).numpy(), torch.cat(logits).numpy()))


def run(seed: int, factor: int, options: argparse.Namespace, tell=lambda steps: None) -> dict:
    """Train and test one network at one resolution."""
    torch.manual_seed(seed)
    easy, close = (Canvases(options.size, seed, majority=m) for m in (options.majority, options.test_majority))
    model = fxstream.compile(network(), memory=options.memory)  # the one line
    trained = train(model, easy, factor, options, tell)
    plain = model.plan.prediction.plain_bytes
    auc = test(model, close, factor, options)
    return {"seed": seed, "factor": factor, "auc": auc, "plain": plain, **trained}


def table_of(runs: list[dict], options: argparse.Namespace) -> Table:
    """One row per resolution: AUC as mean over the seeds and of each, then peak and seconds of a training step."""
    table = Table("pixels a side", "a digit", "AUC", "of each seed", "peak", "plain", "seconds")
    for factor, name in FACTORS.items():
        rows = [row for row in runs if row["factor"] == factor]
        table.add_row(
            f"{options.size // factor}, {name}",
            f"{DIGIT // factor} x {DIGIT // factor}",
            f"{statistics.mean(row['auc'] for row in rows):.3f}",
            " ".join(f"{row['auc']:.3f}" for row in rows),
            bytes_text(max(row["peak"] for row in rows)),
            bytes_text(max(row["plain"] for row in rows)),
            f"{statistics.mean(row['seconds'] for row in rows):.2f}",
        )
    return table


def plot(runs: list[dict], options: argparse.Namespace, path: str) -> None:
    """The same corner of a canvas at the three resolutions, and AUC over resolution."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.2), width_ratios=[1, 1, 1, 1.4], layout="constrained")
    canvas, _ = Canvases(options.size).draw(1, train=False)
    for axis, (factor, name) in zip(axes, FACTORS.items(), strict=False):
        corner = at_resolution(canvas, factor)[0, : 128 // factor, : 128 // factor].numpy()
        axis.imshow(corner, cmap="gray_r", vmin=-2, vmax=4)
        axis.set(title=f"{name}: a digit is {DIGIT // factor} x {DIGIT // factor}", xticks=[], yticks=[])
    factors = sorted(FACTORS, reverse=True)
    by_factor = [[row["auc"] for row in runs if row["factor"] == factor] for factor in factors]
    for place, values in enumerate(by_factor):
        axes[-1].plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
    axes[-1].plot([sum(values) / len(values) for values in by_factor], color="tab:blue")
    axes[-1].axhline(0.5, color="gray", linestyle=":")
    ticks = [f"{FACTORS[factor]}\n{options.size // factor} px" for factor in factors]
    axes[-1].set(
        title=f"same network, same {options.memory}", ylabel="AUC, canvases of new digits", ylim=(0.4, 1.03)
    )
    axes[-1].set_xticks(range(len(factors)), ticks)
    figure.savefig(path, dpi=110)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="for a minute: 384 pixels, larger majorities, fewer steps"
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--majority", type=float, default=0.65, help="of ones or eights, in training")
    parser.add_argument("--test-majority", type=float, default=0.54, help="the same where it is tested: closer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tests", type=int, default=160, help="canvases to test with")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument(
        "--memory", default="64MiB", help="what a step may allocate at its peak, at every resolution"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", help="write the picture to this file")
    parser.add_argument("--results", help="a JSON file of runs: what it holds is not run again")
    if parser.parse_args(arguments).small:
        parser.set_defaults(size=384, majority=0.75, test_majority=0.65, steps=80, batch=4, memory="16MiB")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    options, console = options_of(arguments), Console()
    kept = Path(options.results) if options.results else None
    runs = json.loads(kept.read_text()) if kept and kept.exists() else []
    wanted = [(seed, factor) for seed in range(options.seeds) for factor in FACTORS]
    missing = [key for key in wanted if key not in {(row["seed"], row["factor"]) for row in runs}]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=len(missing) * options.steps)
        for seed, factor in missing:
            runs.append(run(seed, factor, options, lambda steps: progress.advance(bar, steps)))
            if kept:
                kept.write_text(json.dumps(runs, indent=1))
    console.print(table_of(runs, options))
    if options.plot:
        plot(runs, options, options.plot)
    return runs


if __name__ == "__main__":
    main()
