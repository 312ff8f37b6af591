"""Where the grpc executor's service is, and how gRPC is to connect to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from wove.errors import ConfigurationError, MissingDispatchFeatureError
from wove.executors.policy import client_tls, is_loopback, read_headers, read_pem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

DEFAULT_METHOD = "/wove.network_executor.WorkerService/Send"
_METHOD = re.compile(r"/[\w.]+/\w+")
_NAME = re.compile(r"[a-z0-9_.-]+")


class Target(NamedTuple):
    """A service and its method that were checked.

    Attributes:
        address: as gRPC has it.
        local: literally this machine.
        method: the name of the method.
        metadata: what the user adds to each call.
        secure: whether it is TLS.
    """

    address: str
    local: bool
    method: str
    metadata: tuple[tuple[str, str], ...]
    secure: bool


def read_target(config: Mapping[str, Any]) -> Target:
    """Check what ``executor_config`` says of the service.

    Raises:
        ConfigurationError: a setting is missing or unusable; says what it looks like.
    """
    address, local = _read_address(config)
    method = _read_method(config)
    metadata = _read_metadata(config)
    secure = config.get("secure", False)
    if type(secure) is not bool:
        raise ConfigurationError(f'executor_config["secure"] is True (TLS) or False; got {secure!r}')
    given = [key for key in ("root_certificates", "client_certificate", "client_key") if config.get(key)]
    if given and not secure:
        raise ConfigurationError(f'executor_config["{given[0]}"] is of no use without "secure": True')
    return Target(address, local, method, metadata, secure)


def _read_address(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the address, and whether it is literally this machine."""
    target = config.get("target")
    if target is None:
        raise ConfigurationError(
            'executor_config["target"] is missing: the grpc executor needs it, as in {"target": "127.0.0.1:8300"}'
        )
    if (
        not isinstance(target, str)
        or not target
        or "//" in target.removeprefix("dns:///").removeprefix("unix://")
    ):
        raise ConfigurationError(
            f'executor_config["target"] is "host:port" or "unix:/path", without http://; got {target!r:.200}'
        )
    if target.startswith(("unix:", "unix-abstract:")):
        return target, True
    address = target.removeprefix("dns:///").removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise ConfigurationError(
            f'executor_config["target"] needs a port, as in "127.0.0.1:8300"; got {target!r:.200}'
        )
    return target, is_loopback(host.strip("[]"))


def _read_method(config: Mapping[str, Any]) -> str:
    method = config.get("method", DEFAULT_METHOD)
    if not isinstance(method, str) or not _METHOD.fullmatch(method):
        raise ConfigurationError(f'executor_config["method"] is /package.Service/Method; got {method!r:.200}')
    return method


def _read_metadata(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    metadata = read_headers(config, "metadata")
    for name in metadata:
        if not _NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
            raise ConfigurationError(
                f'executor_config["metadata"]: {name!r} is no name of gRPC metadata (lower case, no "grpc-" before it and '
                'no "-bin" behind it)'
            )
    return tuple(metadata.items())


def read_credentials(grpc: ModuleType, config: Mapping[str, Any]) -> Any:
    """Return what gRPC speaks TLS by.

    Raises:
        ConfigurationError: a file cannot be read, or holds no certificate.
    """
    client_tls(config)  # what is no certificate is said in our words
    roots, chain, key = (
        read_pem(config, name) for name in ("root_certificates", "client_certificate", "client_key")
    )
    return grpc.ssl_channel_credentials(roots, key if key is not None else chain, chain)


def channel_options(*, max_message: int, keep_alive: float, timeout: float) -> tuple[tuple[str, int], ...]:
    """Return the options of a connection; times are in seconds."""
    return (
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(keep_alive * 1000)),
        ("grpc.keepalive_timeout_ms", int(timeout * 1000)),
        # A connection of its own, and no proxy from the environment.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        # A service that comes back is found soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    )


def require_grpc() -> ModuleType:
    """Return grpc.

    Raises:
        MissingDispatchFeatureError: it is not installed; names the command.
    """
    try:
        import grpc
        import grpc.aio
    except ImportError:
        raise MissingDispatchFeatureError(
            'The grpc executor needs grpcio: pip install "wove[grpc]"'
        ) from None
    return grpc
