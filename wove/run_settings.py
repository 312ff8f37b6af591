"""The delivery settings of an environment and of each of its runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wove.commands import delivery
from wove.errors import ConfigurationError
from wove.policy import DeliveryPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Different delivery settings that are remembered.
MAX_DELIVERIES = 256


class RunSettings:
    """Resolves them, and remembers what frames say of them.

    Args:
        defaults: settings of the definition, then of the runtime (``delivery_*`` keys).
        heartbeat_seconds: how often the executor's workers send heartbeats unless told otherwise; None where they
            send none.

    Attributes:
        policy: the settings of a run that has none of its own.
    """

    def __init__(self, defaults: Sequence[Mapping[str, Any]], heartbeat_seconds: float | None) -> None:
        self._defaults = tuple(defaults)
        self._heartbeat_seconds = heartbeat_seconds
        self.policy = self._resolve(None)
        self._deliveries: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._last: tuple[DeliveryPolicy | None, bool, dict[str, Any]] = (None, False, {})

    def policy_for(self, settings: Mapping[str, Any] | None) -> DeliveryPolicy:
        """Return the settings of a run.

        Raises:
            ConfigurationError: a setting that an environment's definition alone can have.
        """
        policy = self._resolve(settings) if settings else self.policy
        if policy.max_in_flight != self.policy.max_in_flight:
            raise ConfigurationError(
                "delivery_max_in_flight belongs to an environment's definition: it bounds all its runs together"
            )
        return policy

    def _resolve(self, overrides: Mapping[str, Any] | None) -> DeliveryPolicy:
        policy = DeliveryPolicy.resolve(overrides, *self._defaults, heartbeat_seconds=self._heartbeat_seconds)
        if self._heartbeat_seconds is None:
            # Its workers send no heartbeats: silence means nothing there.
            policy = replace(policy, heartbeat_seconds=None)
        return policy

    def delivery(self, policy: DeliveryPolicy, *, mapped: bool) -> dict[str, Any]:
        """Return what a first attempt's frame says of its delivery: one mapping for all that are alike."""
        if policy is self._last[0] and mapped is self._last[1]:
            return self._last[2]
        said = delivery(policy, 1, mapped=mapped)
        alike = tuple(said.values())
        said = self._deliveries.setdefault(alike, said)
        if len(self._deliveries) > MAX_DELIVERIES:
            self._deliveries.clear()
        self._last = (policy, mapped, said)
        return said
