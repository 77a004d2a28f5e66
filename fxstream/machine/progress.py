"""Progress on a terminal (standard error): the stages before the first tile, then tiles done and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Bar"]


class _Rate(TextColumn):
    """Tiles per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: object) -> Text:
        speed = getattr(task, "finished_speed", None) or getattr(task, "speed", None)
        return Text("" if not speed else f"{speed:.2f} tiles/s")


class Bar:
    """One bar for the pass that runs now; it leaves nothing behind."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._shown: Progress | None = None
        self._task = TaskID(0)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show what is done within the block, which has no parts that could be counted."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(what):
            yield

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that so many tiles of a pass are done; the last one ends it."""
        if done >= total:
            if self._shown is not None:
                self._shown.stop()
            self._shown = None
            return
        if self._shown is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
            self._shown = Progress(
                *columns,
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                disable=not self._console.is_terminal,
            )
            self._task = self._shown.add_task(what, total=total)
            self._shown.start()
        self._shown.update(self._task, description=what, completed=done, total=total)
