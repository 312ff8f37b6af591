"""Checks that definitions and ``executor_config`` share: misspelt keys are errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError
from wove.policy import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def check_keys(environment: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keys of ``executor_config`` that this executor does not know.

    Raises:
        ConfigurationError: names the environment, the key and the nearest known one.
    """
    allowed = set(known)
    for key in config:
        if key not in allowed:
            raise ConfigurationError(
                f"environment {environment!r}: unknown executor_config key {key!r}{nearest(key, allowed)}"
            )
