"""TLS of a listener: from files of certificates, or a context of the user's own."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wove.errors import ConfigurationError
from wove.policy import nearest

_KEYS = ("ca", "certificate", "key")
_SETTING = 'executor_config["callback_tls"]'


class ListenerTls:
    """How a listener speaks TLS; equal where two environments may share one.

    Args:
        context: what it speaks it by.
        identity: what the context was made from.
    """

    __slots__ = ("context", "identity")

    def __init__(self, context: ssl.SSLContext, identity: tuple[object, ...]) -> None:
        self.context = context
        self.identity = identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ListenerTls) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        return f"ListenerTls({self.identity!r})"


def read_tls(setting: Any) -> ListenerTls | None:
    """Read ``callback_tls``: ``{"certificate": path, "key": path}``, with ``"ca"`` for mutual TLS, or a context.

    Raises:
        ConfigurationError: it is neither, or a file cannot be used; names which.
    """
    if setting is None:
        return None
    if isinstance(setting, ssl.SSLContext):
        if setting.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ConfigurationError(
                f"{_SETTING} is a context for clients: make it with ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), or "
                "ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)"
            )
        return ListenerTls(setting, ("context", id(setting)))
    if not isinstance(setting, Mapping):
        raise ConfigurationError(
            f'{_SETTING} is {{"certificate": path, "key": path}} or an ssl.SSLContext, not {type(setting).__name__}'
        )
    for key in setting:
        if key not in _KEYS:
            raise ConfigurationError(f"{_SETTING}: unknown key {key!r}{nearest(key, _KEYS)}")
    if setting.get("certificate") is None:
        raise ConfigurationError(f'{_SETTING} needs a "certificate": the path of a PEM file')
    paths = {name: _path(setting, name) for name in _KEYS if setting.get(name) is not None}
    return ListenerTls(_make_context(paths), tuple(sorted(paths.items())))


def _path(setting: Mapping[str, Any], name: str) -> str:
    try:
        return str(Path(setting[name]).absolute())
    except TypeError:
        raise ConfigurationError(
            f"{_SETTING}: {name!r} is a path, not {type(setting[name]).__name__}"
        ) from None


def _make_context(paths: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty password, rather than a prompt that nobody sees.
        context.load_cert_chain(paths["certificate"], paths.get("key"), password="")
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            f"{_SETTING}: the certificate {paths['certificate']} and the key {paths.get('key', 'in it')} cannot be "
            f"used ({_reason(exc)}): they are PEM files that belong together, without a password"
        ) from None
    if "ca" in paths:
        try:
            context.load_verify_locations(paths["ca"])
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f'{_SETTING}: the "ca" {paths["ca"]}, by which workers\' certificates are verified, cannot be used '
                f"({_reason(exc)}): it is a PEM file of certificates"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(exc: Exception) -> str:
    return str(getattr(exc, "strerror", None) or getattr(exc, "reason", None) or type(exc).__name__)
