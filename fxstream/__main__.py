"""The command line: report, plan, check, bench, rules.

Results go to standard output, progress and errors to standard error. Exit codes: 0 all is well, 1 a comparison or
the probe found a difference, 2 a mistake in what was asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fxstream.compiler.analysis import Analysis, analyze
from fxstream.compiler.compile import GLOBAL_OPS, checked_request
from fxstream.errors import CaptureError, FxstreamError, InputError
from fxstream.machine.device import free_bytes
from fxstream.machine.units import bytes_text, parse_bytes
from fxstream.planning.plan import Plan, make_plan, worthwhile
from fxstream.probe.probe import ProbeReport, probe
from fxstream.report.as_json import SCHEMA, as_json, bench_json, check_json, plan_json
from fxstream.report.html import html_page
from fxstream.report.plot import save_pareto, save_plot
from fxstream.report.summary import Summary, summarise
from fxstream.report.terminal import progress, show, show_bench, show_check, show_plan, show_rules
from fxstream.rules import rules
from fxstream.tiling.request import Request
from fxstream.tools.benchmark import Row, Setting, Way, compare
from fxstream.tools.check import check
from fxstream.tools.freeze import freeze_batch_norm
from fxstream.tools.model_spec import load

__all__ = ["main"]

EXAMPLES = """examples:
  fxstream report torchvision/resnet50 --size 8192 --tile 2048
  fxstream report model.py:build --size 4096x6144 --html report.html
  fxstream plan timm/convnext_tiny --size 16384 --memory 8GiB
  fxstream check torchvision/resnet18 --size 300x260 --tile 128
  fxstream rules

TARGET is torchvision/NAME, timm/NAME, module:callable or file.py:callable;
the callable takes no arguments and returns the model."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(80, int(os.environ.get("COLUMNS", "80"))), max_help_position=26)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxstream",
        description="Receptive fields of a network, how it streams, and whether that is exact.",
        epilog=EXAMPLES,
        formatter_class=_Formatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=_Formatter)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    report = command("report", "receptive field, cost, verdict of every layer; regions and cuts", _report)
    _model_arguments(report)
    _tile_arguments(report)
    _device_arguments(report, "what to plan for")
    report.add_argument("--depth", type=int, default=2, help="group layers by this many parts of the path (2)")
    report.add_argument("--all", action="store_true", help="every operator on a line of its own")
    report.add_argument("--no-probe", action="store_true", help="do not measure on the real operators")
    report.add_argument("--html", metavar="FILE", help="write one self-contained page")
    report.add_argument("--plot", metavar="FILE", help="draw fields, memory and tiles (needs matplotlib)")
    plan = command("plan", "segments, tiles and predicted memory", _plan)
    _model_arguments(plan)
    _tile_arguments(plan)
    _device_arguments(plan, "what to plan for")
    for sub in (report, plan):
        sub.add_argument("--no-grad", action="store_true", help="plan a call without gradients")
    compare = command("check", "streamed against plain, tensor by tensor; exit code 1 if they differ", _check)
    _model_arguments(compare)
    _tile_arguments(compare)
    compare.set_defaults(offload=False)
    compare.add_argument("--native", action="store_true", help="in the model's own type instead of float64")
    bench = command("bench", "time and peak memory of a training step: plain, checkpoint, streamed", _bench)
    _model_arguments(bench)
    _tile_arguments(bench, f"budgets, in bytes or as a share of the plain network's peak ({BUDGETS})")
    _device_arguments(bench, "what to measure on")
    bench.add_argument("--rounds", type=int, default=3, help="processes per way; medians are given (3)")
    bench.add_argument("--plot", metavar="FILE", help="draw time over memory (needs matplotlib)")
    command("rules", "the operators that have a rule", _rules)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="what to look at; see below")
    parser.add_argument("--size", help="image extent, one number or one per axis: 8192, 4096x6144")
    parser.add_argument("--channels", type=int, default=3, help="image channels (3)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (1)")
    parser.add_argument("--input-shape", metavar="N,C,...", help="the whole shape, instead of the three above")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="training mode")
    mode.add_argument("--eval", action="store_true", help="evaluation mode (the default)")
    parser.add_argument("--freeze-batch-norm", action="store_true", help="use running statistics also in training")
    parser.add_argument("--json", action="store_true", help="plain data on standard output")


BUDGETS = "60%,40%,25%,15%"
"""The budgets of a benchmark that names none."""


