"""Each executor beside the same executor of the published Wove 2.0.3, in one run on one machine.

    python benchmarks/executors.py                 # everything, two or three minutes
    python benchmarks/executors.py --only http stdio --calls 500

Wove 2.0.3 is installed into an environment of its own in a temporary folder (``--peer-python`` uses one that is
there already). Both are driven by the same program through the same call, ``ExecutorRuntime.run_task``. 2.0.3 comes
without services for http, grpc and websocket, so it speaks with ours: the same engine, behind its own wire format, and
without signatures, which ours carries.
"""

from __future__ import annotations

import argparse
import json
import os
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
#: Runs of each measurement, alternating between the two; the best counts.
ROUNDS = 2
SECRET = "a-secret-for-benchmarks-only"


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=EXECUTORS, default=EXECUTORS)
    parser.add_argument("--calls", type=int, default=2_000, help="calls for the throughput (2000)")
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
        print_table(results, arguments.concurrency)
    return 0


def install_peer(folder: Path) -> str:
    """Make an environment with the published Wove and return its interpreter."""
    print("Installing Wove 2.0.3 beside this one ...", file=sys.stderr)
    venv.create(folder / "peer", with_pip=True)
    python = str(folder / "peer" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-qq", *PEER_PACKAGES], check=True)
    return python


def compare(executor: str, peer: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure one executor of both, in turn."""
    best: dict[str, dict[str, Any]] = {"ours": {}, "peer": {}}
    with ExitStack() as stack:
        ours = ours_definition(executor, arguments.processes, stack)
        theirs = peer_definition(executor, arguments.processes, stack)
        for _ in range(ROUNDS):
            for side, python, definition in (("ours", sys.executable, ours), ("peer", peer, theirs)):
                print(f"{executor}: {side} ...", file=sys.stderr)
                for name, value in drive(python, definition, arguments).items():
                    best[side][name] = better(name, best[side].get(name), value)
    return best


def better(name: str, one: Any, other: Any) -> Any:
    """Return the better of two figures; a failure only where there is nothing else."""
    figures = [value for value in (one, other) if isinstance(value, (int, float))]
    if not figures:
        return other
    return max(figures) if name == "per_second" else min(figures)


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


def print_table(results: dict[str, dict[str, dict[str, Any]]], concurrency: int) -> None:
    """Print a Markdown table."""
    print(
        f"\nNo-ops with {concurrency} at once; the best of {ROUNDS} runs each, in turn, on {os.cpu_count()} CPUs.\n"
    )
    print("| executor | | Wove | Wove 2.0.3 | factor |")
    print("|---|---|---|---|---|")
    for executor, sides in results.items():
        for key, title, form in ROWS:
            ours, theirs = sides["ours"].get(key), sides["peer"].get(key)
            factor = ""
            if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
                factor = f"{ours / theirs if key == 'per_second' else theirs / ours:.1f} x"
            cells = [form.format(v) if isinstance(v, (int, float)) else str(v) for v in (ours, theirs)]
            print(f"| {executor} | {title} | {cells[0]} | {cells[1]} | {factor} |")


if __name__ == "__main__":
    sys.exit(main())
