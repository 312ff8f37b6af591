"""Records what was called, whoever called it: nothing may be decoded before it is verified."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    import pytest

#: Everything that turns bytes into objects.
DECODERS: tuple[tuple[Any, str], ...] = (
    (msgpack, "unpackb"),
    (msgpack, "unpack"),
    (pickle, "loads"),
    (pickle, "load"),
    (json, "loads"),
    (json, "load"),
)


def record_calls(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> list[str]:
    """Wrap functions, given as module and name; return the list that their names go to."""
    calls: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def recording(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, recording)

    for module, name in functions:
        watch(module, name)
    return calls
