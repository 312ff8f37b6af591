"""What a service needs of the place where its tasks run: this process, or child processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from wove.exchange import Packet

    #: Takes an event: its type, its bytes, and whether it ends the run. From any thread.
    Emit = Callable[[str, Sequence[Buffer]], None]

#: Synchronous callables that run at once in a process, unless ``threads`` says otherwise.
DEFAULT_THREADS = 40


class Engine(Protocol):
    """Runs tasks; its methods neither block nor wait."""

    def run(self, packet: Packet, emit: Emit) -> None:
        """Run a ``run_task`` command; exactly one of the events that ``emit`` gets ends the run."""
        ...

    def cancel(self, run_id: str) -> None:
        """Cancel a run; an unknown one is ignored."""
        ...

    async def close(self) -> None:
        """Cancel what runs and give everything up."""
        ...
