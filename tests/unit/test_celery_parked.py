"""Outcomes that Celery workers have left in their result backend, read many at a time."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from wove.adapters.celery import CeleryAdapter
from wove.wire import PARKED, PARKED_SUFFIX


def adapter(backend: Any, serializer: str = "json") -> CeleryAdapter:
    """Return an adapter whose fleet has that result backend."""
    made = CeleryAdapter(name="reports", config={}, callback_url="", run_config={})
    made._app = SimpleNamespace(backend=backend, conf=SimpleNamespace(result_serializer=serializer))
    return made


def stored(value: Any, status: str = "SUCCESS") -> bytes:
    return json.dumps({"status": status, "result": value}).encode()


class Backend:
    """A result backend; the values by task id."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self.values = {f"key-{run_id}{PARKED_SUFFIX}": value for run_id, value in values.items()}
        self.asked: list[list[str]] = []

    def get_key_for_task(self, task_id: str) -> str:
        return f"key-{task_id}"

    def mget(self, keys: list[str]) -> list[bytes | None]:
        self.asked.append(keys)
        return [self.values.get(key) for key in keys]

    def decode_result(self, value: bytes) -> Any:
        return json.loads(value)

    def get_task_meta(self, task_id: str, cache: bool) -> Any:
        assert not cache
        self.asked.append([task_id])
        return json.loads(self.values.get(f"key-{task_id}", b'{"status": "PENDING"}'))


class AlonesBackend(Backend):
    """One that can be asked for one task at a time only."""

    def mget(self, keys: list[str]) -> list[bytes | None]:
        raise NotImplementedError


class MappingBackend(Backend):
    """One whose client answers with a mapping, by keys of its own."""

    def mget(self, keys: list[str]) -> Any:
        return {}


KEPT = {
    "a": stored({PARKED: "b3V0"}),
    "b": stored({PARKED: "b3V0"}, "FAILURE"),
    "c": stored({PARKED: "not base64!"}),
    "d": stored("something else"),
    "e": stored({PARKED: "Y29tZQ=="}),
}


@pytest.mark.parametrize(("kind", "questions"), [(Backend, 1), (AlonesBackend, 6), (MappingBackend, 6)])
def test_they_are_found_whatever_else_is_there(kind: type[Backend], questions: int) -> None:
    backend = kind(KEPT)
    assert adapter(backend)._parked([*KEPT, "missing"]) == {"a": b"out", "c": b"", "e": b"come"}
    assert len(backend.asked) == questions


def test_nothing_is_asked_where_nothing_can_be_had() -> None:
    backend = Backend(KEPT)
    assert adapter(backend)._parked([]) == {}
    assert adapter(backend, "pickle")._parked(["a"]) == {}
    assert backend.asked == []


def test_a_result_backend_that_is_out_is_no_word_on_the_runs() -> None:
    class Out(Backend):
        def mget(self, keys: list[str]) -> list[bytes | None]:
            raise ConnectionError("out")

    assert adapter(Out(KEPT))._parked(["a"]) == {}
