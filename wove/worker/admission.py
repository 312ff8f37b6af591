"""What this worker takes, beside the signature: where it calls back, which environments, which functions.

All of it is set in the worker's own environment, so that nobody who can write to the broker has a say in it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wove.errors import ConfigurationError, PayloadRejectedError, safe_text

if TYPE_CHECKING:
    from wove.worker.allowed import AllowList
    from wove.worker.origins import Origin

_VARIABLES = ("WOVE_ALLOW", "WOVE_CALLBACK_ALLOW", "WOVE_ENVIRONMENTS")


class Admission:
    """The settings; None where there is no restriction.

    Attributes:
        functions: what may be called, by name and with plain data only.
        origins: where callbacks may go.
        environments: patterns of the environments' names whose payloads are taken.
    """

    __slots__ = ("environments", "functions", "origins")

    def __init__(
        self,
        functions: AllowList | None,
        origins: tuple[Origin, ...] | None,
        environments: tuple[str, ...] | None,
    ) -> None:
        self.functions = functions
        self.origins = origins
        self.environments = environments

    def check_origin(self, origin: str) -> None:
        """Refuse a callback to somewhere else.

        Raises:
            PayloadRejectedError: it is not on the list; nothing may be sent there, not even that.
        """
        if self.origins is None:
            return
        from wove.worker.origins import full_origin

        try:
            wanted = full_origin(origin)
            covered = any(allowed.covers(wanted) for allowed in self.origins)
        except ValueError:
            covered = False
        if not covered:
            raise PayloadRejectedError(
                f"its outcome would go to {safe_text(origin, 200)}, which WOVE_CALLBACK_ALLOW on this worker does not "
                "list: add it there, or find out who sends such payloads",
                reason="callback",
            )

    def check_environment(self, name: str) -> None:
        """Refuse another environment's payload.

        Raises:
            PayloadRejectedError: its name is not on the list.
        """
        if self.environments is None:
            return
        from fnmatch import fnmatchcase

        if not any(fnmatchcase(name, pattern) for pattern in self.environments):
            raise PayloadRejectedError(
                f"it belongs to the environment {safe_text(name, 100)!r}, and this worker takes those of "
                f"WOVE_ENVIRONMENTS only: {', '.join(self.environments)}",
                reason="environment",
            )


_known: dict[tuple[str | None, ...], Admission] = {}


def admission() -> Admission:
    """Return the settings that are in force.

    Raises:
        ConfigurationError: one of the variables cannot be read; names it.
    """
    texts = tuple(os.environ.get(name) for name in _VARIABLES)
    known = _known.get(texts)
    if known is None:
        _known.clear()
        known = _known[texts] = _read(*texts)
    return known


def _read(allow: str | None, callbacks: str | None, environments: str | None) -> Admission:
    functions = None
    if allow is not None:
        # Only where it is wanted: RQ workers pay for imports once per job.
        from wove.worker.allowed import AllowList

        functions = AllowList.from_environment()
    origins = None
    if callbacks is not None:
        from wove.worker.origins import read_origin

        try:
            origins = tuple(read_origin(part) for part in _parts("WOVE_CALLBACK_ALLOW", callbacks))
        except ValueError as exc:
            raise ConfigurationError(
                "WOVE_CALLBACK_ALLOW lists where callbacks may go, separated by commas, as in "
                f'"https://app.example:8443, http://10.0.0.5, https://*.example"; {exc}'
            ) from None
    names = None
    if environments is not None:
        names = tuple(_parts("WOVE_ENVIRONMENTS", environments))
    return Admission(functions, origins, names)


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigurationError(f"{name} is set and lists nothing: fill it, or unset it")
    return parts
