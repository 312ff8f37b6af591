"""Values, callables and messages as bytes; hostile bytes are refused at once."""

from __future__ import annotations

import functools
import operator
import os.path
import struct
import sys
import threading
import tracemalloc
from collections import OrderedDict
from decimal import Decimal
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
import msgpack
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wove import wire
from wove.errors import EncodeError, MissingDispatchFeatureError, ProtocolError
from wove.wire import (
    MAX_ENTRIES,
    MAX_ENVELOPE,
    OUT_OF_BAND_FROM,
    callable_name,
    decode_callable,
    decode_value,
    encode_callable,
    encode_value,
    importable_reference,
    pack_message,
    unpack_json,
    unpack_message,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def encoded(value: Any) -> tuple[list[Any], list[memoryview]]:
    """Return a value's descriptor and attachments, as they arrive."""
    attachments: list[Any] = []
    descriptor = encode_value(value, attachments)
    return descriptor, [memoryview(part) for part in attachments]


def round_trip(value: Any) -> Any:
    """Send a value in a message of its own."""
    attachments: list[Any] = []
    parts = pack_message({"value": encode_value(value, attachments)}, attachments)
    envelope, views = unpack_message(b"".join(parts))
    return decode_value(envelope["value"], views)


class Account:
    """A class of the user's."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> int:
        return self.number

    def method(self) -> int:
        """A bound method."""
        return self.number

    @staticmethod
    def static() -> str:
        """A static method."""
        return "static"


def function(number: int = 1) -> int:
    """A function of a module."""
    return number


class TestValues:
    """A value travels as the narrowest thing that gives it back exactly."""

    @pytest.mark.parametrize(
        ("value", "codec"),
        [
            ([1, {"a": None}], "data"),
            (2**63, "data"),
            (2**64, "tagged"),
            ((1, 2), "tagged"),
            (Decimal("1.5"), "tagged"),
            ("\ud800", "pickle"),
            (OrderedDict(a=1), "pickle"),
            ({2**70: 1}, "pickle"),
        ],
        ids=repr,
    )
    def test_the_codec_is_the_first_that_carries_the_value(self, value: Any, codec: str) -> None:
        descriptor, attachments = encoded(value)
        assert descriptor == [codec, 0, 1]
        back = decode_value(descriptor, attachments)
        assert back == value
        assert type(back) is type(value)

    def test_values_share_a_message(self) -> None:
        attachments: list[Any] = []
        one, two = encode_value("one", attachments), encode_value((2,), attachments)
        assert (one, two) == (["data", 0, 1], ["tagged", 1, 1])
        views = [memoryview(part) for part in attachments]
        assert decode_value(two, views) == (2,)
        assert decode_value(one, views) == "one"

    def test_sharing_and_cycles_are_kept(self) -> None:
        shared = [1]
        loop: list[Any] = [shared, shared]
        loop.append(loop)
        back = round_trip(loop)
        assert back[0] is back[1]
        assert back[2] is back

    def test_closures_and_local_classes_travel_by_value(self) -> None:
        offset = 40

        class Local:
            number = 2

        assert round_trip(lambda number: number + offset)(2) == 42
        assert round_trip(Local)().number == 2

    def test_large_buffers_are_not_copied_and_come_back_writable(self) -> None:
        array = numpy.zeros(OUT_OF_BAND_FROM, dtype="uint8")
        attachments: list[Any] = []
        descriptor = encode_value({"array": array}, attachments)
        assert descriptor == ["pickle", 0, 2]
        assert numpy.shares_memory(numpy.frombuffer(attachments[1], dtype="uint8"), array)
        back = round_trip({"array": array})["array"]
        back += 1
        assert back.sum() == OUT_OF_BAND_FROM

    def test_small_and_scattered_buffers_stay_in_the_pickle(self) -> None:
        small = numpy.zeros(OUT_OF_BAND_FROM - 1, dtype="uint8")
        scattered = numpy.arange(4 * OUT_OF_BAND_FROM, dtype="uint8").reshape(4, -1)[:, ::2]
        for array in (small, scattered):
            assert encoded(array)[0] == ["pickle", 0, 1]
            assert (round_trip(array) == array).all()

    def test_more_large_buffers_than_a_message_has_room_for(self) -> None:
        arrays = [numpy.full(OUT_OF_BAND_FROM, n, dtype="uint8") for n in range(MAX_ENTRIES + 10)]
        back = round_trip(arrays)
        assert [int(array[0]) for array in back] == list(range(MAX_ENTRIES + 10))

    @pytest.mark.parametrize(
        ("value", "name"),
        [(threading.Lock(), r"_thread\.lock"), ((n for n in ()), "generator"), ([sys._getframe()], "list")],
        ids=["lock", "generator", "frame"],
    )
    def test_what_no_codec_carries_is_refused_by_the_name_of_its_type(self, value: Any, name: str) -> None:
        attachments: list[Any] = [b"an earlier value's"]
        with pytest.raises(EncodeError, match=f"a value of type {name} cannot be sent: TypeError") as caught:
            encode_value(value, attachments)
        assert isinstance(caught.value.__cause__, TypeError)
        assert attachments == [b"an earlier value's"]

    def test_what_is_nested_beyond_any_codec_is_refused(self) -> None:
        value: Any = 1
        for _ in range(100_000):
            value = [value]
        with pytest.raises(EncodeError, match=r"cannot be sent: .*[Rr]ecursion"):
            encode_value(value, [])


class TestMissingLibraries:
    """Without the extra the message names the command that brings it."""

    def test_without_msgpack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "msgpack", None)
        for attempt in (
            lambda: encode_value(1, []),
            lambda: pack_message({}, []),
            lambda: unpack_message(b""),
        ):
            with pytest.raises(MissingDispatchFeatureError, match=r'pip install "wove\[dispatch\]"'):
                attempt()

    def test_without_cloudpickle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        with pytest.raises(MissingDispatchFeatureError, match=r'pip install "wove\[dispatch\]"'):
            encode_value(lambda: 1, [])

    def test_without_cloudpickle_what_can_be_imported_is_sent_all_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        assert round_trip(OrderedDict(a=1)) == OrderedDict(a=1)


class TestMalformedValues:
    """Verified bytes may still be wrong: a peer of another version wrote them."""

    @pytest.mark.parametrize(
        "descriptor",
        [
            None,
            "data",
            {},
            [],
            ["data", 0],
            ["data", 0, 1, 2],
            ("data", 0, 1),
            ["data", "0", 1],
            ["data", 0, None],
            ["data", True, 1],
            ["data", -1, 1],
            ["data", 0, 0],
            ["data", 0, 2],
            ["data", 1, 1],
            ["data", 2**63, 2**63],
            ["yaml", 0, 1],
            [None, 0, 1],
            [["data"], 0, 1],
        ],
        ids=repr,
    )
    def test_a_malformed_descriptor_is_refused(self, descriptor: Any) -> None:
        with pytest.raises(ProtocolError):
            decode_value(descriptor, [memoryview(b"\x01")])

    def test_plain_data_is_one_attachment(self) -> None:
        with pytest.raises(ProtocolError, match="unknown value codec"):
            decode_value(["data", 0, 2], [memoryview(b"\x01"), memoryview(b"\x01")])

    def test_the_message_does_not_repeat_a_hostile_codec(self) -> None:
        with pytest.raises(ProtocolError) as caught:
            decode_value(["x" * 1_000_000, 0, 1], [memoryview(b"\x01")])
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("codec", ["data", "tagged"])
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x01\x01",
            b"\xc1",
            b"\xd4\x05\x00",
            b"\xc7\x00\x05",
            b"\xd6\xff\x00\x00\x00\x00",
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xdb\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\x91" * 100_000,
            b"\x81\x90\x01",
            b"\xa1\xff",
        ],
        ids=[
            "nothing", "trailing byte", "reserved byte", "extension", "empty extension", "timestamp",
            "claimed array", "claimed map", "claimed text", "claimed bytes", "deep nesting",
            "unhashable key", "no UTF-8",
        ],
    )  # fmt: skip
    def test_malformed_data_is_refused(self, codec: str, data: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode_value([codec, 0, 1], [memoryview(data)])

    @pytest.mark.parametrize(
        "value",
        [
            {"__wove__": "pickle", "v": b"x"},
            {"__wove__": "uuid", "v": "no"},
            [{"__wove__": "set", "v": [[]]}],
        ],
        ids=repr,
    )
    def test_a_wrong_tag_is_refused(self, value: Any) -> None:
        with pytest.raises(ProtocolError):
            decode_value(["tagged", 0, 1], [memoryview(msgpack.packb(value))])


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An importable module of the user's."""
    made = ModuleType("wove_test_user_module")
    exec(
        "def task():\n    return 42\n\nclass Box:\n    @staticmethod\n    def inner():\n        return 43\n",
        made.__dict__,
    )
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


class TestCallables:
    """By name where the other side can import it, by value otherwise."""

    @pytest.mark.parametrize(
        ("func", "reference"),
        [
            (os.path.join, "posixpath:join"),
            (len, "builtins:len"),
            (OrderedDict, "collections:OrderedDict"),
            (OrderedDict.fromkeys, None),
            (functools.partial(len), None),
            (lambda: 1, None),
            (Account(1).method, None),
            (Account(1), None),
            (operator.itemgetter(0), None),
        ],
        ids=repr,
    )
    def test_the_name_of_what_can_be_imported(self, func: Any, reference: str | None) -> None:
        assert importable_reference(func) == reference

    def test_a_name_leads_back_to_the_function_itself(self, module: ModuleType) -> None:
        for func in (module.task, module.Box.inner):
            described = encode_callable(func, [])
            assert described == f"{module.__name__}:{func.__qualname__}"
            assert decode_callable(described, []) is func

    def test_a_function_whose_name_means_another_by_now_travels_by_value(self, module: ModuleType) -> None:
        original = module.task
        module.task = lambda: 0
        attachments: list[Any] = []
        described = encode_callable(original, attachments)
        assert decode_callable(described, [memoryview(part) for part in attachments])() == 42

    def test_what_a_script_defines_travels_by_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        script = ModuleType("__main__")
        exec("def task():\n    return 42\n", script.__dict__)
        monkeypatch.setitem(sys.modules, "__main__", script)
        assert importable_reference(script.task) is None
        attachments: list[Any] = []
        described = encode_callable(script.task, attachments)
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # the worker's own
        assert decode_callable(described, [memoryview(part) for part in attachments])() == 42

    def test_modules_registered_with_cloudpickle_travel_by_value(self, module: ModuleType) -> None:
        cloudpickle.register_pickle_by_value(module)
        try:
            attachments: list[Any] = []
            described = encode_callable(module.task, attachments)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
        del sys.modules[module.__name__]
        assert decode_callable(described, [memoryview(part) for part in attachments])() == 42

    @pytest.mark.parametrize(
        "func", [lambda: 42, functools.partial(function, 42), Account(42), Account(42).method]
    )
    def test_anything_else_travels_by_value(self, func: Callable[[], int]) -> None:
        attachments: list[Any] = []
        described = encode_callable(func, attachments)
        assert decode_callable(described, [memoryview(part) for part in attachments])() == 42

    @pytest.mark.parametrize("described", ["", "nocolon", ":name", "module:", 5, None, []], ids=repr)
    def test_a_malformed_description_is_refused(self, described: Any) -> None:
        with pytest.raises(ProtocolError):
            decode_callable(described, [])

    def test_a_name_that_does_not_exist_here_is_an_import_or_attribute_error(self) -> None:
        with pytest.raises(ModuleNotFoundError, match="wove_no_such_module"):
            decode_callable("wove_no_such_module:task", [])
        with pytest.raises(AttributeError, match="no_such_name"):
            decode_callable("json:no_such_name", [])

    @pytest.mark.parametrize(
        ("func", "name"),
        [
            (os.path.join, "posixpath.join"),
            (functools.partial(functools.partial(os.path.join, "a"), "b"), "posixpath.join"),
            (operator.itemgetter(0), "operator.itemgetter"),
        ],
        ids=repr,
    )
    def test_the_name_that_dashboards_show(self, func: Any, name: str) -> None:
        assert callable_name(func) == name


def message(envelope: bytes, rest: bytes = b"") -> bytes:
    """Put the length before an envelope."""
    return struct.pack(">I", len(envelope)) + envelope + rest


def claim(head: bytes) -> bytes:
    """An envelope that maps ``a`` to what begins with ``head`` and is not there."""
    return message(b"\x82\xa5sizes\x90\xa1a" + head)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x00\x00\x00",
    "empty envelope": message(b""),
    "envelope longer than the message": struct.pack(">I", 1000) + b"\x80",
    "envelope longer than allowed": message(b"\xc0" * (MAX_ENVELOPE + 1)),
    "claims 4 GiB": b"\xff\xff\xff\xff\x80",
    "list": message(b"\x90"),
    "number": message(b"\x01"),
    "nil": message(b"\xc0"),
    "text": message(b"\xa1a"),
    "trailing byte after the map": message(msgpack.packb({"sizes": []}) + b"\x00"),
    "two maps": message(msgpack.packb({"sizes": []}) * 2),
    "trailing byte after the attachments": message(msgpack.packb({"sizes": []}), b"\x00"),
    "int key": message(b"\x82\x01\x01\xa5sizes\x90"),
    "nested int key": message(b"\x82\xa1a\x81\x01\x01\xa5sizes\x90"),
    "array key": message(b"\x82\x90\x01\xa5sizes\x90"),
    "deep arrays": claim(b"\x91" * 1_000_000 + b"\xc0"),
    "deep maps": claim(b"\x81\xa1a" * 300_000 + b"\xc0"),
    "array of 4 billion": claim(b"\xdd\xff\xff\xff\xff"),
    "array of 65535": claim(b"\xdc\xff\xff"),
    "array one too long": message(msgpack.packb({"sizes": [], "a": [None] * (MAX_ENTRIES + 1)})),
    "map of 4 billion": claim(b"\xdf\xff\xff\xff\xff"),
    "map one too long": message(msgpack.packb({"sizes": [], **{str(n): n for n in range(MAX_ENTRIES)}})),
    "text of 4 GiB": claim(b"\xdb\xff\xff\xff\xff"),
    "text one too long": message(msgpack.packb({"sizes": [], "a": "x" * 65_537})),
    "bytes of 4 GiB": claim(b"\xc6\xff\xff\xff\xff"),
    "bytes one too long": message(msgpack.packb({"sizes": [], "a": b"x" * 65_537})),
    "extension": claim(b"\xd4\x05\x00"),
    "empty extension": claim(b"\xc7\x00\x05"),
    "timestamp": claim(b"\xd6\xff\x00\x00\x00\x00"),
    "extension of 4 GiB": claim(b"\xc9\xff\xff\xff\xff\x05"),
    "reserved byte": claim(b"\xc1"),
    "cut short": claim(b""),
    "no UTF-8": claim(b"\xa1\xff"),
    "no sizes": message(msgpack.packb({"a": 1})),
    "sizes is a map": message(msgpack.packb({"sizes": {}})),
    "sizes is nil": message(msgpack.packb({"sizes": None})),
    "negative size": message(msgpack.packb({"sizes": [-1, 2]}), b"x"),
    "float size": message(msgpack.packb({"sizes": [1.0]}), b"x"),
    "bool size": message(msgpack.packb({"sizes": [True]}), b"x"),
    "attachment is missing": message(msgpack.packb({"sizes": [1]})),
    "attachment is too short": message(msgpack.packb({"sizes": [2**63]}), b"x"),
}  # fmt: skip


