"""`wove demo` as a person runs it: a process of its own, real fleets, and nothing left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

import wove
from wove.demo.processes import ManagedProcess, ProcessError, find_redis_server, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wove_tests.fleets import Fleets

pytestmark = pytest.mark.redis

DATABASE = 11
FEW_MODULES = "60"
FULL_SECONDS = 90
SECONDS = 40
GONE_SECONDS = 15


class Home:
    """A machine's worth of places to leave things in, for one demo: temporary folder, settings, processes."""

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "temp"
        self.config = folder / "config"
        self.temp.mkdir()
        self.config.mkdir()
        self.env = {
            "TMPDIR": str(self.temp),
            "XDG_CONFIG_HOME": str(self.config),
            "WOVE_TEST_DEMO": secrets.token_hex(8),
        }

    def start(self, *arguments: str) -> ManagedProcess:
        return ManagedProcess(
            [sys.executable, "-m", "wove.cli", "demo", *arguments], name="demo", env=self.env
        ).start()

    def processes(self) -> list[str]:
        """The demo and everything it started, told by their environment, wherever they have got to."""
        mark = f"WOVE_TEST_DEMO={self.env['WOVE_TEST_DEMO']}".encode()
        return [
            command.replace(b"\0", b" ").decode()
            for entry in Path("/proc").glob("[0-9]*")
            if mark in _read(entry / "environ").split(b"\0") and (command := _read(entry / "cmdline"))
        ]

    def assert_nothing_left(self, seconds: float = 0.0) -> None:
        deadline = time.monotonic() + seconds
        while (self.processes() or self.files()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.processes() == []
        assert self.files() == []

    def files(self) -> list[Path]:
        return [*self.temp.iterdir(), *self.config.rglob("*")]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # gone meanwhile, or somebody else's
        return b""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    # The secret of the test run would keep the demo from making its own.
    monkeypatch.delenv("WOVE_SECRET", raising=False)
    return Home(tmp_path)


@pytest.fixture
def demo(home: Home) -> Iterator[Callable[..., ManagedProcess]]:
    started: list[ManagedProcess] = []

    def start(*arguments: str) -> ManagedProcess:
        started.append(home.start(*arguments))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def wait_for_end(process: ManagedProcess, seconds: float = SECONDS) -> str:
    process.wait_until(lambda: not process.running, seconds, "at its end")
    return process.log_text()


def test_the_whole_demo(demo: Callable[..., ManagedProcess], home: Home) -> None:
    process = demo()
    output = wait_for_end(process, FULL_SECONDS)
    assert process.returncode == 0, output
    assert "ok: the totals of celery match a local run" in output
    assert "ok: the totals of rq match a local run" in output
    assert "ClassNotFoundError: analysis.py defines no class 'Zen'" in output
    assert "KeyError: 'Zen'" in output, "the remote traceback has the cause over there"
    assert "ok: the worker says: stopped after" in output
    assert "ok: left behind: no process, no file" in output
    rows = {
        words[0]: words[1:] for line in output.splitlines() if (words := line.split()) and len(words) == 8
    }
    assert {"celery", "rq", "together", "local"} <= rows.keys(), output
    assert rows["together"][:5] == rows["local"][:5]
    assert int(rows["local"][0].replace(",", "")) > 700
    home.assert_nothing_left()


def test_one_fleet_on_a_redis_of_ones_own(
    demo: Callable[..., ManagedProcess], home: Home, fleets: Fleets
) -> None:
    url = fleets.redis_url(DATABASE)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        client.set("somebody's", "data")
        for only in ("rq", "celery"):
            process = demo("--redis-url", url, "--only", only, "--modules", FEW_MODULES)
            output = wait_for_end(process)
            assert process.returncode == 0, output
            assert f"ok: the totals of {only} match a local run" in output
            # The lock of RQ 3's own house-keeping expires; it belongs to whoever's workers there are.
            assert set(client.keys()) - {b"rq:clean_groups"} == {b"somebody's"}
        client.flushdb()
    home.assert_nothing_left()


@pytest.mark.parametrize(
    ("signum", "when", "code"),
    [
        pytest.param(signal.SIGINT, "pid", 130, id="Ctrl-C while the work begins"),
        pytest.param(signal.SIGINT, "local", 130, id="Ctrl-C during the local run"),
        pytest.param(signal.SIGTERM, "20 of 80", 143, id="SIGTERM while a worker is in a task"),
    ],
)
def test_an_interrupted_demo_leaves_nothing(
    demo: Callable[..., ManagedProcess], home: Home, signum: int, when: str, code: int
) -> None:
    process = demo("--modules", "400")
    process.wait_for_log(when)
    os.kill(process.pid, signum)
    output = wait_for_end(process)
    assert process.returncode == code, output
    assert "Traceback" not in output.partition("interrupted")[2]
    home.assert_nothing_left()


def test_a_demo_that_is_killed_leaves_nothing(demo: Callable[..., ManagedProcess], home: Home) -> None:
    process = demo("--modules", "400")
    process.wait_for_log("up to")
    os.kill(process.pid, signal.SIGKILL)
    home.assert_nothing_left(GONE_SECONDS)


def test_the_printed_program_runs_against_serve(
    demo: Callable[..., ManagedProcess], home: Home, tmp_path: Path
) -> None:
    process = demo("--serve")
    process.wait_for_log("asyncio.run(main())")
    program = "import asyncio" + process.log_text().partition("import asyncio")[2]
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "program.py"
    script.write_text(program)
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=script.parent,
        env={**os.environ, **home.env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr + process.log_text()
    assert ran.stdout.split() == ["49", *(str(row * row) for row in range(10))]
    os.kill(process.pid, signal.SIGINT)
    wait_for_end(process)
    assert process.returncode == 0
    assert home.processes() == []
    assert list(home.temp.iterdir()) == []


def run_cli(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wove.cli", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_version_and_wrong_usage() -> None:
    version = run_cli("--version")
    assert (version.returncode, version.stdout) == (0, f"wove {wove.__version__}\n")
    assert run_cli().returncode == 2
    assert run_cli("demo", "--only", "cron").returncode == 2
    assert run_cli("demo", "--modules", "0").returncode == 2


def test_a_redis_that_does_not_answer_is_said_at_once() -> None:
    answer = run_cli("demo", "--redis-url", f"redis://:hidden@127.0.0.1:{free_port()}/0")
    assert answer.returncode == 1
    assert "no Redis answers at redis://:***@127.0.0.1" in answer.stderr
    assert "hidden" not in answer.stderr


def test_a_redis_that_does_not_start_is_said_with_its_log() -> None:
    answer = run_cli("demo", WOVE_REDIS_SERVER=shutil.which("false") or "/bin/false")
    assert answer.returncode == 1
    assert "redis ended with 1" in answer.stderr


def test_what_is_missing_is_named_with_its_command() -> None:
    root = str(Path(wove.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from wove.cli import main; sys.exit(main(['demo']))"
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert answer.returncode == 1
    assert 'pip install "wove[demo]"' in answer.stderr
    assert "rich" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_process_that_ends_early_is_reported_with_its_log() -> None:
    process = ManagedProcess(["/bin/sh", "-c", "echo no such luck; exit 3"])
    with pytest.raises(ProcessError, match=r"ended with 3[\s\S]*no such luck"):
        with process:
            process.wait_for_log("ready")
    process.stop()
    assert process.log_text() == "no such luck\n"


def test_a_server_is_found_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WOVE_REDIS_SERVER", "/nonexistent")
    assert find_redis_server() is None
