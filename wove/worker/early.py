"""Whether a reply has begun on a connection that became readable; over TLS that is not the same.

A TLS connection becomes readable for records of the protocol's own, such as the session tickets that follow a
handshake: whoever then waits for the reply waits for as long as the server takes. And what was decrypted
together with something else makes no socket readable any more.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

    from typing_extensions import Buffer


def has_decrypted(sock: Any) -> bool:
    """Tell whether bytes of the peer wait in the TLS layer, unseen by any selector."""
    pending = getattr(sock, "pending", None)
    return pending is not None and pending() > 0


def first_byte(sock: Any) -> bytes | None:
    """Return the reply's first byte, ``b""`` from a plain socket, which has it yet; None when there is none.

    Raises:
        ConnectionError: the peer has closed the connection.
        OSError: it has broken, or is no TLS.
    """
    if not hasattr(sock, "pending"):
        return b""
    import ssl

    timeout = sock.gettimeout()
    sock.settimeout(0.0)
    try:
        first: bytes = sock.recv(1)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
    finally:
        sock.settimeout(timeout)
    if not first:
        raise ConnectionError("the callback server has closed the connection")
    return first


def reply_after(first: bytes, connection: HTTPConnection) -> HTTPResponse:
    """Return the reply whose first byte has been read already.

    Raises:
        OSError, http.client.HTTPException: it is none.
    """
    if not first:
        return connection.getresponse()

    def begun(sock: Any, *args: Any, **kwargs: Any) -> HTTPResponse:
        return _begun(first, sock, *args, **kwargs)

    # Nothing is done with it but to call it.
    connection.response_class = cast("type[HTTPResponse]", begun)
    try:
        return connection.getresponse()
    finally:
        del connection.response_class


def reply_from(read: bytes, sock: Any, method: str) -> HTTPResponse:
    """Return the reply to a request that was not made by ``http.client``, and that was read in part.

    Raises:
        OSError, http.client.HTTPException: it is none.
    """
    reply = _begun(read, sock, method=method)
    reply.begin()
    return reply


def _begun(read: bytes, sock: Any, *args: Any, **kwargs: Any) -> HTTPResponse:
    import http.client

    reply = http.client.HTTPResponse(sock, *args, **kwargs)
    reply.fp = io.BufferedReader(_Begun(read, reply.fp.detach()))
    return reply


class _Begun(io.RawIOBase):
    """A stream after the bytes that were taken from it."""

    def __init__(self, first: bytes, rest: io.RawIOBase) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Buffer) -> int | None:
        """Read; those bytes come alone."""
        view = memoryview(buffer)
        if self._first and view.nbytes:
            piece, self._first = self._first[: view.nbytes], self._first[view.nbytes :]
            view[: len(piece)] = piece
            return len(piece)
        count: int | None = self._rest.readinto(view)
        return count

    def close(self) -> None:
        """Close the stream."""
        self._rest.close()
        super().close()
