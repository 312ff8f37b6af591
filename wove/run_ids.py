"""Ids of runs: random, and had by the hundred."""

from __future__ import annotations

import os

from wove.frames import RUN_ID_LENGTH

#: Ids that the system is asked for together: that call costs as much as all the rest.
_TOGETHER = 256

_ids: list[str] = []


def new_run_id() -> str:
    """Return the id of a new run: 32 hexadecimal characters, 128 random bits of the system."""
    try:
        return _ids.pop()
    except IndexError:
        text = os.urandom(_TOGETHER * RUN_ID_LENGTH // 2).hex()
        fresh = [text[at : at + RUN_ID_LENGTH] for at in range(0, len(text), RUN_ID_LENGTH)]
        found = fresh.pop()
        _ids.extend(fresh)
        return found


if hasattr(os, "register_at_fork"):
    # A child must not hand out the ids that its parent will.
    os.register_at_fork(after_in_child=_ids.clear)
