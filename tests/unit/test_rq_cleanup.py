"""A job that has ended well is deleted without RQ's look around, and every other one as RQ does it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from wove.worker.rq import delete_at_once


class Job(SimpleNamespace):
    """As much of RQ's job as is looked at."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(key="k", dependents_key="d", dependencies_key="e", theirs=[], **attributes)

    def cleanup(self, ttl: Any = None, pipeline: Any = None, remove_from_queue: bool = True) -> None:
        self.theirs.append((ttl, pipeline, remove_from_queue))


class Pipeline:
    """Remembers what is deleted."""

    def __init__(self) -> None:
        self.deleted: list[str] = []

    def delete(self, *keys: str) -> None:
        self.deleted += keys


def test_a_job_without_a_result() -> None:
    job, pipeline = Job(), Pipeline()
    delete_at_once(job)
    job.cleanup(0, pipeline=pipeline, remove_from_queue=False)
    assert (pipeline.deleted, job.theirs) == (["k", "d", "e"], [])


@pytest.mark.parametrize(
    ("attributes", "arguments"),
    [
        ({}, {"ttl": 500}),
        ({}, {"ttl": None}),
        ({}, {"remove_from_queue": True}),
        ({}, {"pipeline": None}),
        ({"group_id": "g"}, {}),
        ({"has_rate_limit": True}, {}),
        ({"number_of_retries": 1}, {}),
    ],
)
def test_every_other_job(attributes: dict[str, Any], arguments: dict[str, Any]) -> None:
    job, pipeline = Job(**attributes), Pipeline()
    delete_at_once(job)
    given = {"ttl": 0, "pipeline": pipeline, "remove_from_queue": False, **arguments}
    job.cleanup(**given)
    assert (pipeline.deleted, job.theirs) == ([], [tuple(given.values())])
