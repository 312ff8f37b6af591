"""The exceptions of Wove, and exceptions as plain data."""

from __future__ import annotations

import pickle
import traceback
from typing import Any, NoReturn

import pytest

from wove import errors, frames
from wove.errors import (
    ConfigurationError,
    DeliveryOrphanedError,
    DeliveryTimeoutError,
    EncodeError,
    EnvironmentExecutionError,
    MissingDispatchFeatureError,
    PayloadRejectedError,
    ProtocolError,
    RemoteTraceback,
    SubmitError,
    WorkerLostError,
    WoveError,
    normalize_exception,
    safe_text,
)
from wove.threads import DaemonPool

PAYLOAD = {"kind": "Boom", "message": "it broke", "traceback": "tb", "retryable": False, "source": "task"}


class TestHierarchy:
    """One root, and the builtin type that a caller would think of."""

    @pytest.mark.parametrize(
        ("error", "builtin"),
        [
            (MissingDispatchFeatureError, RuntimeError),
            (ConfigurationError, ValueError),
            (ProtocolError, RuntimeError),
            (EncodeError, TypeError),
            (PayloadRejectedError, RuntimeError),
            (SubmitError, RuntimeError),
            (DeliveryTimeoutError, TimeoutError),
            (DeliveryOrphanedError, RuntimeError),
            (EnvironmentExecutionError, RuntimeError),
            (WorkerLostError, EnvironmentExecutionError),
        ],
        ids=lambda cls: cls.__name__,
    )
    def test_every_error_is_a_wove_error_a_runtime_error_and_its_builtin(
        self, error: type[Exception], builtin: type[Exception]
    ) -> None:
        assert issubclass(error, WoveError)
        assert issubclass(error, RuntimeError)
        assert issubclass(error, builtin)

    def test_a_remote_traceback_is_no_error_of_wove(self) -> None:
        assert not issubclass(RemoteTraceback, WoveError)


class TestTexts:
    """What a user reads."""

    def test_a_delivery_timeout_shows_its_message_although_it_is_an_os_error(self) -> None:
        assert str(DeliveryTimeoutError("no outcome within 3 s")) == "no outcome within 3 s"

    @pytest.mark.parametrize(
        ("payload", "text"),
        [
            (PAYLOAD, "Boom: it broke"),
            ({"kind": "Boom", "message": ""}, "Boom"),
            ({"kind": "Boom"}, "Boom"),
            ({"message": "it broke"}, "Error: it broke"),
            ({}, "Error"),
        ],
    )
    def test_an_execution_error_shows_kind_and_message(self, payload: dict[str, Any], text: str) -> None:
        assert str(EnvironmentExecutionError(payload)) == text

    def test_an_execution_error_keeps_a_payload_of_its_own(self) -> None:
        payload = dict(PAYLOAD)
        error = EnvironmentExecutionError(payload)
        payload["kind"] = "Changed"
        assert error.payload == PAYLOAD
        assert error.kind == "Boom"

    def test_the_remote_traceback_stands_above_the_error_it_caused(self) -> None:
        error = ValueError("local")
        error.__cause__ = RemoteTraceback("Traceback of the worker\nValueError: remote\n")
        shown = "".join(traceback.format_exception(error))
        assert "Traceback of the worker\nValueError: remote\n" in shown
        assert shown.index("Traceback of the worker") < shown.index("ValueError: local")


class TestPickling:
    """Errors pass through process pools and queues of the submitter."""

    @pytest.mark.parametrize("cls", [EnvironmentExecutionError, WorkerLostError])
    def test_execution_errors_keep_type_and_payload(self, cls: type[EnvironmentExecutionError]) -> None:
        back = pickle.loads(pickle.dumps(cls(PAYLOAD)))
        assert type(back) is cls
        assert back.payload == PAYLOAD
        assert str(back) == "Boom: it broke"

    def test_a_submit_error_keeps_its_doubt(self) -> None:
        back = pickle.loads(pickle.dumps(SubmitError("no answer", maybe_accepted=True)))
        assert (str(back), back.maybe_accepted) == ("no answer", True)
        assert SubmitError("refused").maybe_accepted is False

    def test_a_delivery_timeout_keeps_its_message(self) -> None:
        assert str(pickle.loads(pickle.dumps(DeliveryTimeoutError("late")))) == "late"


def raised(exc: BaseException) -> BaseException:
    """Return ``exc`` after it was raised here."""
    try:
        raise exc
    except BaseException as caught:
        return caught


