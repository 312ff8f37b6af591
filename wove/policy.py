"""The ``delivery_*`` settings: what they may be, and how layers of them are merged."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PREFIX = "delivery_"

#: What ``stop()`` may do to open runs, and those of them after which the work goes on.
ORPHAN_POLICIES = ("cancel", "fail", "detach", "requeue")
KEEPING = frozenset({"detach", "requeue"})


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """The ``delivery_*`` settings of one run; times are in seconds."""

    timeout: float | None = None
    start_timeout: float | None = None
    heartbeat_seconds: float | None = None
    cancel_mode: str = "best_effort"
    cancel_timeout: float = 10.0
    idempotency_key: str | Callable[..., str] | None = None
    max_in_flight: int | None = None
    orphan_policy: str = "cancel"
    retries: int = 0

    @classmethod
    def resolve(cls, *layers: Mapping[str, Any] | None, **defaults: Any) -> DeliveryPolicy:
        """Merge settings, the first layer winning; keys without the prefix are ignored.

        Raises:
            ConfigurationError: a misspelt key or a value that cannot be; names both.
        """
        merged: dict[str, Any] = dict(defaults)
        for layer in reversed(layers):
            for key, value in (layer or {}).items():
                if isinstance(key, str) and key.startswith(_PREFIX):
                    _check_setting(key, value)
                    merged[key.removeprefix(_PREFIX)] = value
        return cls(**merged)

    @property
    def keeps_work(self) -> bool:
        """Whether the work is to go on when its submitter has gone."""
        return self.orphan_policy in KEEPING

    @property
    def sends_again(self) -> bool:
        """Whether a run may have to be submitted more than once."""
        return self.retries > 0 or self.orphan_policy == "requeue"


#: Longest time of a setting, in seconds: some thirty years.
MAX_SECONDS = 1e9


def _positive(value: object) -> bool:
    return value is None or ((type(value) is int or type(value) is float) and 0 < value <= MAX_SECONDS)


def _count(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)


def _key(value: object) -> bool:
    return value is None or callable(value) or (isinstance(value, str) and bool(value))


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "timeout": (_positive, "a number of seconds above 0, or None"),
    "start_timeout": (_positive, "a number of seconds above 0, or None"),
    "heartbeat_seconds": (_positive, "a number of seconds above 0, or None"),
    "cancel_mode": (lambda v: v in ("best_effort", "require_ack"), '"best_effort" or "require_ack"'),
    "cancel_timeout": (lambda v: v is not None and _positive(v), "a number of seconds above 0"),
    "idempotency_key": (
        _key,
        'a string, a format string over the arguments such as "report-{account_id}", a callable that takes the '
        "arguments and returns a string, or None",
    ),
    "max_in_flight": (_count, "a whole number from 1, or None"),
    "orphan_policy": (
        lambda v: v in ORPHAN_POLICIES,
        f"one of {', '.join(repr(policy) for policy in ORPHAN_POLICIES)}",
    ),
    "retries": (lambda v: type(v) is int and v >= 0, "a whole number from 0"),
}

SETTINGS = tuple(_PREFIX + item.name for item in fields(DeliveryPolicy))


def _check_setting(key: str, value: object) -> None:
    check = _CHECKS.get(key.removeprefix(_PREFIX))
    if check is None:
        raise ConfigurationError(f"unknown delivery setting {key!r}{nearest(key, SETTINGS)}")
    accepts, wanted = check
    if not accepts(value):
        raise ConfigurationError(f"{key} is {wanted}; got {value!r:.200}")


def nearest(name: str, known: Any) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to ``name``, or all of them."""
    names = sorted(str(item) for item in known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
