"""Every command of the pages: those of fxstream run, on small images; scripts exist and have the flags."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import MODEL

from fxstream.__main__ import _parser, main
from fxstream.tools.values import check_flags

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = {
    "README.md": 7,
    "coming_from.md": 4,
    "exactness.md": 1,
    "images_on_disk.md": 5,
    "options.md": 5,
    "other_tools.md": 1,
    "own_training.md": 1,
    "predicting.md": 1,
    "several_processes.md": 1,
}
"""Blocks of Python that `test_readme.py` and `test_pages.py` run; what is missing here is run nowhere."""
SMALL = (
    *(("8192", "256"), ("16384", "256"), ("512x512", "96x96"), ("300x260", "150x130")),
    *(("--tile 128", "--tile 96"), ("--tile 256", "--tile 48")),
    *(("resnet50", "resnet18"), ("convnext_tiny", "convnext_atto")),
    *(("5GiB", "60MiB"), ("8GiB", "250MiB"), ("3GiB", "60MiB")),
)
"""What a command says, and what it says in a test."""


def commands(page: Path) -> list[str]:
    """The commands of a page: lines of its shell blocks, and what follows a prompt in the others."""
    lines = [
        line.removeprefix("$ ")
        for language, block in BLOCK.findall(page.read_text())
        for line in block.splitlines()
        if language == "sh" or line.startswith("$ ")
    ]
    inline = re.findall(r"`((?:fxstream|python)\s[^`]*--[^`]*)`", page.read_text())
    without_comments = (shlex.join(shlex.split(line, comments=True)) for line in (*lines, *inline))
    return [line for line in without_comments if line and not re.search(r"\.\.\.|COMMAND|NAME", line)]


ALL = [(page, command) for page in PAGES for command in commands(page)]
OURS = sorted({command for _, command in ALL if command.startswith("fxstream ")})


def test_every_block_of_python_is_run():
    count = {}
    for page in PAGES:
        blocks = [block for language, block in BLOCK.findall(page.read_text()) if language == "python"]
        if page.name == "coming_from.md":  # the others are of other libraries
            blocks = [block for block in blocks if block.startswith("# with fxstream")]
        if blocks and page.name != "reference.md":  # which is made from docstrings, whose doctests run
            count[page.name] = len(blocks)
    assert count == RUN


def test_the_pages_have_commands():
    assert len(OURS) > 10


@pytest.mark.parametrize("command", OURS)
def test_commands_of_fxstream_run(command, tmp_path, monkeypatch, capsys):
    """As printed they are understood; at a small size they succeed, or fail with the error that the page shows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL.replace("class Two", "class Net"))
    arguments = shlex.split(command)[1:]
    check_flags(_parser().parse_args(arguments))
    if "bench" in arguments or "predict" in arguments:  # tests/test_main.py and tests/prediction run them
        return
    for old, new in SMALL:
        command = command.replace(old, new)
    fails = "300MiB" in command
    command = command.replace("300MiB", "1MiB")
    assert main(shlex.split(command)[1:]) == (2 if fails else 0)
    output = capsys.readouterr()
    assert bool(output.out) != fails
    assert ("no plan fits into" in output.err) == fails


@pytest.mark.parametrize("command", sorted({c for _, c in ALL if c.startswith("python examples/")}))
def test_scripts_have_the_flags_of_the_pages(command):
    script, *arguments = shlex.split(command)[1:]
    text = (ROOT / script).read_text()
    assert [flag for flag in arguments if flag.startswith("--") and f'"{flag}"' not in text] == []
