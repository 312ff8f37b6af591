"""No-ops and naps on a fleet: unbatched, by ``map``, one after another, on many threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parts.figures import CONTENDERS, Row, Want

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parts.fleets import Fleet, Lane

#: Items of the ``map`` by which is found out how many are worth a measurement.
SOUNDING = 300
MOST_SOUNDINGS = 6
NAP_SECONDS = 0.1
THREADS = 50
#: Whose processor time is measured.
WHO = ("caller", "worker")
CELERY, FORK, SIMPLE = "Celery, prefork x2", "RQ, a fork per job", "RQ, SimpleWorker"


def celery_rows(fleet: Fleet) -> list[Row]:
    """No-ops on Celery."""
    rows = _Rows("celery", CELERY, fleet, fleet.bench.scale.celery, fleet.bench.scale.calls)
    rows.ask(1.2)
    rows.unbatched.wants.append(Want(2.4, "peer"))
    rows.p50.wants = [Want(1.0, "raw")]
    rows.measure()
    return rows.all()


def rq_simple_rows(fleet: Fleet) -> list[Row]:
    """No-ops on RQ's SimpleWorker, which runs jobs in its own process."""
    rows = _Rows("rq-simple", SIMPLE, fleet, fleet.bench.scale.simple, fleet.bench.scale.calls)
    rows.ask(1.0)
    rows.measure()
    return rows.all()


