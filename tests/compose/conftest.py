"""The fleet of docker-compose.yml, started once for these tests under a name of its own."""

from __future__ import annotations

import secrets
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.resources import compose_command

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOG_LINES = 60


class Compose:
    """Calls Compose for the project of these tests."""

    def __init__(self, command: str, file: Path, project: str) -> None:
        self.project = project
        self._command = [*shlex.split(command), "-f", str(file), "-p", project]

    def run(self, *arguments: str, timeout: float = 60, check: bool = True) -> str:
        """Run a subcommand and return its standard output; an error shows both outputs."""
        command = [*self._command, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            pytest.fail(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def left(self) -> list[str]:
        """Return the project's containers, networks and volumes that exist."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = (["ps", "--all"], ["network", "ls"], ["volume", "ls"])
        ids: list[str] = []
        for listing in listings:
            command = ["docker", *listing, "--quiet", "--filter", label]
            ids += subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return ids


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    """Compose as this machine calls it."""
    command = compose_command()
    assert command is not None  # the tests would have been skipped
    return command


@pytest.fixture(scope="session")
def docker_compose_file() -> Path:
    """The file that users start."""
    return Path(__file__).resolve().parents[2] / "docker-compose.yml"


@pytest.fixture(scope="session")
def compose(docker_compose_command: str, docker_compose_file: Path) -> Iterator[Compose]:
    """Compose for a project that exists as long as this session does, and not a container longer."""
    project = Compose(docker_compose_command, docker_compose_file, f"wove-test-{secrets.token_hex(4)}")
    yield project
    left = project.left()
    if left:  # pytest-docker does not clean up after a setup that failed half-way
        project.run("down", "--volumes", "--remove-orphans", "--timeout", "3", check=False)
    assert not project.left(), "Compose left containers, networks or volumes behind"


@pytest.fixture(scope="session")
def docker_compose_project_name(compose: Compose) -> str:
    """A name that no other run has."""
    return compose.project


@pytest.fixture(scope="session")
def docker_setup() -> Iterator[list[str]]:
    """Build the image, then start; Compose waits for healthy servers before it starts their workers."""
    with pytest.MonkeyPatch.context() as environment:
        # Not the image of whoever started the fleet by hand.
        environment.setenv("WOVE_FLEET_IMAGE", "wove-fleet:test")
        yield ["build", "up -d"]


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    """Remove everything; nothing in these containers is worth an orderly end."""
    return ["down --volumes --remove-orphans --timeout 3"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Show what the containers said when a test failed."""
    report = yield
    running = getattr(item, "funcargs", {})
    if report.failed and "docker_services" in running and "compose" in running:
        logs = running["compose"].run("logs", "--no-color", "--tail", str(_LOG_LINES), check=False)
        report.sections.append(("containers", logs))
    return report
