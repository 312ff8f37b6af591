"""The grpc executor."""

from __future__ import annotations

from wove.executors.unavailable import UnavailableExecutor


class GrpcEnvironmentExecutor(UnavailableExecutor):
    """Reserved for the grpc transport, which this version does not carry."""

    transport = "grpc"
