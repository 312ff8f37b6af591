"""Plain data comes back exactly: equal, and of the same types all the way down."""

from __future__ import annotations

import json
import zoneinfo
from collections import OrderedDict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from typing import Any
from uuid import UUID, SafeUUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wove.errors import EncodeError, ProtocolError
from wove.plain_data import (
    MAX_DEPTH,
    MAX_MAPPING,
    MAX_SEQUENCE,
    OTHER,
    PLAIN,
    TAG,
    TAGGED,
    from_tagged,
    shape_of,
    to_tagged,
    type_name,
)
from wove.wire import decode_value, encode_value

CET = timezone(timedelta(hours=1))


class Colour(IntEnum):
    """An int that is more than an int."""

    RED = 1


class Name(str):
    """A str that is more than a str."""


Pair = namedtuple("Pair", "a b")


def through_json(value: Any) -> Any:
    """Send plain data as a JSON peer would."""
    text = json.dumps(to_tagged(value, for_json=True), allow_nan=False)
    return from_tagged(json.loads(text))


def through_the_wire(value: Any) -> Any:
    """Send a value as a worker of ours would."""
    attachments: list[Any] = []
    descriptor = encode_value(value, attachments)
    return decode_value(descriptor, [memoryview(part) for part in attachments])


def exactly(value: Any) -> Any:
    """Describe a value so that equal descriptions mean: equal, of the same types, in the same order."""
    cls = type(value)
    if cls in (list, tuple):
        return (cls, [exactly(item) for item in value])
    if cls in (set, frozenset):
        return (cls, sorted(repr(exactly(item)) for item in value))
    if cls is dict:
        return (cls, [(exactly(key), exactly(item)) for key, item in value.items()])
    if cls is float:
        return (cls, value.hex())  # tells -0.0 from 0.0, and NaN is NaN
    if cls is Decimal:
        return (cls, value.as_tuple())  # tells 1.0 from 1.00
    if cls in (datetime, time):
        return (cls, value.isoformat(), repr(value.tzinfo), value.fold)
    return (cls, value)


#: Other zones than of whole seconds are left to the pickle, see TestShape.
OFFSETS = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**200), max_value=2**200),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.decimals().filter(lambda number: not number.is_snan()),  # one that signals has no hash
    st.uuids(),
    st.dates(),
    st.datetimes(timezones=st.none() | OFFSETS).map(lambda moment: moment.replace(fold=0)),
    st.times(timezones=st.none() | OFFSETS).map(lambda moment: moment.replace(fold=0)),
    st.timedeltas(),
)
KEYS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
PLAIN_DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(KEYS, max_size=3),
        st.frozensets(KEYS, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.sampled_from([TAG, "v", "a"]), inner, max_size=3),
    ),
    max_leaves=12,
)


class TestRoundTrip:
    """Over JSON and over msgpack alike."""

    @settings(max_examples=150, deadline=None, database=None)
    @given(PLAIN_DATA)
    def test_nested_plain_data_comes_back_exactly_over_json(self, value: Any) -> None:
        assert exactly(through_json(value)) == exactly(value)

    @settings(max_examples=150, deadline=None, database=None)
    @given(PLAIN_DATA)
    def test_nested_plain_data_comes_back_exactly_over_the_wire(self, value: Any) -> None:
        assert exactly(through_the_wire(value)) == exactly(value)

    @pytest.mark.parametrize("carry", [through_json, through_the_wire])
    @pytest.mark.parametrize(
        "value",
        [
            2**53,
            -(2**53) - 1,
            2**63 - 1,
            2**64,
            -(2**63) - 1,
            float("inf"),
            float("-inf"),
            -0.0,
            Decimal("-0.00"),
            Decimal("sNaN123"),
            Decimal("1E+1000"),
            timedelta.min,
            datetime.max,
            datetime(2026, 3, 1, tzinfo=UTC),
            time(12, 30, 0, 5, tzinfo=CET),
            UUID(int=0),
            "\ud800 alone",
            (),
            {TAG: "tuple", "v": [1]},
            {TAG: 5},
            {TAG: {TAG: "x"}, "v": (1,)},
            {1: "int", "1": "str", None: 0, b"1": 1, 1.5: 2, (1, "1"): 3, frozenset({1}): 4},
            {2**70: 2**70},
            {frozenset({(1, 2)}), 3},
        ],
        ids=repr,
    )
    def test_the_corners(self, value: Any, carry: Any) -> None:
        assert exactly(carry(value)) == exactly(value)

    @pytest.mark.parametrize("carry", [through_json, through_the_wire])
    def test_nan_is_nan(self, carry: Any) -> None:
        back = carry([float("nan"), Decimal("NaN")])
        assert back[0] != back[0]
        assert back[1].is_nan()


