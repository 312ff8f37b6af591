"""The report of a chaos run: for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wove_tests.chaos.ledger import EXAMPLES, quantiles, totals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove_tests.chaos.executions import Executions
    from wove_tests.chaos.ledger import Ledger
    from wove_tests.chaos.nemesis import Nemesis
    from wove_tests.chaos.vitals import Vitals

_MIB = 1024 * 1024


@dataclass
class Report:
    """Everything that a run of the chaos test found out."""

    seed: int
    seconds: float
    ledger: Ledger
    executions: Executions
    nemesis: Nemesis
    before: Vitals
    warm: Vitals
    half: Vitals
    after: Vitals
    loop_lag: float
    tasks_left: list[str]
    closed_runs: int
    features: dict[str, bool]
    #: By environment, whether it worked when everything was mended.
    recovered: dict[str, bool]
    #: Errors that were logged, and exceptions that nobody fetched, with how often.
    complaints: Counter[str] = field(default_factory=Counter)

    @property
    def defects(self) -> dict[str, list[str]]:
        """What makes the run fail, with each case."""
        blind = [] if self.closed_runs else ["no run was seen to be closed: watch_outcomes() watches nothing"]
        broken = [name for name, works in self.recovered.items() if not works]
        return {
            "lost": self.ledger.lost,
            "double": self.ledger.double,
            "wrong": self.ledger.wrong,
            "zombie": self.executions.zombies,
            "not recovered": broken,
            "problems of the test": blind + ([self.nemesis.problem] if self.nemesis.problem else []),
        }

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, double, wrong or undead."""
        return not any(self.defects.values())

    @property
    def threads_left(self) -> list[str]:
        """Threads that were not there before."""
        return sorted(self.after.threads - self.before.threads)

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data."""
        ledger, executions = self.ledger, self.executions
        return {
            "seed": self.seed,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "submitted": ledger.submitted,
            "outcomes": {name: dict(counts) for name, counts in ledger.outcomes.items()},
            **{name.replace(" ", "_"): len(cases) for name, cases in self.defects.items()},
            "cases": {name: cases for name, cases in self.defects.items() if cases},
            "executions": executions.started,
            "dup_exec": executions.duplicates,
            "retried": executions.retried,
            "started_late": executions.started_late.total(),
            "acknowledged_cancels": len(ledger.acknowledged),
            "false_alarms": executions.false_alarms,
            "unnoticed": executions.unnoticed,
            "undelivered": executions.undelivered,
            "shared_runs": ledger.shared,
            "closed_runs": self.closed_runs,
            "seconds_to_outcome": {
                name: dict(zip(("p50", "p99", "max"), quantiles(values), strict=True))
                for name, values in sorted(ledger.seconds.items())
            },
            "max_overshoot": ledger.max_overshoot,
            "loop_lag": self.loop_lag,
            "rss_growth": self.after.rss - self.warm.rss,
            "rss_growth_second_half": self.after.rss - self.half.rss,
            "rss_warm": self.warm.rss,
            "fd_growth": self.after.descriptors - self.before.descriptors,
            "threads_left": self.threads_left,
            "tasks_left": self.tasks_left,
            "features": self.features,
            "faults": dict(Counter(fault.name for fault in self.nemesis.faults)),
            # Monotonic seconds, as in the cases.
            "timeline": [
                (round(fault.begun, 2), round(fault.ended, 2), fault.name) for fault in self.nemesis.faults
            ],
            "died_by_themselves": [f"{name}: {log}" for name, log in self.nemesis.died],
            "complaints": dict(self.complaints),
        }

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        data, ledger, executions = self.as_data(), self.ledger, self.executions
        yield f"chaos, seed {self.seed}, {self.seconds:.0f} s, {data['submitted']} calls"
        yield ""
        yield from self._faults()
        yield ""
        yield f"  {'outcomes':<24}" + ", ".join(f"{n} {name}" for name, n in totals(ledger.outcomes))
        for name, counts in ledger.outcomes.items():
            yield f"    {name:<22}" + ", ".join(f"{n} {what}" for what, n in counts.most_common())
        yield f"  {'executions':<24}{executions.started}, {executions.duplicates} duplicate, {executions.retried} retried"
        yield f"  {'':<24}{data['started_late']} that nobody waited for; {data['acknowledged_cancels']} acknowledged cancels"
        shared = ledger.shared if self.features["delivery_idempotency_key"] else "not carried by this version"
        yield f"  {'shared runs':<24}{shared}"
        yield f"  {'retries':<24}{'used' if self.features['delivery_retries'] else 'not carried by this version'}"
        yield f"  {'seconds to outcome':<24}{'p50':>8}{'p99':>8}{'max':>8}{'calls':>8}"
        for name, values in sorted(ledger.seconds.items()):
            yield (
                f"    {name:<22}"
                + "".join(f"{value:8.3f}" for value in quantiles(values))
                + f"{len(values):8}"
            )
        late = f"{ledger.max_overshoot:.3f} s ({ledger.late})" if ledger.late else "no deadline was passed"
        yield f"  {'longest overshoot':<24}{late}"
        yield f"  {'loop held up':<24}{self.loop_lag * 1000:.0f} ms at most"
        rises = (self.half.rss - self.warm.rss) / _MIB, (self.after.rss - self.half.rss) / _MIB
        yield f"  {'memory':<24}{self.warm.rss / _MIB:.0f} MiB warm, {rises[0]:+.1f} at half-time, {rises[1]:+.1f} after"
        yield f"  {'descriptors':<24}{data['fd_growth']:+d}"
        yield f"  {'threads left':<24}{', '.join(self.threads_left) or 'none'}"
        yield f"  {'tasks left':<24}{', '.join(self.tasks_left) or 'none'}"
        yield ""
        for name, cases in self.defects.items():
            yield f"  {name:<24}{len(cases)}"
            yield from _examples(cases)
        for name, meaning, cases in (
            ("false alarms", "WorkerLostError of a living worker", executions.false_alarms),
            ("unnoticed", "DeliveryTimeoutError of a killed one", executions.unnoticed),
            ("undelivered", "DeliveryTimeoutError of work that was done", executions.undelivered),
        ):
            yield f"  {name:<24}{len(cases)} ({meaning})"
            yield from _examples(cases)
        if self.complaints:
            yield f"  {'complaints':<24}{self.complaints.total()}"
            yield from _examples([f"{n} x {text}" for text, n in self.complaints.most_common()])
        yield ""
        yield f"{'passed' if self.passed else 'FAILED'}; again with CHAOS_SEED={self.seed}"

    def _faults(self) -> Iterator[str]:
        counts = Counter(fault.name for fault in self.nemesis.faults)
        broken = sum(fault.ended - fault.begun for fault in self.nemesis.faults)
        yield f"  {'faults':<24}{counts.total()}, which took {broken:.0f} s"
        for name, count in sorted(counts.items()):
            yield f"    {count:3} {name}"
        if self.nemesis.died:
            died = Counter(name for name, _ in self.nemesis.died)
            yield "    workers that ended by themselves: " + ", ".join(f"{n} {e}" for e, n in died.items())


def _examples(cases: list[str]) -> Iterator[str]:
    for case in cases[:EXAMPLES]:
        yield f"    - {case}"
    if len(cases) > EXAMPLES:
        yield f"    ... and {len(cases) - EXAMPLES} more"
