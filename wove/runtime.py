"""ExecutorRuntime: named environments, started together, and the calls into them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from wove.dispatch import Dispatcher
from wove.errors import ConfigurationError, WoveError
from wove.executors.local import LocalEnvironmentExecutor
from wove.executors.registry import coerce_executor
from wove.handle import EnvironmentHandle
from wove.policy import SETTINGS, DeliveryPolicy, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from wove.executors.base import EnvironmentExecutor

_DEFINITION_KEYS = ("executor", "executor_config", *SETTINGS)


class ExecutorRuntime:
    """Owns the executors of several named environments.

    ::

        async with ExecutorRuntime({"reports": {"executor": "celery", ...}}) as runtime:
            await runtime["reports"].run(build_report, account_id=7)

    Args:
        environment_definitions: ``{name: definition}``. A definition holds ``executor``
            (a name or an :class:`EnvironmentExecutor`; default ``"local"``),
            ``executor_config`` (a mapping) and any ``delivery_*`` default.
        run_config: defaults for all environments (``delivery_*``), handed on to executors.

    Raises:
        ConfigurationError: an unknown key or an unusable value; names environment and key.
    """

    def __init__(
        self,
        environment_definitions: Mapping[str, Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._definitions = {
            _check_name(name): _check_definition(name, definition)
            for name, definition in environment_definitions.items()
        }
        self._run_config = dict(run_config or {})
        DeliveryPolicy.resolve(self._run_config)
        self._dispatchers: dict[str, Dispatcher] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        # Counts calls of stop(): an environment that was starting meanwhile is stopped, too.
        self._stops = 0
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ExecutorRuntime:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    def __getitem__(self, environment_name: str) -> EnvironmentHandle:
        """Return the handle of a started environment.

        Raises:
            NameError: no environment has that name; names the nearest one.
        """
        return EnvironmentHandle(self._dispatcher(environment_name))

    async def start(self) -> None:
        """Start all environments, concurrently. Idempotent.

        Raises:
            Exception: what the first failing environment raised, with a note that names
                it; the other environments are stopped again.
        """
        names = list(self._definitions)
        try:
            results = await asyncio.gather(
                *(self.ensure_environment(name, self._definitions[name]) for name in names),
                return_exceptions=True,
            )
        except BaseException:
            await self.stop()
            raise
        failed = [
            (name, result)
            for name, result in zip(names, results, strict=True)
            if isinstance(result, BaseException)
        ]
        if failed:
            await self.stop()
            raise failed[0][1]

    async def stop(self) -> None:
        """Stop all environments; open runs end by their ``delivery_orphan_policy``. Idempotent."""
        self._stops += 1
        dispatchers = list(self._dispatchers.values())
        self._dispatchers.clear()
        for dispatcher in dispatchers:
            task = dispatcher.begin_stop()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        if self._ending:
            # Also what a stop() that was cancelled has begun.
            await asyncio.wait(self._ending)

    async def ensure_environment(self, environment_name: str, definition: Mapping[str, Any]) -> None:
        """Start an environment unless one of that name runs already.

        Raises:
            ConfigurationError: an unusable definition.
            Exception: what its executor's ``start`` raised, with a note naming the environment.
        """
        checked = _check_definition(_check_name(environment_name), definition)
        async with self._starting.setdefault(environment_name, asyncio.Lock()):
            if environment_name in self._dispatchers:
                return
            stops = self._stops
            executor = _build_executor(environment_name, checked)
            dispatcher = Dispatcher(
                environment_name,
                executor,
                checked.get("executor_config") or {},
                (checked, self._run_config),
            )
            try:
                await dispatcher.start(self._run_config)
            except Exception as exc:
                exc.add_note(f"while starting environment {environment_name!r}")
                raise
            if stops != self._stops:
                await dispatcher.stop()
                raise WoveError(
                    f"the runtime was stopped while environment {environment_name!r} was starting"
                )
            self._definitions[environment_name] = checked
            self._dispatchers[environment_name] = dispatcher

    def is_local_environment(self, environment_name: str) -> bool:
        """Tell whether the environment runs its tasks in this process.

        Raises:
            NameError: no environment has that name.
        """
        if environment_name in self._dispatchers:
            executor: object = self._dispatchers[environment_name].executor
        elif environment_name in self._definitions:
            executor = self._definitions[environment_name].get("executor", "local")
        else:
            raise self._unknown(environment_name)
        return executor == "local" or isinstance(executor, LocalEnvironmentExecutor)

    async def run_task(
        self,
        *,
        task_name: str,
        task_func: Callable[..., Any],
        task_args: Mapping[str, Any] | None,
        task_info: Mapping[str, Any],
    ) -> Any:
        """Run ``task_func(**task_args)`` and return its result.

        Args:
            task_name: shown in logs and errors as the task's id.
            task_func: any callable.
            task_args: keyword arguments.
            task_info: ``environment`` (a name) and any ``delivery_*`` override; an
                ``on_progress`` callable gets progress and log frames.

        Raises:
            As :meth:`EnvironmentHandle.run`; NameError for an unknown environment.
        """
        settings = {key: value for key, value in task_info.items() if key.startswith("delivery_")}
        if "environment" not in task_info:
            raise ConfigurationError(f'task {task_name!r}: task_info has no "environment"')
        return await self._dispatcher(task_info["environment"]).call(
            task_func,
            (),
            task_args or {},
            task_id=task_name,
            settings=settings,
            on_progress=task_info.get("on_progress"),
        )

    def _dispatcher(self, name: str) -> Dispatcher:
        dispatcher = self._dispatchers.get(name)
        if dispatcher is not None:
            return dispatcher
        if name in self._definitions:
            raise WoveError(
                f"environment {name!r} is not started: use `async with ExecutorRuntime(...)`, or await start()"
            )
        raise self._unknown(name)

    def _unknown(self, name: str) -> NameError:
        return NameError(f"unknown environment {name!r}{nearest(name, self._definitions)}")


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name.encode()) <= 200:
        raise ConfigurationError(f"an environment's name is a string of 1 to 200 bytes; got {name!r}")
    return name


def _check_definition(name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
    try:
        checked = dict(definition)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"environment {name!r}: a definition is a mapping, not {type(definition).__name__}"
        ) from None
    for key in checked:
        if key not in _DEFINITION_KEYS:
            raise ConfigurationError(
                f"environment {name!r}: unknown key {key!r}{nearest(key, _DEFINITION_KEYS)}"
            )
    config = checked.get("executor_config")
    if config is not None and not hasattr(config, "items"):
        raise ConfigurationError(
            f"environment {name!r}: executor_config is a mapping, not {type(config).__name__}"
        )
    try:
        DeliveryPolicy.resolve(checked)
    except ConfigurationError as exc:
        raise ConfigurationError(f"environment {name!r}: {exc}") from None
    return checked


def _build_executor(name: str, definition: Mapping[str, Any]) -> EnvironmentExecutor:
    try:
        return coerce_executor(definition.get("executor", "local"))
    except (TypeError, ValueError) as exc:
        exc.add_note(f"while starting environment {name!r}")
        raise
