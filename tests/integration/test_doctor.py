"""``wove doctor`` names what keeps a call from coming back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from wove.demo.processes import free_port

if TYPE_CHECKING:
    from wove_tests.fleets import Fleets


def doctor(*arguments: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command as a user does and return its exit code and findings."""
    result = subprocess.run(
        [sys.executable, "-m", "wove.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


def problem(findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one problem, which ends the examination."""
    assert [f["state"] for f in findings].count("problem") == 1
    assert findings[-1]["state"] == "problem"
    return findings[-1]


@pytest.mark.redis
class TestHealthyFleets:
    def test_celery(self, fleets: Fleets) -> None:
        config = fleets.executor_definition("celery-redis-prefork")["executor_config"]
        code, findings = doctor("--broker-url", config["broker_url"], "--queue", config["queue"])
        assert code == 0
        assert {f["state"] for f in findings} == {"ok"}
        assert "same secret" in findings[-2]["text"]
        assert "came back" in findings[-1]["text"]

    def test_rq(self, fleets: Fleets) -> None:
        config = fleets.executor_definition("rq-worker")["executor_config"]
        code, findings = doctor("--redis-url", config["redis_url"], "--queue-name", config["queue_name"])
        assert code == 0
        assert "came back" in findings[-1]["text"]


class TestProblems:
    def test_a_broker_that_is_down_and_no_password_on_the_screen(self) -> None:
        code, findings = doctor("--redis-url", f"redis://:canary@127.0.0.1:{free_port()}/0")
        assert code == 1
        assert "does not answer" in problem(findings)["text"]
        assert "canary" not in json.dumps(findings)

    @pytest.mark.redis
    def test_nobody_on_the_queue(self, fleets: Fleets) -> None:
        config = fleets.executor_definition("celery-redis-prefork")["executor_config"]
        code, findings = doctor("--broker-url", config["broker_url"], "--queue", "another")
        assert code == 1
        assert "-Q another" in problem(findings)["mend"]

    @pytest.mark.redis
    def test_another_secret_on_celery(self, fleets: Fleets) -> None:
        config = fleets.executor_definition("celery-redis-prefork")["executor_config"]
        arguments = ("--broker-url", config["broker_url"], "--queue", config["queue"])
        code, findings = doctor(*arguments, WOVE_SECRET="quite-another-secret-of-36-characters")
        assert code == 1
        assert "WOVE_SECRET" in problem(findings)["mend"]

    @pytest.mark.redis
    def test_another_secret_on_rq(self, fleets: Fleets) -> None:
        config = fleets.executor_definition("rq-worker")["executor_config"]
        arguments = ("--redis-url", config["redis_url"], "--queue-name", config["queue_name"])
        code, findings = doctor(*arguments, WOVE_SECRET="quite-another-secret-of-36-characters")
        assert code == 1
        assert "same WOVE_SECRET" in problem(findings)["text"]


def test_usage_errors_have_their_own_exit_code() -> None:
    result = subprocess.run([sys.executable, "-m", "wove.cli", "doctor"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--broker-url" in result.stderr


def without(library: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Wove's where a library is not installed."""
    program = f"import sys; sys.modules[{library!r}] = None; from wove.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("library", "option", "executor"), [("celery", "--broker-url", "celery"), ("rq", "--redis-url", "rq")]
)
def test_a_library_that_is_missing_is_no_broker_that_is_down(
    library: str, option: str, executor: str
) -> None:
    done = without(library, "doctor", "--json", option, f"redis://127.0.0.1:{free_port()}/0")
    assert done.returncode == 1, done.stderr
    found = problem(json.loads(done.stdout))
    assert f"{executor} is not installed here" in found["text"]
    assert found["mend"] == f'pip install "wove[{executor}]"'


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [("http", "aiohttp", "dispatch"), ("websocket", "aiohttp", "dispatch"), ("grpc", "grpc", "grpc")],
)
def test_a_service_names_the_extra_that_it_needs(kind: str, library: str, extra: str) -> None:
    done = without(library, "worker", kind, "--port", "0", "--processes", "0")
    assert done.returncode == 2
    assert done.stderr == f'wove worker {kind} needs {library}: pip install "wove[{extra}]"\n'
