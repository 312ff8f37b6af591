"""Worker services: the other side of the stdio, HTTP, gRPC and WebSocket executors.

``wove worker stdio|http|grpc|websocket`` starts one as a process of its own. The same as objects, for an
application that has a server already: :class:`http_application` and :class:`websocket_application` return
aiohttp applications (``app.add_subapp("/wove", ...)``), :class:`grpc_handler` a generic handler
(``server.add_generic_rpc_handlers([...])``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wove.worker.services.grpc import grpc_handler
    from wove.worker.services.http import http_application
    from wove.worker.services.websocket import websocket_application

__all__ = ["grpc_handler", "http_application", "websocket_application"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"wove.worker.services.{name.partition('_')[0]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
