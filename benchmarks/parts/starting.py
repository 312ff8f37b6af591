"""Starting an environment, holding runs in flight, importing: what needs no worker."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from parts.figures import Row, Want
from parts.processes import REMOTE, BenchError, Child, environment, say

if TYPE_CHECKING:
    from parts.fleets import Bench

# What a worker has loaded before, and what Wove adds to it. An import of 2.0.3's has its own name.
CELERY_WORKER = "import celery.apps.worker, celery.concurrency.prefork"
RQ_WORKER = "import rq, rq.cli, rq.worker"
IMPORTS = (
    ("import-wove", "`import wove`", "", {"wove": "import wove", "peer": "import wove"}, None),
    (
        "import-runtime",
        "`from wove import ExecutorRuntime`",
        "",
        {
            "wove": "from wove import ExecutorRuntime",
            "peer": "from wove.environment import ExecutorRuntime",
        },
        None,
    ),
    (
        "import-celery",
        "`wove.worker.celery`, over Celery's own",
        CELERY_WORKER,
        {"wove": "import wove.worker.celery", "peer": "import wove.backend"},
        25.0,
    ),
    (
        "import-rq",
        "`wove.worker.rq`, over RQ's own",
        RQ_WORKER,
        {"wove": "import wove.worker.rq", "peer": "import wove.integrations.worker"},
        25.0,
    ),
)


def import_rows(bench: Bench) -> list[Row]:
    """Time imports, each in a fresh process."""
    rows = []
    for key, title, before, statements, limit in IMPORTS:
        row = Row(key, "Imports (processor time)", title, "ms", [Want(limit)] if limit else [])
        for number in range(bench.scale.imports + 1):
            for name, statement in statements.items():
                python = bench.peer_python if name == "peer" else sys.executable
                if python is None:
                    continue
                took = _time_import(python, before, statement)
                if number:  # the first one fills the caches, and may compile
                    row.add(name, took)
        rows.append(row)
    return rows


def _time_import(python: str, before: str, statement: str) -> float:
    code = f"{before or 'pass'}\nimport time\nbegun = time.process_time()\n{statement}\nprint(1000 * (time.process_time() - begun))"
    done = subprocess.run(
        [python, "-c", code], env=environment(), cwd=REMOTE, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"{statement} fails: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def start_rows(bench: Bench) -> list[Row]:
    """Start an environment in fresh processes: the first time, again, and beside another."""
    group = "Starting a Celery environment"
    first = Row("start-first", group, "first in a process, imports of Celery and all", "ms")
    second = Row("start-second", group, "second, after the first was stopped", "ms", [Want(2.0)])
    beside = Row("start-beside", group, "second, while the first goes on", "ms", [Want(2.0)])
    stop = Row("start-stop", group, "stopping the only one, nothing in flight", "ms")
    rows = {"first": first, "second": second, "beside": beside, "stop": stop}
    for number in range(bench.scale.light_rounds + 1):
        for name in _contenders(bench, first):
            figures = _lonely(bench, name, "starts")
            if number:  # the first one may compile
                for what, row in rows.items():
                    row.add(name, figures[what])
    return list(rows.values())


def memory_rows(bench: Bench) -> list[Row]:
    """Hold runs in flight that no worker takes."""
    held = bench.scale.held
    fewer = max(10, held // 5)  # tracing takes its time
    group = f"{held:,} runs in flight"
    resident = Row("held-rss", group, "memory of the process (RSS), a run", "KiB", [Want(4.0)])
    traced = Row(
        "held-traced", group, f"Python's own memory (tracemalloc, {fewer:,} runs), a run", "KiB", [Want(4.0)]
    )
    bare = Row("held-bare", group, "of which the caller's own asyncio task (tracemalloc)", "KiB")
    submitting = Row("held-submit", group, "time until all are with the broker, a run", "us")
    for number in range(bench.scale.few_rounds):
        say(f"  in flight: round {number + 1} of {bench.scale.few_rounds}")
        for name in _contenders(bench, resident):
            try:
                figures = _lonely(bench, name, "hold", count=held, trace=False)
                resident.add(name, figures["rss"] / held / 1024)
                submitting.add(name, 1e6 * figures["seconds"] / held)
                figures = _lonely(bench, name, "hold", count=fewer, trace=True)
                traced.add(name, figures["traced"] / fewer / 1024)
                bare.add(name, figures["bare"] / fewer / 1024)
            except BenchError as exc:
                say(f"out of the race: {exc}")
                for row in (resident, traced, bare, submitting):
                    row.failures[name] = str(exc)
    return [resident, traced, bare, submitting]


def _contenders(bench: Bench, row: Row) -> list[str]:
    names = ["peer", "wove"] if bench.peer_python else ["wove"]
    return [name for name in names if name not in row.failures]


def _lonely(bench: Bench, name: str, do: str, **options: Any) -> dict[str, Any]:
    """Ask a fresh process that has no worker."""
    python = bench.peer_python if name == "peer" else None
    url = bench.redis_url()
    command = [python or sys.executable, str(REMOTE / "lonely.py"), json.dumps({"kind": name, "url": url})]
    with Child(command, name) as child:
        return child.ask(do, **options)