class TestShape:
    """What travels as it is, what after tagging, and what only a pickle carries."""

    @pytest.mark.parametrize(
        "value",
        [None, True, 1, 2**200, 1.5, "text", b"bytes", [], {}, [1, [2, [3]]], {"a": {1: [None]}}],
        ids=repr,
    )
    def test_plain(self, value: Any) -> None:
        assert shape_of(value) == PLAIN

    @pytest.mark.parametrize(
        "value",
        [
            (),
            set(),
            frozenset({1}),
            date(2026, 1, 1),
            datetime(2026, 1, 1, tzinfo=CET),
            time(1),
            timedelta(1),
            Decimal(1),
            UUID(int=1),
            {(1, 2): 3},
            {TAG: 1},
            [{"a": [()]}],
        ],
        ids=repr,
    )
    def test_tagged(self, value: Any) -> None:
        assert shape_of(value) == TAGGED

    @pytest.mark.parametrize(
        "value",
        [
            Colour.RED,
            Name("name"),
            Pair(1, 2),
            OrderedDict(a=1),
            bytearray(b"x"),
            datetime(2026, 10, 25, 2, 30, fold=1),
            datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
            datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1), "CET")),
            # CPython reads an offset of less than a second back as UTC.
            time(12, tzinfo=timezone(timedelta(microseconds=1))),
            datetime(2026, 1, 1, tzinfo=timezone(-timedelta(microseconds=1))),
            UUID(int=1, is_safe=SafeUUID.safe),
        ],
        ids=repr,
    )
    def test_what_would_lose_something_is_left_to_the_pickle(self, value: Any) -> None:
        assert shape_of(value) == OTHER
        assert shape_of([{"deep": (value,)}]) == OTHER
        assert exactly(through_the_wire([value])) == exactly([value])

    def test_a_container_met_twice_is_left_to_the_pickle(self) -> None:
        inner = [1]
        assert shape_of([inner, inner]) == OTHER
        assert shape_of([inner, [1]]) == PLAIN

    def test_an_empty_container_met_twice_is_left_to_the_pickle(self) -> None:
        # The two places are one list, and whoever appends to one of them relies on it.
        for empty in ([], {}, set()):
            back = through_the_wire([empty, empty])
            assert back[0] is back[1], type(empty)

    def test_a_cycle_is_left_to_the_pickle(self) -> None:
        loop: list[Any] = [1]
        loop.append(loop)
        assert shape_of(loop) == OTHER
        back = through_the_wire(loop)
        assert back[1] is back

    def test_sharing_does_not_take_exponential_time(self) -> None:
        value: Any = [1]
        for _ in range(60):
            value = [value, value]
        assert shape_of(value) == OTHER

    def test_what_is_nested_too_deeply_is_left_to_the_pickle(self) -> None:
        def nested(depth: int) -> Any:
            value: Any = 1
            for _ in range(depth):
                value = [value]
            return value

        assert shape_of(nested(MAX_DEPTH)) == PLAIN
        assert shape_of(nested(MAX_DEPTH + 10)) == OTHER
        assert shape_of(nested(100_000)) == OTHER

    @pytest.mark.parametrize(
        "value",
        [[None] * (MAX_SEQUENCE + 1), (None,) * (MAX_SEQUENCE + 1), dict.fromkeys(range(MAX_MAPPING + 1))],
        ids=["list", "tuple", "dict"],
    )
    def test_what_is_too_large_for_the_limits_is_left_to_the_pickle(self, value: Any) -> None:
        assert shape_of(value) == OTHER


