"""What an RQ worker imports before it forks: ``rq worker -c wove.worker.rq_preload ...``.

RQ forks a work horse for each job. What its parent has imported and executed, the horse does not pay for. RQ
reads a settings module's names in capitals; this one has none. Who has a settings module already imports this one in it.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress

import wove.worker.batch
import wove.worker.beats
import wove.worker.fetching
import wove.worker.rq  # noqa: F401 - for the horses
from wove.worker.rehearsal import rehearse


def prepare() -> None:
    """Make this process ready to fork for one task after another."""
    with suppress(ImportError):  # what functions need that are sent by value
        import cloudpickle  # noqa: F401 - for the horses
    rehearse()
    if hasattr(os, "fork"):
        # A collection in a work horse would write to each object that it finds, and so copy all of them.
        gc.collect()
        gc.freeze()


prepare()
