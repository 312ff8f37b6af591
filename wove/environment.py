"""The documented module: the contract, the executors, the runtime and the errors."""

from __future__ import annotations

from wove.errors import (
    DeliveryOrphanedError,
    DeliveryTimeoutError,
    EnvironmentExecutionError,
    MissingDispatchFeatureError,
    WorkerLostError,
    WoveError,
    normalize_exception,
)
from wove.executors.adapter import BackendAdapterEnvironmentExecutor
from wove.executors.base import EnvironmentExecutor
from wove.executors.grpc import GrpcEnvironmentExecutor
from wove.executors.http import HttpEnvironmentExecutor
from wove.executors.local import LocalEnvironmentExecutor
from wove.executors.registry import build_executor_from_name, coerce_executor
from wove.executors.stdio import StdioEnvironmentExecutor
from wove.executors.websocket import WebSocketEnvironmentExecutor
from wove.runtime import ExecutorRuntime

__all__ = [
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
]
