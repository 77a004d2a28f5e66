"""Writes `reference.md` beside this file: the public names of the package, their signatures and docstrings.

    python examples/make_reference.py

A test makes the page again and compares it, so that it is never older than the docstrings.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fxstream

PAGE = Path(__file__).parent / "reference.md"
GROUPS = {
    "Functions": ("compile", "plan", "analyze", "check", "freeze_batch_norm", "infer", "lsuv_"),
    "Images on disk": ("source", "tiff_array", "openslide_array", "pyvips_array", "target", "Source", "Target"),
    "Results": ("StreamedModule", "Decision", "Analysis", "CheckReport", "ProbeReport"),
    "Operators and backends": ("register_rule", "rules", "backend"),
    "Errors": (
        *("FxstreamError", "InputError", "CaptureError", "PlanError", "ProbeError", "RuleError", "StreamError"),
        "StreamingWarning",
    ),
}
"""The public names by subject; any other comes under the last title."""
WIDTH = 100


def page() -> str:
    """The whole page."""
    texts = [name for name in fxstream.__all__ if isinstance(getattr(fxstream, name), str)]
    listed = {name for names in GROUPS.values() for name in names} | set(texts)
    groups = GROUPS | {"Others": tuple(name for name in fxstream.__all__ if name not in listed)}
    lines = ["# Reference", "", "<!-- Written by make_reference.py: edit the docstrings. -->", ""]
    lines += ["The public names of `fxstream`. Guides with examples: [the examples](README.md).", ""]
    for title, names in groups.items():
        if names:
            lines += [f"## {title}", "", *(line for name in names for line in entry(name))]
    return "\n".join(lines).rstrip("\n") + "\n"


def entry(name: str) -> Iterator[str]:
    """One public name: a title, how it is called, what it says of itself, and its public members."""
    thing = getattr(fxstream, name)
    yield from (f"### {name}", "")
    if inspect.isfunction(thing):
        yield from ("```python", signature(f"fxstream.{name}", thing), "```", "")
    elif inspect.isclass(thing):
        bases = [base.__name__ for base in thing.__bases__ if base is not object]
        yield from ("```python", f"class fxstream.{name}({', '.join(bases)})".replace("()", ""), "```", "")
    yield from docstring(thing)
    if isinstance(thing, ModuleType):
        yield from module_members(name, thing)
    elif inspect.isclass(thing):
        yield from class_members(thing)


def signature(name: str, function: Any) -> str:
    """The call as Python would define it, a line for each argument where it is long."""
    called = inspect.signature(function)
    parameters = [one for one in called.parameters.values() if one.name not in ("self", "cls")]
    keywords = [one.kind is one.KEYWORD_ONLY for one in parameters]
    arguments = [argument(one) for one in parameters]
    if True in keywords and not any(one.kind is one.VAR_POSITIONAL for one in parameters):
        arguments.insert(keywords.index(True), "*")
    result = "" if called.return_annotation is called.empty else f" -> {called.return_annotation}"
    text = f"{name}({', '.join(arguments)}){result}"
    if len(text) <= WIDTH:
        return text
    return f"{name}(\n{''.join(f'    {one},' + chr(10) for one in arguments)}){result}"


def argument(parameter: inspect.Parameter) -> str:
    """One argument; annotations are the text of the source."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    equals = " = " if typed else "="
    return f"{stars}{parameter.name}{typed}" + (
        "" if parameter.default is parameter.empty else f"{equals}{parameter.default!r}"
    )


def docstring(thing: Any) -> Iterator[str]:
    """A docstring as Markdown, without notes about the code; doctests become blocks of code."""
    text = inspect.cleandoc(thing.__doc__ or "").replace("``", "`")
    for paragraph in re.split(r"\n\n", text.split("\n\nNOTE [")[0]):
        if paragraph.startswith(">>> "):
            yield from ("```python", paragraph, "```", "")
        elif paragraph:
            yield from (paragraph, "")


def class_members(thing: type) -> Iterator[str]:
    """The public fields, properties and methods that a class defines itself."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    rows = [f"- `{field.name}: {field.type}`" for field in fields if not field.name.startswith("_")]
    for name, member in vars(thing).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            call = name if isinstance(member, property) else signature(name, function)
            rows.append(row(call, function))
    yield from [*rows, ""] if rows else ()


def module_members(name: str, module: ModuleType) -> Iterator[str]:
    """The functions that a module exports."""
    functions = {one: getattr(module, one) for one in module.__all__ if inspect.isfunction(getattr(module, one))}
    rows = [row(signature(f"{name}.{one}", function), function) for one, function in functions.items()]
    yield from [*rows, ""] if rows else ()


def row(call: str, function: Any) -> str:
    """A member in one line: how it is called, and the first paragraph of its docstring."""
    call = " ".join(call.split()).replace("( ", "(").replace(", )", ")")
    return f"- `{call}`: {' '.join(inspect.cleandoc(function.__doc__ or '').split(chr(10) * 2)[0].split())}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
