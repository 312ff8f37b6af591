"""What a listener may be exposed to: no secret that others lack, no plain text on the internet."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wove.errors import ConfigurationError
from wove.keyring import is_cookie

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.keyring import SecretRing

_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def wants_insecure(config: Mapping[str, Any]) -> bool:
    """Return ``executor_config["insecure"]``.

    Raises:
        ConfigurationError: it is neither True nor False.
    """
    insecure = config.get("insecure", False)
    if type(insecure) is not bool:
        raise ConfigurationError(f'executor_config["insecure"] is True or False; got {insecure!r}')
    return insecure


def check_listener(host: str, ring: SecretRing, config: Mapping[str, Any] | None = None) -> None:
    """Refuse a listener that other hosts reach without a shared secret, or the internet without TLS.

    Args:
        host: the address to listen on.
        ring: the secrets in force.
        config: ``executor_config``.

    Raises:
        ConfigurationError: says which setting is missing.
    """
    if host in _LOCAL_HOSTS:
        return
    if is_cookie(ring):
        raise ConfigurationError(
            f'callback_host "{host}" can be reached from other hosts, which do not have this user\'s cookie: '
            'set WOVE_SECRET (or executor_config["security"]) to one secret on the submitter and its workers'
        )
    if config is None or config.get("callback_tls") is not None or wants_insecure(config):
        return
    try:
        public = ip_address(host).is_global
    except ValueError:
        return  # a name: where it leads is looked at when the callback URL is
    if public:
        raise ConfigurationError(
            f'callback_host "{host}" is a public address and would be listened on without TLS: set '
            'executor_config["callback_tls"] to {"certificate": ..., "key": ...}, listen on a private address, or set '
            '"insecure": True'
        )


def check_plain_http(callback_url: str, config: Mapping[str, Any]) -> None:
    """Refuse callbacks that would cross the internet unencrypted. Resolves the host; may block.

    Raises:
        ConfigurationError: plain HTTP to a public address, without ``insecure``.
    """
    insecure = wants_insecure(config)
    parts = urlsplit(callback_url)
    if insecure or parts.scheme != "http" or not parts.hostname or parts.hostname in _LOCAL_HOSTS:
        return
    try:
        found = {item[4][0] for item in socket.getaddrinfo(parts.hostname, None)}
    except OSError:
        return  # a name that only the workers' network knows
    public = sorted(address for address in map(str, found) if ip_address(address.partition("%")[0]).is_global)
    if public:
        raise ConfigurationError(
            f'callback_url "{callback_url}" is plain HTTP to the public address {public[0]}: outcomes are signed, but '
            'anybody on the way can read them. Set executor_config["callback_tls"], use an https:// URL (a reverse '
            'proxy), or set "insecure": True'
        )
