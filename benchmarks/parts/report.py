"""The figures as text: RESULTS.md, the README's section, and what is printed."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from parts.figures import CONTENDERS, Row, number
from parts.plot import throughput_plot
from parts.processes import BENCHMARKS, BenchError
from wove.demo.processes import find_redis_server

if TYPE_CHECKING:
    from pathlib import Path

    from parts.figures import Want

PLOT = "throughput.svg"
README = BENCHMARKS.parent / "README.md"
BEGIN, END = "<!-- speed: begin, written by benchmarks/bench.py --readme -->", "<!-- speed: end -->"
LIBRARIES = (
    "celery", "kombu", "billiard", "rq", "redis", "aiohttp", "msgpack", "cloudpickle", "numpy",
)  # fmt: skip

EXPLAINED = """\
Medians, with the least and the most in brackets; *against* is by what factor Wove is better, the median of the factors of the
rounds: more than 1 is better in every row. All contenders run on the same machine in the same run and take turns; whoever begins changes with each
round. Each has workers and a process to call from of its own, which are warmed up and idle while another is measured.

- **raw Celery**: `delay()` for all, then `get()` for each; results in Redis, JSON. **raw RQ**: `enqueue()` for all, then
  `latest_result(timeout=...)` for each, a blocking read that does not poll; RQ's own serializer.
- **Wove 2.0.3** is the published package, in an environment of its own with the same releases of everything else. On Celery its worker has
  the task `wove.run_backend_payload`, which its users define themselves, without a result backend. On RQ **its job ids are patched**: they
  contain a colon, which RQ 2.12 and later refuse, so as published it runs nothing there.
- **Wove** is this project: `run()` for calls at once and one after another, `map()` for the rows that say so. `map` is held against the
  others' calls at once, as they have no counterpart.
- Processor time is that of the calling process and of the workers, Redis left out. Memory in arrays: by how much the process grew over what it held
  before, at its peak (VmHWM), as a multiple of the array's size; the caller holds the array that it sends and the one that it gets.
"""


@dataclass
class Report:
    """All that one run has found out."""

    scale: str
    command: str
    begun: str
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    minutes: float = 0.0

    @classmethod
    def begin(cls, scale: str, command: str) -> Report:
        """Return the report of a run that begins now."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(scale, command, now.isoformat(timespec="minutes"), _machine())

    def end(self) -> None:
        """Note how long it took and what the machine was like."""
        begun = datetime.datetime.fromisoformat(self.begun)
        self.minutes = (datetime.datetime.now(datetime.UTC) - begun).total_seconds() / 60
        self.machine["load when it ended"] = _load()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def load(cls, file: Path) -> Report:
        """Read a report that was kept.

        Raises:
            BenchError: there is none.
        """
        try:
            data = json.loads(file.read_text("utf-8"))
        except OSError as exc:
            raise BenchError(f"no figures in {file}: run `make bench` first") from exc
        return cls(**{**data, "rows": [Row.from_dict(row) for row in data["rows"]]})

    def row(self, key: str) -> Row | None:
        """Return a row, None where it was not measured."""
        return next((row for row in self.rows if row.key == key), None)

    def write(self, folder: Path) -> None:
        """Write RESULTS.md and the plot."""
        (folder / PLOT).write_text(throughput_plot(self.rows), "utf-8")
        (folder / "RESULTS.md").write_text(self.markdown(), "utf-8")

    def markdown(self) -> str:
        """Return RESULTS.md."""
        facts = "\n".join(f"| {name} | {value} |" for name, value in self.machine.items())
        parts = [
            "# Results of the benchmark",
            f"`{self.command}` ({self.scale} run of {self.minutes:.1f} minutes), begun {self.begun}. `make bench` writes this file.",
            f"![Tasks per second]({PLOT})",
            EXPLAINED,
            f"## Asked for\n\n{self._asked_for()}",
        ]
        parts += [f"## {group}\n\n{_table(rows)}" for group, rows in self._groups()]
        parts.append(f"## The machine\n\n| | |\n|---|---|\n{facts}")
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def summary(self) -> str:
        """Return what was asked for and what was reached, for the terminal."""
        return self._asked_for()

    def line(self, row: Row) -> str:
        """Return one row as a line of text."""
        found = [
            f"{title} {number(median)}"
            for name, title in CONTENDERS.items()
            if (median := row.median(name)) is not None
        ]
        found += [
            f"{CONTENDERS[name]}: {reason[:80]}"
            for name, reason in row.failures.items()
            if name in CONTENDERS
        ]
        verdict = {None: "", True: " (reached)", False: " (not reached)"}[row.reached()]
        return f"{row.title} [{row.unit}]: {', '.join(found)}{verdict}"

    def _groups(self) -> list[tuple[str, list[Row]]]:
        # Stages that share a fleet may add to one group in two places.
        order = list(dict.fromkeys(row.group for row in self.rows))
        rows = sorted(self.rows, key=lambda row: order.index(row.group))
        return [(group, list(found)) for group, found in itertools.groupby(rows, key=lambda row: row.group)]

    def _asked_for(self) -> str:
        lines = ["| | | asked for | found | |", "|---|---|---|---|---|"]
        for row in self.rows:
            if not row.wants:
                continue
            verdict = {None: "not measured", True: "reached", False: "**not reached**"}[row.reached()]
            joined = " or " if row.any_want else "; "
            asked = joined.join(_want(row, want) for want in row.wants)
            found = joined.join(_found(row, want) for want in row.wants)
            lines.append(f"| {row.group} | {row.title} | {asked} | {found} | {verdict} |")
        return "\n".join(lines)


