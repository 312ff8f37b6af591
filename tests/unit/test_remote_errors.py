"""Exceptions across the wire: as themselves where that is possible, as data always."""

from __future__ import annotations

import asyncio
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy
import pytest
from wove_tests.tasks import TwoArguments

from wove.errors import EnvironmentExecutionError, RemoteTraceback, WorkerLostError, normalize_exception
from wove.remote_errors import MAX_CHAIN, decode_exception, encode_exception, error_from_frame
from wove.wire import MAX_ENTRIES, encode_value, pack_message, unpack_message


class HostileText:
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise LookupError("no text")


class Endless(Exception):
    """Looks attributes up in an attribute that it never got: endless recursion."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class HostileArgs(Exception):
    """Its ``args`` cannot be read."""

    @property
    def args(self) -> Any:
        raise LookupError("no args")


class HostileReduce(Exception):
    """Cannot be pickled, and says so in an unusual way."""

    def __reduce__(self) -> NoReturn:
        raise KeyError("no pickle")


class Disguised(Exception):
    """Is pickled as another type."""

    def __reduce__(self) -> tuple[type[Exception], tuple[str]]:
        return (KeyError, ("not what it was",))


class Fatal(BaseException):
    """A user's own that is no ``Exception``."""


def strike(kind: type[BaseException]) -> NoReturn:
    """What unpickling a :class:`Struck` calls."""
    raise kind


class Struck(Exception):
    """Something strikes while it is pickled, or unpickled."""

    def __init__(self, kind: type[BaseException], *, unpickling: bool = False) -> None:
        super().__init__(kind)
        self.kind = kind
        self.unpickling = unpickling

    def __reduce__(self) -> Any:
        if self.unpickling:
            return strike, (self.kind,)
        raise self.kind


#: What code raises by itself, and what only strikes there.
BY_CODE = [ValueError, SystemExit, GeneratorExit, asyncio.CancelledError, Fatal]
FROM_OUTSIDE = [KeyboardInterrupt]


@dataclass(frozen=True)
class Frozen(Exception):
    """Lets nothing be set on it."""

    code: int


def raised(exc: BaseException, cause: BaseException | None = None) -> Any:
    """Return ``exc`` after it was raised here."""
    try:
        raise exc from cause
    except BaseException as caught:
        return caught


def across(exc: BaseException) -> Exception | None:
    """Send an exception to the other side."""
    attachments: list[Any] = []
    chain = encode_exception(exc, attachments)
    envelope, views = unpack_message(b"".join(pack_message({"exception": chain}, attachments)))
    return decode_exception(envelope["exception"], views)


class TestAcross:
    """What an exception is after the way."""

    def test_a_builtin_is_itself(self) -> None:
        back = across(raised(ValueError("bad", 7)))
        assert type(back) is ValueError
        assert back.args == ("bad", 7)

    def test_one_whose_constructor_wants_more_than_it_keeps_is_itself(self) -> None:
        back = across(raised(TwoArguments(7, "seven")))
        assert type(back) is TwoArguments
        assert (back.code, back.reason, str(back)) == (7, "seven", "7: seven")

    def test_a_group_keeps_its_members(self) -> None:
        back = across(ExceptionGroup("several", [ValueError(1), KeyError(2)]))
        assert isinstance(back, ExceptionGroup)
        assert [type(member) for member in back.exceptions] == [ValueError, KeyError]

    def test_notes_come_along(self) -> None:
        exc = ValueError("bad")
        exc.add_note("row 7")
        back = across(exc)
        assert back is not None
        assert back.__notes__ == ["row 7"]

    def test_causes_and_contexts_come_along(self) -> None:
        def fail() -> None:
            try:
                try:
                    {}["missing"]
                except KeyError as exc:
                    raise TwoArguments(1, "one") from exc
            except TwoArguments:
                raise ValueError("outer")  # noqa: B904 - a context is wanted

        with pytest.raises(ValueError, match="outer") as caught:
            fail()
        back = across(caught.value)
        assert isinstance(back, ValueError)
        assert back.__cause__ is None
        assert isinstance(back.__context__, TwoArguments)
        assert isinstance(back.__context__.__cause__, KeyError)

    def test_a_suppressed_context_stays_behind(self) -> None:
        def fail() -> None:
            try:
                {}["missing"]
            except KeyError:
                raise ValueError("outer") from None

        with pytest.raises(ValueError, match="outer") as caught:
            fail()
        back = across(caught.value)
        assert back is not None
        assert back.__context__ is None

    def test_a_cause_that_cannot_be_carried_leaves_its_text_in_its_place(self) -> None:
        back = across(raised(ValueError("outer"), cause=RuntimeError("holds", threading.Lock())))
        assert isinstance(back, ValueError)
        assert isinstance(back.__cause__, EnvironmentExecutionError)
        assert "RuntimeError: ('holds'" in str(back.__cause__)

    @pytest.mark.parametrize(
        "exc",
        [
            RuntimeError("holds a lock", threading.Lock()),
            HostileReduce("x"),
            SystemExit(4),
            KeyboardInterrupt(),
            GeneratorExit(),
            asyncio.CancelledError(),
            StopIteration(1),
            StopAsyncIteration(),
        ],
        ids=repr,
    )
    def test_what_cannot_or_must_not_be_raised_there_is_not_rebuilt(self, exc: BaseException) -> None:
        if isinstance(exc, HostileReduce):
            exc.lock = threading.Lock()
        assert across(raised(exc)) is None

    def test_no_exception_changes_its_type_on_the_way(self) -> None:
        back = across(raised(Disguised("x")))
        assert type(back) in (Disguised, type(None))


