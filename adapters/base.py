"""The contract between Wove and a backend: submit a payload, and little else."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from wove.threads import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wove.frames import Frame

#: Threads for one adapter's blocking calls: one that hangs does not stop the others.
BLOCKING_THREADS = 4
ASKING_THREADS = 2


@dataclass(frozen=True, slots=True)
class BackendState:
    """What a backend knows of a run.

    Attributes:
        state: ``queued`` (also: to be run again), ``running``, ``done``, ``failed``, ``lost``
            (the worker that ran it is gone), ``gone`` (the backend has no trace of it), or
            ``unknown``.
        detail: the backend's own word, such as ``signal 9``.
        outcome: a signed outcome that a worker could not deliver, and left with the backend.
        busy: of a running one, that its process is known to be computing this moment: it may be
            too busy to speak.
    """

    state: str
    detail: str = ""
    outcome: bytes | None = None
    busy: bool = False


class BackendAdapter(ABC):
    """Submits payloads to a backend.

    Only :meth:`submit` has to be implemented. All methods are called in an event loop of
    the environment's own thread, under a deadline: an adapter that blocks delays only its
    own environment, and one that hangs does not keep a run from its timeout. For blocking
    client libraries use :meth:`blocking`.

    Args:
        name: the environment's name.
        config: its ``executor_config``.
        callback_url: where workers report to; it is part of every payload already.
        run_config: the runtime's ``run_config``.
    """

    #: Modules that must be importable before anything is submitted.
    required_modules: ClassVar[tuple[str, ...]] = ()
    #: The command that installs them.
    install_hint: ClassVar[str] = ""
    #: ``executor_config`` keys of this adapter, beside those every adapter shares. None: any.
    config_keys: ClassVar[tuple[str, ...] | None] = None
    #: Whether :meth:`cancel` can end the process of a running task, where that is configured.
    stops_running: bool = False
    #: Whether :meth:`submit_blocking` is to be called instead of :meth:`submit_many`.
    submits_blocking: ClassVar[bool] = False
    #: Whether the backend can call a URL when a job fails: then frames carry ``failure_webhook``.
    takes_failure_webhook: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let an adapter that changes how another one submits be asked the way it has changed."""
        super().__init_subclass__(**options)
        own = vars(cls)
        if ("submit" in own or "submit_many" in own) and "submit_blocking" not in own:
            cls.submits_blocking = False

    def __init__(
        self, *, name: str, config: Mapping[str, Any], callback_url: str, run_config: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.config = config
        self.callback_url = callback_url
        self.run_config = run_config
        self._blocking: DaemonPool | None = None
        self._asking: DaemonPool | None = None
        #: What the worker of a job has said of itself (``host``, ``pid``, ...); empty where
        #: none has spoken. Set by the executor; callable from any thread.
        self.worker_of: Callable[[str], Mapping[str, Any]] = _nobody

    async def start(self) -> None:  # noqa: B027 - optional
        """Connect, check the configuration. Called once, before anything else.

        Raises:
            ConfigurationError: an unusable setting, named together with the mend.
        """

    @abstractmethod
    async def submit(self, payload: bytes, frame: Frame) -> Any:
        """Hand one payload to the backend.

        Args:
            payload: signed bytes, to be given unchanged to ``wove.worker.run`` there.
            frame: the ``run_task`` frame: ``run_id``, ``task_id``, ``delivery`` (its ``attempt``
                counts deliveries that came to nothing, its ``key`` is the idempotency key, and it is
                ``repeated`` where the backend may have this very attempt already) and, for a backend
                that can call a URL when a job fails, ``failure_webhook`` (``url``, ``token``).

        Returns:
            Whatever :meth:`cancel` needs to find the job again.

        Raises:
            Exception: the backend did not accept the payload.
            SubmitError: as well; then ``delivery_retries`` may submit the run again: as another attempt, or,
                where it was ``maybe_accepted``, as the same one. Use :func:`wove.backend.job_id` as the job's
                id, so that a backend which can tell does not take it twice; where it does, the second
                execution is not begun while there is a first.
        """

    async def submit_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Hand several payloads over together, in order.

        Returns:
            For each, its submission or the exception that refused it.
        """
        results: list[Any] = []
        for payload, frame in batch:
            try:
                results.append(await self.submit(payload, frame))
            except Exception as exc:
                results.append(exc)
        return results

    def submit_blocking(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Do what :meth:`submit_many` does, in a thread that may block.

        For adapters whose clients block anyway, and that set :attr:`submits_blocking`: it spares each
        submission two changes of thread. May be called from several threads at a time.
        """
        raise NotImplementedError

    async def submit_alone(self, payload: bytes, frame: Frame) -> Any:
        """Submit one payload by :meth:`submit_many`, for adapters whose batches come first."""
        (result,) = await self.submit_many([(payload, frame)])
        if isinstance(result, Exception):
            raise result
        return result

    async def cancel(self, run_id: str, submission: Any, frame: Frame) -> bool:
        """Keep a queued run from starting, and stop a running one where that is configured.

        Running tasks are told over the callback server. Where the backend is configured to
        stop those that do not listen, this is called a second time a moment later, with
        ``frame["escalate"]`` true. Idempotent; may be called for a run that has ended.

        Args:
            run_id: the run.
            submission: what :meth:`submit` returned; None when that is not known.
            frame: the ``cancel_task`` frame; ``frame["started"]`` tells whether a worker has
                spoken of the run.

        Returns:
            True only when the run surely never starts, now or later.
        """
        return False

    async def probe(self, run_ids: Sequence[str]) -> dict[str, BackendState]:
        """Say what the backend knows of runs. Idempotent; unknown ones may be left out.

        Asked when a worker seems to be dead, before that is believed, and now and then about
        runs of which nothing is heard. A wrong ``lost``, ``gone``, ``failed`` or ``done`` ends a
        healthy run: where the backend cannot be sure, the state is ``unknown``.

        Args:
            run_ids: the jobs' ids, as :func:`wove.backend.job_id` makes them: the run's id,
                or ``<run id>-<attempt>`` for a later attempt. Where :meth:`submit` returned
                a string, it is that.
        """
        return {}

    def is_shared(self, submission: Any) -> bool:
        """Tell whether runs of other processes may wait for the same job. Must not block.

        A worker at such a job is told to stop only when :meth:`cancel` has returned False;
        True says here that the work, if it goes on, does so for others.

        Args:
            submission: what :meth:`submit` returned; None when that is not known.
        """
        return False

    async def close(self) -> None:  # noqa: B027 - optional
        """Release what :meth:`start` took, and nothing that belongs to the user. Idempotent."""

    async def blocking(self, func: Callable[..., Any], *args: Any) -> Any:
        """Run a blocking call in a thread and return its result."""
        if self._blocking is None:
            self._blocking = DaemonPool(BLOCKING_THREADS, f"wove-adapter-{self.name}")
        return await asyncio.wrap_future(self._blocking.submit(func, *args))

    async def asking(self, func: Callable[..., Any], *args: Any) -> Any:
        """As :meth:`blocking`, in threads of their own: for :meth:`probe`.

        Whether a worker is dead can be asked while submissions hang, and the other way round.
        """
        if self._asking is None:
            self._asking = DaemonPool(ASKING_THREADS, f"wove-probe-{self.name}")
        return await asyncio.wrap_future(self._asking.submit(func, *args))

    def release_threads(self) -> None:
        """Let the threads of :meth:`blocking` and :meth:`asking` end. Called after :meth:`close`."""
        for pool in (self._blocking, self._asking):
            if pool is not None:
                pool.close()
        self._blocking = self._asking = None


def _nobody(job: str) -> Mapping[str, Any]:
    return {}