def _want(row: Row, want: Want) -> str:
    if want.over is None:
        return f"{'≥' if row.more_is_better else '≤'} {want.limit:g} {_unit(row)}"
    return f"≥ {want.limit:g} × {CONTENDERS[want.over]}"


def _found(row: Row, want: Want) -> str:
    if want.over is None:
        median = row.median("wove")
        return "-" if median is None else f"{number(median)} {_unit(row)}"
    factor = row.factor(want.over)
    return "-" if factor is None else f"{number(factor)} ×"


def _unit(row: Row) -> str:
    return {"x": "×", "us": "µs"}.get(row.unit, row.unit)


def _table(rows: list[Row]) -> str:
    names = dict(CONTENDERS)
    if rows[0].key.startswith("rq"):
        names["peer"] += ", job ids patched"
    titles = " | ".join(names.values())
    lines = [f"| | unit | {titles} | against raw | against 2.0.3 |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_cell(row, name) for name in CONTENDERS]
        factors = [row.factor(name) for name in ("raw", "peer")]
        cells += ["" if factor is None else f"{number(factor)} ×" for factor in factors]
        lines.append(f"| {row.title} | {_unit(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    found = row.samples.get(name)
    if not found:
        return row.failures.get(name, "-").replace("|", "/")[:120]
    median = row.median(name)
    if median is None or len(found) == 1:
        return number(found[0])
    return f"{number(median)} ({number(min(found))} - {number(max(found))})"


# --- the machine ---------------------------------------------------------------


def _machine() -> dict[str, str]:
    facts = {
        "processors": str(os.cpu_count()),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "Python": platform.python_version(),
        "Redis": _first_line([find_redis_server() or "redis-server", "--version"]),
        "commit": _first_line(
            ["git", "-C", str(BENCHMARKS), "describe", "--always", "--dirty", "--exclude", "*"]
        ),
        "load when it began": _load(),
    }
    facts.update({name: metadata.version(name) for name in LIBRARIES})
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    words = done.stdout.strip().splitlines()
    return words[0].split(" sha=")[0] if words else "unknown"


def _load() -> str:
    return ", ".join(f"{load:.1f}" for load in os.getloadavg())


# --- the README ------------------------------------------------------------------


def write_readme(report: Report) -> None:
    """Write the figures' place in README.md anew.

    Raises:
        BenchError: the place is not there.
    """
    text = README.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"README.md has no place for the figures: {BEGIN} ... {END}")
    README.write_text(f"{before}{BEGIN}\n{_readme_part(report)}\n{END}{after}", "utf-8")


#: Rows of the README: the row's key, what it is called there, and what over.
_README_ROWS = (
    ("celery-unbatched", "Celery, calls at once"),
    ("celery-map", "Celery, `map`"),
    ("celery-p50", "Celery, one call after another (p50)"),
    ("rq-fork-unbatched", "RQ, calls at once"),
    ("rq-preloaded-unbatched", "RQ, calls at once, `rq worker -c wove.worker.rq_preload`"),
    ("rq-fork-map", "RQ, `map`"),
    ("array", "64 MiB array there and back"),
    ("array-caller", "peak memory of the caller for it"),
    ("stall", "longest stall of the event loop during 500 calls"),
    ("start-second", "starting an environment again"),
)


def _readme_part(report: Report) -> str:
    lines = [
        f"![Tasks per second, raw, Wove 2.0.3 and this project](benchmarks/{PLOT})",
        "",
        "| | against raw Celery or RQ | against Wove 2.0.3 | |",
        "|---|---|---|---|",
    ]
    for key, title in _README_ROWS:
        row = report.row(key)
        if row is None or (median := row.median("wove")) is None:
            continue
        factors = [row.factor(name) for name in ("raw", "peer")]
        cells = ["" if factor is None else f"{number(factor)} ×" for factor in factors]
        figure = f"{number(median)}{'' if row.unit == '/s' else ' '}{_unit(row)}"
        lines.append(f"| {title} | {' | '.join(cells)} | {figure} |")
    processors = report.machine["processors"]
    lines += [
        "",
        f"Medians of one run on {processors} processors, Redis on loopback, all in turns; more than 1 × is better than the other. All rows,\n"
        "their spread, the machine and how it is measured are in [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
    ]
    return "\n".join(lines)
