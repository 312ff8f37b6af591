"""The websocket executor."""

from __future__ import annotations

from wove.executors.unavailable import UnavailableExecutor


class WebSocketEnvironmentExecutor(UnavailableExecutor):
    """Reserved for the websocket transport, which this version does not carry."""

    transport = "websocket"
