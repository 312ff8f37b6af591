"""What users import: the names, where they lead, and what they cost."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import wove
import wove.environment

#: DESIGN.md, section 4: exactly these.
ENVIRONMENT = {
    "BackendAdapterEnvironmentExecutor",
    "DeliveryOrphanedError",
    "DeliveryTimeoutError",
    "EnvironmentExecutionError",
    "EnvironmentExecutor",
    "ExecutorRuntime",
    "GrpcEnvironmentExecutor",
    "HttpEnvironmentExecutor",
    "LocalEnvironmentExecutor",
    "MissingDispatchFeatureError",
    "StdioEnvironmentExecutor",
    "WebSocketEnvironmentExecutor",
    "WorkerLostError",
    "WoveError",
    "build_executor_from_name",
    "coerce_executor",
    "normalize_exception",
}


def in_a_fresh_interpreter(program: str) -> Any:
    """Run a program and return what it printed, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestNames:
    """Every name is there and leads to the one thing it names."""

    def test_the_documented_module_holds_exactly_the_documented_names(self) -> None:
        assert set(wove.environment.__all__) == ENVIRONMENT

    @pytest.mark.parametrize("module", ["wove", "wove.environment"])
    def test_every_name_is_listed_once_and_resolves(self, module: str) -> None:
        found = importlib.import_module(module)
        assert sorted(set(found.__all__)) == sorted(found.__all__)
        for name in found.__all__:
            assert getattr(found, name) is not None
        assert set(found.__all__) <= set(dir(found))

    @pytest.mark.parametrize("module", ["wove", "wove.environment"])
    def test_a_star_import_brings_all_of_it(self, module: str) -> None:
        namespace: dict[str, Any] = {}
        exec(f"from {module} import *", namespace)
        assert set(namespace) - {"__builtins__"} == set(importlib.import_module(module).__all__)

    def test_the_shortcuts_are_the_same_objects(self) -> None:
        for name in set(wove.__all__) & ENVIRONMENT:
            assert getattr(wove, name) is getattr(wove.environment, name)
        assert wove.current is importlib.import_module("wove.worker").current

    def test_a_name_that_does_not_exist_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'wove' has no attribute 'no_such_name'"):
            _ = wove.no_such_name
        with pytest.raises(ImportError):
            exec("from wove import no_such_name")

    @pytest.mark.parametrize("name", sorted(ENVIRONMENT))
    def test_everything_has_a_docstring(self, name: str) -> None:
        assert inspect.getdoc(getattr(wove.environment, name))

    def test_the_version_is_that_of_the_project(self) -> None:
        assert wove.__version__.count(".") == 2


class TestSignatures:
    """Contracts that callers and implementors are written against."""

    @pytest.mark.parametrize(
        ("function", "signature"),
        [
            (wove.ExecutorRuntime, ["environment_definitions", "run_config=None"]),
            (wove.ExecutorRuntime.start, ["self"]),
            (wove.ExecutorRuntime.stop, ["self"]),
            (wove.ExecutorRuntime.ensure_environment, ["self", "environment_name", "definition"]),
            (wove.ExecutorRuntime.is_local_environment, ["self", "environment_name"]),
            (
                wove.ExecutorRuntime.run_task,
                ["self", "*task_name", "*task_func", "*task_args", "*task_info"],
            ),
            (
                wove.EnvironmentExecutor.start,
                ["self", "*environment_name", "*environment_config", "*run_config"],
            ),
            (wove.EnvironmentExecutor.send, ["self", "frame"]),
            (wove.EnvironmentExecutor.recv, ["self"]),
            (wove.EnvironmentExecutor.stop, ["self"]),
            (wove.LocalEnvironmentExecutor, []),
            (wove.environment.StdioEnvironmentExecutor, []),
            (wove.environment.HttpEnvironmentExecutor, ["*require_https=False"]),
            (wove.environment.GrpcEnvironmentExecutor, []),
            (wove.environment.WebSocketEnvironmentExecutor, []),
            (
                wove.BackendAdapterEnvironmentExecutor,
                ["name", "adapter_class=None", "required_modules=None"],
            ),
            (wove.build_executor_from_name, ["name"]),
            (wove.coerce_executor, ["value"]),
            (wove.normalize_exception, ["exc", "*source='task'", "*retryable=False"]),
            (wove.EnvironmentExecutionError, ["payload"]),
        ],
        ids=lambda value: getattr(value, "__qualname__", ""),
    )
    def test_they_are_as_documented(self, function: Any, signature: list[str]) -> None:
        described = [
            ("*" if parameter.kind is parameter.KEYWORD_ONLY else "")
            + parameter.name
            + ("" if parameter.default is parameter.empty else f"={parameter.default!r}")
            for parameter in inspect.signature(function).parameters.values()
        ]
        assert described == signature

    def test_an_executor_has_to_implement_all_four_methods(self) -> None:
        assert wove.EnvironmentExecutor.__abstractmethods__ == {"start", "send", "recv", "stop"}
        for name in ("start", "send", "recv", "stop"):
            assert inspect.iscoroutinefunction(getattr(wove.EnvironmentExecutor, name))


class TestImports:
    """A worker that imports `wove` pays for nothing that it does not use."""

    def test_import_wove_loads_nothing_else(self) -> None:
        loaded = in_a_fresh_interpreter(
            "import sys; before = set(sys.modules); import wove, json; print(json.dumps([*set(sys.modules) - before]))"
        )
        assert [name for name in loaded if name.startswith("wove.")] == []
        assert not {"asyncio", "aiohttp", "msgpack", "cloudpickle", "celery", "rq"} & set(loaded)

    def test_the_runtime_loads_no_backend_and_no_server(self) -> None:
        loaded = in_a_fresh_interpreter(
            "import sys, json, wove.environment; print(json.dumps([*sys.modules]))"
        )
        assert "wove.runtime" in loaded
        assert not {"aiohttp", "cloudpickle", "celery", "kombu", "rq", "redis"} & set(loaded)

    def test_without_the_extra_local_work_runs_and_other_work_names_the_command(self) -> None:
        told = in_a_fresh_interpreter(
            """
import sys
for missing in ("aiohttp", "cloudpickle", "msgpack", "celery", "rq", "redis"):
    sys.modules[missing] = None
import asyncio, json
from wove import ExecutorRuntime, MissingDispatchFeatureError

async def main():
    told = []
    async with ExecutorRuntime({"here": {}}) as runtime:
        told.append(await runtime["here"].run(abs, -1))
    for name in ("memory", "celery", "rq"):
        try:
            await ExecutorRuntime({"there": {"executor": name}}).start()
        except MissingDispatchFeatureError as exc:
            told.append(str(exc))
    return told

print(json.dumps(asyncio.run(main())))
"""
        )
        assert told[0] == 1
        assert len(told) == 4
        for text, extra in zip(told[1:], ("dispatch", "celery", "rq"), strict=True):
            assert f'pip install "wove[{extra}]"' in text