class TestMessages:
    """An envelope under tight limits, then raw attachments."""

    def test_envelope_and_attachments_come_back(self) -> None:
        parts = pack_message({"a": [1, None, "x"], "b": {"c": b"d"}}, [b"one", memoryview(b"two2"), b""])
        envelope, attachments = unpack_message(b"".join(parts))
        assert envelope == {"a": [1, None, "x"], "b": {"c": b"d"}}
        assert [bytes(part) for part in attachments] == [b"one", b"two2", b""]

    def test_attachments_are_copied_on_neither_side(self) -> None:
        large = bytearray(1_000_000)
        assert pack_message({}, [large])[1] is large
        body = bytearray(b"".join(pack_message({}, [large])))
        _, (part,) = unpack_message(body)
        part[0] = 7
        assert body[-len(large)] == 7

    def test_the_size_of_an_attachment_is_counted_in_bytes(self) -> None:
        numbers = memoryview(bytearray(16)).cast("Q")
        _, (part,) = unpack_message(b"".join(pack_message({}, [numbers])))
        assert part.nbytes == 16

    @pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
    def test_a_hostile_message_is_refused_before_it_takes_memory(self, body: bytes) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError):
                unpack_message(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.data())
    def test_a_changed_message_is_read_or_refused_and_nothing_else(self, data: st.DataObject) -> None:
        attachments: list[Any] = []
        value = encode_value({"a": (1, "two")}, attachments)
        body = bytearray(b"".join(pack_message({"value": value, "n": [1.5, None]}, attachments)))
        for _ in range(data.draw(st.integers(1, 3))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        try:
            envelope, parts = unpack_message(body[: data.draw(st.integers(0, len(body)))])
            decode_value(envelope.get("value"), parts)
        except ProtocolError:
            return
        assert type(envelope) is dict

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.binary(max_size=64))
    def test_noise_is_read_or_refused_and_nothing_else(self, noise: bytes) -> None:
        try:
            envelope, _ = unpack_message(message(noise))
        except ProtocolError:
            return
        assert type(envelope) is dict


class TestJson:
    """JSON peers write one mapping."""

    def test_a_mapping_is_read_from_any_buffer(self) -> None:
        for body in (b'{"a": [1]}', bytearray(b'{"a": [1]}'), memoryview(b'{"a": [1]}')):
            assert unpack_json(body) == {"a": [1]}

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'"text"',
            b'{"a": 1} x',
            b"\xff\xfe",
            b'{"a": ' + b"[" * 100_000,
            b'{"a": ' + b"1" * 10_000 + b"}",
        ],
        ids=["nothing", "half", "list", "null", "text", "trailing", "no UTF-8", "deep", "long number"],
    )
    def test_anything_else_is_refused(self, body: bytes) -> None:
        with pytest.raises(ProtocolError, match="JSON"):
            unpack_json(body)
