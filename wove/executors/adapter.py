"""BackendAdapterEnvironmentExecutor: an adapter to submit by, a callback server to hear from."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.adapters.registry import adapter_names, check_modules, is_adapter, load_adapter
from wove.backend import resolve_callback_url
from wove.errors import ConfigurationError
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.batching import Batching
from wove.executors.lane import Lane
from wove.executors.outbox import Outbox
from wove.executors.packing import Terms
from wove.executors.sending import SUBMIT_SECONDS
from wove.executors.settings import check_keys, flag
from wove.executors.watch import Watch, worker_of
from wove.exposure import check_listener, check_plain_http
from wove.security import find_secrets
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from wove.adapters.base import BackendAdapter, BackendState
    from wove.callback_server.batches import OpenBatch
    from wove.callback_server.hub import Lease
    from wove.frames import Frame
    from wove.security import SecretRing

__all__ = ["BackendAdapterEnvironmentExecutor", "adapter_names", "is_adapter"]

logger = logging.getLogger("wove.executors")

#: ``executor_config`` keys that every adapter shares.
SHARED_KEYS = (
    "batch", "callback_host", "callback_max_body", "callback_port", "callback_tls", "callback_url", "insecure",
    "payload_expires", "pickle", "security",
)  # fmt: skip
#: Largest outcome, in bytes, unless ``callback_max_body`` says otherwise.
DEFAULT_MAX_BODY = 256 * 1024 * 1024
#: Seconds that a payload may be limited to at least.
LEAST_EXPIRY = 60.0
#: Seconds that one call of an adapter may take.
CONTROL_SECONDS = 10.0
CLOSE_SECONDS = 1.0
#: Seconds that a probe may take.
PROBE_SECONDS = 5.0
#: Seconds that a running task gets to listen to a cancellation before its process is ended, where that is configured:
#: it may hear of it only by its first beat, a second after it has begun.
ESCALATE_AFTER = 2.0
#: Seconds in which a worker that has begun a run without asking says so.
BEGINS_WITHIN = 3.0
#: Seconds between two looks whether it has.
LOOK_EVERY = 0.05
#: Seconds that stopping waits for workers that were told to stop.
DRAIN_SECONDS = 1.5


class BackendAdapterEnvironmentExecutor(EnvironmentExecutor):
    """Runs tasks on a backend: payloads out by an adapter, outcomes in by the callback server.

    Args:
        name: the adapter's name, as in the entry-point group ``wove.adapters``.
        adapter_class: the adapter itself, for one that is not registered.
        required_modules: modules to insist on, instead of the adapter's own list.

    ``executor_config``, beside the adapter's own keys: ``batch`` ("auto", or how many runs travel in
    one message; by default "auto" for those of a ``map``, 1 for others), ``callback_host`` ("127.0.0.1"),
    ``callback_port`` (0: any free one), ``callback_url`` (what workers call; ``{hostname}``
    and ``{port}`` are filled in), ``callback_tls``, ``callback_max_body`` (bytes), ``security``
    (the secret), ``pickle`` (False: plain data only), ``payload_expires`` (seconds) and ``insecure``.
    """

    default_heartbeat_seconds = 15.0
    #: Adapters do by the job's id, and workers ask before they start.
    recognises_repeats = True
    takes_shared = True

    def __init__(
        self,
        name: str,
        adapter_class: type[BackendAdapter] | None = None,
        required_modules: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        self._adapter_class = adapter_class
        self._required_modules = required_modules
        self._adapter: BackendAdapter | None = None
        self._lease: Lease | None = None
        self._lane: Lane | None = None
        self._channel: FrameChannel | None = None
        self._outbox: Outbox | None = None
        self._batching = Batching(1)
        self._background: set[asyncio.Task[None]] = set()
        self._watch: Watch | None = None

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Check the settings, share a callback listener and start the adapter."""
        self._environment = environment_name
        self._channel = FrameChannel()
        # In a thread: this imports modules, reads files and binds a socket.
        preparing = asyncio.ensure_future(in_thread(self._prepare, environment_config))
        try:
            adapter_class, terms, self._lease = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(_release_unwanted)
            raise
        self._lane = Lane(environment_name)
        self._adapter = adapter_class(
            name=environment_name,
            config=environment_config,
            callback_url=terms.callback_url,
            run_config=run_config,
        )
        self._adapter.worker_of = worker_of(self._lease.find)
        await self._lane.call(self._adapter.start, SUBMIT_SECONDS, "start")
        self._watch = Watch(environment_name, self._lease.close_run, self._probe, self._lease.take_parked)
        if self._adapter.stops_running:
            # Ending the process of one run would end whatever travels with it.
            self._batching = Batching(1)
        self._outbox = Outbox(
            terms, self._adapter, self._lane, self._lease, self._channel, self._watch, self._batching
        )
        self._outbox.on_late_cancel = self._late_cancel

    async def _probe(self, jobs: Sequence[str]) -> Mapping[str, BackendState]:
        adapter, lane = self._adapter, self._lane
        if adapter is None or lane is None:
            return {}
        found = await lane.call(lambda: adapter.probe(jobs), PROBE_SECONDS, "probe")
        return found if isinstance(found, Mapping) else {}

    def _prepare(self, config: Mapping[str, Any]) -> tuple[type[BackendAdapter], Terms, Lease]:
        adapter_class = self._adapter_class or load_adapter(self.name)
        modules = self._required_modules
        check_modules(
            self.name,
            adapter_class.required_modules if modules is None else modules,
            adapter_class.install_hint,
        )
        if adapter_class.config_keys is not None:
            check_keys(self._environment, config, (*SHARED_KEYS, *adapter_class.config_keys))
        ring = find_secrets(config.get("security"))
        max_body = _whole(config, "callback_max_body", DEFAULT_MAX_BODY, 1)
        plain = not flag(config, "pickle", True)
        expires = _expiry(config)
        self._batching = Batching.read(config, plain=plain)
        lease = self._listen(config, ring)
        terms = Terms(
            self._environment,
            ring,
            resolve_callback_url(config, lease.host, lease.port),
            max_body,
            expires,
            plain,
            webhook=adapter_class.takes_failure_webhook,
        )
        return adapter_class, terms, lease

    def _listen(self, config: Mapping[str, Any], ring: SecretRing) -> Lease:
        from wove.callback_server.hub import acquire
        from wove.callback_server.tls import read_tls

        host = config.get("callback_host", "127.0.0.1")
        if not isinstance(host, str) or not host:
            raise ConfigurationError(f'executor_config["callback_host"] is an address; got {host!r}')
        port = _whole(config, "callback_port", 0, 0)
        if port > 65_535:
            raise ConfigurationError(f'executor_config["callback_port"] is from 0 to 65535; got {port}')
        # What cannot work is found before anything listens.
        check_listener(host, ring, config)
        check_plain_http(resolve_callback_url(config, host, port), config)
        return acquire(host, port, read_tls(config.get("callback_tls")))

    async def send(self, frame: Frame) -> None:
        """Submit or cancel a run; see :meth:`EnvironmentExecutor.send`."""
        if self._outbox is None:
            raise RuntimeError(f"the {self.name} executor is not started")
        if frame["type"] == frames.RUN_TASK:
            await self._outbox.submit(frame)
        elif frame["type"] == frames.CANCEL_TASK:
            await self._cancel(frame)

    def post(self, frame: Frame, done: Callable[[BaseException | None], None]) -> None:
        """Submit a run without waiting; see :meth:`EnvironmentExecutor.post`."""
        if self._outbox is None:
            raise RuntimeError(f"the {self.name} executor is not started")
        self._outbox.post(frame, done)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        while True:
            if self._channel is None:
                raise RuntimeError(f"the {self.name} executor is not started")
            frame = await self._channel.get()
            if self._note(frame):
                return frame

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand events over without a turn of the loop; see :meth:`EnvironmentExecutor.attach`."""
        if self._channel is None:
            return False

        def note_and_take(frame: Frame) -> None:
            if self._note(frame):
                take(frame)

        # What arises here, of a cancellation for one, is dealt with when that is over.
        return self._channel.attach(note_and_take, at_once=False)

    def _note(self, frame: Frame) -> bool:
        """Take note of an event; tell whether it concerns anybody else."""
        kind = frame.get("type")
        if self._outbox is not None:
            if kind in frames.TERMINAL:
                self._outbox.ended(frame["run_id"])
            elif kind == frames.TASK_RETURNED:
                self._outbox.take_back(frame["run_id"], frame["task_id"])
        return kind != frames.TASK_RETURNED

    async def stop(self) -> None:
        """Close the adapter, release the listener; see :meth:`EnvironmentExecutor.stop`."""
        adapter, self._adapter = self._adapter, None
        lease, self._lease = self._lease, None
        lane, self._lane = self._lane, None
        watch, self._watch = self._watch, None
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.stop()
        if watch is not None:
            await watch.stop()
        if lease is not None:
            await _drain(lease)
        for task in tuple(self._background):
            task.cancel()
        await self._close(adapter, lane)
        if lease is not None:
            await in_thread(lease.release)
        if self._channel is not None:
            self._channel.close()

    async def _close(self, adapter: BackendAdapter | None, lane: Lane | None) -> None:
        if lane is None:
            return
        if adapter is not None:
            try:
                await lane.call(adapter.close, CLOSE_SECONDS, "close")
            except Exception as exc:
                logger.warning("environment %r: closing the adapter failed: %s", adapter.name, exc)
            adapter.release_threads()
        await lane.stop()

    # --- submitting -----------------------------------------------------------

    def _late_cancel(self, frame: Frame, result: Any) -> None:
        """Settle a run that was cancelled while it was being submitted."""
        if isinstance(result, BaseException):
            self._acknowledge_cancel(frame)
            return
        # The cancellation came too early to find the job; now it is there.
        if self._outbox is not None:
            self._outbox.set(frame["run_id"], result)
            self._in_background(self._cancel_late(frame), "wove-cancel-late")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _cancel_late(self, frame: Frame) -> None:
        try:
            await self._cancel(frame)
        except Exception:
            logger.warning("cancelling run %s failed", frame["run_id"], exc_info=True)

    # --- cancelling -----------------------------------------------------------

    async def _cancel(self, frame: Frame) -> None:
        run_id = frame["run_id"]
        adapter, lane, lease, outbox = self._adapter, self._lane, self._lease, self._outbox
        if adapter is None or lane is None or lease is None or outbox is None:
            return
        batch = lease.batch_of(run_id)
        if outbox.recall(run_id):
            self._acknowledge_cancel(frame)  # it never left
        elif batch is not None:
            await self._cancel_member(run_id, batch, frame, lane)
        else:
            await self._cancel_alone(frame, adapter, lane, lease, outbox.take(run_id))

    async def _cancel_alone(
        self, frame: Frame, adapter: BackendAdapter, lane: Lane, lease: Lease, submission: Any
    ) -> None:
        run_id = frame["run_id"]
        frame = {**frame, "started": lease.has_started(run_id)}
        known = lease.find(run_id)
        if submission is None and known is not None and adapter.is_shared(known.job):
            submission = known.job  # a lost run: nobody waits for it, others may for its job

        def tell_worker() -> None:
            # Over its open beat it hears of it at once.
            lease.cancel_run(run_id)
            if known is not None and self._watch is not None:
                self._watch.opened(known)  # to be forgotten, should nobody answer
            if adapter.stops_running:
                self._in_background(self._escalate(adapter, lane, lease, frame, submission), "wove-escalate")

        # First the worker; but not when others may wait for its work: then the adapter knows.
        asked_first = adapter.is_shared(submission)
        if not asked_first:
            tell_worker()
        never_starts = False
        try:
            never_starts = await lane.call(
                lambda: adapter.cancel(run_id, submission, frame), CONTROL_SECONDS, "cancel"
            )
        finally:
            if asked_first and not never_starts:
                tell_worker()
        if never_starts:
            lease.close_run(run_id)
            self._acknowledge_cancel(frame)

    async def _cancel_member(self, run_id: str, batch: OpenBatch, frame: Frame, lane: Lane) -> None:
        """Cancel a run that travels with others; a batch of which no run is wanted is cancelled as a whole."""
        adapter, lease, outbox = self._adapter, self._lease, self._outbox
        if adapter is None or lease is None or outbox is None:
            return
        outbox.take(run_id)
        known = lease.find(run_id)
        lease.cancel_run(run_id)
        if known is not None and self._watch is not None:
            self._watch.opened(known)  # to be forgotten, should nobody answer
        if not outbox.unwanted(run_id, batch.run_id) or batch.started:
            return
        whole = {**frame, "run_id": batch.run_id, "started": False, "delivery": {"attempt": 1}}
        never_starts = await lane.call(
            lambda: adapter.cancel(batch.run_id, batch.job, whole), CONTROL_SECONDS, "cancel"
        )
        if never_starts:
            batch.sink([batch.event(frames.TASK_CANCELLED)])
            lease.close_run(batch.run_id)

    async def _escalate(
        self, adapter: BackendAdapter, lane: Lane, lease: Lease, frame: Frame, submission: Any
    ) -> None:
        """End the process of a task that has not ended by itself, once it has begun."""
        run_id, pause = frame["run_id"], LOOK_EVERY
        # A worker may have begun it this moment, and say so in the next. Who comes later asks, and is refused.
        late_until = time.monotonic() + BEGINS_WITHIN
        while lease.find(run_id) is not None and not lease.has_started(run_id):
            if time.monotonic() >= late_until:
                return
            await asyncio.sleep(pause)
            pause *= 1.5
        give_up = time.monotonic() + ESCALATE_AFTER
        while lease.find(run_id) is not None:
            if time.monotonic() >= give_up:
                break
            await asyncio.sleep(LOOK_EVERY)
        else:
            return  # it has listened, or never begins
        stop = {**frame, "started": True, "escalate": True}
        try:
            await lane.call(
                lambda: adapter.cancel(frame["run_id"], submission, stop), CONTROL_SECONDS, "cancel"
            )
        except Exception:
            logger.warning("stopping the process of run %s failed", frame["run_id"], exc_info=True)

    def _acknowledge_cancel(self, frame: Frame) -> None:
        if self._outbox is not None:
            self._outbox.ended(frame["run_id"])
        if self._channel is not None:
            attempt = (frame.get("delivery") or {}).get("attempt", 1)
            event = frames.event(frames.TASK_CANCELLED, frame["run_id"], frame["task_id"], attempt, 2**31)
            self._channel.put([event])


def _release_unwanted(preparing: asyncio.Future[tuple[Any, Any, Lease]]) -> None:
    # The start was cancelled while the listener came up.
    if not preparing.cancelled() and preparing.exception() is None:
        _, _, lease = preparing.result()
        threading.Thread(target=lease.release, name="wove-release", daemon=True).start()


async def _drain(lease: Lease) -> None:
    """Give workers that were told to stop a moment to answer.

    A worker whose callback server has gone offers its outcome for minutes, and is busy
    with that. Tasks longer than a second have heard of it over their open beat; shorter
    ones end by themselves.
    """
    begun = time.monotonic()
    while cancelled := [run for run in lease.open_runs() if run.cancelled]:
        waited = time.monotonic() - begun
        if waited > (DRAIN_SECONDS if any(run.started for run in cancelled) else DRAIN_SECONDS / 10):
            return
        await asyncio.sleep(0.01)


def _expiry(config: Mapping[str, Any]) -> float | None:
    value = config.get("payload_expires")
    if value is None:
        return None
    if type(value) not in (int, float) or not LEAST_EXPIRY <= value < float("inf"):
        raise ConfigurationError(
            f'executor_config["payload_expires"] is a number of seconds from {LEAST_EXPIRY:g}, or None; got {value!r}: '
            "the clocks of two machines are compared by it"
        )
    return float(value)


def _whole(config: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise ConfigurationError(f'executor_config["{key}"] is a whole number from {least}; got {value!r}')
    return value
