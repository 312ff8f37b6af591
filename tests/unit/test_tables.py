"""Tables of calls and of outcomes."""

from __future__ import annotations

import threading
from typing import Any

import msgpack
import pytest

from wove.errors import ProtocolError
from wove.tables import MAX_RUNS, MAX_VALUE, encode_small, pack_table, unpack_table
from wove.wire import decode_value


@pytest.mark.parametrize("value", [1, "text", [1, {"a": None}], (1, {2, 3}), 2**100, {1: object}])
def test_a_small_value_comes_back(value: Any) -> None:
    found = encode_small(value)
    assert found is not None
    codec, data = found
    assert decode_value([codec, 0, 1], [memoryview(data)]) == value


@pytest.mark.parametrize("value", [bytes(MAX_VALUE), [object()] * 50_000, threading.Lock(), lambda: bytes])
def test_what_is_large_or_cannot_be_sent_travels_alone(value: Any) -> None:
    found = encode_small(value)
    assert found is None or len(found[1]) <= MAX_VALUE


def test_rows_come_back() -> None:
    rows = [("a", "data", b"1"), ("b", "pickle", b"")]
    assert unpack_table(pack_table(rows), str) == rows


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({"a": 1}),
        msgpack.packb([["a", "data"]]),
        msgpack.packb([[1, "data", b""]]),
        msgpack.packb([["a", b"data", b""]]),
        msgpack.packb([["a", "data", "text"]]),
        msgpack.packb([["a", "data", b"", 1]]),
        msgpack.packb([["a", "data", bytes(MAX_VALUE + 1)]]),
        msgpack.packb([["a" * 100, "data", b""]]),
        msgpack.packb([["a", "data", b""]] * (MAX_RUNS + 1)),
        msgpack.packb([["a", "data", msgpack.ExtType(1, b"x")]]),
        b"\xdd\xff\xff\xff\xff" * 100,
        msgpack.packb([]) + b"trailing",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_table(data, str)