class TestEncoding:
    """The data is complete whatever the object does."""

    def test_the_entries(self) -> None:
        inner = KeyError("missing")
        inner.add_note("a note")
        chain = encode_exception(raised(ValueError("outer"), cause=inner), [])
        assert [(entry["kind"], entry["message"], entry["link"]) for entry in chain] == [
            ("ValueError", "outer", ""),
            ("KeyError", "'missing'", "cause"),
        ]
        assert chain[1]["notes"] == ["a note"]

    def test_what_cannot_be_carried_has_no_value_and_leaves_no_attachment(self) -> None:
        attachments: list[Any] = []
        (entry,) = encode_exception(SystemExit(4), attachments)
        assert (entry["kind"], entry["message"]) == ("SystemExit", "4")
        assert "value" not in entry
        assert attachments == []

    def test_attachments_are_counted_behind_those_already_there(self) -> None:
        attachments: list[Any] = [b"first", b"second"]
        chain = encode_exception(raised(ValueError("outer"), cause=KeyError("inner")), attachments)
        back = decode_exception(chain, [memoryview(part) for part in attachments])
        assert isinstance(back, ValueError)
        assert isinstance(back.__cause__, KeyError)
        assert attachments[:2] == [b"first", b"second"]

    def test_a_long_chain_is_cut(self) -> None:
        exc: BaseException = ValueError(0)
        for number in range(1, 50):
            exc = raised(ValueError(number), cause=exc)
        chain = encode_exception(exc, [])
        assert [entry["message"] for entry in chain] == [str(49 - n) for n in range(MAX_CHAIN)]

    def test_a_chain_that_bites_its_tail_ends(self) -> None:
        one, two = ValueError("one"), ValueError("two")
        one.__cause__, two.__cause__ = two, one
        assert [entry["message"] for entry in encode_exception(one, [])] == ["one", "two"]

    def test_large_buffers_leave_room_for_the_rest_of_the_message(self) -> None:
        arrays = [numpy.zeros(100_000, dtype="uint8") for _ in range(MAX_ENTRIES)]
        attachments: list[Any] = []
        encode_exception(raised(ValueError(arrays), cause=ValueError(arrays)), attachments)
        assert len(attachments) <= MAX_ENTRIES // 2

    @pytest.mark.parametrize(
        "kind", [Endless, HostileArgs, HostileReduce, Frozen], ids=lambda cls: cls.__name__
    )
    def test_a_hostile_exception_is_described_all_the_same(self, kind: type[Exception]) -> None:
        chain = encode_exception(raised(kind(1)), [])
        assert [entry["kind"] for entry in chain] == [kind.__name__]

    @pytest.mark.parametrize(
        "notes",
        [[HostileText()], "text", None, 5, [None, 1]],
        ids=["hostile", "text", "None", "5", "no texts"],
    )
    def test_hostile_notes_are_described_all_the_same(self, notes: Any) -> None:
        exc = ValueError("bad")
        exc.__notes__ = notes
        (entry,) = encode_exception(exc, [])
        assert entry["kind"] == "ValueError"
        assert all(type(note) is str for note in entry["notes"])

    @pytest.mark.parametrize("unpickling", [False, True], ids=["pickled", "unpickled"])
    @pytest.mark.parametrize("kind", BY_CODE)
    def test_what_its_code_raises_leaves_the_text(self, kind: type[BaseException], unpickling: bool) -> None:
        (entry,) = encode_exception(Struck(kind, unpickling=unpickling), [])
        assert entry["kind"] == "Struck"

    @pytest.mark.parametrize("unpickling", [False, True], ids=["pickled", "unpickled"])
    @pytest.mark.parametrize("kind", FROM_OUTSIDE)
    def test_what_strikes_meanwhile_is_raised(self, kind: type[BaseException], unpickling: bool) -> None:
        with pytest.raises(kind):
            encode_exception(Struck(kind, unpickling=unpickling), [])

    def test_a_text_that_cannot_be_had_is_replaced(self) -> None:
        (entry,) = encode_exception(ValueError(HostileText()), [])
        assert entry["message"] == "<ValueError: its text failed with LookupError>"


