"""A RabbitMQ server of our own: started for the tests, in a folder and on ports that nobody else uses."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING

from wove.demo.processes import ManagedProcess, free_port

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

#: Seconds that it may take to start.
READY_SECONDS = 90.0
# Debian's `rabbitmq-server` on PATH changes to the user rabbitmq and to that user's folders; the script
# behind it runs as whoever calls it.
_DEBIAN_SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def find_rabbitmq_server() -> str | None:
    """Return the path of a RabbitMQ start script that needs no particular user, or None."""
    return shutil.which(_DEBIAN_SCRIPT) or shutil.which("rabbitmq-server")


def answers_amqp(port: int) -> bool:
    """Whether an AMQP server listens on a loopback port and begins the handshake."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            # A method frame (type 1) on channel 0: Connection.Start. A server that is still booting
            # accepts and closes.
            return connection.recv(3) == b"\x01\x00\x00"
    except OSError:
        return False


class PortMapper(ManagedProcess):
    """Erlang's `epmd` on a port of its own, so that the nodes of this machine and ours never meet.

    A node that finds none starts one in the background, which would outlive it.
    """

    def __init__(self) -> None:
        self.port = free_port()
        # epmd may stand beside `erl` only.
        binary = shutil.which("epmd") or "epmd"
        super().__init__([binary, "-port", str(self.port), "-address", "127.0.0.1"], name="epmd")

    def _is_ready(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True


class RabbitServer(ManagedProcess):
    """A RabbitMQ node without plugins on loopback ports, forgotten when it stops.

    It never sees the machine's own node: its name, ports, cookie and folders are its own.

    Args:
        data: a folder for what it keeps, by which it can be killed and started again; else it forgets.
    """

    def __init__(self, data: Path | None = None) -> None:
        super().__init__([], name="rabbitmq")
        self.port = free_port()
        self._data = data
        self._mapper = PortMapper()

    @property
    def url(self) -> str:
        """The URL of its default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> Self:
        """Start the node; its port mapper is ready before."""
        self.command = [find_rabbitmq_server() or "rabbitmq-server"]
        self._mapper.__enter__()
        try:
            return super().start()
        except BaseException:
            self._mapper.stop()
            raise

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Return when it takes connections; a machine that is busy makes it slow to start."""
        super().wait_ready(timeout)

    def stop(self, timeout: float = 0.0) -> None:
        """End node and port mapper at once: nothing in them is worth an orderly shutdown."""
        super().stop(timeout)
        self._mapper.stop()

    def _working_folder(self) -> Path:
        # The last moment before the start at which the folder exists.
        self._env.update(self._settings())
        return self.folder

    def _settings(self) -> dict[str, str]:
        folder = self.folder
        (folder / "enabled_plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text(
            # Low limits would stop publishers on a machine whose disk or memory others fill.
            "disk_free_limit.absolute = 1MB\nvm_memory_high_watermark.relative = 0.9\n"
        )
        return {
            "HOME": str(folder),  # the Erlang cookie is made here
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._mapper.port),
            "ERL_CRASH_DUMP": os.devnull,
            "RABBITMQ_NODENAME": f"wove-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._data or folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "config"),
            "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
        }

    def _is_ready(self) -> bool:
        return answers_amqp(self.port)
