"""The command line: report, plan, check, bench, predict, models, rules.

Exit codes: 0 all is well, 1 a comparison or the probe found a difference or an image failed, 2 a mistake in what
was asked for. torch is loaded once a command runs: help, and a mistake in the flags, do not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence

from fxstream.errors import FxstreamError
from fxstream.tools import flags
from fxstream.tools.values import check_flags

__all__ = ["main"]

EXAMPLES = {
    "report": (
        "report torchvision/resnet50 --size 8192",
        "report model.py:build --size 4096x6144 --html report.html",
    ),
    "plan": (
        "plan timm/convnext_tiny --size 16384 --memory 8GiB",
        'plan "m.py:Net(8)" --input 1x3x64x64 --input 1x1x64x64 --tile 32',
    ),
    "check": ("check torchvision/resnet18 --size 300x260 --tile 128",),
    "bench": ("bench torchvision/resnet18 --size 1024 --memory 60%,40%",),
    "predict": ("predict model.py:build *.svs --weights model.pt --out results",),
    "models": ("models convnext",),
    "rules": ("rules",),
}
"""Calls of each command."""

TARGET = """TARGET is torchvision/NAME or timm/NAME ("fxstream models" lists them), or
module:callable or file.py:callable. The callable returns the model; arguments
in brackets are Python literals: "timm/resnet18(num_classes=2)"."""

COMMANDS: tuple[tuple[str, str, flags.Group], ...] = (
    ("report", "receptive field, cost, verdict of every layer; regions and cuts", flags.REPORT),
    ("plan", "segments, tiles and predicted memory", flags.PLAN),
    ("check", "streamed against plain, tensor by tensor; exit code 1 if they differ", flags.CHECK),
    ("bench", "time and peak memory of a training step: plain, checkpoint, streamed", flags.BENCH),
    ("predict", "a network over image files, one result each; exit code 1 if one failed", flags.PREDICT),
    ("models", "the networks of torchvision and timm, one a line", flags.MODELS),
    ("rules", "the operators that have a rule", ()),
)
"""Every command: its name, its help, its flags."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(80, shutil.get_terminal_size().columns), max_help_position=26)


def _version() -> str:
    """The versions of fxstream, torch and Python."""
    versions = []
    for package in ("fxstream", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package}, not installed")
    return f"{versions[0]} ({versions[1]}, Python {platform.python_version()})"


class _ShowVersion(argparse.Action):
    """Print the versions and stop; they are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(_version())
        parser.exit()


def _epilog(commands: Sequence[str]) -> str:
    """Examples of commands, and what a target is where one of them has any."""
    calls = [f"  fxstream {call}" for command in commands for call in EXAMPLES[command]]
    has_target = not set(commands) <= {"models", "rules"}
    return "\n".join(["examples:", *calls, *(["", TARGET] if has_target else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxstream",
        description="Receptive fields of a network, how it streams, and whether that is exact.",
        epilog=_epilog(list(EXAMPLES)),
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the versions and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, group in COMMANDS:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=_epilog([name]), formatter_class=_Formatter
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        flags.add_flags(sub, group)
    return parser


def _run(options: argparse.Namespace) -> int:
    """The exit code of the command, which loads torch; nothing that can be refused before is left for then."""
    check_flags(options)
    commands = importlib.import_module("fxstream.report.commands")
    return int(commands.COMMANDS[options.command](options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("default" if options.debug else "ignore")
    try:
        return _run(options)
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
