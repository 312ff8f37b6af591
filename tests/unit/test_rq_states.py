"""What RQ says of failed jobs, in words for whoever called."""

from __future__ import annotations

import base64
import zlib

import pytest

from wove.adapters.rq_states import _last_line


def packed(text: str) -> bytes:
    """Return a traceback as RQ keeps it."""
    return base64.b64encode(zlib.compress(text.encode()))


def test_the_last_line_of_a_traceback_is_the_reason() -> None:
    assert _last_line(packed("Traceback ...\n  File ...\nKeyError: 'total'\n")) == "KeyError: 'total'"
    assert _last_line(b"") == ""


@pytest.mark.parametrize(
    "line",
    ["ValueError: Invalid attribute name: wove.worker.rq.run", "ModuleNotFoundError: No module named 'wove'"],
)
def test_a_worker_without_wove_is_told_from_others(line: str) -> None:
    assert _last_line(packed(f"Traceback ...\n{line}\n")) == (
        f'{line}; Wove is not installed where the worker runs: pip install "wove[worker]" there'
    )
