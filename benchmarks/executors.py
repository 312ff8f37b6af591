"""Each executor beside the same executor of the published Wove 2.0.3, in one run on one machine.

    python benchmarks/executors.py                 # everything, some three minutes
    python benchmarks/executors.py --only http stdio --rounds 40

Both run all the time, each with a service of its own, and take turns of a fraction of a second, in an order that
changes from round to round; both have warmed up before anything counts. A percentile is taken within a turn, of
the same number of calls on both sides; what counts is the median over the rounds. The range is that of the middle
half of the factors within a round. It ends with 1 unless Wove is ahead in every row by as much as the row asks for.

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
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
PARTS = HERE / "executors_parts"
PEER_PACKAGES = ("wove==2.0.3", "cloudpickle", "grpcio", "numpy", "websockets")
EXECUTORS = ("stdio", "http", "grpc", "websocket")
SIDES = ("ours", "peer")
SECRET = "a-secret-that-is-good-for-benchmarks-only"
#: Calls of one turn: one after another, and at once.
LATENCIES = 200
CALLS = 1_000
#: Rounds for the array, which takes long.
ARRAYS = 3


class Row(NamedTuple):
    """One line of the table: a figure, and by what factor ours is to be ahead."""

    key: str
    title: str
    form: str
    wanted: dict[str, float]


ROWS = (
    Row("per_second", "no-op, calls/s", "{:,.0f}", {"http": 4.0, "stdio": 2.0}),
    Row("p50_ms", "one call, p50 ms", "{:.3f}", {}),
    Row("p99_ms", "one call, p99 ms", "{:.3f}", {}),
    Row("array_s", "64 MiB there and back, s", "{:.2f}", {}),
)
#: What one side showed: for each row a figure per round, or why there is none.
Shown = dict[str, list[float | str]]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=EXECUTORS, default=EXECUTORS)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each executor (20)")
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
    return 0 if all(ahead(name, row, shown) for name, shown in results.items() for row in ROWS) else 1


def install_peer(folder: Path) -> str:
    """Make an environment with the published Wove and return its interpreter."""
    print("Installing Wove 2.0.3 beside this one ...", file=sys.stderr)
    venv.create(folder / "peer", with_pip=True)
    python = str(folder / "peer" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-qq", *PEER_PACKAGES], check=True)
    return python


# --- measuring -----------------------------------------------------------------


def compare(executor: str, peer: str, arguments: argparse.Namespace) -> dict[str, Shown]:
    """Measure one executor of both, in turn."""
    shown: dict[str, Shown] = {side: {row.key: [] for row in ROWS} for side in SIDES}
    with ExitStack() as stack:
        sides = {
            "ours": Driver(sys.executable, ours_definition(executor, arguments.processes, stack), stack),
            "peer": Driver(peer, peer_definition(executor, arguments.processes, stack), stack),
        }
        print(f"{executor}: {arguments.rounds} rounds ...", file=sys.stderr)
        for number in range(arguments.rounds + 1):
            # Whoever comes second in one round comes first in the next.
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            turns = [(side, turn(sides[side], arguments.concurrency)) for side in order]
            if number:  # the first round is the warm-up
                for side, figures in turns:
                    for key, figure in figures.items():
                        shown[side][key].append(figure)
        for number in range(ARRAYS + 1):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                figure = (
                    sides[side].ask({"measure": "array"})
                    if sides[side].carries_arrays
                    else shown[side]["array_s"][0]
                )
                if isinstance(figure, dict):
                    # Asked once: what fails need not be waited for again, and may have broken more than the call.
                    sides[side].carries_arrays = False
                    figure = str(figure["fails"])
                if number or isinstance(figure, str):
                    shown[side]["array_s"].append(figure)
    return shown


def turn(driver: Driver, concurrency: int) -> dict[str, float | str]:
    """Return the figures of one turn."""
    times = driver.ask({"measure": "latency", "calls": LATENCIES})
    rate = driver.ask({"measure": "throughput", "calls": CALLS, "concurrency": concurrency})
    if isinstance(times, dict):
        figures: dict[str, float | str] = {"p50_ms": times["fails"], "p99_ms": times["fails"]}
    else:
        times.sort()
        figures = {"p50_ms": times[len(times) // 2], "p99_ms": times[len(times) * 99 // 100]}
    return {**figures, "per_second": rate["fails"] if isinstance(rate, dict) else rate}


class Driver:
    """A process that has an environment started, and measures when it is told to."""

    def __init__(self, python: str, definition: dict[str, Any], stack: ExitStack) -> None:
        self.carries_arrays = True
        self._process = stack.enter_context(
            running(
                [python, str(PARTS / "drive.py"), json.dumps(definition)],
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Not where this repository is: `-m wove...` would find it instead of 2.0.3.
                cwd=PARTS,
            )
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Have something measured."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no standard input or output")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says that it has ended
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"fails": f"ended with {self._process.wait()}"}


def environment() -> dict[str, str]:
    """Return the variables that every process gets."""
    path = os.pathsep.join(filter(None, [str(PARTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "WOVE_SECRET": SECRET}


def ours_definition(executor: str, processes: str, stack: ExitStack) -> dict[str, Any]:
    """Return our environment, with its service started."""
    if executor == "stdio":
        return {"executor": executor}
    command = [sys.executable, "-m", "wove.cli", "worker", executor, "--port", "0", "--processes", processes]
    address = service([*command, "--log-level", "warning"], stack)
    return {"executor": executor, "executor_config": {"target" if executor == "grpc" else "url": address}}


def peer_definition(executor: str, processes: str, stack: ExitStack) -> dict[str, Any]:
    """Return Wove 2.0.3's environment, with a service started."""
    if executor == "stdio":
        return {"executor": executor}
    address = service([sys.executable, str(PARTS / "peer_service.py"), executor, processes], stack)
    config = {"target" if executor == "grpc" else "url": address, "security": "none"}
    return {"executor": executor, "executor_config": config}


