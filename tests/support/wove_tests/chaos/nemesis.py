"""Kills, restarts and cuts, in an order that a seed decides."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from wove_tests.chaos.fleet import PREFORK, RQ, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from wove_tests.chaos.fleet import ChaosFleet, PersistentRedis, Slot
    from wove_tests.proxy import TcpProxy

#: Seconds between two faults, in which nothing is broken.
QUIET = (0.7, 2.0)
#: Seconds to wait for a work horse to kill.
HORSE_SECONDS = 3.0
#: Characters of its log that are kept of a worker which ended by itself.
LAST_WORDS = 3_000


class Fault(NamedTuple):
    """Something that was done to the fleet; times are monotonic."""

    name: str
    begun: float
    ended: float


class Nemesis:
    """Breaks one thing at a time and mends it, until it is stopped; in a thread of its own.

    Each fault comes once before any comes again, in a new order each round.
    """

    def __init__(self, fleet: ChaosFleet, proxy: TcpProxy, seed: int) -> None:
        self._fleet = fleet
        self._proxy = proxy
        self._random = random.Random(f"nemesis {seed}")
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemesis")
        self.faults: list[Fault] = []
        #: Every process that was killed here, and when.
        self.killed: dict[int, float] = {}
        #: Environments whose worker ended without having been killed here, with the end of its log.
        self.died: list[tuple[str, str]] = []
        #: What went wrong with the nemesis itself.
        self.problem: str | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the fault that is under way, mend everything, and return."""
        self._enough.set()
        self._thread.join()
        self._proxy.up()
        for broker in (self._fleet.celery_broker, self._fleet.rq_broker):
            if not broker.running:
                broker.revive()
        self._revive()

    def _run(self) -> None:
        try:
            while True:
                deck = list(self._deck().items())
                self._random.shuffle(deck)
                for name, act in deck:
                    if self._enough.wait(self._random.uniform(*QUIET)):
                        return
                    begun = time.monotonic()
                    if act():
                        self.faults.append(Fault(name, begun, time.monotonic()))
                    self._revive()
        except Exception:
            self.problem = traceback.format_exc()

    def _revive(self) -> None:
        dead = self._fleet.dead()
        for slot in dead:
            # A work horse may have outlived its worker; it goes with the rest.
            self._note_killed([slot.worker.pid, *slot.worker.members()])
            self.died.append((slot.environment, slot.worker.log_text()[-LAST_WORDS:]))
        self._fleet.replace(dead)

    def _note_killed(self, pids: Iterable[int]) -> None:
        # After the deed: what such a process did, it did before.
        self.killed.update(dict.fromkeys(pids, time.monotonic()))

    def _deck(self) -> dict[str, Callable[[], bool]]:
        pick, proxy = self._random, self._proxy
        direction = pick.choice(["request", "response", "both"])
        return {
            "celery child killed": lambda: self._kill_child(PREFORK, 0.0),
            "celery child killed again": lambda: self._kill_child(PREFORK, 0.0),
            "celery prefork worker killed": lambda: self._kill_worker(PREFORK),
            "celery threads worker killed": lambda: self._kill_worker(THREADS),
            "rq horse killed": lambda: self._kill_child(RQ, HORSE_SECONDS),
            "rq horse killed again": lambda: self._kill_child(RQ, HORSE_SECONDS),
            "rq worker killed": lambda: self._kill_worker(RQ),
            "celery broker restarted": lambda: self._restart(self._fleet.celery_broker),
            "rq broker restarted": lambda: self._restart(self._fleet.rq_broker),
            "callbacks refused": lambda: self._weather(proxy.down, 3.0),
            "callbacks reset": lambda: self._weather(proxy.reset, 2.0),
            f"callbacks in a black hole ({direction})": lambda: self._weather(
                lambda: proxy.black_hole(direction), 3.0
            ),
            "callbacks cut after commit": lambda: self._weather(
                lambda: proxy.cut_after_commit(pick.choice([1, 1, 20])), 2.0
            ),
            "callbacks late": lambda: self._weather(
                lambda: proxy.latency(pick.uniform(0.02, 0.3), pick.uniform(0, 0.1)), 3.0
            ),
            "callbacks in slices": lambda: self._weather(lambda: proxy.slicer(pick.randint(5, 50)), 2.0),
            "connections cut": lambda: self._weather(proxy.cut, 0.1),
        }

    def _weather(self, verb: Callable[[], None], longest: float) -> bool:
        verb()
        self._pause(0.1, longest)
        self._proxy.up()
        return True

    def _kill_child(self, environment: str, patience: float) -> bool:
        """Kill one of the workers' own processes; a work horse is there only while a job runs."""
        deadline = time.monotonic() + patience
        while not (children := [pid for slot in self._fleet.of(environment) for pid in slot.children()]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        pid = self._random.choice(children)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._note_killed([pid])
        return True

    def _kill_worker(self, environment: str) -> bool:
        slot: Slot = self._random.choice(self._fleet.of(environment))
        members = slot.worker.members()
        slot.worker.kill()
        self._note_killed(members)
        self._pause(0.0, 1.5)
        slot.replace()
        return True

    def _restart(self, broker: PersistentRedis) -> bool:
        broker.kill()
        self._pause(0.1, 2.0)
        broker.revive()
        return True

    def _pause(self, least: float, most: float) -> None:
        self._enough.wait(self._random.uniform(least, most))
