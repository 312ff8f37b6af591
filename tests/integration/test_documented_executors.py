"""docs/executors.md: every configuration runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from wove_tests.services import WorkerService

from wove.demo.processes import free_port
from wove.executors.registry import _BUILT_IN

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "executors.md").read_text("utf-8")


def section(name: str) -> str:
    """Return the text of one section."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    assert found, name
    return found.group(1)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("local", r"6"),
        ("stdio", r"(\d+) is not (?!\1)\d+"),
        ("http and https", r"6"),
        ("websocket", r"6"),
        ("grpc", r"6"),
    ],
)
def test_a_section_runs_as_printed(name: str, printed: str, tmp_path: Path) -> None:
    text = section(name)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with ExitStack() as stack:
        for kind, port in re.findall(r"^wove worker (\w+) --port (\d+)$", text, re.MULTILINE):
            # Another port, for this machine may be using that one.
            other = free_port()
            assert f":{port}" in program
            program = program.replace(f":{port}", f":{other}")
            stack.enter_context(WorkerService(kind, port=other))
        script = tmp_path / "program.py"
        script.write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(printed, done.stdout.strip()), done.stdout


def test_the_table_holds_every_executor() -> None:
    table = TEXT.split("\n## ")[0]
    assert all(f"`{name}`" in table for name in (*_BUILT_IN, "celery", "rq"))


def test_every_setting_is_described() -> None:
    from wove.executors.grpc import GrpcEnvironmentExecutor
    from wove.executors.http import HttpEnvironmentExecutor
    from wove.executors.network import NETWORK_KEYS
    from wove.executors.stdio import _KEYS
    from wove.executors.websocket import WebSocketEnvironmentExecutor

    keys = {
        *_KEYS, *NETWORK_KEYS, *HttpEnvironmentExecutor.config_keys, *GrpcEnvironmentExecutor.config_keys,
        *WebSocketEnvironmentExecutor.config_keys,
    }  # fmt: skip
    assert [key for key in sorted(keys) if f"`{key}`" not in TEXT] == []
