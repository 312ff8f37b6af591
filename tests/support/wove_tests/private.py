"""A program's own environment: the settings of whoever starts it must not decide how it ends."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wove_tests import leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator


class ProcessesLeft(RuntimeError):
    """Processes that the program started outlived it; they have been killed."""


@contextmanager
def private_environment() -> Iterator[None]:
    """Give this program and its workers a secret and settings of their own, for programs that pytest does not run.

    Raises:
        ProcessesLeft: at the end, when something that was started within is still there.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(("CELERY_", "RQ_")) or name in ("WOVE_SECRET", "WOVE_ALLOW", "C_FORCE_ROOT"):
            del os.environ[name]
    mark = {name: value for name, value in leftovers.mark_descendants().items() if name not in before}
    with tempfile.TemporaryDirectory(prefix="wove-config-") as config:
        os.environ.update(mark, WOVE_SECRET=secrets.token_hex(32), XDG_CONFIG_HOME=config)
        try:
            yield
            # Under pytest the processes are marked already, and pytest looks for them.
            left = leftovers.wait_until_none_left() if mark else []
            if left:
                raise ProcessesLeft("processes were left behind (killed now):\n" + "\n".join(left))
        finally:
            os.environ.clear()
            os.environ.update(before)
