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


def whole_number(config: Mapping[str, Any], key: str, default: int | None, least: int = 1) -> int | None:
    """Return a whole number from ``executor_config``.

    Raises:
        ConfigurationError: it is none, or less than ``least``.
    """
    value = config.get(key, default)
    if value is default or (type(value) is int and value >= least):
        return value
    raise ConfigurationError(f'executor_config["{key}"] is a whole number from {least}; got {value!r}')


def seconds(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of seconds from ``executor_config``.

    Raises:
        ConfigurationError: it is no number, or not above 0.
    """
    value = config.get(key, default)
    if type(value) in (int, float) and 0 < value < float("inf"):
        return float(value)
    raise ConfigurationError(f'executor_config["{key}"] is a number of seconds above 0; got {value!r}')


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return True or False from ``executor_config``.

    Raises:
        ConfigurationError: it is neither.
    """
    value = config.get(key, default)
    if type(value) is bool:
        return value
    raise ConfigurationError(f'executor_config["{key}"] is True or False; got {value!r}')