def _tile_arguments(
    parser: argparse.ArgumentParser, memory: str = "the fastest plan predicted to fit: 8GiB, 500MB"
) -> None:
    parser.add_argument("--tile", help="largest box that a tile reads of the image: 2048, 2048x1024")
    parser.add_argument("--memory", help=memory.replace("%", "%%"))
    parser.add_argument("--segments", type=int, help="segments per region; 1 is a single stream")
    parser.add_argument("--cut", metavar="MODULE", help="stream nothing behind this module")
    parser.add_argument(
        "--global-ops",
        choices=GLOBAL_OPS,
        default="auto",
        help="stream reductions over space (batch statistics, pooling), cut there, or as the planner finds (auto)",
    )


def _device_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--device", default="cpu", help=f"{what}: cpu, cuda, cuda:1 (cpu)")
    parser.add_argument("--offload", action="store_true", help="boundaries in host memory, where that is faster")


def _extents(text: str, what: str) -> tuple[int, ...]:
    """Numbers written as 8192 or 4096x6144."""
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise InputError(f"{what} {text!r} is not a number, or numbers joined by x: 8192, 4096x6144") from None


def _shape(options: argparse.Namespace) -> tuple[tuple[int, ...], int, int]:
    """Extents, channels and batch of the image."""
    if options.input_shape:
        shape = _extents(options.input_shape, "--input-shape")
        if len(shape) < 3:
            raise InputError(f"--input-shape {options.input_shape} needs batch, channels and at least one extent")
        return shape[2:], shape[1], shape[0]
    if not options.size:
        raise InputError("give the image's --size: 8192, or 4096x6144")
    size = _extents(options.size, "--size")
    return (size * 2 if len(size) == 1 else size), options.channels, options.batch


def _model(options: argparse.Namespace, weights: bool) -> nn.Module:
    model = load(options.target, weights=weights)
    model.train(options.train)
    return freeze_batch_norm(model) if options.freeze_batch_norm else model


def _tile(options: argparse.Namespace) -> int | tuple[int, ...] | None:
    if not options.tile:
        return None
    numbers = _extents(options.tile, "--tile")
    if min(numbers) < 1:
        raise InputError(f"--tile {options.tile} must be positive")
    return numbers if len(numbers) > 1 else numbers[0]


def _request(options: argparse.Namespace) -> Request | None:
    if options.tile and options.memory:
        raise InputError("give --tile or --memory, not both")
    if not options.tile and not options.memory:
        return None
    memory = parse_bytes(options.memory) if options.memory else None
    bounds = _tile(options), options.segments, options.cut, memory
    return checked_request(*bounds, options.global_ops, options.offload)


def _planned(options: argparse.Namespace, analysis: Analysis) -> Plan | None:
    request, device = _request(options), _device(options)
    if request is None:
        return None
    return make_plan(analysis.graph, request, training=not options.no_grad, device=device)


def _device(options: argparse.Namespace) -> torch.device:
    try:
        return torch.device(options.device)
    except RuntimeError:
        raise InputError(f"--device {options.device!r} is no device: cpu, cuda, cuda:1") from None


def _analysis(options: argparse.Namespace) -> Analysis:
    extents, channels, batch = _shape(options)
    try:
        model = _model(options, weights=False)
        return analyze(model, extents, channels=channels, batch=batch, global_ops=options.global_ops)
    except (NotImplementedError, CaptureError):
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        model = _model(options, weights=True)  # code that looks at the values of its weights
        return analyze(model, extents, channels=channels, batch=batch, global_ops=options.global_ops)


