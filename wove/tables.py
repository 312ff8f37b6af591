"""Several calls in one payload, several outcomes in one request: tables.

A table is a msgpack array of rows ``[key, codec, bytes]``. It travels as one attachment of a message, beside
the message's envelope, whose limits are those of small data. Each row's bytes are a value of their own, which
is decoded by itself, or not at all: a row that is malformed harms its own run.

Rows of calls have the run's id as their key, and as their value ``[[positional], {keywords}]``. Rows of outcomes have
the run's place in the batch, and as their codec that of a result, or one of:

``error``      a message: ``error``, ``exception``, as a ``task_error`` frame has them
``cancelled``  the run was cancelled; no bytes
``returned``   the worker has not begun it, and gives it back; no bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import ProtocolError, raised_by_code, safe_text
from wove.plain_data import OTHER, shape_of
from wove.wire import encode_value, pack_plain, require_msgpack

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    import msgpack
except ImportError:  # the base install has no dependencies
    msgpack = None

#: Runs in one batch at most.
MAX_RUNS = 512
#: Bytes of one row's value at most: what is larger travels alone.
MAX_VALUE = 32 * 1024
#: Longest of a run's id and of a codec's name, in characters.
MAX_NAME = 64

ERROR = "error"
CANCELLED = "cancelled"
RETURNED = "returned"

#: ``[key, codec, bytes]``.
Row = tuple[Any, str, bytes]


def encode_small(value: Any) -> tuple[str, bytes] | None:
    """Encode a value for a row.

    Returns:
        Its codec and its bytes; None for one that does not belong into a row: too large, or not to be sent at all.
    """
    shape = shape_of(value)
    if shape != OTHER:
        try:
            codec, data = pack_plain(value, shape)
        except (ValueError, OverflowError, TypeError, RecursionError):
            pass  # a pickle may carry it
        else:
            return (codec, data) if len(data) <= MAX_VALUE else None
    attachments: list[Any] = []
    try:
        codec, _, count = encode_value(value, attachments)
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        return None  # whoever sends it alone gets the error
    if count != 1 or len(attachments[0]) > MAX_VALUE:
        return None
    return codec, attachments[0]


def pack_table(rows: Sequence[Row]) -> bytes:
    """Return a table's bytes."""
    require_msgpack()
    packed: bytes = msgpack.packb(rows, use_bin_type=True)
    return packed


def unpack_table(data: Any, key: type) -> list[Row]:
    """Return a table's rows (verified bytes only).

    Args:
        data: its bytes.
        key: the type of its keys.

    Raises:
        ProtocolError: it is no table of such rows.
    """
    require_msgpack()
    try:
        rows = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            max_array_len=MAX_RUNS,
            max_map_len=0,
            max_str_len=MAX_NAME,
            max_bin_len=MAX_VALUE,
            max_ext_len=0,
        )
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        raise ProtocolError(f"malformed table: {type(exc).__name__}: {safe_text(exc, 200)}") from exc
    if type(rows) is not tuple:
        raise ProtocolError("a table is an array of rows")
    for row in rows:
        if (
            type(row) is not tuple
            or len(row) != 3
            or type(row[0]) is not key
            or type(row[1]) is not str
            or type(row[2]) is not bytes
        ):
            raise ProtocolError("a table's row is [key, codec, bytes]")
    return list(rows)