def fail_with_cause() -> NoReturn:
    """Raise a LookupError from a KeyError."""
    try:
        {}["missing"]
    except KeyError as exc:
        raise LookupError("outer") from exc


class Mute(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise LookupError("no text")


class HostileNotes(Exception):
    """Its notes cannot be read."""

    @property
    def __notes__(self) -> list[str]:
        raise LookupError("no notes")


class TestNormalizeException:
    """``{"kind", "message", "traceback", "retryable", "source"}``, whatever the exception is."""

    def test_holds_exactly_the_documented_keys_with_their_defaults(self) -> None:
        data = normalize_exception(raised(ValueError("bad value")))
        assert data.pop("traceback").startswith("Traceback (most recent call last)")
        assert data == {"kind": "ValueError", "message": "bad value", "retryable": False, "source": "task"}

    def test_says_where_it_arose_and_whether_another_try_may_help(self) -> None:
        data = normalize_exception(ValueError(), source="backend", retryable=True)
        assert (data["source"], data["retryable"]) == ("backend", True)

    def test_the_traceback_names_functions_and_causes(self) -> None:
        with pytest.raises(LookupError) as caught:
            fail_with_cause()
        text = normalize_exception(caught.value)["traceback"]
        assert "in fail_with_cause" in text
        assert "KeyError: 'missing'" in text
        assert text.index("KeyError") < text.index("LookupError: outer")

    def test_notes_are_part_of_the_traceback(self) -> None:
        error = ValueError("bad")
        error.add_note("while reading row 7")
        assert "while reading row 7" in normalize_exception(error)["traceback"]

    def test_an_exception_that_was_never_raised_has_a_traceback_text_all_the_same(self) -> None:
        assert normalize_exception(ValueError("bad"))["traceback"] == "ValueError: bad\n"

    def test_leading_frames_of_wove_are_left_out(self) -> None:
        pool = DaemonPool(1, "test")
        try:
            error = pool.submit(fail_with_cause).exception(20)
        finally:
            pool.close()
        assert error is not None
        text = normalize_exception(error)["traceback"]
        assert "in fail_with_cause" in text
        assert "threads.py" not in text

    def test_frames_of_wove_are_kept_where_there_are_no_others(self) -> None:
        pool = DaemonPool(1, "test")
        try:
            error = pool.submit(frames.check_event, 1).exception(20)
        finally:
            pool.close()
        assert error is not None
        assert "in check_event" in normalize_exception(error)["traceback"]

    def test_a_text_that_cannot_be_had_is_replaced_by_what_is_known(self) -> None:
        data = normalize_exception(raised(Mute()))
        assert data["kind"] == "Mute"
        assert data["message"] == "<Mute: its text failed with LookupError>"
        assert "Mute" in data["traceback"]

    def test_a_traceback_that_cannot_be_formatted_is_replaced_by_what_is_known(self) -> None:
        assert "HostileNotes" in normalize_exception(raised(HostileNotes("x")))["traceback"]

    def test_long_texts_are_cut(self) -> None:
        data = normalize_exception(raised(ValueError("x" * 1_000_000)))
        assert len(data["message"]) <= errors.MAX_TEXT
        assert len(data["traceback"]) <= errors.MAX_TEXT

    def test_lone_surrogates_become_text_that_utf8_can_carry(self) -> None:
        data = normalize_exception(raised(ValueError("a\ud800b")))
        assert data["message"] == "a\\ud800b"
        data["traceback"].encode("utf-8")


class TestSafeText:
    """Text of any object, of bounded length."""

    def test_short_text_is_left_alone(self) -> None:
        assert safe_text("abc", 3) == "abc"
        assert safe_text(ValueError("abc")) == "abc"

    def test_the_middle_is_cut_and_its_length_is_named(self) -> None:
        text = safe_text("start" + "x" * 1000 + "end", 400)
        assert text.startswith("start")
        assert text.endswith("end")
        kept = sum(text.count(letter) for letter in "x") + len("start") + len("end")
        assert f"[... {1008 - kept} characters cut ...]" in text

    @pytest.mark.parametrize("limit", [40, 80, 400, 16_000])
    def test_no_text_is_longer_than_its_limit(self, limit: int) -> None:
        longest = max(len(safe_text("x" * length, limit)) for length in (limit + 1, 20_000, 1_000_000))
        assert longest <= limit
