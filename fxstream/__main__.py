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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from fxstream.compiler.analysis import Analysis, analyze
from fxstream.errors import CaptureError, FxstreamError, InputError
from fxstream.machine.device import free_bytes, is_present
from fxstream.machine.units import bytes_text
from fxstream.planning.plan import Plan, make_plan, worthwhile
from fxstream.probe.probe import probe
from fxstream.report.as_json import as_json, bench_json, plan_json
from fxstream.report.html import html_page
from fxstream.report.plot import save_pareto, save_plot
from fxstream.report.summary import Summary, summarise
from fxstream.report.terminal import progress, show, show_bench, show_check, show_plan, show_rules
from fxstream.rules import rules
from fxstream.tiling.request import Request
from fxstream.tools import flags
from fxstream.tools.benchmark import CHECKPOINT, FXSTREAM, PLAIN, Method, Row, Workload, compare
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


def _model(options: argparse.Namespace, weights: bool) -> nn.Module:
    model = load(options.target, weights=weights)
    model.train(options.train)
    return freeze_batch_norm(model) if options.freeze_batch_norm else model


def _analysis(options: argparse.Namespace) -> Analysis:
    extents, channels, batch = flags.image_shape(options)
    try:
        model = _model(options, weights=False)
        return analyze(model, extents, channels=channels, batch=batch, global_ops=options.global_ops)
    except (NotImplementedError, CaptureError):
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        model = _model(options, weights=True)  # code that looks at the values of its weights
        return analyze(model, extents, channels=channels, batch=batch, global_ops=options.global_ops)


def _plan_of(options: argparse.Namespace, analysis: Analysis) -> Plan | None:
    request, device = flags.request_from(options), flags.device_of(options)
    if request is None:
        return None
    return make_plan(analysis.graph, request, training=not options.no_grad, device=device)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on standard error, to which everything printed meanwhile goes too."""
    with progress(Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        yield bar


def _summary(options: argparse.Namespace, probes: bool) -> Summary:
    """Analyse, plan and, if asked for, probe."""
    with _progress() as bar:
        task = bar.add_task("capture", total=3)
        analysis = _analysis(options)
        bar.update(task, advance=1, description="plan")
        plan = _plan_of(options, analysis)
        bar.update(task, advance=1, description="probe")
        parts = worthwhile(analysis.graph) if probes else []
        reports = [probe(analysis.graph, part, f"region {i}") for i, part in enumerate(parts)]
        bar.update(task, advance=1, description="done")
    return summarise(analysis, options.target, training=options.train, plan=plan, probe=reports)


def _report(options: argparse.Namespace) -> int:
    if options.depth < 1:
        raise InputError(f"--depth {options.depth} must be positive")
    html, plot = (_writable(path) if path else None for path in (options.html, options.plot))
    summary = _summary(options, not options.no_probe)
    if options.json:
        _print_json(as_json(summary))
    elif html is None and plot is None:
        show(summary, Console(), None if options.all else options.depth)
    if html is not None:
        page = html_page(summary, options.depth)
        _write(html, lambda path: path.write_text(page, encoding="utf-8"))
    if plot is not None:
        _write(plot, lambda path: save_plot(summary, path))
    return int(any(report.mismatches for report in summary.probe))


def _plan(options: argparse.Namespace) -> int:
    _required_request(options)
    summary = _summary(options, probes=False)
    assert summary.plan is not None
    if options.json:
        _print_json(plan_json(summary.plan, summary.name))
    else:
        show_plan(summary, Console())
    return 0


def _required_request(options: argparse.Namespace) -> Request:
    request = flags.request_from(options)
    if request is None:
        raise InputError(f"{options.command} needs --tile or --memory")
    return request


def _check(options: argparse.Namespace) -> int:
    _required_request(options)
    extents, channels, batch = flags.image_shape(options)
    with _progress() as bar:
        bar.add_task("one step plain, one streamed", total=None)
        report = check(
            _model(options, weights=True),
            extents,
            channels=channels,
            batch=batch,
            native=options.native,
            **flags.request_options(options),
        )
    if options.json:
        _print_json(as_json(report))
    else:
        show_check(report, Console())
    return 0 if report.ok else 1


def _bench(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds} must be positive")
    device = flags.device_of(options)
    if not is_present(device):
        raise InputError(f"--device {device}: torch finds no GPU here; plan works without one")
    plot = _writable(options.plot) if options.plot else None
    workload = _workload(options)
    with _progress() as bar:
        rows = _rows(options, workload, bar)
    if options.json:
        _print_json(bench_json(workload, rows))
    else:
        show_bench(workload, rows, Console())
    if plot is not None:
        _write(plot, lambda path: save_pareto(workload, rows, path))
    return 0


def _workload(options: argparse.Namespace) -> Workload:
    extents, channels, batch = flags.image_shape(options)
    common = flags.request_options(options)
    del common["tile"], common["memory"]
    return Workload(
        target=options.target,
        shape=(batch, channels, *extents),
        train=options.train,
        freeze_batch_norm=options.freeze_batch_norm,
        device=options.device,
        options=common,
    )


def _rows(options: argparse.Namespace, workload: Workload, bar: Progress) -> list[Row]:
    """Every method measured; on a device without the memory for it the dense network is left out."""
    task, device = bar.add_task("plan", total=None), flags.device_of(options)
    graph = _analysis(options).graph
    plain = make_plan(graph, Request(memory=2**62), device=device).prediction.plain_bytes
    too_large = f"does not fit: needs {bytes_text(plain)}" if plain > free_bytes(device) else ""
    methods = [Method(PLAIN, "plain"), Method(CHECKPOINT, "checkpoint"), *_streamed(options, plain)]
    return compare(workload, methods, options.rounds, lambda text: bar.update(task, description=text), too_large)


def _streamed(options: argparse.Namespace, plain: int) -> list[Method]:
    """fxstream with the tile, or within every budget, that was asked for."""
    if options.tile:
        tile = flags.request_options(options)["tile"]
        return [Method(FXSTREAM, f"tile {options.tile}", {"tile": tile})]
    budgets = flags.budgets_of(options, plain)
    return [Method(FXSTREAM, f"memory {text}", {"memory": memory}) for text, memory in budgets]


def _rules(options: argparse.Namespace) -> int:
    show_rules(rules(), Console())
    return 0


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=1))


def _writable(path: str) -> Path:
    """The path, if a file can be made there. Raises `InputError` before any work is done."""
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: name a file in a directory that exists and is yours to write")
    return file


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, and say so."""
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
    print(f"wrote {path}", file=sys.stderr)


COMMANDS: tuple[tuple[str, str, Callable[[argparse.Namespace], int], flags.Group], ...] = (
    ("report", "receptive field, cost, verdict of every layer; regions and cuts", _report, flags.REPORT),
    ("plan", "segments, tiles and predicted memory", _plan, flags.PLAN),
    ("check", "streamed against plain, tensor by tensor; exit code 1 if they differ", _check, flags.CHECK),
    ("bench", "time and peak memory of a training step: plain, checkpoint, streamed", _bench, flags.BENCH),
    ("rules", "the operators that have a rule", _rules, ()),
)
"""Every command: its name, its help, what runs it, its flags."""


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
    for name, text, run, group in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=_Formatter)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        flags.add_flags(sub, group)
    return parser


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
        text = " ".join(str(error).split())
        hint = "" if isinstance(error, FxstreamError) else f" ({type(error).__name__}; --debug shows where)"
        print(f"fxstream: {text}{hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
