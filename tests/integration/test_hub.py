"""The listeners of a process: one per address, shared, and gone with the last who asked for it."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import tasks
from wove_tests.callbacks import Sink, ask, child_environment, open_run, post, result_body, wait_until

from wove import ConfigurationError, ExecutorRuntime
from wove.callback_server import hub
from wove.demo.processes import free_port
from wove.security import beat_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wove.callback_server.hub import Lease

LOOPBACK = "127.0.0.1"


@pytest.fixture
def acquire() -> Iterator[Callable[..., Lease]]:
    """``hub.acquire``; whatever a test leaves unreleased is released after it."""
    with ExitStack() as stack:

        def acquire(host: str = LOOPBACK, port: int = 0) -> Lease:
            lease = hub.acquire(host, port)
            stack.callback(lease.release)
            return lease

        yield acquire
    assert listener_threads() == [], "the thread ends with the last release"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


def listener_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wove-callback")]


def listens(port: int, host: str = LOOPBACK) -> bool:
    """Whether anybody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


class TestSharing:
    """Who asks for the same address gets the same listener."""

    def test_the_same_address(self, acquire: Callable[..., Lease]) -> None:
        first, second = acquire(), acquire()
        assert first.port == second.port
        assert len(listener_threads()) == 1
        assert ask(first, "GET", "/healthz").status == 200

    def test_a_fixed_port(self, acquire: Callable[..., Lease]) -> None:
        port = free_port()
        first, second = acquire(port=port), acquire(port=port)
        assert (first.port, second.port) == (port, port)
        assert len(listener_threads()) == 1

    def test_another_address_is_another_listener(self, acquire: Callable[..., Lease]) -> None:
        any_port, fixed = acquire(), acquire(port=free_port())
        assert any_port.port != fixed.port
        assert len(listener_threads()) == 2
        for lease in (any_port, fixed):
            assert ask(lease, "GET", "/healthz").status == 200

    def test_at_the_same_moment(self, acquire: Callable[..., Lease]) -> None:
        barrier = threading.Barrier(8)

        def ask_for_it(_: int) -> Lease:
            barrier.wait(5)
            return acquire()

        with ThreadPoolExecutor(8) as pool:
            leases = list(pool.map(ask_for_it, range(8)))
        assert len({lease.port for lease in leases}) == 1
        assert len(listener_threads()) == 1

    def test_each_has_runs_of_its_own(self, acquire: Callable[..., Lease]) -> None:
        mine, theirs = Sink(), Sink()
        first, second = acquire(), acquire()
        run, other = open_run(first, mine), open_run(second, theirs)
        for lease, each, sink in ((first, run, mine), (second, other, theirs)):
            assert post(lease, each, result_body(each, lease.port)).status == 204
            assert [frame["run_id"] for frame in sink.frames] == [each.run_id]


class TestRelease:
    """The last one to go ends it, and nobody else."""

    def test_the_last_one_ends_it(self, acquire: Callable[..., Lease]) -> None:
        first, second = acquire(), acquire()
        first.release()
        assert ask(second, "GET", "/healthz").status == 200
        second.release()
        assert not listens(second.port)
        assert listener_threads() == []

    def test_twice_counts_once(self, acquire: Callable[..., Lease]) -> None:
        first, second = acquire(), acquire()
        first.release()
        first.release()
        assert ask(second, "GET", "/healthz").status == 200

    def test_a_late_release_does_not_end_the_next_one(self, acquire: Callable[..., Lease]) -> None:
        port = free_port()
        old = acquire(port=port)
        old.release()
        new = acquire(port=port)
        old.release()
        assert ask(new, "GET", "/healthz").status == 200

    def test_it_closes_the_runs_of_who_goes(self, acquire: Callable[..., Lease]) -> None:
        gone, stays = Sink(), Sink()
        first, second = acquire(), acquire()
        closed, still_open = open_run(first, gone), open_run(second, stays)
        first.release()
        wait_until(lambda: post(second, closed, result_body(closed, 1)).status == 410, "its runs are closed")
        assert gone.frames == []
        assert post(second, still_open, result_body(still_open, 1)).status == 204
        assert stays.outcome(still_open.run_id)["result"] == 1

    def test_a_released_share_opens_nothing(self, acquire: Callable[..., Lease]) -> None:
        lease = acquire()
        lease.release()
        with pytest.raises(RuntimeError, match="released"):
            open_run(lease, Sink())
        lease.close_run("0" * 32)
        lease.cancel_run("0" * 32)

    def test_the_port_is_free_at_once(self, acquire: Callable[..., Lease]) -> None:
        port = free_port()
        for _ in range(5):
            lease = acquire(port=port)
            # A connection that was served lingers in TIME_WAIT, which must not matter.
            assert ask(lease, "GET", "/healthz").status == 200
            lease.release()

    def test_held_beats_and_idle_connections_do_not_hold_it_up(self, acquire: Callable[..., Lease]) -> None:
        lease = acquire()
        run = open_run(lease, Sink())
        kid = run.ring.primary.kid
        key = run.key(kid)
        assert key is not None
        body = f"hold 30\nrun {run.run_id} e 1 1 {kid} {beat_tag(key, run.run_id, 'e', 1, 1).hex()}".encode()
        with ThreadPoolExecutor(1) as pool, closing(socket.create_connection((LOOPBACK, lease.port))):
            held = pool.submit(ask, lease, "POST", "/wove/v1/beats", body)
            wait_until(lambda: run.watchers, "the beat is held")
            begun = time.monotonic()
            lease.release()
            assert time.monotonic() - begun < 2
            assert held.result(5).body == b""
        assert listener_threads() == []

    def test_who_comes_while_it_ends_is_not_forgotten(
        self, acquire: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A worker whose connection was accepted and then dropped, unclosed, would wait for its whole timeout.
        forgotten: list[str] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda args: forgotten.append(str(args.exc_value)))

        def knock(port: int, connections: list[socket.socket]) -> None:
            with suppress(OSError):
                for _ in range(10):
                    connections.append(socket.create_connection((LOOPBACK, port), timeout=5))

        for _ in range(20):
            lease = acquire()
            connections: list[socket.socket] = []
            knocking = threading.Thread(target=knock, args=(lease.port, connections))
            knocking.start()
            lease.release()
            knocking.join()
            for connection in connections:
                connection.close()
            del lease
            gc.collect()
        assert forgotten == []


