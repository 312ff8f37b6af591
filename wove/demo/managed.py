"""One process of our own: started in its own session, logged to a file, never left behind.

Nothing survives the process that started it, not even when that one is killed with SIGKILL: see
:mod:`wove.demo.reaper`. Needs a POSIX system. Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from wove.demo import reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

_POLL_SECONDS = 0.02
READY_SECONDS = 30.0
STOP_SECONDS = 10.0
_ORPHAN_GRACE_SECONDS = 3.0
_LOG_TAIL_LINES = 40

# The new process announces itself to the reaper before it becomes the command, so there is no moment at
# which the starter could die and leave it unknown. The reaper's pipe arrives as its standard input.
_ANNOUNCE = 'echo "started $$" >&0; exec "$@" </dev/null'


class ProcessError(RuntimeError):
    """A managed process did not start or did not become ready; the message ends with its log."""


class _ReaperLink:
    """The pipe to this process's reaper, which lives as long as anything is managed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._pipe = -1
        self._process: subprocess.Popen[bytes] | None = None

    def acquire(self) -> int:
        """Count one more user and return the pipe's end that announcements are written to."""
        with self._lock:
            if self._process is None:
                self._start()
            self._users += 1
            return self._pipe

    def release(self) -> None:
        """Count one user less; the last one takes the reaper along."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._process is not None:
                self.tell("done")
                os.close(self._pipe)
                self._process.wait()
                self._process = None

    def tell(self, verb: str, subject: object = "") -> None:
        """Announce something; short enough to arrive in one piece."""
        # Without its reader the pipe is of no use, but neither is an error in the middle of a clean-up.
        with contextlib.suppress(OSError):
            os.write(self._pipe, f"{verb} {subject}\n".encode("utf-8", "surrogateescape"))

    def _start(self) -> None:
        reading, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", reaper.__file__, str(_ORPHAN_GRACE_SECONDS)],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(reading)


_reaper = _ReaperLink()


class ManagedProcess:
    """A command running in a session of its own, with its output in a log of its own.

    ``command`` is run with this process's environment plus ``env``. ``name`` appears in error messages and
    in the name of its folder, which holds its log and its temporary files and goes when it is stopped;
    :meth:`log_text` keeps working after that. Subclasses say in :meth:`_is_ready` when it is ready for work.

    A stopped process can be started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str = "process",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.command = list(command)
        self.name = name
        self._env = dict(env or {})
        self._cwd = cwd
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._last_log = ""

    @property
    def pid(self) -> int:
        """The pid of the command itself (it leads its session and its process group)."""
        if self._process is None:
            raise ProcessError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the command itself still runs; its children are not asked."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """What the command ended with, None while it runs or before it was started."""
        return self._process.poll() if self._process else None

    @property
    def folder(self) -> Path:
        """The temporary folder of this process; it exists from start to stop."""
        if self._folder is None:
            raise ProcessError(f"{self.name} is not started")
        return self._folder

    def start(self) -> Self:
        """Start the command and return at once; see :meth:`wait_ready`."""
        if self._folder is not None:
            raise ProcessError(f"{self.name} is started already; stop it first")
        pipe = _reaper.acquire()
        self._folder = Path(tempfile.gettempdir(), f"wove-{self.name}-{secrets.token_hex(6)}")
        try:
            _reaper.tell("folder", self._folder)
            self._folder.mkdir(mode=0o700)
            with open(self._folder / "log", "wb") as log:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _ANNOUNCE, "sh", *self.command],
                    stdin=pipe,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._working_folder(),
                    env={**os.environ, **self._own_settings(self._folder), **self._env},
                    start_new_session=True,
                )
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Ask the process to end, wait, then kill what is left of its session; remove its files.

        Harmless when it was never started, has ended by itself or was stopped before.
        """
        if self._folder is None:
            return
        try:
            if self._process is not None:
                self._end(self._process, timeout)
        finally:
            self._last_log = self.log_text()
            shutil.rmtree(self._folder, ignore_errors=True)
            _reaper.tell("removed", self._folder)
            self._folder = None
            _reaper.release()

    def kill(self) -> None:
        """Kill the whole session at once, as when its container dies; :meth:`stop` is still due."""
        if self._process is not None:
            reaper.kill_session(self._process.pid)
            self._process.wait()

    def members(self) -> list[int]:
        """Return the pids of the process and all its descendants that still run."""
        return reaper.session_members(self.pid)

    def log_text(self) -> str:
        """Return what the process and its children have written so far."""
        if self._folder is None:
            return self._last_log
        try:
            return (self._folder / "log").read_text("utf-8", "replace")
        except OSError:
            return self._last_log

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Return when the process is ready for work.

        Raises :class:`ProcessError` with the end of the log when it exits before, or is not ready in time.
        """
        self.wait_until(self._is_ready, timeout, "ready")

    def wait_for_log(self, text: str, timeout: float = READY_SECONDS) -> None:
        """Return when ``text`` appears in the log; raises :class:`ProcessError` as :meth:`wait_ready` does."""
        self.wait_until(lambda: text in self.log_text(), timeout, f"logging {text!r}")

    def wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Return when ``condition()`` holds; raises :class:`ProcessError` as :meth:`wait_ready` does."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running:
                raise self._error(f"{self.name} ended with {self.returncode} before it was {what}")
            if time.monotonic() > deadline:
                raise self._error(f"{self.name} was not {what} within {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _is_ready(self) -> bool:
        return self.running

    def _own_settings(self, folder: Path) -> dict[str, str]:
        # A killed process leaves its temporary files where they are; here they go with the folder.
        return {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}

    def _working_folder(self) -> str | os.PathLike[str] | None:
        return self._cwd

    def _end(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        try:
            if process.poll() is None:
                reaper.send_signal(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
        finally:
            reaper.kill_session(process.pid)
            process.wait()
            _reaper.tell("ended", process.pid)

    def _error(self, message: str) -> ProcessError:
        tail = "\n".join(self.log_text().splitlines()[-_LOG_TAIL_LINES:])
        return ProcessError(f"{message}; the end of its log:\n{tail}" if tail else f"{message}; no log")
