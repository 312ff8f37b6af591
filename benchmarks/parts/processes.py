"""Where things are, and the processes that are asked for figures."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Self

BENCHMARKS = Path(__file__).resolve().parents[1]
#: Code for callers and workers: on the path of both, in every environment.
REMOTE = Path(__file__).resolve().parent / "remote"
#: What is made and may be deleted.
BUILD = BENCHMARKS.parent / "build" / "bench"
SECRET = "a-secret-for-benchmarks-only-which-is-long-enough"
ANSWER_SECONDS = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(RuntimeError):
    """Something could not be measured; the message says why."""


def say(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of every process that is measured."""
    return {**os.environ, "PYTHONPATH": str(REMOTE), "WOVE_SECRET": SECRET, **variables}


def prepare_environment() -> None:
    """Change this process's variables to what all its children are to have.

    Byte code is written: a worker that compiles its modules anew with every start would be measured for that. And
    nothing comes in by the path: 2.0.3 would find this project instead of itself.
    """
    for name in list(os.environ):
        # The settings of whoever runs this would be those of all workers.
        if name == "PYTHONDONTWRITEBYTECODE" or name.startswith(
            ("CELERY_", "RQ_", "WOVE_CALLBACK", "WOVE_ALLOW")
        ):
            del os.environ[name]
    os.environ["PYTHONPATH"] = str(REMOTE)
    os.environ["WOVE_SECRET"] = SECRET


class Child:
    """A process that takes one JSON object a line and answers with one."""

    def __init__(self, command: Sequence[str], name: str, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()
        # Not where this repository is: `import wove` would find it there instead of 2.0.3.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=REMOTE,
            env=environment(**(env or {})),
        )

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._process.pid

    def ask(self, do: str, timeout: float = ANSWER_SECONDS, **options: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Raises:
            BenchError: it fails, ends, or does not answer.
        """
        self.tell(do=do, **options)
        return self.listen(do, timeout)

    def tell(self, **message: Any) -> None:
        """Send something and do not wait.

        Raises:
            BenchError: it has ended.
        """
        stdin = self._process.stdin
        try:
            if stdin is None:
                raise OSError("no standard input")
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except OSError as exc:
            raise BenchError(f"{self.name} has ended: {self._last_words()}") from exc

    def listen(self, what: str, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            BenchError: it says that it failed, ends, or does not answer.
        """
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], timeout)[0]:
            raise BenchError(f"{self.name} has not answered to {what} within {timeout:g} s")
        line = stdout.readline()
        if not line:
            raise BenchError(f"{self.name} has ended during {what}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name} fails at {what}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it; its last words stay unread."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # it has ended with something unread
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "without a word"


def processor_seconds(pids: Iterable[int]) -> float:
    """Return what these processes and their children that have ended have used of the processors."""
    total = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        except OSError:
            continue  # its parent has its time by now
        total += sum(int(ticks) for ticks in stat.rpartition(")")[2].split()[11:15])
    return total / _TICKS


def memory(pid: int, field: str) -> int:
    """Return a process's ``VmRSS`` or ``VmHWM`` in bytes, 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else 0
