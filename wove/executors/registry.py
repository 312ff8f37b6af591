"""Finds executors by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wove.executors.base import EnvironmentExecutor
from wove.policy import nearest

if TYPE_CHECKING:
    from collections.abc import Callable


def _local() -> EnvironmentExecutor:
    from wove.executors.local import LocalEnvironmentExecutor

    return LocalEnvironmentExecutor()


def _stdio() -> EnvironmentExecutor:
    from wove.executors.stdio import StdioEnvironmentExecutor

    return StdioEnvironmentExecutor()


def _http(*, require_https: bool = False) -> EnvironmentExecutor:
    from wove.executors.http import HttpEnvironmentExecutor

    return HttpEnvironmentExecutor(require_https=require_https)


def _grpc() -> EnvironmentExecutor:
    from wove.executors.grpc import GrpcEnvironmentExecutor

    return GrpcEnvironmentExecutor()


def _websocket() -> EnvironmentExecutor:
    from wove.executors.websocket import WebSocketEnvironmentExecutor

    return WebSocketEnvironmentExecutor()


_BUILT_IN: dict[str, Callable[[], EnvironmentExecutor]] = {
    "local": _local,
    "stdio": _stdio,
    "http": _http,
    "https": lambda: _http(require_https=True),
    "grpc": _grpc,
    "websocket": _websocket,
}


def build_executor_from_name(name: str) -> EnvironmentExecutor:
    """Return a new executor: a built-in one, or one for an adapter of that name.

    Args:
        name: ``local stdio http https grpc websocket celery rq memory``, or any name in
            the entry-point group ``wove.adapters``.

    Raises:
        ValueError: no executor has that name; lists the known ones.
    """
    build = _BUILT_IN.get(name)
    if build is not None:
        return build()
    from wove.executors.adapter import BackendAdapterEnvironmentExecutor, adapter_names, is_adapter

    if is_adapter(name):
        return BackendAdapterEnvironmentExecutor(name)
    known = sorted({*_BUILT_IN, *adapter_names()})
    hint = nearest(name, known)
    listed = "" if hint.startswith("; known") else f" (known: {', '.join(known)})"
    raise ValueError(f"unknown executor {name!r}{hint}{listed}")


def coerce_executor(value: object) -> EnvironmentExecutor:
    """Return ``value`` when it is an executor, or the executor of that name.

    Raises:
        TypeError: neither a name nor an :class:`EnvironmentExecutor`.
        ValueError: an unknown name.
    """
    if isinstance(value, EnvironmentExecutor):
        return value
    if isinstance(value, str):
        return build_executor_from_name(value)
    raise TypeError(f"an executor is a name or an EnvironmentExecutor instance, not {type(value).__name__}")
