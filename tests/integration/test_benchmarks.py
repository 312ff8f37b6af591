"""The benchmark runs through, in a size that measures nothing, and writes what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(BENCH),
        "--scale",
        "tiny",
        "--no-peer",
        "--output",
        str(folder),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.redis
def test_rows_with_and_without_a_fleet(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "celery", "ingest")
    assert done.returncode == 0, done.stderr
    # Wove 2.0.3 is not there, and says so; every other contender has its figures.
    assert "out of the race" not in done.stderr
    results = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "## Celery, prefork x2" in results
    assert "10 no-ops at once" in results
    assert "frames/s, 32 a request" in results
    plot = (tmp_path / "throughput.svg").read_text("utf-8")
    assert "Wove, map" in plot
    assert "Wove 2.0.3" not in plot


def test_a_row_that_does_not_exist(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "nonsense")
    assert done.returncode == 2
    assert "rq-fork" in done.stderr, "the rows that there are"
    assert os.listdir(tmp_path) == []
