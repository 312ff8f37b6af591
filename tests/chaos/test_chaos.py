"""Nothing is lost, double, wrong or undead while workers, brokers and the network fail: a short `make chaos`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from wove_tests.callbacks import child_environment

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 60 if os.environ.get("CI") else 20
#: Seconds beside: starting the fleet, the last calls' deadlines, mending, stopping.
MARGIN = 180


@pytest.mark.redis
@pytest.mark.timeout(SECONDS + MARGIN + 20)
def test_every_call_has_one_right_outcome_whatever_dies(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ended = subprocess.run(
        [sys.executable, "-m", "wove_tests.chaos"],
        env=child_environment(CHAOS_SECONDS=str(SECONDS), CHAOS_REPORT=str(report)),
        capture_output=True,
        text=True,
        timeout=SECONDS + MARGIN,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert found["submitted"] > 100
    assert sum(found["faults"].values()) >= 3
    print(ended.stdout)