def _summary(options: argparse.Namespace, measure_it: bool) -> Summary:
    """Analyse, plan and probe, with progress on standard error."""
    with progress(Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        task = bar.add_task("capture", total=3)
        analysis = _analysis(options)
        bar.update(task, advance=1, description="plan")
        plan = _planned(options, analysis)
        bar.update(task, advance=1, description="probe")
        reports: list[ProbeReport] = []
        if measure_it:
            parts = worthwhile(analysis.graph)
            reports = [probe(analysis.graph, part, f"region {i}") for i, part in enumerate(parts)]
        bar.update(task, advance=1, description="done")
    return summarise(analysis, options.target, training=options.train, plan=plan, probe=reports)


def _report(options: argparse.Namespace) -> int:
    if options.depth < 1:
        raise InputError(f"--depth {options.depth} must be positive")
    paths = [_writable(path) for path in (options.html, options.plot) if path]
    summary = _summary(options, not options.no_probe)
    if options.json:
        print(json.dumps(as_json(summary), indent=1))
    elif not paths:
        show(summary, Console(), None if options.all else options.depth)
    if options.html:
        _write(
            Path(options.html), lambda path: path.write_text(html_page(summary, options.depth), encoding="utf-8")
        )
    if options.plot:
        _write(Path(options.plot), lambda path: save_plot(summary, path))
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return int(any(report.mismatches for report in summary.probe))


def _plan(options: argparse.Namespace) -> int:
    _needed_request(options)
    summary = _summary(options, measure_it=False)
    assert summary.plan is not None
    if options.json:
        print(json.dumps({"schema": SCHEMA, "network": summary.name, **plan_json(summary.plan)}, indent=1))
    else:
        show_plan(summary, Console())
    return 0


def _needed_request(options: argparse.Namespace) -> Request:
    request = _request(options)
    if request is None:
        raise InputError(f"{options.command} needs --tile or --memory")
    return request


def _check(options: argparse.Namespace) -> int:
    request = _needed_request(options)
    extents, channels, batch = _shape(options)
    with progress(Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        bar.add_task("one step plain, one streamed", total=None)
        report = check(
            _model(options, weights=True),
            extents,
            tile=request.tile,
            memory=request.memory,
            segments=request.segments,
            cut=request.cut,
            global_ops=request.global_ops,
            channels=channels,
            batch=batch,
            native=options.native,
        )
    if options.json:
        print(json.dumps(check_json(report), indent=1))
    else:
        show_check(report, Console())
    return 0 if report.ok else 1


def _bench(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds} must be positive")
    device = _device(options)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no GPU here; plan works without one")
    place = _writable(options.plot) if options.plot else None
    extents, channels, batch = _shape(options)
    setting = Setting(
        target=options.target,
        shape=(batch, channels, *extents),
        train=options.train,
        freeze_batch_norm=options.freeze_batch_norm,
        device=options.device,
        segments=options.segments,
        cut=options.cut,
        global_ops=options.global_ops,
        offload=options.offload,
    )
    with progress(Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        task = bar.add_task("plan", total=None)
        analysis = _analysis(options)
        plain = make_plan(analysis.graph, Request(None, memory=2**62), device=device).prediction.plain_bytes
        ways = _ways(options, plain)
        too_large = plain > free_bytes(device)
        rows = compare(
            setting,
            [way for way in ways if way.kind == "fxstream" or not too_large],
            options.rounds,
            lambda text: bar.update(task, description=text),
        )
    if too_large:
        reason = f"does not fit: needs {bytes_text(plain)}"
        rows = [*(Row(way, failure=reason) for way in ways if way.kind != "fxstream"), *rows]
    if options.json:
        print(json.dumps(bench_json(setting, rows), indent=1))
    else:
        show_bench(setting, rows, Console())
    if place is not None:
        _write(place, lambda path: save_pareto(setting, rows, path))
        print(f"wrote {place}", file=sys.stderr)
    return 0


def _ways(options: argparse.Namespace, plain: int) -> list[Way]:
    """The plain network, checkpoints, and fxstream at every tile or budget asked for."""
    ways = [Way("plain", label="plain"), Way("checkpoint", label="checkpoint")]
    if options.tile:
        return [*ways, Way("fxstream", tile=_tile(options), label=f"tile {options.tile}")]
    for text in (options.memory or BUDGETS).split(","):
        share = text.strip().removesuffix("%")
        if share != text.strip():
            try:
                memory = int(float(share) / 100 * plain)
            except ValueError:
                raise InputError(f"--memory {text!r} is no share: write 25%") from None
        else:
            memory = parse_bytes(text)
        ways.append(Way("fxstream", memory=memory, label=f"memory {text.strip()}"))
    return ways


def _rules(options: argparse.Namespace) -> int:
    show_rules(rules(), Console())
    return 0


def _writable(path: str) -> Path:
    """The path, if a file can be made there. Raises `InputError` before any work is done."""
    place = Path(path)
    if place.is_dir() or not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: name a file in a directory that exists and is yours to write")
    return place


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    name = None
    try:
        handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
        os.close(handle)
        write(Path(name))
        os.replace(name, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("default" if options.debug else "ignore")
    try:
        return int(options.run(options))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            raise
        known = isinstance(error, FxstreamError)
        text = " ".join(str(error).split())
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"fxstream: {text}{hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
