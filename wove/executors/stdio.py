"""The stdio executor."""

from __future__ import annotations

from wove.executors.unavailable import UnavailableExecutor


class StdioEnvironmentExecutor(UnavailableExecutor):
    """Reserved for the stdio transport, which this version does not carry."""

    transport = "stdio"
