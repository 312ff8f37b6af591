"""Wove: await any Python function on the Celery or RQ fleet you already run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wove.environment import (
        BackendAdapterEnvironmentExecutor,
        EnvironmentExecutor,
        ExecutorRuntime,
        LocalEnvironmentExecutor,
        build_executor_from_name,
        coerce_executor,
    )
    from wove.errors import (
        ConfigurationError,
        DeliveryOrphanedError,
        DeliveryTimeoutError,
        EncodeError,
        EnvironmentExecutionError,
        MissingDispatchFeatureError,
        RemoteTraceback,
        SubmitError,
        WorkerLostError,
        WoveError,
        normalize_exception,
    )
    from wove.worker.context import current

# Resolved when first used (PEP 562): a worker that imports `wove.worker` loads no runtime.
_HOMES = {
    "wove.environment": (
        "BackendAdapterEnvironmentExecutor",
        "EnvironmentExecutor",
        "ExecutorRuntime",
        "LocalEnvironmentExecutor",
        "build_executor_from_name",
        "coerce_executor",
    ),
    "wove.errors": (
        "ConfigurationError",
        "DeliveryOrphanedError",
        "DeliveryTimeoutError",
        "EncodeError",
        "EnvironmentExecutionError",
        "MissingDispatchFeatureError",
        "RemoteTraceback",
        "SubmitError",
        "WorkerLostError",
        "WoveError",
        "normalize_exception",
    ),
    "wove.worker.context": ("current",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "BackendAdapterEnvironmentExecutor",
    "ConfigurationError",
    "DeliveryOrphanedError",
    "DeliveryTimeoutError",
    "EncodeError",
    "EnvironmentExecutionError",
    "EnvironmentExecutor",
    "ExecutorRuntime",
    "LocalEnvironmentExecutor",
    "MissingDispatchFeatureError",
    "RemoteTraceback",
    "SubmitError",
    "WorkerLostError",
    "WoveError",
    "build_executor_from_name",
    "coerce_executor",
    "current",
    "normalize_exception",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
