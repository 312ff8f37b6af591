"""The frame vocabulary and the checks on what comes in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wove import frames
from wove.errors import ProtocolError

RUN_ID = "0123456789abcdef" * 2


def event(kind: str, **fields: Any) -> frames.Frame:
    """Build an event of the run that these tests speak of."""
    return frames.event(kind, RUN_ID, "app.task", 1, 1, **fields)


VALID = {
    "task_started": event("task_started"),
    "heartbeat": event("heartbeat"),
    "progress": event("progress", fraction=0.5, message="half"),
    "progress without a fraction": event("progress", fraction=None),
    "progress from 0": event("progress", fraction=0),
    "progress to 1": event("progress", fraction=1),
    "log": event("log", message="a line"),
    "task_result": event("task_result", result=42),
    "task_result of None": event("task_result", result=None),
    "task_error": event("task_error", error={"kind": "ValueError"}),
    "task_cancelled": event("task_cancelled"),
}

MALFORMED: dict[str, tuple[Any, str]] = {
    "no mapping": ([], "a frame is a mapping, not list"),
    "None": (None, "a frame is a mapping, not NoneType"),
    "no type": ({"run_id": RUN_ID}, "type is a string"),
    "type is unhashable": ({"type": ["heartbeat"]}, "type is a string"),
    "type is bytes": ({"type": b"heartbeat"}, "type is a string"),
    "no run_id": ({"type": "heartbeat", "attempt": 1, "seq": 1}, "run_id"),
    "run_id is a list": ({**event("heartbeat"), "run_id": ["x"]}, "run_id"),
    "run_id is short": ({**event("heartbeat"), "run_id": "ab"}, "run_id"),
    "attempt 0": ({**event("heartbeat"), "attempt": 0}, "attempt"),
    "attempt is a bool": ({**event("heartbeat"), "attempt": True}, "attempt"),
    "attempt is text": ({**event("heartbeat"), "attempt": "1"}, "attempt"),
    "seq is missing": ({k: v for k, v in event("heartbeat").items() if k != "seq"}, "seq"),
    "seq is a float": ({**event("heartbeat"), "seq": 1.0}, "seq"),
    "seq is negative": ({**event("heartbeat"), "seq": -1}, "seq"),
    "seq is beyond what JSON carries exactly": ({**event("heartbeat"), "seq": 2**53}, "seq"),
    "no result": (event("task_result"), "the result is missing"),
    "no error": (event("task_error"), "error is not a mapping"),
    "error is text": (event("task_error", error="ValueError"), "error is not a mapping"),
    "error without a kind": (event("task_error", error={"message": "x"}), "error is not a mapping"),
    "kind is a number": (event("task_error", error={"kind": 5}), "error is not a mapping"),
    "fraction above 1": (event("progress", fraction=1.5), "fraction"),
    "fraction below 0": (event("progress", fraction=-0.1), "fraction"),
    "fraction is NaN": (event("progress", fraction=float("nan")), "fraction"),
    "fraction is a bool": (event("progress", fraction=True), "fraction"),
    "fraction is text": (event("progress", fraction="0.5"), "fraction"),
    "progress message": (event("progress", fraction=0.5, message=5), "message"),
    "log message": (event("log", message=b"line"), "message"),
}


class TestVocabulary:
    """Names that both sides and every released version agree on."""

    def test_exactly_three_events_end_a_run(self) -> None:
        assert frames.TERMINAL == {"task_result", "task_error", "task_cancelled"}

    def test_the_events(self) -> None:
        assert frames.EVENTS == frames.TERMINAL | {
            "task_started",
            "heartbeat",
            "progress",
            "log",
            "task_retry",
        }

    def test_an_event_carries_its_run_task_attempt_and_number(self) -> None:
        assert frames.event("log", RUN_ID, "app.task", 2, 7, message="x") == {
            "type": "log",
            "run_id": RUN_ID,
            "task_id": "app.task",
            "attempt": 2,
            "seq": 7,
            "message": "x",
        }


class TestRunIds:
    """32 hexadecimal characters: valid for Celery, RQ and URLs."""

    @pytest.mark.parametrize("value", [RUN_ID, "0" * 32, "f" * 32])
    def test_accepted(self, value: str) -> None:
        assert frames.is_run_id(value)

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "a" * 31,
            "a" * 33,
            "A" * 32,
            "g" * 32,
            "٣" * 32,
            "a" * 31 + "\n",
            b"a" * 32,
            0,
            None,
            ["a"] * 32,
        ],
    )
    def test_refused(self, value: object) -> None:
        assert not frames.is_run_id(value)


class TestCheckEvent:
    """Nothing but a well-formed event passes."""

    @pytest.mark.parametrize("frame", VALID.values(), ids=VALID)
    def test_a_well_formed_event_is_accepted(self, frame: frames.Frame) -> None:
        assert frames.check_event(frame) is True

    def test_a_type_of_a_newer_peer_is_told_apart_and_is_no_error(self) -> None:
        assert frames.check_event(event("task_paused", whatever=[1])) is False

    @pytest.mark.parametrize(("frame", "named"), MALFORMED.values(), ids=MALFORMED)
    def test_a_malformed_event_is_refused_and_the_field_named(self, frame: Any, named: str) -> None:
        with pytest.raises(ProtocolError, match=named):
            frames.check_event(frame)

    def test_the_message_does_not_repeat_a_hostile_type(self) -> None:
        with pytest.raises(ProtocolError) as caught:
            frames.check_event({"type": "x" * 1_000_000, "run_id": 5})
        assert len(str(caught.value)) < 200

    @settings(max_examples=200, deadline=None, database=None)
    @given(
        st.dictionaries(
            st.sampled_from(["type", "run_id", "attempt", "seq", "result", "error", "fraction", "message"]),
            st.sampled_from([*sorted(frames.EVENTS), RUN_ID, 1, 0, None, True, 0.5, b"x", (), {"kind": "E"}])
            | st.lists(st.integers(), max_size=2),
        )
    )
    def test_whatever_comes_is_accepted_refused_or_unknown(self, frame: dict[str, Any]) -> None:
        try:
            known = frames.check_event(frame)
        except ProtocolError:
            return
        assert known is (frame["type"] in frames.EVENTS)
        assert frames.is_run_id(frame["run_id"])
        assert type(frame["attempt"]) is int
        assert type(frame["seq"]) is int
