"""A report in a worker's parent process leaves no import to its thread."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import wove.worker.parent
wove.worker.parent._in_background(b"", "celery", lambda session: None)
before = set(sys.modules)
from wove.worker.transport import connect, open_connection
connection = connect("http://localhost:1")
try:
    open_connection(connection, 1.0)
except OSError:
    pass
print(*sorted(set(sys.modules) - before))
"""


def test_what_a_report_sends_with_is_imported_before_its_thread_starts() -> None:
    # A pool process that is forked during an import inherits the module's lock and hangs in its first task.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