def one_value(value: Any) -> tuple[list[Any], list[memoryview]]:
    """Return the descriptor and the attachments of a value."""
    attachments: list[Any] = []
    return encode_value(value, attachments), [memoryview(part) for part in attachments]


class TestDecoding:
    """Verified bytes may still be malformed: they harm their own run at most."""

    @pytest.mark.parametrize(
        "chain",
        [
            None,
            [],
            {},
            "ValueError",
            5,
            ["junk"],
            [None],
            [{}],
            [[]],
            [{"value": None}],
            [{"value": ["data", 9, 1]}],
        ],
        ids=repr,
    )
    def test_what_is_no_description_is_no_exception(self, chain: Any) -> None:
        assert decode_exception(chain, []) is None

    @pytest.mark.parametrize("junk", ["junk", None, 5, [], {}, {"value": ["data", 9, 1]}], ids=repr)
    def test_a_malformed_cause_leaves_the_exception_itself(self, junk: Any) -> None:
        descriptor, views = one_value(ValueError("outer"))
        back = decode_exception([{"kind": "ValueError", "value": descriptor}, junk], views)
        assert isinstance(back, ValueError)
        assert back.args == ("outer",)

    @pytest.mark.parametrize(
        "value",
        [
            5,
            "text",
            (),
            (1, 2, 3),
            (int, (), {}),
            (SystemExit, (4,), {}),
            (ValueError, 5, {}),
            (ValueError, (), 5),
        ],
        ids=repr,
    )
    def test_a_value_that_is_no_exception_is_none(self, value: Any) -> None:
        descriptor, views = one_value(value)
        assert decode_exception([{"kind": "ValueError", "value": descriptor}], views) is None

    def test_a_class_that_does_not_exist_here_is_none(self) -> None:
        raw = b"cwove_no_such_module\nError\n."
        assert decode_exception([{"kind": "Error", "value": ["pickle", 0, 1]}], [memoryview(raw)]) is None

    @pytest.mark.parametrize("kind", BY_CODE)
    def test_what_unpickling_raises_leaves_none(self, kind: type[BaseException]) -> None:
        descriptor, views = one_value(Struck(kind, unpickling=True))
        assert decode_exception([{"kind": "Struck", "value": descriptor}], views) is None

    @pytest.mark.parametrize("kind", FROM_OUTSIDE)
    def test_what_strikes_meanwhile_is_raised(self, kind: type[BaseException]) -> None:
        descriptor, views = one_value(Struck(kind, unpickling=True))
        with pytest.raises(kind):
            decode_exception([{"kind": "Struck", "value": descriptor}], views)

    def test_ctrl_c_strikes_in_the_main_thread_alone(self) -> None:
        # In the callback listener's thread it would end the loop, and with it the runs of everybody.
        descriptor, views = one_value(Struck(KeyboardInterrupt, unpickling=True))
        with ThreadPoolExecutor(1) as pool:
            decoded = pool.submit(decode_exception, [{"kind": "Struck", "value": descriptor}], views)
            assert decoded.result() is None

    def test_an_exception_that_lets_nothing_be_set_is_an_exception_or_none(self) -> None:
        back = across(raised(Frozen(7), cause=KeyError("inner")))
        assert back is None or (type(back) is Frozen and back.code == 7)


