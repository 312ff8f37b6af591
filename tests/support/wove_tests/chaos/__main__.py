"""``make chaos``: CHAOS_SECONDS (60), CHAOS_SEED (random), CHAOS_RUNS (no limit), CHAOS_REPORT (a file)."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from wove import ExecutorRuntime, WoveError
from wove.demo.processes import free_port
from wove_tests.chaos import tasks
from wove_tests.chaos.executions import Executions
from wove_tests.chaos.fleet import PREFORK, RQ, THREADS, ChaosFleet, new_seed
from wove_tests.chaos.ledger import Ledger, watch_outcomes
from wove_tests.chaos.load import Load
from wove_tests.chaos.nemesis import Nemesis
from wove_tests.chaos.report import Report
from wove_tests.chaos.vitals import LoopLag, Vitals, tasks_left
from wove_tests.private import private_environment
from wove_tests.proxy import TcpProxy
from wove_tests.waiting import until

WORKERS = {PREFORK: 2, THREADS: 1, RQ: 3}
#: Seconds after which this process holds what it needs, and its memory is measured.
WARM_UP = 6.0
#: Seconds in which work that nobody waits for any more may still start.
SETTLE = 3.0
#: Seconds that a mended environment may take for a call, and how often it is asked.
PROBE_SECONDS, PROBES = 10.0, 3
#: Seconds beyond the planned time after which the program says where it hangs, and ends.
PATIENCE = 150.0


class Complaints(logging.Handler):
    """Counts errors that are logged and exceptions that nobody fetched."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        what = f"{record.name}: {record.msg!s:.200}"
        if record.exc_info and record.exc_info[1] is not None:
            what += f": {record.exc_info[1]!r:.200}"
        self.counts[what] += 1


async def probe(fleet: ChaosFleet, runtime: ExecutorRuntime, name: str) -> bool:
    """Tell whether an environment works, with new workers if need be."""
    handle = runtime[name].options(delivery_timeout=PROBE_SECONDS)
    for _ in range(PROBES):
        try:
            return await handle.run(abs, -1) == 1
        except WoveError:
            # Perhaps a worker that has not found its way back to its broker: not the submitter's doing.
            await asyncio.to_thread(fleet.replace, fleet.of(name))
    return False


async def chaos(fleet: ChaosFleet, proxy: TcpProxy, port: int, seed: int, log: Path) -> Report:
    """Run the load against the nemesis, mend everything, and find out what became of it all."""
    complaints = Complaints()
    logging.getLogger("wove").addHandler(complaints)
    logging.getLogger("asyncio").addHandler(complaints)
    seconds, most = float(os.environ.get("CHAOS_SECONDS") or 60), os.environ.get("CHAOS_RUNS")
    ledger, lag = Ledger(), LoopLag()
    closed = watch_outcomes(ledger.double.append)
    nemesis = Nemesis(fleet, proxy, seed)
    await asyncio.to_thread(time.sleep, 0)  # the thread that asyncio keeps for this
    before = Vitals.take()
    begun = time.monotonic()
    async with ExecutorRuntime(fleet.definitions(f"http://127.0.0.1:{proxy.port}", port)) as runtime:
        handles = {name: runtime[name] for name in WORKERS}
        load = Load(handles, ledger, seed, int(most) if most else None)
        async with lag.watched():
            running = asyncio.create_task(load.run(), name="load")
            await asyncio.wait([running], timeout=min(WARM_UP, seconds / 4))
            warm = Vitals.take()
            nemesis.start()
            try:
                await asyncio.wait([running], timeout=(begun + seconds - time.monotonic()) / 2)
                half = Vitals.take()
                await asyncio.wait([running], timeout=begun + seconds - time.monotonic())
            finally:
                await asyncio.to_thread(nemesis.stop)
            load.enough.set()
            await running
        recovered = {name: await probe(fleet, runtime, name) for name in handles}
        await asyncio.sleep(SETTLE)
    proxy.cut()  # workers keep their ends of idle connections
    await until(lambda: not proxy.connections, "the proxy has closed its connections")
    after = Vitals.take()
    left = tasks_left()
    return Report(
        seed=seed,
        seconds=time.monotonic() - begun,
        ledger=ledger,
        executions=Executions.check(log, ledger, nemesis.killed),
        nemesis=nemesis,
        before=before,
        warm=warm,
        half=half,
        after=after,
        loop_lag=lag.longest,
        tasks_left=left,
        closed_runs=closed(),
        features=load.features,
        recovered=recovered,
        complaints=complaints.counts,
    )


def main() -> int:
    """Print the report; 1 when anything was lost, double, wrong or undead."""
    seed = new_seed()
    seconds = float(os.environ.get("CHAOS_SECONDS") or 60)
    print(f"chaos for {seconds:g} s, CHAOS_SEED={seed}", flush=True)
    faulthandler.dump_traceback_later(seconds + PATIENCE, exit=True)
    with private_environment(), tempfile.TemporaryDirectory(prefix="wove-chaos-") as folder:
        log = Path(folder, "executions")
        log.touch()
        os.environ[tasks.LOG_VARIABLE] = str(log)
        port = free_port()
        with ChaosFleet(log, WORKERS) as fleet, TcpProxy("127.0.0.1", port, seed=seed) as proxy:
            report = asyncio.run(chaos(fleet, proxy, port, seed, log))
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(report.lines()), flush=True)
    if path := os.environ.get("CHAOS_REPORT"):
        data: dict[str, Any] = report.as_data()
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
