"""One request and its reply over an open socket, several times faster than ``http.client``.

Only replies of the plainest form are read here: HTTP/1.1, a length, nothing encoded or folded. Whatever else a
proxy or a gateway may say is left to ``http.client``, from its first byte on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

#: Bytes that are asked of the kernel at a time, and the longest head that is read here.
_CHUNK = 64 * 1024
#: Bodies up to this size, in bytes, are sent in one piece with their head.
SMALL = 64 * 1024


def head_of(method: str, path: str, host: str, headers: Mapping[str, str], size: int) -> bytes | None:
    """Return the head of a request; None for one that ``http.client`` is to encode, or to refuse.

    In this order a callback server recognises a worker's request without looking at each of its headers.
    """
    text = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n"
    for name, value in headers.items():
        text += f"{name}: {value}\r\n"
    if method != "GET":
        text += f"Content-Length: {size}\r\n"
    ends = len(headers) + (2 if method == "GET" else 3)
    usable = text.isascii() and text.count("\n") == ends == text.count("\r") and "\0" not in text
    if not usable or not path.isprintable() or " " in path:
        return None
    return f"{text}\r\n".encode("ascii")


def send(sock: Any, head: bytes, parts: Sequence[Buffer], size: int) -> None:
    """Write a request; large parts are sent as they are, without being joined first."""
    if size <= SMALL:
        sock.sendall(b"".join((head, *parts)))
        return
    sock.sendall(head)
    for part in parts:
        sock.sendall(part)


class Head:
    """The head of a reply.

    Attributes:
        status: its status.
        headers: by names in lower case; of equal ones the last counts.
        length: bytes of the body.
        rest: what has come after the head.
    """

    __slots__ = ("headers", "length", "rest", "status")

    def __init__(self, status: int, headers: dict[str, str], length: int, rest: bytes) -> None:
        self.status = status
        self.headers = headers
        self.length = length
        self.rest = rest


def read_head(sock: Any) -> Head | bytes:
    """Read a reply's head.

    Returns:
        The head, or what was read so far of a reply that is left to ``http.client``.

    Raises:
        ConnectionResetError: the peer has closed the connection without a word.
        OSError: it has broken, or nothing came in time.
    """
    data: bytes = sock.recv(_CHUNK)
    if not data:
        raise ConnectionResetError("the callback server closed the connection without an answer")
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) >= _CHUNK:
            return data  # http.client says what is wrong with it
        more = sock.recv(_CHUNK)
        if not more:
            raise ConnectionResetError("the callback server closed the connection within an answer")
        data += more
    return parse_head(data[:end], data[end + 4 :]) or data


def parse_head(head: bytes, rest: bytes) -> Head | None:
    """Read the lines of a reply's head; None when it is not of the plainest form."""
    first, *lines = head.decode("latin-1").split("\r\n")
    digits = first[9:12]
    if not first.startswith("HTTP/1.1 ") or not _is_number(digits) or first[12:13] not in ("", " "):
        return None
    status = int(digits)
    headers: dict[str, str] = {}
    lengths = 0
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name.split() != [name] or "\n" in line or "\r" in line:
            return None
        name = name.lower()
        lengths += name == "content-length"
        headers[name] = value.strip()
    length = headers.get("content-length", "")
    if status in (204, 304):
        # Without a body, whatever is said of one.
        length, lengths = "0", 1
    if status < 200 or lengths != 1 or not _is_number(length) or "transfer-encoding" in headers:
        return None
    return Head(status, headers, int(length), rest)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 15


def read_body(sock: Any, head: Head) -> bytes | bytearray:
    """Read the body that belongs to a head.

    Raises:
        ConnectionError: it was cut short.
        OSError: the connection has broken, or nothing came in time.
    """
    if len(head.rest) >= head.length:
        return head.rest[: head.length]
    body = bytearray(head.length)
    at = len(head.rest)
    body[:at] = head.rest
    view = memoryview(body)
    while at < head.length:
        count = sock.recv_into(view[at:])
        if not count:
            raise ConnectionError("the callback server's reply was cut short")
        at += count
    return body


def stays_open(head: Head) -> bool:
    """Tell whether another request may follow on the connection."""
    return "connection" not in head.headers and len(head.rest) <= head.length
