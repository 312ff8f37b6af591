"""Where callbacks may go, as ``WOVE_CALLBACK_ALLOW`` writes it; loaded where that is set."""

from __future__ import annotations

from typing import NamedTuple

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Where callbacks may go to: scheme, host, and port (None: any)."""

    scheme: str
    host: str
    port: int | None

    def covers(self, other: Origin) -> bool:
        """Tell whether a callback to ``other`` is one to here."""
        if self.scheme != other.scheme or self.port not in (None, other.port):
            return False
        if self.host.startswith("*."):
            return other.host.endswith(self.host[1:])
        return self.host == other.host


def read_origin(text: str) -> Origin:
    """Read ``scheme://host`` or ``scheme://host:port``; a URL's default port is that of its scheme.

    Raises:
        ValueError: it is neither.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(text)
    host = parts.hostname or ""
    if parts.scheme not in _DEFAULT_PORTS or not host or "@" in parts.netloc or parts.path.strip("/"):
        raise ValueError(f"{text!r:.200} is not scheme://host or scheme://host:port")
    if "*" in host and not (host.startswith("*.") and "*" not in host[1:]):
        raise ValueError(
            f'a "*" stands for the first parts of a host name, as in "*.example"; got {text!r:.200}'
        )
    return Origin(parts.scheme, host.rstrip("."), parts.port)


def full_origin(text: str) -> Origin:
    """Read an origin that is to be called: its port is never open."""
    origin = read_origin(text)
    return origin._replace(port=origin.port or _DEFAULT_PORTS[origin.scheme])
