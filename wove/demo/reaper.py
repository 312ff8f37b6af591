"""Ends processes whose starter died, whatever killed it.

A starter that is killed with SIGKILL runs no clean-up code, and Linux' parent-death signal reaches only the
direct child: a Celery worker's pool and an RQ work horse would live on. So every starter keeps one reaper
beside it: this file, run as a script, reading a pipe whose other end only the starter holds. When the
starter is gone, however it went, the pipe reports its end and the reaper ends what was announced on it.

Whole sessions are ended, not process groups: an RQ work horse leaves its worker's group but not its session.

Standard library only and cheap to import: it runs with ``python -I -S``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

_POLL_SECONDS = 0.02
_KILL_SECONDS = 5.0


def session_members(session: int) -> list[int]:
    """Return the pids of the processes that run in a session; zombies do not count."""
    return [pid for pid in _running_pids() if _session_of(pid) == session]


def kill_session(session: int) -> None:
    """Send SIGKILL to every process of a session until none is left (or the kernel refuses for too long)."""
    deadline = time.monotonic() + _KILL_SECONDS
    while members := session_members(session):
        for pid in members:
            send_signal(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)


def end_session(session: int, grace: float) -> None:
    """Ask a session's leader to end, wait up to ``grace`` seconds for it, then kill what is left."""
    send_signal(session, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while session in session_members(session) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    kill_session(session)


def send_signal(pid: int, signum: int) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _running_pids() -> list[int]:
    """All pids but those of zombies: from /proc where it exists, else from ``ps``."""
    if os.path.exists("/proc/self/stat"):
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_running(name)]
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=False
    ).stdout
    rows = (line.split() for line in listing.splitlines())
    return [int(row[0]) for row in rows if len(row) == 2 and not row[1].startswith("Z")]


def _is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return False
    # The command name stands in parentheses and may hold anything, so count from the last one.
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def _watch(announcements: int) -> tuple[list[int], list[str]]:
    """Read announcements until the starter is gone; return the sessions and folders that were left open."""
    sessions: dict[int, None] = {}
    folders: dict[str, None] = {}
    with open(announcements, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            verb, _, subject = line.rstrip("\n").partition(" ")
            match verb:
                case "started":
                    sessions[int(subject)] = None
                case "ended":
                    sessions.pop(int(subject), None)
                case "folder":
                    folders[subject] = None
                case "removed":
                    folders.pop(subject, None)
                case "done":
                    break
    return list(sessions), list(folders)


def main() -> None:
    """Wait for the starter's end on standard input, then end and remove what it left."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    grace = float(sys.argv[1])
    sessions, folders = _watch(0)
    # Last started, first ended: workers say goodbye to a server that still answers.
    for session in reversed(sessions):
        end_session(session, grace)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
