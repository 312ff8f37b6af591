"""The conformance kit, over our own executors, over the one in the documentation, and over broken ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.fleets import FLEETS, fleet_params

from wove import LocalEnvironmentExecutor
from wove.testing import CHECKS, ConformanceError, executor_conformance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from wove_tests.fleets import Fleets

    from wove.frames import Frame

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "custom-executors.md"


@pytest.mark.parametrize(
    "fleet", fleet_params("local", "memory", "stdio-1", "http", "grpc", "websocket", "celery-redis-threads")
)
async def test_our_own_executors_conform(fleet: str, fleets: Fleets) -> None:
    # In this process a lock is a result like any other.
    skip = ("unencodable",) if fleet == "local" else ()
    passed = await executor_conformance(lambda: fleets.executor_definition(FLEETS[fleet].name), skip=skip)
    assert set(passed) == set(CHECKS) - set(skip)


@pytest.fixture
def pool_executor(tmp_path: Path) -> Iterator[ModuleType]:
    """The executor of docs/custom-executors.md, as a module."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if "class PoolExecutor" in block]
    path = tmp_path / "pool_executor.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("pool_executor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pool_executor"] = module
    sys.path.insert(0, str(tmp_path))  # for the pool's processes
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(tmp_path))
    del sys.modules["pool_executor"]


async def test_the_documented_executor_conforms(pool_executor: ModuleType) -> None:
    config = {"processes": 2}
    passed = await executor_conformance(
        lambda: {"executor": pool_executor.PoolExecutor(), "executor_config": config}
    )
    assert set(passed) == set(CHECKS)


class _Forgetful(LocalEnvironmentExecutor):
    """Reports what it likes."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self._forgets = forgets

    async def recv(self) -> Frame:
        frame = await super().recv()
        if frame["type"] == self._forgets:
            frame = {**frame, "run_id": "0" * 32}
        return frame


async def test_a_lost_outcome_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wove.testing.CHECK_SECONDS", 0.5)
    with pytest.raises(ConformanceError, match="results: TimeoutError: no end within") as caught:
        await executor_conformance(
            lambda: {"executor": _Forgetful("task_result")}, skip=set(CHECKS) - {"results", "exceptions"}
        )
    assert set(caught.value.failures) == {"results"}


async def test_a_second_outcome_is_found() -> None:
    class Twice(LocalEnvironmentExecutor):
        async def recv(self) -> Any:
            frame = await super().recv()
            if frame["type"] == "task_result" and not frame.pop("again", False):
                assert self._channel is not None
                self._channel.put([{**frame, "again": True}])
            return frame

    with pytest.raises(ConformanceError, match="ended twice"):
        await executor_conformance(lambda: {"executor": Twice()}, skip=set(CHECKS) - {"frames"})


async def test_a_check_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no check is called 'typing'; known: results"):
        await executor_conformance(lambda: {}, skip=["typing"])
