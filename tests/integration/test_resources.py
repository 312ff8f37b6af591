"""What a run of the tests says when the machine lacks something; see wove_tests.resources."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from wove_tests import leftovers
from wove_tests.fleets import SUPPORT, Fleets
from wove_tests.rabbitmq import answers_amqp

if TYPE_CHECKING:
    from pathlib import Path

CONFTEST = """
import sys
sys.path.insert(0, {support!r})
from wove_tests import rabbitmq, resources

rabbitmq._DEBIAN_SCRIPT = "/nonexistent"

def pytest_configure(config):
    config.pluginmanager.register(resources.ResourcePlugin())
"""

TESTS = """
import pytest

@pytest.fixture
def rabbitmq_url():
    raise AssertionError("asked for, though there is none")

@pytest.fixture
def through_another(rabbitmq_url):
    pass

def test_plain():
    pass

def test_by_fixture(through_another):
    pass

@pytest.mark.parametrize("fleet", [pytest.param("far", marks=pytest.mark.rabbitmq), "near"])
def test_by_mark(fleet):
    pass
"""


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A folder with tests for a machine that has no RabbitMQ and no Docker on its PATH."""
    (tmp_path / "conftest.py").write_text(CONFTEST.format(support=str(SUPPORT)))
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def run_pytest(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WOVE_TEST_")}
    environment.update(PATH=str(folder), **variables)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_what_is_missing_is_listed_with_its_cost_and_its_remedy(bare_machine: Path) -> None:
    done = run_pytest(bare_machine)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    listed = next(i for i, line in enumerate(lines) if line.startswith("rabbitmq: "))
    assert "2 tests skipped" in lines[listed]
    assert "apt-get install rabbitmq-server" in lines[listed + 1]
    assert "2 passed, 2 skipped" in lines[-1]


def test_only_the_selected_tests_count(bare_machine: Path) -> None:
    done = run_pytest(bare_machine, "-m", "not rabbitmq")
    assert "2 passed, 2 deselected" in done.stdout
    assert "missing on this machine" not in done.stdout


def test_a_required_resource_that_is_missing_fails_the_run(bare_machine: Path) -> None:
    done = run_pytest(bare_machine, "-k", "plain", WOVE_TEST_REQUIRE="rabbitmq, docker, compiler")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "names rabbitmq, but no rabbitmq-server on PATH" in done.stderr
    assert "names docker, but no Docker engine answers" in done.stderr
    assert "names compiler, but no cc and no gcc on PATH: apt-get install" in done.stderr


def test_a_misspelt_requirement_fails_the_run(bare_machine: Path) -> None:
    done = run_pytest(bare_machine, WOVE_TEST_REQUIRE="rabitmq")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "'rabitmq'; it knows redis, rabbitmq, docker" in done.stderr


def test_a_process_left_behind_is_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in leftovers.mark_descendants().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(leftovers, "_GRACE_SECONDS", 0.2)
    # Its parent and its session are gone by the time anybody looks.
    subprocess.run(["/bin/sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &"], check=True)
    # Between fork and exec a process has no environment to be told by.
    deadline = time.monotonic() + 10
    while list(leftovers._marked().values()) != ["sleep 60"]:
        assert time.monotonic() < deadline, "it has started"
        time.sleep(0.01)
    left = leftovers.wait_until_none_left()
    assert [line.partition(": ")[2] for line in left] == ["sleep 60"]
    assert leftovers.wait_until_none_left() == []


def test_servers_are_private_and_started_once(fleets: Fleets, redis_server: object) -> None:
    assert fleets.redis() is redis_server
    assert fleets.redis().port != 6379


@pytest.mark.skipif("WOVE_TEST_AMQP_URL" in os.environ, reason="a given server is not started by the tests")
def test_the_rabbitmq_server_is_private(rabbitmq_url: str) -> None:
    port = int(rabbitmq_url.rstrip("/").rpartition(":")[2])
    assert port != 5672
    assert answers_amqp(port)
