"""The part that executors share whose transport this version does not carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from wove.errors import MissingDispatchFeatureError
from wove.executors.base import EnvironmentExecutor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.frames import Frame


class UnavailableExecutor(EnvironmentExecutor):
    """Its name and its class are reserved; :meth:`start` says that it cannot be used."""

    transport: ClassVar[str] = ""

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Say plainly that this version does not carry the transport."""
        raise MissingDispatchFeatureError(
            f"environment {environment_name!r}: this version of Wove does not carry the {self.transport} "
            "executor; use local, celery or rq"
        )

    async def send(self, frame: Frame) -> None:
        """Raise: there is nothing to send to."""
        self._refuse()

    async def recv(self) -> Frame:
        """Raise: nothing comes back."""
        self._refuse()

    async def stop(self) -> None:
        """Do nothing: nothing was started."""

    def _refuse(self) -> NoReturn:
        raise MissingDispatchFeatureError(
            f"this version of Wove does not carry the {self.transport} executor"
        )
