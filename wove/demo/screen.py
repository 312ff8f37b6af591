"""Everything the demo shows: on a terminal with live progress bars, into a pipe as plain lines."""

from __future__ import annotations

import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from wove.demo.fleets import without_password

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from wove.demo.analysis import Facts
    from wove.demo.fleets import Fleet

_PLAIN_WIDTH = 100
_TRACEBACK_LINES = 24


class Bars:
    """Progress by name: a live bar each on a terminal, a line at every quarter elsewhere."""

    def __init__(self, console: Console, totals: Mapping[str, int], unit: str) -> None:
        self._console = console
        self._unit = unit
        self._totals = dict(totals)
        self._done = dict.fromkeys(totals, 0)
        self.live = Progress(
            TextColumn("  {task.description:<8}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {name: self.live.add_task(name, total=total) for name, total in totals.items()}

    def advance(self, name: str, amount: int) -> None:
        """Move a bar forward by ``amount`` units."""
        self.reach(name, self._done[name] + amount)

    def reach(self, name: str, done: int) -> None:
        """Move a bar to ``done`` units."""
        before, total = self._done[name], self._totals[name]
        self._done[name] = done
        self.live.update(self._tasks[name], completed=done)
        if not self._console.is_terminal and 4 * done // total > 4 * before // total:
            self._console.print(f"  {name:<8} {done:,} of {total:,} {self._unit}")


class Screen:
    """Prints the demo's acts."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=_PLAIN_WIDTH)

    def title(self, text: str) -> None:
        """Print the heading of an act."""
        self.console.print(Text(f"\n{text}", style="bold"))

    def line(self, text: str, style: str = "") -> None:
        """Print a line as it is, however long."""
        self.console.print(Text(f"  {text}", style=style), soft_wrap=True)

    def check(self, passed: bool, text: str) -> None:
        """Print a finding."""
        self.line(f"{'ok' if passed else 'FAILED'}: {text}", "green" if passed else "bold red")

    def fleets(self, url: str, fleets: list[Fleet]) -> None:
        """Say what runs where."""
        self.line(f"Redis   {without_password(url)}")
        for fleet in fleets:
            self.line(f"{fleet.name:<7} {fleet.kind}, pid {fleet.worker.pid}: {fleet.command}")

    def program(self, text: str) -> None:
        """Print source code exactly as it is, to be copied."""
        self.console.print(Text(text), soft_wrap=True)

    @contextmanager
    def bars(self, totals: Mapping[str, int], unit: str) -> Iterator[Bars]:
        """Show progress while the block runs."""
        bars = Bars(self.console, totals, unit)
        with bars.live:
            yield bars

    def table(self, rows: Mapping[str, tuple[Facts, float]]) -> None:
        """Print what each fleet found and how long it took."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("fleet")
        for heading in ("files", "lines", "functions", "classes", "deepest", "seconds", "files/s"):
            table.add_column(heading, justify="right")
        for name, (facts, seconds) in rows.items():
            counts = (facts["files"], facts["lines"], facts["functions"], facts["classes"], facts["nesting"])
            speed = f"{facts['files'] / seconds:,.0f}"
            table.add_row(name, *(f"{count:,}" for count in counts), f"{seconds:.2f}", speed)
        self.console.print(table)

    def remote_error(self, error: BaseException) -> None:
        """Print an exception as its caller got it: type, message, notes and the traceback from over there."""
        self.line(f"raised here: {type(error).__module__}.{type(error).__qualname__}: {error}", "red")
        for note in getattr(error, "__notes__", ()):
            self.line(note, "dim")
        remote = error
        while remote.__cause__ is not None:
            remote = remote.__cause__
        lines = str(remote).strip('"\n').splitlines()
        if len(lines) > _TRACEBACK_LINES:
            lines = ["...", *lines[-_TRACEBACK_LINES:]]
        for line in lines:
            self.line(f"  | {line}", "dim")


def python_name() -> str:
    """Return "Python 3.11.7" or "PyPy 3.11.7"."""
    implementation = platform.python_implementation()
    return f"{'Python' if implementation == 'CPython' else implementation} {platform.python_version()}"
