"""A backend's time limit that strikes while something is encoded or decoded is the task's, and no trouble of that."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from wove import plain_data
from wove.errors import EncodeError, format_traceback, safe_text
from wove.no_pickle import encode_plain
from wove.remote_errors import encode_exception
from wove.tables import ERROR, encode_small
from wove.wire import decode_value, encode_value, unpack_message
from wove.worker import offering
from wove.worker.batch import _Work
from wove.worker.batch_session import BatchSession
from wove.worker.celery import CeleryHooks
from wove.worker.hooks import BackendHooks, keep
from wove.worker.outcomes import encode_error, encode_result
from wove.worker.rq import RqHooks
from wove.worker.rq_sharing import SharedJob

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = ["a" * 32, "b" * 32]


class SoftTimeLimitExceeded(Exception):
    """Named as Celery's."""


class BaseTimeoutException(Exception):
    """As RQ's."""


class JobTimeoutException(BaseTimeoutException):
    """As RQ's."""


class Longer(JobTimeoutException):
    """A user's own."""


LIMITS = [SoftTimeLimitExceeded, JobTimeoutException, Longer]


def strike(kind: type[Exception]) -> NoReturn:
    raise kind("time is up")


class Struck:
    """The time is up while it is pickled, or its text is made."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __reduce__(self) -> NoReturn:
        strike(self.kind)

    def __str__(self) -> NoReturn:
        strike(self.kind)


class StruckLater(Struck):
    """The time is up while it is unpickled."""

    def __reduce__(self) -> Any:
        return strike, (self.kind,)


class StruckError(Exception):
    """The time is up while it is pickled; only once, as a limit does."""

    def __init__(self, kind: type[Exception]) -> None:
        super().__init__("its own")
        self.kind: type[Exception] | None = kind

    def __reduce__(self) -> Any:
        kind, self.kind = self.kind, None
        if kind is not None:
            strike(kind)
        return ValueError, ("its own",)


class StruckText(Exception):
    def __str__(self) -> NoReturn:
        strike(self.args[0])


ENCODERS: dict[str, Callable[[type[Exception]], object]] = {
    "value": lambda kind: encode_value(Struck(kind), []),
    "value in a list": lambda kind: encode_value([1, {"two": Struck(kind)}], []),
    "by value": lambda kind: encode_value((lambda: None, Struck(kind)), []),
    "small value": lambda kind: encode_small(Struck(kind)),
    "result": lambda kind: encode_result(Struck(kind), [], plain=False),
    "plain result": lambda kind: encode_plain({Struck(kind): set()}, []),
    "exception": lambda kind: encode_exception(StruckError(kind), []),
    "error": lambda kind: encode_error(StruckError(kind), source="task", plain=False),
    "error's text": lambda kind: encode_error(StruckText(kind), source="task", plain=True),
    "text": lambda kind: safe_text(Struck(kind)),
}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_it_is_raised_as_it_is(encode: Callable[[type[Exception]], object], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="time is up"):
        encode(kind)


@pytest.mark.parametrize("kind", LIMITS)
def test_it_is_raised_as_it_is_from_decoding(kind: type[Exception]) -> None:
    attachments: list[Any] = []
    described = encode_value(StruckLater(kind), attachments)
    with pytest.raises(kind, match="time is up"):
        decode_value(described, [memoryview(part) for part in attachments])


def test_it_is_raised_as_it_is_while_a_tag_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    attachments: list[Any] = []
    described = encode_value((1,), attachments)
    monkeypatch.setitem(plain_data._REBUILD, "tuple", lambda _: strike(SoftTimeLimitExceeded))
    with pytest.raises(SoftTimeLimitExceeded):
        decode_value(described, [memoryview(part) for part in attachments])


def test_in_another_thread_it_is_of_the_values_own_doing() -> None:
    # A backend strikes in the main thread. In a listener's it would end everybody's runs.
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(EncodeError):
            pool.submit(encode_value, Struck(SoftTimeLimitExceeded), []).result()
        assert "SoftTimeLimitExceeded" in pool.submit(safe_text, Struck(SoftTimeLimitExceeded)).result()


def test_one_that_is_told_is_told_whatever_its_causes_do() -> None:
    limit = SoftTimeLimitExceeded("time is up")
    limit.__cause__ = StruckText(JobTimeoutException)
    error, described, attachments = encode_error(limit, source="task", plain=False)
    assert (error["kind"], error["message"], error["source"]) == (
        "SoftTimeLimitExceeded",
        "time is up",
        "task",
    )
    assert (described, attachments) == ([], [])
    assert "time is up" in format_traceback(limit)


# --- in a job that several share ---------------------------------------------------


def shared(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[tuple[str, str]]]:
    """Return a shared job, and the kinds and sources of the errors that others are told."""
    errors: list[tuple[str, str]] = []
    job: Any = object.__new__(SharedJob)
    monkeypatch.setattr(job, "_tell", lambda _, say: say(), raising=False)
    job._job = SimpleNamespace(id="job")

    def deliver_error(error: dict[str, Any], *_: object) -> None:
        errors.append((error["kind"], error["source"]))

    job.other = SimpleNamespace(deliver_error=deliver_error)
    return job, errors


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("failed", [False, True], ids=["result", "error"])
def test_others_hear_of_it_as_the_tasks(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], failed: bool
) -> None:
    job, errors = shared(monkeypatch)
    failure = StruckError(kind) if failed else None
    job._deliver([job.other], None if failed else Struck(kind), failure, "task", plain=False)
    assert errors == [(kind.__name__, "task")]


@pytest.mark.parametrize("strikes", [1, 2])
def test_it_keeps_nobody_from_knowing_who_shares_the_job(
    monkeypatch: pytest.MonkeyPatch, strikes: int
) -> None:
    job, _ = shared(monkeypatch)
    left = [JobTimeoutException("time is up")] * strikes

    def close() -> tuple[str, dict[str, bytes]]:
        if left:
            raise left.pop()
        return "", {}

    job._party = SimpleNamespace(close=close)
    assert job._close() == (("", {}) if strikes == 1 else None)


# --- with a result that the backend keeps ---------------------------------------------


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("backend", ["celery", "rq"])
def test_it_does_not_turn_the_result_into_text(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], backend: str
) -> None:
    strikes, kept = [kind], []

    def store(*given: object) -> None:
        if strikes:
            strike(strikes.pop())
        kept.append(given)

    hooks: BackendHooks
    if backend == "celery":
        request = SimpleNamespace(id="job")
        hooks = CeleryHooks(SimpleNamespace(backend=SimpleNamespace(store_result=store), request=request))
        expected: tuple[object, ...] = ("job", [1, 2], "SUCCESS")
    else:
        monkeypatch.setattr(offering, "outages", None)  # put back after the test
        serializer = SimpleNamespace(dumps=store)
        hooks = RqHooks(SimpleNamespace(id="job", connection=None, result_ttl=0, serializer=serializer))
        expected = ([1, 2],)
    session: Any = SimpleNamespace(parked=None, unclaimed=True, assignment=SimpleNamespace(run_id="a" * 32))
    keep(session, hooks, result=[1, 2])
    assert kept == [expected]
    assert backend == "celery" or hooks.passed == [1, 2]


# --- in a batch -------------------------------------------------------------------


class Again(BackendHooks):
    """Runs again what has raised a time limit."""

    def runs_again(self, ending: Any) -> bool:
        return isinstance(ending, SoftTimeLimitExceeded)


def work(func: Callable[[], object], hooks: BackendHooks | None = None) -> tuple[BatchSession, _Work]:
    """Return a batch of two runs of a function without arguments."""
    assignment: Any = SimpleNamespace(
        run_id="c" * 32, task_id="task", attempt=1, path="", origin="http://nowhere", plain=False,
        function="task", decode_row=lambda row: ((), {}), another=lambda func: func, attended=True,
    )  # fmt: skip
    session = BatchSession(assignment)
    session.expect(len(RUNS))
    return session, _Work(session, func, [(run_id, "data", b"") for run_id in RUNS], hooks or BackendHooks())


def told(session: BatchSession) -> list[tuple[int, str, str]]:
    errors = []
    for place, codec, data in session._news.rows:
        assert codec == ERROR
        error = unpack_message(data)[0]["error"]
        errors.append((place, error["kind"], error["source"]))
    return errors


def fail(kind: type[Exception]) -> NoReturn:
    raise StruckError(kind)


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("func", [Struck, fail], ids=["result", "error"])
def test_a_run_of_a_batch_fails_by_it_and_the_batch_ends(
    func: Callable[[type[Exception]], object], kind: type[Exception]
) -> None:
    session, batch = work(lambda: func(kind))
    with pytest.raises(kind):
        batch.execute()
    assert told(session) == [(0, kind.__name__, "task")]


def test_a_run_of_a_batch_is_run_again_by_a_backend_that_does_so() -> None:
    results = [Struck(SoftTimeLimitExceeded), 7]
    session, batch = work(lambda: results.pop(0), Again())
    batch.execute()
    assert isinstance(batch.again, SoftTimeLimitExceeded)
    assert [row[0] for row in session._news.rows] == [1]


def test_a_run_of_a_batch_whose_arguments_it_interrupts_fails_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    session, batch = work(lambda: None)
    monkeypatch.setattr(session.assignment, "decode_row", lambda _: strike(SoftTimeLimitExceeded))
    with pytest.raises(SoftTimeLimitExceeded):
        batch.execute()
    assert told(session) == [(0, "SoftTimeLimitExceeded", "task")]
