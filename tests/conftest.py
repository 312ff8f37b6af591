"""Resources, private servers and fleets for every test; see CONTRIBUTING.md."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Tests and workers import the shared helpers from here.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

from wove_tests import leftovers
from wove_tests.callbacks import Sink, listening
from wove_tests.fleets import Fleets
from wove_tests.resources import ResourcePlugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove.callback_server.hub import Lease
    from wove.demo.processes import RedisServer

_environment = pytest.MonkeyPatch()
_config_home = tempfile.mkdtemp(prefix="wove-test-config-")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run an environment of its own, which workers inherit."""
    # The settings of whoever runs the tests must not decide how they end.
    for name in list(os.environ):
        theirs = name.startswith(("CELERY_", "RQ_")) or name == "C_FORCE_ROOT"
        ours = name.startswith("WOVE_") and not name.startswith("WOVE_TEST_") and name != "WOVE_REDIS_SERVER"
        if theirs or ours:
            _environment.delenv(name)
    _environment.setenv("WOVE_SECRET", secrets.token_hex(32))
    # The cookie of whoever runs the tests lies in their own folder and is never touched.
    _environment.setenv("XDG_CONFIG_HOME", _config_home)
    for name, value in leftovers.mark_descendants().items():
        _environment.setenv(name, value)
    config.pluginmanager.register(ResourcePlugin(), "wove-resources")


def pytest_unconfigure() -> None:
    """Give back what :func:`pytest_configure` took."""
    _environment.undo()
    shutil.rmtree(_config_home, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """Fail the run when a process that it started is still there. First set up, so torn down last."""
    yield
    left = leftovers.wait_until_none_left()
    assert not left, "the tests left processes behind (killed now):\n" + "\n".join(left)


@pytest.fixture(scope="session")
def fleets(_no_process_left: None) -> Iterator[Fleets]:
    """Every server and worker of this run, started when first asked for."""
    with Fleets() as running:
        yield running
        left = leftovers.wait_until(lambda: not running.keys_left()) or running.keys_left()
        assert left is True, f"the tests left keys in Redis: {left}"


@pytest.fixture(scope="session")
def redis_server(fleets: Fleets) -> RedisServer:
    """A private Redis server on a free port; its database 0 belongs to no fleet."""
    return fleets.redis()


@pytest.fixture(scope="session")
def rabbitmq_url(fleets: Fleets) -> str:
    """The URL of a RabbitMQ server: a private one, or that of WOVE_TEST_AMQP_URL."""
    return fleets.rabbitmq_url()


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Say that a test needs a Docker engine and Compose; see wove_tests.resources."""


@pytest.fixture
def lease() -> Iterator[Lease]:
    """A share of a callback listener that nobody else has at the moment."""
    with listening() as shared:
        yield shared


@pytest.fixture
def sink() -> Sink:
    """Where a listener hands the events of runs over."""
    return Sink()
