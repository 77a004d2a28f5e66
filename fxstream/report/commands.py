"""The commands of the command line, each a function of its flags that returns the exit code.

Results go to standard output, progress to standard error, with what a model prints while it is built and analysed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules.batchnorm import _BatchNorm

from fxstream.compiler.analysis import Analysis, analyze
from fxstream.compiler.options import request_of
from fxstream.errors import CaptureError, InputError, PlanError
from fxstream.machine.device import device_of, free_bytes, is_present
from fxstream.machine.units import bytes_text
from fxstream.planning.plan import Plan, make_plan
from fxstream.prediction.predict import predict
from fxstream.probe.probe import probe
from fxstream.report.as_json import as_json, bench_json, plan_json
from fxstream.report.files import writable, write
from fxstream.report.html import html_page
from fxstream.report.plot import save_pareto, save_plot
from fxstream.report.summary import Summary, summarise
from fxstream.report.terminal import progress, show, show_bench, show_check, show_plan, show_rules
from fxstream.rules import rules
from fxstream.tiling.parts import worthwhile
from fxstream.tiling.request import Request
from fxstream.tools.benchmark import CHECKPOINT, COMPILED, FXSTREAM, PLAIN, Method, Row, Workload, compare
from fxstream.tools.check import check
from fxstream.tools.freeze import freeze_batch_norm
from fxstream.tools.inputs import checked_inputs, example_inputs_of
from fxstream.tools.model_spec import load
from fxstream.tools.roofline import roofline_seconds
from fxstream.tools.values import budgets_of, has_request, is_training, request_options, shapes_of, title_of
from fxstream.tools.zoo import names

__all__ = ["COMMANDS"]

Options = argparse.Namespace
SAVED = {1.0: "", 0.5: " 50%", 0.2: " 20%", 0.05: " 5%"}
"""The shares of the activations that torch.compile is told to save for backward, and how they are shown."""


def _model(options: Options, weights: bool) -> nn.Module:
    model = load(options.target, weights=weights)
    model.train(is_training(options))
    return freeze_batch_norm(model) if options.freeze_batch_norm else model


class Output(Console):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """Whoever reads has seen enough, as `head` has: no failure of the command."""
        raise BrokenPipeError


def _analysis(options: Options, freeze: bool = False) -> Analysis:
    """The analysed network; with `freeze` BatchNorm is frozen whatever the flags say."""
    for weights in (False, True):  # with weights for code that looks at their values
        try:
            model = _model(options, weights)
            if freeze:
                freeze_batch_norm(model)
            inputs = example_inputs_of(model, shapes_of(options))
            return analyze(model, inputs=inputs, global_ops=options.global_ops)
        except (NotImplementedError, CaptureError):
            if weights or not any(parameter.is_meta for parameter in model.parameters()):
                raise
    raise AssertionError


def _plan_of(options: Options, analysis: Analysis) -> Plan:
    request = request_of(**request_options(options))
    return make_plan(analysis.graph, request, training=not options.no_grad, device=device_of(options.device))


def _planned(options: Options, analysis: Analysis) -> Plan:
    """The plan. Where none fits, the error says whether one does with frozen BatchNorm."""
    try:
        return _plan_of(options, analysis)
    except PlanError as error:
        frozen = _frozen_plan(options)
        if frozen is None:
            raise
        needed = bytes_text(frozen.prediction.bytes)
        raise PlanError(f"{error}. With --freeze-batch-norm a plan fits: {needed}") from error


def _frozen_plan(options: Options) -> Plan | None:
    """The plan with frozen BatchNorm, where that is another network and has one."""
    if not is_training(options) or options.freeze_batch_norm:
        return None
    if not any(isinstance(module, _BatchNorm) for module in load(options.target).modules()):
        return None
    with contextlib.suppress(PlanError, InputError):
        return _plan_of(options, _analysis(options, freeze=True))
    return None


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on standard error, to which everything printed meanwhile goes too."""
    with progress(Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        yield bar


def _summary(options: Options, probes: bool) -> Summary:
    """Analyse, plan and, if asked for, probe."""
    with _progress() as bar:
        task = bar.add_task("capture", total=3)
        analysis = _analysis(options)
        bar.update(task, advance=1, description="plan")
        plan, frozen = None, None
        if has_request(options):
            plan, frozen = _planned(options, analysis), _frozen_plan(options)
        bar.update(task, advance=1, description="probe")
        parts = worthwhile(analysis.graph) if probes else []
        reports = [probe(analysis.graph, part, f"region {i}") for i, part in enumerate(parts)]
        bar.update(task, advance=1, description="done")
    mode = is_training(options)
    return summarise(analysis, options.target, training=mode, plan=plan, frozen=frozen, probe=reports)


def _title(options: Options) -> str:
    return title_of(options.target, shapes_of(options), is_training(options), options.freeze_batch_norm)


def _report(options: Options) -> int:
    html, plot = (writable(path) if path else None for path in (options.html, options.plot))
    summary = _summary(options, not options.no_probe)
    if options.json:
        _print_json(as_json(summary))
    elif html is None and plot is None:
        show(summary, Output(), _title(options), None if options.all else options.depth)
    if html is not None:
        page = html_page(summary, options.depth)
        write(html, lambda path: path.write_text(page, encoding="utf-8"))
    if plot is not None:
        write(plot, lambda path: save_plot(summary, path))
    return int(any(report.mismatches for report in summary.probe))


def _plan(options: Options) -> int:
    summary = _summary(options, probes=False)
    assert summary.plan is not None
    if options.json:
        _print_json(plan_json(summary.plan, summary.name, summary.training))
    else:
        show_plan(summary, Output(), _title(options))
    return 0


def _check(options: Options) -> int:
    with _progress() as bar:
        bar.add_task("one step plain, one streamed", total=None)
        model = _model(options, weights=True)
        inputs = checked_inputs(model, shapes_of(options))
        report = check(model, inputs=inputs, native=options.native, **request_options(options))
    if options.json:
        _print_json(as_json(report))
    else:
        show_check(report, Output(), _title(options))
    return 0 if report.ok else 1


def _bench(options: Options) -> int:
    if not is_present(device_of(options.device)):
        raise InputError(f"--device {options.device}: torch finds no GPU here; plan works without one")
    plot = writable(options.plot) if options.plot else None
    workload = _workload(options)
    with _progress() as bar:
        rows, roofline = _rows(options, workload, bar)
    if options.json:
        _print_json(bench_json(workload, rows, roofline))
    else:
        show_bench(workload, rows, Output(), roofline)
    if plot is not None:
        write(plot, lambda path: save_pareto(workload, rows, path))
    return 0


def _workload(options: Options) -> Workload:
    common = request_options(options)
    del common["tile"], common["memory"]
    return Workload(
        target=options.target,
        inputs=tuple(shapes_of(options)),
        train=is_training(options),
        freeze_batch_norm=options.freeze_batch_norm,
        device=options.device,
        options=common,
    )


def _rows(options: Options, workload: Workload, bar: Progress) -> tuple[list[Row], float | None]:
    """Every method measured, and the seconds of the roofline beside torch.compile.

    On a device without the memory for it the dense network is left out.
    """
    task, device = bar.add_task("plan", total=None), device_of(options.device)
    graph = _analysis(options).graph
    plain = make_plan(graph, Request(memory=2**62), device=device).prediction.plain_bytes
    too_large = f"does not fit: needs {bytes_text(plain)}" if plain > free_bytes(device) else ""
    peers = [Method(COMPILED, f"compile{text}", saved=share) for share, text in SAVED.items() if options.compile]
    methods = [Method(PLAIN, "plain"), Method(CHECKPOINT, "checkpoint"), *peers, *_streamed(options, plain)]
    roofline = roofline_seconds(graph, device) if options.compile else None
    rows = compare(workload, methods, options.rounds, lambda t: bar.update(task, description=t), too_large)
    return rows, roofline


def _streamed(options: Options, plain: int) -> list[Method]:
    """fxstream with the tile, or within every budget, that was asked for."""
    if options.tile:
        return [Method(FXSTREAM, f"tile {options.tile}", {"tile": request_options(options)["tile"]})]
    budgets = budgets_of(options, plain)
    return [Method(FXSTREAM, f"memory {text}", {"memory": memory}) for text, memory in budgets]


def _predict(options: Options) -> int:
    """A line for each image on standard output, those that failed once more at the end on standard error."""
    names = ("weights", "memory", "level", "spacing", "layout", "normalise", "format", "dtype")
    chosen = {name: getattr(options, name) for name in names}
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of a broken file the line of the image says enough
    device = options.device or ("cuda" if is_present(device_of("cuda")) else "cpu")
    with _mesh(device) if options.mesh else contextlib.nullcontext() as mesh:
        say = functools.partial(print, flush=True)
        outcome = predict(
            options.target, options.images, options.out, device=device, mesh=mesh, progress=True, say=say, **chosen
        )
        if mesh is None or not mesh.get_local_rank():
            print(outcome, file=sys.stderr if outcome.failed else sys.stdout)
    return 1 if outcome.failed else 0


@contextlib.contextmanager
def _mesh(device: str) -> Iterator[Any]:
    """All processes that torchrun started, as one mesh."""
    kind = device_of(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield init_device_mesh(kind, (distributed.get_world_size(),))
    finally:
        distributed.destroy_process_group()


def _rules(options: Options) -> int:
    show_rules(rules(), Output())
    return 0


def _models(options: Options) -> int:
    """The names of networks, one a line; what is not installed is said on standard error."""
    listed, missing = names()
    chosen = [name for name in listed if options.pattern.lower() in name.lower()]
    for name in chosen:
        print(name)
    for error in missing:
        print(f"fxstream: {error}", file=sys.stderr)
    if not chosen and not missing:
        raise InputError(f"no network of torchvision or timm has {options.pattern!r} in its name")
    return 0


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=1))


COMMANDS: dict[str, Callable[[Options], int]] = {
    "report": _report,
    "plan": _plan,
    "check": _check,
    "bench": _bench,
    "predict": _predict,
    "models": _models,
    "rules": _rules,
}
"""What runs each command."""
