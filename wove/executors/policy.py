"""Where tasks may be sent to: other hosts only over TLS, and only with credentials."""

from __future__ import annotations

import ssl
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from wove.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.network_security import NetworkExecutorSecurity

TLS_KEYS = ("client_certificate", "client_key", "root_certificates")


class Endpoint(NamedTuple):
    """A URL that was checked.

    Attributes:
        url: what is called; of a Unix socket a URL with the host "localhost".
        host: as the ``Host`` header says it.
        target: path and query.
        secure: whether it is TLS.
        local: a literal loopback address or a Unix socket.
        socket_path: of a Unix socket, else None.
    """

    url: str
    host: str
    target: str
    secure: bool
    local: bool
    socket_path: str | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.socket_path or self.url


def read_endpoint(config: Mapping[str, Any], executor: str, schemes: tuple[str, str]) -> Endpoint:
    """Check ``executor_config["url"]``.

    Args:
        config: the ``executor_config``.
        executor: its name, for messages.
        schemes: the plain and the TLS scheme.

    Raises:
        ConfigurationError: missing or unusable; says what it looks like.
    """
    plain, tls = schemes
    example = f'"{plain}://127.0.0.1:8300/"'
    url = config.get("url")
    if url is None:
        raise ConfigurationError(
            f'executor_config["url"] is missing: the {executor} executor needs it, as in {{"url": {example}}}'
        )
    if not isinstance(url, str):
        raise ConfigurationError(f'executor_config["url"] is a string such as {example}; got {url!r:.200}')
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ConfigurationError(
                f'executor_config["url"]: a Unix socket is unix:///path/to/it; got {url!r}'
            )
        return Endpoint(f"{plain}://localhost/", "localhost", "/", False, True, path)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigurationError(
            f'executor_config["url"] cannot be used ({exc}); it looks like {example}'
        ) from None
    if parts.scheme not in schemes or not parts.hostname or parts.fragment or parts.username is not None:
        raise ConfigurationError(
            f'executor_config["url"] looks like {example} or "{tls}://workers.example.com/", without user and '
            f"fragment; got the scheme {parts.scheme!r}, host {parts.hostname!r}"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme == tls else 80
    if port is not None and port != default:
        host = f"{host}:{port}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Endpoint(
        f"{parts.scheme}://{host}{target}", host, target, parts.scheme == tls, is_loopback(parts.hostname)
    )


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` is literally a loopback address; a name is whatever a resolver says."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_policy(
    config: Mapping[str, Any], security: NetworkExecutorSecurity, *, where: str, secure: bool, local: bool
) -> None:
    """Refuse to send work to another host in plain text, or without credentials.

    Raises:
        ConfigurationError: says which setting mends it.
    """
    insecure = config.get("insecure", False)
    if type(insecure) is not bool:
        raise ConfigurationError(f'executor_config["insecure"] is True or False; got {insecure!r}')
    if local or insecure:
        return
    named = (
        " (a name is not known to be this machine: write 127.0.0.1 if it is)" if "localhost" in where else ""
    )
    if not secure:
        raise ConfigurationError(
            f"{where} is another host, and plain text can be read and changed on the way{named}: use TLS (https://, "
            'wss://, for gRPC "secure": True), or set "insecure": True'
        )
    if security.mode == "none" or not security.is_shared:
        raise ConfigurationError(
            f'{where} is another host, and nothing tells it that this is you: set executor_config["security"] (or '
            'WOVE_SECRET) to a secret that the service has too, or set "insecure": True'
        )


def client_tls(config: Mapping[str, Any]) -> ssl.SSLContext:
    """Return the TLS settings of a client: ``root_certificates``, ``client_certificate``, ``client_key``.

    Raises:
        ConfigurationError: a file cannot be read, or holds no certificate.
    """
    roots = _path(config, "root_certificates")
    try:
        context = ssl.create_default_context(cafile=roots)
    except (OSError, ssl.SSLError) as exc:
        raise unreadable("root_certificates", roots, exc) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate, key = _path(config, "client_certificate"), _path(config, "client_key")
    if key is not None and certificate is None:
        raise ConfigurationError('executor_config["client_key"] needs "client_certificate"')
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as exc:
            raise unreadable("client_certificate", certificate, exc) from None
    return context


def read_pem(config: Mapping[str, Any], key: str) -> bytes | None:
    """Return the bytes of a PEM file that ``executor_config`` names.

    Raises:
        ConfigurationError: it cannot be read.
    """
    path = _path(config, key)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as exc:
        raise unreadable(key, path, exc) from None
    if b"-----BEGIN" not in data:
        raise unreadable(key, path, ValueError("it holds no PEM block"))
    return data


def unreadable(key: str, path: str | None, exc: Exception) -> ConfigurationError:
    """Return the error for a certificate or key that cannot be used."""
    reason = getattr(exc, "strerror", None) or str(exc)
    return ConfigurationError(f'executor_config["{key}"]: the PEM file {path!r} cannot be used: {reason}')


def _path(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise ConfigurationError(
        f'executor_config["{key}"] is the path of a PEM file; got {type(value).__name__}'
    )


def read_headers(config: Mapping[str, Any], key: str = "headers") -> dict[str, str]:
    """Return additional headers (or gRPC metadata).

    Raises:
        ConfigurationError: no mapping of strings, or one that would be split on its way.
    """
    headers = config.get(key) or {}
    usable = hasattr(headers, "items") and all(
        type(name) is str and type(value) is str and name and not set("\r\n\0") & set(name + value)
        for name, value in headers.items()
    )
    if not usable:
        raise ConfigurationError(
            f'executor_config["{key}"] is a mapping of names to values, all of them strings'
        )
    return dict(headers)
