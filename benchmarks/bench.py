"""Wove beside raw Celery, raw RQ and the published Wove 2.0.3: in one run, in turns, on this machine.

    make bench                  # everything, about eight minutes; writes benchmarks/RESULTS.md and the plot
    make bench-quick            # a first look, under two minutes; writes into build/bench
    python benchmarks/bench.py --only celery stall --rounds 7

All servers and workers are started for the occasion, on free ports of loopback, and ended. Only one contender works at a
time, and each round lets all take their turn, so that what else the machine does falls on all; figures are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from parts.fleets import Bench, Fleet, FleetStarter
from parts.peer import peer_python
from parts.processes import BENCHMARKS, BUILD, BenchError, prepare_environment, say
from parts.report import Report, write_readme
from parts.scale import SCALES
from parts.stages import STAGES, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> int:
    """Measure, write what was found, and say what was reached; 1 when something could not be measured."""
    arguments = parse()
    folder = BUILD if arguments.output is None else arguments.output
    kept = BUILD / f"results-{arguments.scale}.json"
    if arguments.readme:
        try:
            write_readme(Report.load(kept))
        except BenchError as exc:
            say(str(exc))
            return 1
        return 0
    prepare_environment()
    BUILD.mkdir(parents=True, exist_ok=True)
    scale = SCALES[arguments.scale]
    if arguments.rounds:
        number = arguments.rounds
        scale = replace(scale, rounds=number, few_rounds=number, light_rounds=number)
    stages = [stage for stage in STAGES if not arguments.only or stage.key in arguments.only]
    report = Report.begin(scale.name, command_line())
    with Bench(scale, None if arguments.no_peer else peer_python()) as bench:
        failed = measure(bench, stages, report)
    report.end()
    whole = not arguments.only and not failed
    if arguments.output is None and scale.name == "full" and whole:
        folder = BENCHMARKS
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder)
    if whole:
        kept.write_text(json.dumps(report.to_dict(), indent=1), "utf-8")
    print(report.summary())
    say(f"written to {os.path.relpath(folder / 'RESULTS.md')}")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much is measured (full)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ROW",
        choices=[stage.key for stage in STAGES],
        help="of " + ", ".join(stage.key for stage in STAGES),
    )
    parser.add_argument("--rounds", type=int, help="of each comparison")
    parser.add_argument("--no-peer", action="store_true", help="leave Wove 2.0.3 out, install nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for RESULTS.md and the plot")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="measure nothing: write the figures of the last whole run of that scale into README.md",
    )
    return parser.parse_args()


def measure(bench: Bench, stages: Sequence[Stage], report: Report) -> list[str]:
    """Measure stage by stage; those that share a fleet stand together. Return what failed."""
    failed = []
    for fleet_key, group in itertools.groupby(stages, key=lambda stage: stage.fleet):
        with ExitStack() as stack:
            fleet: Fleet | None = None
            for stage in group:
                say(f"{stage.key}: {stage.title}")
                try:
                    if fleet is None and fleet_key is not None:
                        fleet = stage.start(stack.enter_context(FleetStarter(bench)))
                    rows = stage.measure(bench, fleet)
                except BenchError as exc:
                    say(f"{stage.key} failed: {exc}")
                    failed.append(stage.key)
                    continue
                for row in rows:
                    say(f"  {report.line(row)}")
                report.rows += rows
    return failed


def command_line() -> str:
    """Return the command that reproduces this run."""
    return " ".join(["python", "benchmarks/bench.py", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