def service(command: list[str], stack: ExitStack) -> str:
    """Start a service; return the address that ends the line by which it says that it is ready."""
    process = stack.enter_context(running(command))
    line = process.stdout.readline().split() if process.stdout is not None else []
    if not line:
        raise RuntimeError(f"{command} did not start")
    return str(line[-1])


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the end of the block; a driver ends by itself when nothing more is asked."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), **options)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        else:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


# --- the verdict ---------------------------------------------------------------


def numbers(figures: list[float | str]) -> list[float]:
    """Return what was measured, without the reasons why something was not."""
    return [figure for figure in figures if isinstance(figure, (int, float))]


def factors(row: Row, shown: dict[str, Shown]) -> list[float]:
    """Return by what factor ours was better: of the medians, and within the rounds in which both have a figure."""
    ours, theirs = shown["ours"][row.key], shown["peer"][row.key]
    if not numbers(ours) or not numbers(theirs):
        return []
    pairs = [(statistics.median(numbers(ours)), statistics.median(numbers(theirs)))]
    pairs += [(a, b) for a, b in zip(ours, theirs, strict=False) if numbers([a, b]) == [a, b]]
    return [a / b if row.key == "per_second" else b / a for a, b in pairs]


def ahead(executor: str, row: Row, shown: dict[str, Shown]) -> bool:
    """Tell whether ours is ahead by as much as is asked for; what the other cannot do at all counts."""
    found = factors(row, shown)
    if found:
        return found[0] >= row.wanted.get(executor, 1.0)
    return bool(numbers(shown["ours"][row.key]))


def cell(row: Row, figures: list[float | str]) -> str:
    """Return the median of a figure, or why there is none."""
    found = numbers(figures)
    return row.form.format(statistics.median(found)) if found else str(figures[0])


def print_table(results: dict[str, dict[str, Shown]], arguments: argparse.Namespace) -> None:
    """Print a Markdown table."""
    print(
        f"\nNo-ops with {arguments.concurrency} at once; medians of {arguments.rounds} rounds in turn, on "
        f"{os.cpu_count()} CPUs.\n"
    )
    print("| executor | | Wove | Wove 2.0.3 | factor | middle half | asked for | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for executor, shown in results.items():
        for row in ROWS:
            first, *others = factors(row, shown) or [0.0]
            middle = statistics.quantiles(others, n=4) if len(others) > 1 else []
            cells = [cell(row, shown[side][row.key]) for side in SIDES]
            cells.append(f"{first:.2f} x" if first else "")
            cells.append(f"{middle[0]:.2f} - {middle[2]:.2f}" if middle else "")
            cells.append(f"{row.wanted.get(executor, 1.0):g} x")
            cells.append("ahead" if ahead(executor, row, shown) else "BEHIND")
            print(f"| {executor} | {row.title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