class TestToTagged:
    """The one form that every peer reads."""

    @pytest.mark.parametrize(
        ("value", "tagged"),
        [
            ((1, 2), {TAG: "tuple", "v": [1, 2]}),
            (b"\x00", {TAG: "bytes", "v": "AA=="}),
            (2**53, {TAG: "int", "v": "0x20000000000000"}),
            (float("inf"), {TAG: "float", "v": "inf"}),
            (Decimal("1.50"), {TAG: "decimal", "v": "1.50"}),
            (timedelta(1, 2, 3), {TAG: "timedelta", "v": [1, 2, 3]}),
            (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), {TAG: "datetime", "v": "2026-01-02T03:04:05+00:00"}),
            ({1: 2}, {TAG: "dict", "v": [[1, 2]]}),
            ({TAG: 1}, {TAG: "dict", "v": [[TAG, 1]]}),
        ],
        ids=repr,
    )
    def test_the_json_form(self, value: Any, tagged: Any) -> None:
        assert to_tagged(value, for_json=True) == tagged

    def test_what_json_carries_is_left_alone(self) -> None:
        value = {"a": [1, -1.5, "x", None, True, {"b": []}]}
        assert to_tagged(value, for_json=True) == value

    def test_anything_else_is_refused_by_the_name_of_its_type(self) -> None:
        with pytest.raises(EncodeError, match=r"type collections\.OrderedDict is not plain data"):
            to_tagged([OrderedDict()])

    def test_type_names(self) -> None:
        assert type_name(1) == "int"
        assert type_name(Decimal(1)) == "decimal.Decimal"


class TestFromTagged:
    """What a peer sends wrongly is refused; nothing is guessed."""

    @pytest.mark.parametrize(
        "tagged",
        [
            {TAG: "pickle", "v": "x"},
            {TAG: "object", "v": []},
            {TAG: None, "v": 1},
            {TAG: ["tuple"], "v": 1},
            {TAG: "tuple"},
            {TAG: "tuple", "value": []},
            {TAG: "tuple", "v": [], "more": 1},
        ],
        ids=repr,
    )
    def test_an_unknown_tag_or_key_is_refused(self, tagged: Any) -> None:
        with pytest.raises(ProtocolError, match="unknown tag"):
            from_tagged([{"deep": tagged}])

    @pytest.mark.parametrize(
        ("tag", "value"),
        [
            ("tuple", 5),
            ("tuple", "abc"),
            ("tuple", {"a": 1}),
            ("set", "abc"),
            ("set", [[1]]),
            ("frozenset", None),
            ("frozenset", {"a": 1}),
            ("dict", [[1]]),
            ("dict", ["ab"]),
            ("dict", [[[1], 2]]),
            ("int", 5),
            ("int", "xyz"),
            ("int", None),
            ("float", "one"),
            ("float", None),
            ("bytes", "!!!"),
            ("bytes", 5),
            ("datetime", "tomorrow"),
            ("datetime", 5),
            ("date", "2026-13-01"),
            ("time", "25:00"),
            ("timedelta", [10**12, 0, 0]),
            ("timedelta", [1, 2, 3, 4, 5, 6, 7]),
            ("timedelta", "1 day"),
            ("decimal", "one"),
            ("decimal", 1.1),
            ("decimal", [0, [1], 0]),
            ("uuid", "1234"),
            ("uuid", 5),
        ],
    )
    def test_a_value_that_does_not_fit_its_tag_is_refused(self, tag: str, value: Any) -> None:
        with pytest.raises(ProtocolError, match=f"malformed {tag}"):
            from_tagged({TAG: tag, "v": value})

    def test_the_message_does_not_repeat_a_hostile_tag(self) -> None:
        with pytest.raises(ProtocolError) as caught:
            from_tagged({TAG: "x" * 1_000_000, "v": 1})
        assert len(str(caught.value)) < 500