def rq_fork_rows(fleet: Fleet) -> list[Row]:
    """No-ops on RQ's usual worker, as it is started today and with Wove imported before it forks."""
    scale = fleet.bench.scale
    calls = max(2, scale.calls // 5)
    rows = _Rows("rq-fork", FORK, fleet, scale.fork, calls)
    preloaded = _Rows(
        "rq-preloaded", f"{FORK}, `rq worker -c wove.worker.rq_preload`", fleet, scale.fork, calls
    )
    rows.ask(1.0)
    preloaded.ask(1.0)
    rows.measure(others={"preloaded": preloaded})
    for row, other in zip(rows.all(), preloaded.all(), strict=True):
        # Raw RQ and 2.0.3 were measured once, in the same rounds.
        for name in ("raw", "peer"):
            if name in row.samples:
                other.samples[name] = row.samples[name]
            if name in row.failures:
                other.failures[name] = row.failures[name]
        if "preloaded" in row.failures:
            other.failures["wove"] = row.failures.pop("preloaded")
    return rows.all() + preloaded.all()


class _Rows:
    """The rows that every fleet has."""

    def __init__(self, key: str, group: str, fleet: Fleet, count: int, calls: int) -> None:
        self._fleet = fleet
        self._count = count
        self._calls = calls
        self._items = count
        self.unbatched = Row(f"{key}-unbatched", group, f"{count:,} no-ops at once", "/s")
        self.batched = Row(f"{key}-map", group, "", "/s")
        self.p50 = Row(f"{key}-p50", group, f"one call after another ({calls:,}), p50", "ms")
        self.p99 = Row(f"{key}-p99", group, "the same, p99", "ms")
        self.cpu = [
            Row(f"{key}-{who}-cpu", group, f"processor time of a no-op at once, {who}", "us") for who in WHO
        ]
        self.map_cpu = [
            Row(f"{key}-map-{who}-cpu", group, f"processor time of an item of the `map`, {who}", "us")
            for who in WHO
        ]

    def all(self) -> list[Row]:
        """Return them in the order of the table."""
        return [self.unbatched, self.batched, self.p50, self.p99, *self.cpu, *self.map_cpu]

    def ask(self, over_raw: float) -> None:
        """Say by what factor calls at once have to be better than raw ones; the batched ones are asked for the same everywhere."""
        self.unbatched.wants = [Want(over_raw, "raw")]
        self.batched.wants = [Want(20, "raw")]

    def measure(self, others: dict[str, _Rows] | None = None) -> None:
        """Measure all lanes of the fleet in turn; ``others`` says which lanes have rows of their own."""
        fleet, scale = self._fleet, self._fleet.bench.scale
        fleet.warm_up(max(4, self._count // 4))
        sets: dict[str, tuple[_Rows, str]] = {name: (self, name) for name in CONTENDERS}
        sets.update({lane: (rows, "wove") for lane, rows in (others or {}).items()})
        for rows in {id(rows): rows for rows, _ in sets.values()}.values():
            lane = next(lane for lane, (its, column) in sets.items() if its is rows and column == "wove")
            rows.sound(fleet.racing(lane))

        def turn(lane: Lane) -> Iterator[tuple[Row, str, float]]:
            rows, column = sets[lane.name]
            yield from rows.turn(lane, column)

        fleet.race(scale.rounds, turn)
        for row in self.all():
            row.failures.update(fleet.failures())
        # `map` has no counterpart: it is held against the others' calls at once.
        for name in ("raw", "peer"):
            if name in self.unbatched.samples:
                self.batched.samples[name] = self.unbatched.samples[name]

    def sound(self, lanes: list[Lane]) -> None:
        """Find out how many items a ``map`` is measured with."""
        scale = self._fleet.bench.scale
        least = min(SOUNDING, scale.items, self._count)
        for lane in lanes:
            # More than once: batches grow with what was seen, and only where there is enough to batch.
            self._items = least
            for number in range(MOST_SOUNDINGS):
                count = self._items
                rate = count / lane.work("map", count=count)["seconds"]
                self._items = max(least, min(scale.items, int(rate * scale.map_seconds)))
                if self._items <= 2 * count and number >= 2:
                    break
        self.batched.title = f"`map` over {self._items:,} items, against calls at once"

    def turn(self, lane: Lane, column: str) -> Iterator[tuple[Row, str, float]]:
        """Measure one lane once."""
        figures = lane.work("throughput", count=self._count)
        yield self.unbatched, column, self._count / figures["seconds"]
        for row, who in zip(self.cpu, WHO, strict=True):
            yield row, column, 1e6 * figures[f"{who}_cpu"] / self._count
        if column == "wove":
            figures = lane.work("map", count=self._items)
            yield self.batched, column, self._items / figures["seconds"]
            for row, who in zip(self.map_cpu, WHO, strict=True):
                yield row, column, 1e6 * figures[f"{who}_cpu"] / self._items
        figures = lane.work("latency", count=self._calls)
        yield self.p50, column, figures["p50"]
        yield self.p99, column, figures["p99"]


def stall_rows(fleet: Fleet) -> list[Row]:
    """How long the caller's event loop stands still while it submits."""
    scale = fleet.bench.scale
    row = Row(
        "stall",
        CELERY,
        f"longest stall of the caller's event loop during {scale.stalls:,} submissions (raw: the `delay()` calls, which "
        "block)",
        "ms",
        [Want(20)],
    )
    fleet.warm_up(max(4, scale.stalls // 10))

    def turn(lane: Lane) -> Iterator[tuple[Row, str, float]]:
        yield row, lane.name, lane.work("stall", count=scale.stalls)["stall"]

    fleet.race(scale.few_rounds + 1, turn)
    row.failures.update(fleet.failures())
    return [row]


def window_rows(fleet: Fleet) -> list[Row]:
    """What a call costs with few and with many in flight."""
    scale = fleet.bench.scale
    many = scale.held if scale.few_rounds > 1 else scale.held // 4
    few = min(100, many // 5)
    calls = max(few, scale.celery * 2)
    title = f"a call with {many:,} in flight over one with {few:,}"
    wall = Row("flat", CELERY, f"{title}: time", "x", [Want(1.25)])
    own = Row("flat-cpu", CELERY, f"{title}: processor time, caller and workers", "x", [Want(1.25)])
    fleet.warm_up(max(4, scale.celery // 4))

    def turn(lane: Lane) -> Iterator[tuple[Row, str, float]]:
        small = lane.work("window", count=calls, limit=few)
        large = lane.work("window", count=many, limit=many)
        for figures in (small, large):
            figures["cpu"] = sum(figures[f"{who}_cpu"] for who in WHO)
        for row, what in ((wall, "seconds"), (own, "cpu")):
            yield row, lane.name, (large[what] / many) / (small[what] / calls)

    fleet.race(scale.few_rounds, turn, "wove")
    for row in (wall, own):
        row.failures.update(fleet.failures())
    return [wall, own]


def threads_rows(fleet: Fleet) -> list[Row]:
    """Tasks of 100 ms on 50 threads."""
    scale = fleet.bench.scale
    ideal = max(1.0, scale.naps / THREADS) * NAP_SECONDS
    row = Row(
        "threads",
        f"Celery, {THREADS} threads",
        f"{scale.naps:,} tasks of 100 ms: share of the ideal {ideal:g} s",
        "%",
    )
    fleet.warm_up(max(4, scale.naps // 10), "naps")

    def turn(lane: Lane) -> Iterator[tuple[Row, str, float]]:
        yield row, lane.name, 100 * ideal / lane.work("naps", count=scale.naps)["seconds"]

    fleet.race(scale.few_rounds, turn)
    row.failures.update(fleet.failures())
    return [row]
