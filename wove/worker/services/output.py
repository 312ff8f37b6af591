"""What tasks print: each line becomes a ``log`` frame of the run that printed it."""

from __future__ import annotations

import ctypes
import io
import sys
from typing import Any, TextIO, cast

from wove.worker.context import MAX_MESSAGE, current

#: Runs whose unfinished lines are kept.
MAX_PARTIAL = 1_000


class TaskOutput(io.TextIOBase):
    """Stands for ``sys.stdout`` or ``sys.stderr``: what a run writes goes to whoever waits for the run.

    What is written outside a run goes where it always went.
    """

    def __init__(self, real: Any) -> None:
        super().__init__()
        self._real = real
        self._partial: dict[str, str] = {}

    # typeshed has an attribute here that could be written; the class itself has none such.
    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the real stream."""
        return str(self._real.encoding)

    @property
    def buffer(self) -> Any:
        """The bytes below: what is written there cannot be told by run in this process."""
        return self._real.buffer

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return False."""
        return False

    def fileno(self) -> int:
        """Return the real stream's descriptor."""
        return int(self._real.fileno())

    def write(self, text: str, /) -> int:
        """Write text; complete lines are reported."""
        run = current()
        if not run.run_id:
            self._real.write(text)
            self._real.flush()
            return len(text)
        pending = self._partial.pop(run.run_id, "") + text
        lines = pending.split("\n")
        rest = lines.pop()
        while len(rest) > MAX_MESSAGE:
            lines.append(rest[:MAX_MESSAGE])
            rest = rest[MAX_MESSAGE:]
        if rest and len(self._partial) < MAX_PARTIAL:
            self._partial[run.run_id] = rest
        elif rest:
            lines.append(rest)
        for line in lines:
            run.log(line)
        return len(text)

    def flush(self) -> None:
        """Report a line that is not finished, as a prompt is."""
        run = current()
        rest = self._partial.pop(run.run_id, "") if run.run_id else ""
        if rest:
            run.log(rest)
        else:
            self._real.flush()


def capture_output() -> None:
    """Tell the output of runs by run from now on; C code's is passed on line by line."""
    sys.stdout = cast("TextIO", TaskOutput(sys.stdout))
    sys.stderr = cast("TextIO", TaskOutput(sys.stderr))
    try:
        library = ctypes.CDLL(None)
        stream = ctypes.c_void_p.in_dll(library, "stdout")
        # Into a pipe C would write in blocks, long after the run that printed has ended.
        library.setvbuf(stream, None, 1, 0)  # 1 is _IOLBF on Linux and macOS
    except (OSError, ValueError, AttributeError):
        pass  # another C library: its output comes late


def finish_lines() -> None:
    """Report unfinished lines of the current run; called when its task has ended."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TaskOutput):
            stream.flush()