def frame_of(exc: BaseException, **error: Any) -> dict[str, Any]:
    """Build the ``task_error`` frame that a worker sends for ``exc``."""
    back = across(exc)
    frame = {"type": "task_error", "error": {**normalize_exception(exc), **error}}
    return frame if back is None else {**frame, "exception": back}


class TestErrorFromFrame:
    """What the waiter gets."""

    def test_the_remote_exception_itself_with_the_remote_traceback_as_its_cause(self) -> None:
        error = error_from_frame(frame_of(raised(ValueError("bad"))))
        assert type(error) is ValueError
        assert isinstance(error.__cause__, RemoteTraceback)
        assert "in raised" in error.__cause__.text

    def test_the_traceback_stands_at_the_end_of_the_causes(self) -> None:
        error = error_from_frame(frame_of(raised(ValueError("outer"), cause=KeyError("inner"))))
        assert isinstance(error.__cause__, KeyError)
        assert isinstance(error.__cause__.__cause__, RemoteTraceback)
        # Printed, what happened over there stands first.
        assert "".join(traceback.format_exception(error)).startswith("wove.errors.RemoteTraceback")

    def test_the_place_is_a_note(self) -> None:
        error = error_from_frame(frame_of(raised(ValueError("bad"))), where="on worker w1")
        assert error.__notes__ == ["on worker w1"]

    def test_what_was_not_rebuilt_is_an_execution_error_with_the_data(self) -> None:
        frame = frame_of(raised(SystemExit(4)))
        error = error_from_frame(frame, where="on worker w1")
        assert type(error) is EnvironmentExecutionError
        assert error.payload == frame["error"]
        assert str(error) == "SystemExit: 4"
        assert isinstance(error.__cause__, RemoteTraceback)
        assert error.__notes__ == ["on worker w1"]

    def test_a_loss_that_the_backend_reports_is_a_lost_worker(self) -> None:
        error = error_from_frame(
            {"error": {"kind": "WorkerLostError", "message": "gone", "source": "backend"}}
        )
        assert type(error) is WorkerLostError
        assert str(error) == "gone"

    def test_a_task_that_only_speaks_of_a_loss_is_an_execution_error(self) -> None:
        error = error_from_frame({"error": {"kind": "WorkerLostError", "message": "x", "source": "task"}})
        assert type(error) is EnvironmentExecutionError

    @pytest.mark.parametrize(
        "exc",
        [
            SystemExit(4),
            KeyboardInterrupt(),
            GeneratorExit(),
            asyncio.CancelledError(),
            StopIteration(1),
            "text",
            5,
        ],
        ids=repr,
    )
    def test_what_would_mean_something_else_here_is_never_raised(self, exc: Any) -> None:
        error = error_from_frame({"error": {"kind": "Boom", "message": "text"}, "exception": exc})
        assert type(error) is EnvironmentExecutionError
        assert str(error) == "Boom: text"

    def test_an_exception_of_this_process_keeps_its_own_traceback_and_causes(self) -> None:
        exc = raised(ValueError("bad"))
        error = error_from_frame({"error": normalize_exception(exc), "exception": exc})
        assert error is exc
        assert error.__cause__ is None
        assert error.__traceback__ is not None

    @pytest.mark.parametrize(
        "exc", [Frozen(7), Endless("x"), HostileArgs("x")], ids=lambda exc: type(exc).__name__
    )
    def test_an_exception_that_lets_nothing_be_set_on_it_is_an_outcome_all_the_same(self, exc: Any) -> None:
        frame = {"error": {"kind": "Frozen", "message": "text", "traceback": "tb"}, "exception": exc}
        error = error_from_frame(frame, where="on worker w1")
        assert type(error) in (type(exc), EnvironmentExecutionError)
