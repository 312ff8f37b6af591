"""What an RQ worker imports before it forks: ``rq worker -c wove.worker.rq_preload ...``.

RQ forks a work horse for each job. What its parent has imported and executed, the horse does not pay for. RQ
reads a settings module's names in capitals; this one has none. Who has a settings module already imports this one in it.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from functools import cache

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
    remember_redis_version()
    if hasattr(os, "fork"):
        # A collection in a work horse would write to each object that it finds, and so copy all of them.
        gc.collect()
        gc.freeze()


def remember_redis_version() -> None:
    """Let redis-py look its own version up once, and not in every work horse.

    It tells Redis that version whenever it connects, and finds it by parsing its package's metadata: in a horse, which
    has to connect anew, that takes a tenth of all that is done for a short job.
    """
    import redis.utils

    look_up = getattr(redis.utils, "get_lib_version", None)
    if look_up is not None:
        remembered = cache(look_up)
        remembered()
        vars(redis.utils)["get_lib_version"] = remembered


prepare()
