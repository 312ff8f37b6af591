"""A run that nobody asked for: whoever forks for each task has the code of one warm before it forks.

What a process executes for the first time costs it more than ever after: memory is allotted, code is
specialised, modules are looked up. A work horse executes everything for the first time, once.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING, Any

from wove.errors import WoveError
from wove.keyring import current_secrets
from wove.security import NONCE_SIZE, seal_payload
from wove.wire import encode_value, pack_message
from wove.worker import connection, courier
from wove.worker.admission import admission
from wove.worker.assignment import VERSION
from wove.worker.execution import run

if TYPE_CHECKING:
    from wove.keyring import SecretRing

logger = logging.getLogger("wove.worker")

#: How often; Python specialises what it has executed a few times.
TIMES = 8
#: Seconds that a thread of the rehearsal gets to end.
PATIENCE = 2.0

_TASK = "builtins:len"


class _Listener(socketserver.ThreadingTCPServer):
    """Stands for a callback server."""

    daemon_threads = False
    block_on_close = True


class _Answers(socketserver.StreamRequestHandler):
    """Takes everything."""

    timeout = PATIENCE

    def handle(self) -> None:
        while self.rfile.readline():
            size = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    size = int(value)
            self.rfile.read(size)
            told = f"Wove-Time: {time.time():.6f}\r\nWove-Withdrawn: 0\r\n"
            self.wfile.write(f"HTTP/1.1 204 No Content\r\n{told}\r\n".encode("ascii"))


def rehearse() -> bool:
    """Execute a few runs of this process's own, which report to itself.

    Returns:
        Whether that was done: not where this worker's settings would have refused them, or it has no secret.
    """
    try:
        settings = admission()
        limited = settings.functions or settings.origins is not None or settings.environments is not None
        if limited or os.environ.get("WOVE_PROXY"):
            return False
        ring = current_secrets()
        with _Listener(("127.0.0.1", 0), _Answers) as listener:
            threading.Thread(target=listener.serve_forever, args=(0.01,), name="wove-rehearsal").start()
            port = listener.server_address[1]
            origin = f"http://127.0.0.1:{port}"
            try:
                socket.create_connection(("127.0.0.1", port), PATIENCE).close()
                for _ in range(TIMES):
                    run(_payload(ring, origin), backend={"backend": "rehearsal", "job": ""})
                    if origin in connection.down_since:
                        raise ConnectionError("a report to this process itself was not answered")
            finally:
                _forget(origin)
                listener.shutdown()
    except (OSError, WoveError) as exc:
        logger.info("the rehearsal was left out: %s", exc)
        return False
    return True


def _payload(ring: SecretRing, origin: str) -> bytes:
    attachments: list[Any] = []
    message = {
        "v": VERSION,
        "run_id": secrets.token_hex(16),
        "task_id": _TASK,
        "attempt": 1,
        "nonce": secrets.token_bytes(NONCE_SIZE),
        "callback": origin,
        "sent_at": time.time(),
        "timeout": PATIENCE,
        # So that it asks for leave, as the first of a process does.
        "ask": True,
        "callable": _TASK,
        "args": encode_value([[()], {}], attachments),
    }
    return seal_payload(ring, "rehearsal", pack_message(message, attachments))


def _forget(origin: str) -> None:
    """Leave nothing behind that a run of somebody else's could meet: no thread, no connection, no word of a server."""
    courier.dismiss(origin, PATIENCE)
    connection.forget(origin)
