"""How a worker reaches a callback server: directly unless a proxy is asked for, TLS verified always."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPConnection

#: Seconds to wait for a connection, and for the answer to a small request.
TIMEOUT = 10.0

#: By the settings they were made from: reading a system's authorities takes tens of milliseconds.
_contexts: dict[tuple[object, ...], ssl.SSLContext] = {}


def connect(origin: str, timeout: float = TIMEOUT) -> HTTPConnection:
    """Return a new connection, not opened yet.

    The environment's ``http_proxy`` and its like are not asked; ``WOVE_PROXY`` is.

    Raises:
        ConfigurationError: an unusable ``WOVE_PROXY``, ``WOVE_CA``, ``WOVE_CERT`` or ``WOVE_KEY``.
    """
    import http.client

    scheme, _, host = origin.partition("://")
    proxy = os.environ.get("WOVE_PROXY")
    if proxy:
        return _through(proxy, scheme, host, origin, timeout)
    if scheme == "https":
        return http.client.HTTPSConnection(host, timeout=timeout, context=client_context())
    return http.client.HTTPConnection(host, timeout=timeout)


def open_connection(connection: HTTPConnection, timeout: float) -> None:
    """Open a connection that leads straight to the callback server.

    Raises:
        OSError: it cannot be had.
    """
    import http.client
    import socket
    import sys

    connection.timeout = timeout
    patched = "gevent" in sys.modules or "eventlet" in sys.modules
    if type(connection) is not http.client.HTTPConnection or not connection.host.isascii() or patched:
        connection.connect()
        return
    # As bytes: of a text Python makes an international name, by codecs that a forking worker would load for
    # each job.
    address: Any = (connection.host.encode("ascii"), connection.port)
    connection.sock = socket.create_connection(address, timeout)
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def leads_straight(connection: HTTPConnection) -> bool:
    """Tell whether what is written to the connection's socket reaches the callback server as it is."""
    return not hasattr(connection, "forwards")


def client_context() -> ssl.SSLContext:
    """Return the TLS settings of this worker: ``WOVE_CA``, ``WOVE_CERT``, ``WOVE_KEY``.

    Raises:
        ConfigurationError: a file that cannot be used; names the variable.
    """
    authority, certificate, key = (os.environ.get(f"WOVE_{name}") or None for name in ("CA", "CERT", "KEY"))
    # Certificates are replaced while workers run.
    made_from = tuple((path, _changed_at(path)) for path in (authority, certificate, key))
    context = _contexts.get(made_from)
    if context is None:
        context = _make_context(authority, certificate, key)
        _contexts.clear()
        _contexts[made_from] = context
    return context


def _changed_at(path: str | None) -> int | None:
    try:
        return os.stat(path).st_mtime_ns if path else None
    except OSError:
        return None  # said when it is read


def _make_context(authority: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    import ssl

    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            f"WOVE_CA {authority} cannot be used ({_reason(exc)}): it is a file of certificates in PEM form"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if key and not certificate:
        raise ConfigurationError("WOVE_KEY is set without WOVE_CERT: a client certificate needs both")
    if certificate:
        try:
            # An empty password, rather than a prompt that nobody sees.
            context.load_cert_chain(certificate, key, password="")
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f"WOVE_CERT {certificate} and WOVE_KEY {key or certificate} cannot be used ({_reason(exc)}): they are "
                "PEM files of a certificate and of its key, without a password"
            ) from None
    return context


def _reason(exc: Exception) -> str:
    return str(getattr(exc, "strerror", None) or type(exc).__name__)


def _through(proxy: str, scheme: str, host: str, origin: str, timeout: float) -> HTTPConnection:
    """Return a connection through an HTTP proxy: a tunnel for ``https``, absolute URLs for ``http``."""
    import base64
    import http.client
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(proxy)
        port = parts.port or 3128
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:
        # Not its value: it may hold a password.
        raise ConfigurationError("WOVE_PROXY is the URL of an HTTP proxy, as in http://proxy.example:3128")
    headers: dict[str, str] = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    if scheme == "https":
        tunnel = http.client.HTTPSConnection(parts.hostname, port, timeout=timeout, context=client_context())
        tunnel.set_tunnel(host, headers=headers)
        return tunnel

    class Forwarded(http.client.HTTPConnection):
        forwards = True

        def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
            super().putrequest(method, origin + url, *args, **kwargs)
            for name, value in headers.items():
                self.putheader(name, value)

    return Forwarded(parts.hostname, port, timeout=timeout)
