"""What a worker process pays for Wove: RQ forks one per job, so whatever is imported is imported each time.

Nothing is timed here: which modules are loaded does not depend on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from wove_tests import tasks
from wove_tests.callbacks import Payload, Sink, child_environment

from wove.backend import as_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.callback_server.hub import Lease

#: What neither the import nor a plain task may bring along.
TOO_DEAR = {"aiohttp", "asyncio", "cloudpickle"}

# What a worker has loaded before it sees a payload, and what Wove adds to it.
HOSTS = {
    "celery": (
        "celery.apps.worker, celery.concurrency.prefork",
        "wove.worker.celery",
    ),
    "rq": ("rq, rq.cli, rq.worker", "wove.worker.rq, wove.worker.execution"),
    # Nothing at all: no host's own imports hide what Wove's bring.
    "bare": ("sys", "wove.worker, wove.worker.rq, wove.worker.execution"),
}

SCRIPT = """
import json, os, sys
import {host}
before = set(sys.modules)
import {ours}
imported = set(sys.modules) - before
payload = os.environ.get("PAYLOAD")
if payload:
    from wove.worker import run
    run(payload)
print(json.dumps([sorted(before), sorted(imported), sorted(set(sys.modules) - before - imported)]))
"""


def loaded(host: str, payload: Payload | None = None) -> tuple[set[str], set[str], set[str]]:
    """Return what a process has loaded before, by the import of Wove, and by running a payload."""
    theirs, ours = HOSTS[host]
    environment = child_environment()
    if payload is not None:
        environment["PAYLOAD"] = as_text(payload.blob)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(host=theirs, ours=ours)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, imported, run = json.loads(done.stdout)
    return set(before), set(imported), set(run)


@pytest.mark.parametrize("host", HOSTS)
def test_the_import(host: str) -> None:
    before, imported, _ = loaded(host)
    assert any(name.startswith("wove.worker.") for name in imported), "it was imported by this, not before"
    assert not TOO_DEAR & imported
    # The submitter's half stays at home.
    for package in (
        "wove.callback_server",
        "wove.adapters",
        "wove.executors",
        "wove.runtime",
        "wove.dispatch",
    ):
        assert package not in imported
    if host != "rq":  # which has loaded asyncio itself
        assert not TOO_DEAR & before, "otherwise this test could not tell"


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_task(host: str, lease: Lease, sink: Sink) -> None:
    payload = Payload(f"http://127.0.0.1:{lease.port}", tasks.join, 1, (2, {3}), key="four")
    payload.open_on(lease, sink)
    # The module of the task is the user's, and brings what it likes: here asyncio.
    _, imported, run = loaded(host, payload)
    assert sink.outcome(payload.run_id)["result"] == ((1, (2, {3})), {"key": "four"})
    assert not {"aiohttp", "cloudpickle"} & (imported | run)


@pytest.mark.parametrize(
    ("func", "dear"), [(abs, set()), (lambda number: -number, {"cloudpickle"})], ids=["by name", "by value"]
)
def test_a_task_pays_for_what_it_needs(
    func: Callable[[int], int], dear: set[str], lease: Lease, sink: Sink
) -> None:
    payload = Payload(f"http://127.0.0.1:{lease.port}", func, 3)
    payload.open_on(lease, sink)
    _, imported, run = loaded("bare", payload)
    assert sink.outcome(payload.run_id)["type"] == "task_result"
    assert TOO_DEAR & (imported | run) == dear


def test_as_the_settings_of_an_rq_worker_it_sets_nothing() -> None:
    """``rq worker -c wove.worker.rq`` is how Wove is imported before a worker forks."""
    from rq.cli.helpers import read_config_file

    settings = read_config_file("wove.worker.rq")
    known = {"QUEUES", "NAME", "DICT_CONFIG", "SENTINEL", "SENTRY_DSN", "SENTRY_KWARGS"}
    assert not known & settings.keys()
    assert not [name for name in settings if name.startswith("REDIS_")]
