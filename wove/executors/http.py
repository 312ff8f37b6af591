"""The http and https executors."""

from __future__ import annotations

from wove.executors.unavailable import UnavailableExecutor


class HttpEnvironmentExecutor(UnavailableExecutor):
    """Reserved for the HTTP transport, which this version does not carry.

    Args:
        require_https: insist on ``https://`` URLs, as the name ``https`` does.
    """

    transport = "http"

    def __init__(self, *, require_https: bool = False) -> None:
        self.require_https = require_https
