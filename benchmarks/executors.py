"""Each executor beside the same executor of the published Wove 2.0.3, in one run on one machine.

    python benchmarks/executors.py                 # everything, some five minutes
    python benchmarks/executors.py --only http stdio --rounds 9

The two take turns, in an order that changes from round to round, each time in a new process that has warmed up
before it is measured. What counts is the median over the rounds of the factor within a round: whatever else the
machine does slows both. It ends with 1 unless Wove is ahead in every row by as much as the row asks for.

Wove 2.0.3 is installed into an environment of its own in a temporary folder (``--peer-python`` uses one that is
there already). Both are driven by the same program through the same call, ``ExecutorRuntime.run_task``. 2.0.3 comes
without services for http, grpc and websocket, so it speaks with ours: the same engine, behind its own wire format, and
without signatures, which ours carries. Both have their default settings: what 2.0.3 cannot carry with them is said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
PARTS = HERE / "executors_parts"
PEER_PACKAGES = ("wove==2.0.3", "cloudpickle", "grpcio", "numpy", "websockets")
EXECUTORS = ("stdio", "http", "grpc", "websocket")
#: Factors of the throughput that are asked for; elsewhere more than 1.
WANTED = {"http": 4.0, "stdio": 2.0}
SECRET = "a-secret-for-benchmarks-only"


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=EXECUTORS, default=EXECUTORS)
    parser.add_argument("--calls", type=int, default=5_000, help="calls for the throughput (5000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each executor (5)")
    parser.add_argument("--concurrency", type=int, default=64, help="calls at once (64)")
    parser.add_argument(
        "--processes", default="1", help="of `wove worker` (1; 0 runs tasks in the service's own)"
    )
    parser.add_argument("--peer-python", help="an interpreter that has Wove 2.0.3 and its libraries")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wove-benchmark-") as folder:
        peer = arguments.peer_python or install_peer(Path(folder))
        results = {name: compare(name, peer, arguments) for name in arguments.only}
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results, arguments)
    return (
        0
        if all(ahead(executor, key, rounds) for executor, rounds in results.items() for key, *_ in ROWS)
        else 1
    )


def install_peer(folder: Path) -> str:
    """Make an environment with the published Wove and return its interpreter."""
    print("Installing Wove 2.0.3 beside this one ...", file=sys.stderr)
    venv.create(folder / "peer", with_pip=True)
    python = str(folder / "peer" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-qq", *PEER_PACKAGES], check=True)
    return python


Round = dict[str, dict[str, Any]]


def compare(executor: str, peer: str, arguments: argparse.Namespace) -> list[Round]:
    """Measure one executor of both, in turn."""
    rounds: list[Round] = []
    with ExitStack() as stack:
        sides = {
            "ours": (sys.executable, ours_definition(executor, arguments.processes, stack)),
            "peer": (peer, peer_definition(executor, arguments.processes, stack)),
        }
        for number in range(arguments.rounds):
            print(f"{executor}: round {number + 1} of {arguments.rounds} ...", file=sys.stderr)
            # Whoever comes second in one round comes first in the next.
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            rounds.append({side: drive(*sides[side], arguments) for side in order})
    return rounds


def figure(rounds: list[Round], side: str, key: str) -> float | str:
    """Return the median of a figure, or why there is none."""
    values = [rounds_of[side].get(key, "nothing measured") for rounds_of in rounds]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return statistics.median(numbers) if numbers else str(values[0])


def factors(rounds: list[Round], key: str) -> list[float]:
    """Return by what factor ours was better, per round in which both have a figure."""
    found = []
    for one in rounds:
        ours, theirs = one["ours"].get(key), one["peer"].get(key)
        if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
            found.append(ours / theirs if key == "per_second" else theirs / ours)
    return found


def wanted(executor: str, key: str) -> float:
    """Return the factor that a row asks for."""
    return WANTED.get(executor, 1.0) if key == "per_second" else 1.0


def ahead(executor: str, key: str, rounds: list[Round]) -> bool:
    """Tell whether ours is ahead by as much as is asked for; what the other cannot do at all counts."""
    found = factors(rounds, key)
    if found:
        return statistics.median(found) >= wanted(executor, key)
    return not isinstance(figure(rounds, "ours", key), str)


def environment() -> dict[str, str]:
    """Return the variables that every process gets."""
    path = os.pathsep.join(filter(None, [str(PARTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "WOVE_SECRET": SECRET}


def drive(python: str, definition: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    options = {"definition": definition, "calls": arguments.calls, "concurrency": arguments.concurrency}
    done = subprocess.run(
        [python, str(PARTS / "drive.py"), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        text=True,
        check=False,
        # Not where this repository is: `-m wove...` would find it instead of 2.0.3.
        cwd=PARTS,
    )
    lines = done.stdout.strip().splitlines()
    if not lines:
        return {"per_second": f"ended with {done.returncode}"}
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def ours_definition(executor: str, processes: str, stack: ExitStack) -> dict[str, Any]:
    """Return our environment, with its service started."""
    if executor == "stdio":
        return {"executor": executor}
    command = [sys.executable, "-m", "wove.cli", "worker", executor, "--port", "0", "--processes", processes]
    address = stack.enter_context(started([*command, "--log-level", "warning"]))
    return {"executor": executor, "executor_config": {"target" if executor == "grpc" else "url": address}}


def peer_definition(executor: str, processes: str, stack: ExitStack) -> dict[str, Any]:
    """Return Wove 2.0.3's environment, with a service started."""
    if executor == "stdio":
        return {"executor": executor}
    command = [sys.executable, str(PARTS / "peer_service.py"), executor, processes]
    address = stack.enter_context(started(command))
    config = {"target" if executor == "grpc" else "url": address, "security": "none"}
    return {"executor": executor, "executor_config": config}


@contextmanager
def started(command: list[str]) -> Iterator[str]:
    """Start a service; yield the address that ends the line by which it says that it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        if process.stdout is None:
            raise RuntimeError("no standard output")
        line = process.stdout.readline().split()
        if not line:
            raise RuntimeError(f"{command} did not start")
        yield line[-1]
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


ROWS = (
    ("per_second", "no-op, calls/s", "{:,.0f}"),
    ("p50_ms", "one call, p50 ms", "{:.2f}"),
    ("p99_ms", "one call, p99 ms", "{:.2f}"),
    ("array_s", "64 MiB there and back, s", "{:.2f}"),
)


def print_table(results: dict[str, list[Round]], arguments: argparse.Namespace) -> None:
    """Print a Markdown table."""
    print(
        f"\nNo-ops with {arguments.concurrency} at once; medians of {arguments.rounds} rounds in turn, on "
        f"{os.cpu_count()} CPUs.\n"
    )
    print("| executor | | Wove | Wove 2.0.3 | factor | from - to | asked for | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for executor, rounds in results.items():
        for key, title, form in ROWS:
            values = [figure(rounds, side, key) for side in ("ours", "peer")]
            cells = [form.format(value) if not isinstance(value, str) else value for value in values]
            found = factors(rounds, key)
            cells.append(f"{statistics.median(found):.2f} x" if found else "")
            cells.append(f"{min(found):.2f} - {max(found):.2f}" if found else "")
            cells.append(f"{wanted(executor, key):g} x")
            cells.append("ahead" if ahead(executor, key, rounds) else "BEHIND")
            print(f"| {executor} | {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