class TestAddresses:
    """An address that cannot be had is an error that says what to do."""

    def test_a_port_that_is_taken(self, acquire: Callable[..., Lease], taken: int) -> None:
        with pytest.raises(ConfigurationError) as caught:
            acquire(port=taken)
        message = str(caught.value)
        assert f"callback_port {taken} on 127.0.0.1 is taken" in message
        assert "choose another callback_port, or 0" in message
        assert listener_threads() == []

    def test_a_port_that_another_process_has(self, acquire: Callable[..., Lease]) -> None:
        script = (
            "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
            "print(s.getsockname()[1], flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with other:
            assert other.stdout is not None
            port = int(other.stdout.readline())
            with pytest.raises(ConfigurationError, match=f"callback_port {port} .* is taken"):
                acquire(port=port)
        # It was a failure of that moment: the hub remembers nothing of it.
        assert ask(acquire(port=port), "GET", "/healthz").status == 200

    async def test_it_is_found_when_the_environment_starts(self, taken: int) -> None:
        config = {"callback_port": taken}
        definition = {"executor": "memory", "executor_config": config}
        with pytest.raises(ConfigurationError, match=f"callback_port {taken}") as caught:
            await ExecutorRuntime({"reports": definition}).start()
        assert any("'reports'" in note for note in caught.value.__notes__)
        assert listener_threads() == []

    def test_an_address_of_another_machine(self, acquire: Callable[..., Lease]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            acquire("192.0.2.1")
        message = str(caught.value)
        assert "callback_host '192.0.2.1'" in message
        assert "assign requested address" in message or "could not bind" in message  # Python 3.12 and later
        assert "an address of this machine" in message

    def test_a_name_that_nobody_has(
        self, acquire: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(ConfigurationError, match="Name or service not known") as caught:
            acquire("no-such-host.example")
        assert "callback_host 'no-such-host.example'" in str(caught.value)


# --- forks ---------------------------------------------------------------------

# A process that forks while it listens, as one does that uses multiprocessing. It tells by its output what
# was the case; `GO` is written by the parent when it has let go of the address.
FORKING = """
import os, signal, socket, sys
from wove.callback_server import hub
from wove_tests.callbacks import Sink, ask, child_environment, open_run, post, result_body

if len(sys.argv) > 1:  # a name with two addresses, as "localhost" is one on most machines
    real = socket.getaddrinfo
    def two(host, port, *args, **kwargs):
        if host != "two.example":
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (h, port)) for h in sys.argv[1].split(",")]
    socket.getaddrinfo = two
    host, addresses = "two.example", sys.argv[1].split(",")
else:
    host, addresses = "127.0.0.1", ["127.0.0.1"]

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

port = free_port()
lease = hub.acquire(host, port)
sink = Sink()
run = open_run(lease, sink)
ready, tell_ready = os.pipe()
go, tell_go = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        signal.alarm(20)
        # What was inherited cannot be used, and letting go of it harms nobody.
        lease.cancel_run(run.run_id)
        lease.close_run(run.run_id)
        lease.release()
        own = hub.acquire("127.0.0.1", 0)
        assert own.port != port
        assert ask(own, "GET", "/healthz").status == 200
        mine = Sink()
        child_run = open_run(own, mine)
        assert post(own, child_run, result_body(child_run, "in the child")).status == 204
        assert mine.outcome(child_run.run_id)["result"] == "in the child"
        own.release()
        os.write(tell_ready, b"y")
        os.read(go, 1)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os.write(tell_ready, b"n")
        os._exit(1)
try:
    print("child:", os.read(ready, 1).decode())
    print("parent still listens:", ask(lease, "GET", "/healthz").status)
    print("its run is open:", post(lease, run, result_body(run, 1)).status)
    lease.release()
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=5).close()
            print("somebody still listens on", address)
        except ConnectionRefusedError:
            print("refused")
finally:
    os.write(tell_go, b"y")
    print("exit:", os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize("addresses", ["127.0.0.1", "127.0.0.1,127.0.0.2"], ids=["one", "two"])
def test_a_forked_child_does_not_own_the_listener(addresses: str) -> None:
    arguments = [addresses] if "," in addresses else []
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *arguments],
        env=child_environment(PYTHONWARNINGS="ignore::DeprecationWarning"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "child: y",
        "parent still listens: 200",
        "its run is open: 204",
        *["refused"] * (addresses.count(",") + 1),
        "exit: 0",
    ], done.stderr


async def test_the_environments_of_a_process_share_one() -> None:
    # What the hub is for: starting a second environment costs neither a thread nor a port.
    memory: dict[str, Any] = {"executor": "memory", "delivery_timeout": 20}
    async with ExecutorRuntime({"one": memory, "two": memory}) as runtime:
        assert len(listener_threads()) == 1
        assert await runtime["one"].run(tasks.double, 1) == 2
        assert await runtime["two"].run(tasks.double, 2) == 4
    assert listener_threads() == []
