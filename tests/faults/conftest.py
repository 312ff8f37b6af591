"""Workers that may be killed, shared by the fault tests; see wove_tests.crew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from wove_tests.crew import Crew, Job

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def crew(_no_process_left: None) -> Iterator[Crew]:
    """Workers by name, started when they are first asked for, and again when a test has killed them."""
    with Crew() as running:
        yield running


@pytest.fixture(autouse=True)
def _release_jobs() -> Iterator[None]:
    """Let the jobs of a test that failed end, so that the next one finds free workers."""
    yield
    while Job.begun_here:
        Job.begun_here.pop().release()
    for crew in Crew.at_work:
        crew.dismiss_spoiled()
