"""BackendAdapterEnvironmentExecutor: an adapter to submit by, a callback server to hear from."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wove import frames
from wove.adapters.registry import adapter_names, check_modules, load_adapter
from wove.backend import BuiltPayload, build_payload, failure_webhook, job_id, resolve_callback_url
from wove.errors import ConfigurationError, EncodeError, SubmitError
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.lane import Lane
from wove.executors.settings import check_keys, flag
from wove.executors.watch import Watch, worker_of
from wove.exposure import check_listener, check_plain_http
from wove.security import find_secrets
from wove.threads import DaemonPool, in_thread

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from wove.adapters.base import BackendAdapter, BackendState
    from wove.callback_server.hub import Lease
    from wove.callback_server.runs import OpenRun
    from wove.frames import Frame
    from wove.security import SecretRing

__all__ = ["BackendAdapterEnvironmentExecutor", "adapter_names"]

logger = logging.getLogger("wove.executors")

#: ``executor_config`` keys that every adapter shares.
SHARED_KEYS = (
    "callback_host", "callback_max_body", "callback_port", "callback_tls", "callback_url", "insecure",
    "payload_expires", "pickle", "security",
)  # fmt: skip
#: Largest outcome, in bytes, unless ``callback_max_body`` says otherwise.
DEFAULT_MAX_BODY = 256 * 1024 * 1024
#: Seconds that a payload may be limited to at least.
LEAST_EXPIRY = 60.0
#: Seconds that one call of an adapter may take.
SUBMIT_SECONDS = 30.0
CONTROL_SECONDS = 10.0
CLOSE_SECONDS = 1.0
#: Seconds that a probe may take.
PROBE_SECONDS = 5.0
#: Seconds that a running task gets to listen to a cancellation before its process is ended,
#: where that is configured.
ESCALATE_AFTER = 1.0
#: Seconds that stopping waits for workers that were told to stop.
DRAIN_SECONDS = 1.5
#: Runs that leave together at most.
MAX_BATCH = 500


class BackendAdapterEnvironmentExecutor(EnvironmentExecutor):
    """Runs tasks on a backend: payloads out by an adapter, outcomes in by the callback server.

    Args:
        name: the adapter's name, as in the entry-point group ``wove.adapters``.
        adapter_class: the adapter itself, for one that is not registered.
        required_modules: modules to insist on, instead of the adapter's own list.

    ``executor_config``, beside the adapter's own keys: ``callback_host`` ("127.0.0.1"),
    ``callback_port`` (0: any free one), ``callback_url`` (what workers call; ``{hostname}``
    and ``{port}`` are filled in), ``callback_tls``, ``callback_max_body`` (bytes), ``security``
    (the secret), ``pickle`` (False: plain data only), ``payload_expires`` (seconds) and ``insecure``.
    """

    default_heartbeat_seconds = 15.0

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
        self._encoder: DaemonPool | None = None
        self._waiting: list[_Waiting] = []
        self._flushing: asyncio.Task[None] | None = None
        #: Runs that were sent and have no outcome yet, with what the adapter knows them by.
        self._open: dict[str, Any] = {}
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
        self._encoder = DaemonPool(1, f"wove-encode-{environment_name}")
        # In a thread: this imports modules, reads files and binds a socket.
        preparing = asyncio.ensure_future(in_thread(self._prepare, environment_config))
        try:
            adapter_class, self._lease = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(_release_unwanted)
            raise
        self._lane = Lane(environment_name)
        self._adapter = adapter_class(
            name=environment_name,
            config=environment_config,
            callback_url=self._callback_url,
            run_config=run_config,
        )
        self._adapter.worker_of = worker_of(self._lease.find)
        await self._lane.call(self._adapter.start, SUBMIT_SECONDS, "start")
        self._watch = Watch(environment_name, self._lease.close_run, self._probe, self._lease.take_parked)

    async def _probe(self, jobs: Sequence[str]) -> Mapping[str, BackendState]:
        adapter, lane = self._adapter, self._lane
        if adapter is None or lane is None:
            return {}
        found = await lane.call(lambda: adapter.probe(jobs), PROBE_SECONDS, "probe")
        return found if isinstance(found, Mapping) else {}

    def _prepare(self, config: Mapping[str, Any]) -> tuple[type[BackendAdapter], Lease]:
        adapter_class = self._adapter_class or load_adapter(self.name)
        modules = self._required_modules
        check_modules(
            self.name,
            adapter_class.required_modules if modules is None else modules,
            adapter_class.install_hint,
        )
        if adapter_class.config_keys is not None:
            check_keys(self._environment, config, (*SHARED_KEYS, *adapter_class.config_keys))
        self._ring: SecretRing = find_secrets(config.get("security"))
        self._max_body = _whole(config, "callback_max_body", DEFAULT_MAX_BODY, 1)
        self._plain = not flag(config, "pickle", True)
        self._expires = _expiry(config)
        lease = self._listen(config)
        self._callback_url = resolve_callback_url(config, lease.host, lease.port)
        self._wants_webhook = adapter_class.takes_failure_webhook
        return adapter_class, lease

    def _listen(self, config: Mapping[str, Any]) -> Lease:
        from wove.callback_server.hub import acquire
        from wove.callback_server.tls import read_tls

        host = config.get("callback_host", "127.0.0.1")
        if not isinstance(host, str) or not host:
            raise ConfigurationError(f'executor_config["callback_host"] is an address; got {host!r}')
        port = _whole(config, "callback_port", 0, 0)
        if port > 65_535:
            raise ConfigurationError(f'executor_config["callback_port"] is from 0 to 65535; got {port}')
        # What cannot work is found before anything listens.
        check_listener(host, self._ring, config)
        check_plain_http(resolve_callback_url(config, host, port), config)
        return acquire(host, port, read_tls(config.get("callback_tls")))

    async def send(self, frame: Frame) -> None:
        """Submit or cancel a run; see :meth:`EnvironmentExecutor.send`."""
        if self._adapter is None or self._lane is None:
            raise RuntimeError(f"the {self.name} executor is not started")
        if frame["type"] == frames.RUN_TASK:
            await self._submit(frame)
        elif frame["type"] == frames.CANCEL_TASK:
            await self._cancel(frame)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        if self._channel is None:
            raise RuntimeError(f"the {self.name} executor is not started")
        frame = await self._channel.get()
        if frame.get("type") in frames.TERMINAL:
            self._open.pop(frame["run_id"], None)
        return frame

    async def stop(self) -> None:
        """Close the adapter, release the listener; see :meth:`EnvironmentExecutor.stop`."""
        adapter, self._adapter = self._adapter, None
        lease, self._lease = self._lease, None
        lane, self._lane = self._lane, None
        watch, self._watch = self._watch, None
        if self._flushing is not None:
            self._flushing.cancel()
        if watch is not None:
            await watch.stop()
        if lease is not None:
            await _drain(lease)
        for task in tuple(self._background):
            task.cancel()
        await self._close(adapter, lane)
        if self._encoder is not None:
            self._encoder.close()
        if lease is not None:
            await in_thread(lease.release)
        if self._channel is not None:
            self._channel.close()
        self._open.clear()

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

    async def _submit(self, frame: Frame) -> None:
        # What is submitted in one turn of the loop, or while a batch is under way, leaves together.
        loop = asyncio.get_running_loop()
        waiting = _Waiting(frame, loop.create_future())
        self._waiting.append(waiting)
        self._open[frame["run_id"]] = None
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush(), name="wove-flush")
        await waiting.accepted

    async def _flush(self) -> None:
        while self._waiting and self._lane is not None:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                results = await self._lane.call(partial(self._send_batch, batch), SUBMIT_SECONDS, "submit")
            except Exception as exc:
                results = [_copy(exc) for _ in batch]
            except BaseException:
                self._settle(batch, [SubmitError("the environment was stopped") for _ in batch])
                raise
            self._settle(batch, results)

    def _settle(self, batch: list[_Waiting], results: list[Any]) -> None:
        for waiting, result in zip(batch, results, strict=True):
            run_id = waiting.frame["run_id"]
            known = self._lease.find(run_id) if self._lease is not None else None
            refused = isinstance(result, BaseException)
            if refused and known is not None and _has_it(known, waiting.frame, result):
                # Only the backend's answer was lost: a worker has it.
                refused, result = False, None
            # A run that is submitted again keeps its place, and what is said of this attempt is known.
            again = waiting.frame["delivery"].get("again") and isinstance(result, SubmitError)
            if refused and self._lease is not None and not again:
                self._lease.close_run(run_id)
            if waiting.accepted.cancelled():
                self._settle_cancelled(waiting.frame, result)
            elif refused:
                self._open.pop(run_id, None)
                waiting.accepted.set_exception(result)
            else:
                if run_id in self._open:  # its outcome may have been faster
                    self._open[run_id] = result
                if known is not None:
                    known.job = result if isinstance(result, str) else known.job
                    known.opened_at = time.monotonic()
                    if self._watch is not None:
                        self._watch.opened(known)
                waiting.accepted.set_result(None)

    def _settle_cancelled(self, frame: Frame, result: Any) -> None:
        """Settle a run that was cancelled while it was being submitted."""
        if isinstance(result, BaseException):
            self._acknowledge_cancel(frame)
            return
        # The cancellation came too early to find the job; now it is there.
        self._open[frame["run_id"]] = result
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

    async def _send_batch(self, batch: list[_Waiting]) -> list[Any]:
        """Encode, sign and submit; in the lane's thread, so that the caller's loop is free."""
        adapter, lease, encoder = self._adapter, self._lease, self._encoder
        if adapter is None or lease is None or encoder is None:
            raise SubmitError("the environment was stopped")
        # In a thread of its own again: a large argument must not hold up a cancellation.
        results: list[Any] = await asyncio.wrap_future(encoder.submit(self._encode_batch, batch))
        ready: list[tuple[bytes, Frame]] = []
        places: list[int] = []
        for place, waiting in enumerate(batch):
            built = results[place]
            if isinstance(built, BaseException):
                continue
            if waiting.accepted.cancelled():
                results[place] = SubmitError("cancelled before it was submitted")
                continue
            self._open_run(lease, waiting.frame, built)
            ready.append((built.blob, self._public(waiting.frame, built)))
            places.append(place)
        if ready:
            for place, result in zip(places, await adapter.submit_many(ready), strict=True):
                results[place] = result
        return results

    def _encode_batch(self, batch: list[_Waiting]) -> list[Any]:
        results: list[Any] = []
        for waiting in batch:
            try:
                if waiting.accepted.cancelled():
                    raise SubmitError("cancelled before it was submitted")
                results.append(self._build(waiting.frame))
            except Exception as exc:
                results.append(exc)
            except BaseException as exc:
                # An argument whose pickling exits: an error of its own run only.
                results.append(EncodeError(f"encoding the arguments raised {type(exc).__name__}: {exc}"))
        return results

    def _build(self, frame: Frame) -> BuiltPayload:
        return build_payload(
            frame,
            environment=self._environment,
            ring=self._ring,
            callback_url=self._callback_url,
            max_body=self._max_body,
            nonce=self._nonce(frame),
            expires=self._expires,
            plain=self._plain,
            withdrawn=self._lease.withdrawn if self._lease is not None else None,
        )

    def _nonce(self, frame: Frame) -> bytes | None:
        # What earlier attempts say is signed with keys from the same nonce.
        known = self._lease.find(frame["run_id"]) if self._lease is not None else None
        return known.nonce if known is not None else None

    def _open_run(self, lease: Lease, frame: Frame, built: BuiltPayload) -> None:
        from wove.callback_server.runs import OpenRun

        if self._channel is None or self._watch is None:
            raise SubmitError("the environment was stopped")
        delivery = frame.get("delivery") or {}
        if delivery.get("attended") is False:
            return  # nobody waits for it: it was put back on the queue as we stop
        attempt = delivery.get("attempt", 1)
        known = lease.find(frame["run_id"])
        if known is None and attempt > 1:
            raise SubmitError("the run has ended meanwhile")
        # Before it is submitted: a fast worker may report before the broker has answered us.
        if known is not None:
            lease.renew_run(known, attempt, built.message)
        else:
            known = OpenRun(
                run_id=frame["run_id"],
                task_id=frame["task_id"],
                environment=self._environment,
                ring=self._ring,
                nonce=built.nonce,
                sink=self._channel.put,
                max_body=self._max_body,
                message=built.message,
                attempt=attempt,
                heartbeat=delivery.get("heartbeat_seconds"),
                on_suspect=self._watch.suspect,
                plain=self._plain,
            )
            lease.open_run(known)

    def _public(self, frame: Frame, built: BuiltPayload) -> Frame:
        if not self._wants_webhook or frame["delivery"].get("attended") is False:
            return frame
        webhook = failure_webhook(
            frame["run_id"],
            built.nonce,
            environment=self._environment,
            ring=self._ring,
            callback_url=self._callback_url,
            job=job_id(frame),
        )
        return {**frame, "failure_webhook": webhook}

    # --- cancelling -----------------------------------------------------------

    async def _cancel(self, frame: Frame) -> None:
        run_id = frame["run_id"]
        adapter, lane, lease = self._adapter, self._lane, self._lease
        if adapter is None or lane is None or lease is None:
            return
        frame = {**frame, "started": lease.has_started(run_id)}
        submission = self._open.pop(run_id, None)
        known = lease.find(run_id)
        if submission is None and known is not None and adapter.is_shared(known.job):
            submission = known.job  # a lost run: nobody waits for it, others may for its job

        def tell_worker() -> None:
            # Over its open beat it hears of it at once.
            lease.cancel_run(run_id)
            if known is not None and self._watch is not None:
                self._watch.opened(known)  # to be forgotten, should nobody answer
            if frame["started"] and adapter.stops_running:
                self._in_background(self._escalate(adapter, lane, frame, submission), "wove-escalate")

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

    async def _escalate(self, adapter: BackendAdapter, lane: Lane, frame: Frame, submission: Any) -> None:
        """End the process of a task that has not ended by itself."""
        give_up = time.monotonic() + ESCALATE_AFTER
        while time.monotonic() < give_up:
            if self._lease is None or self._lease.find(frame["run_id"]) is None:
                break
            await asyncio.sleep(0.05)
        lease = self._lease
        if lease is not None and lease.find(frame["run_id"]) is None:
            return  # it has listened
        stop = {**frame, "escalate": True}
        try:
            await lane.call(
                lambda: adapter.cancel(frame["run_id"], submission, stop), CONTROL_SECONDS, "cancel"
            )
        except Exception:
            logger.warning("stopping the process of run %s failed", frame["run_id"], exc_info=True)

    def _acknowledge_cancel(self, frame: Frame) -> None:
        self._open.pop(frame["run_id"], None)
        if self._channel is not None:
            attempt = (frame.get("delivery") or {}).get("attempt", 1)
            event = frames.event(frames.TASK_CANCELLED, frame["run_id"], frame["task_id"], attempt, 2**31)
            self._channel.put([event])


class _Waiting(NamedTuple):
    """A run on its way to the adapter, and what its sender waits for."""

    frame: Frame
    accepted: asyncio.Future[None]


def _release_unwanted(preparing: asyncio.Future[tuple[Any, Lease]]) -> None:
    # The start was cancelled while the listener came up.
    if not preparing.cancelled() and preparing.exception() is None:
        _, lease = preparing.result()
        threading.Thread(target=lease.release, name="wove-release", daemon=True).start()


def _has_it(run: OpenRun, frame: Frame, refusal: Any) -> bool:
    """Tell whether a worker has spoken of that attempt although the backend seems to have refused it."""
    attempt = frame["delivery"].get("attempt", 1)
    return isinstance(refusal, SubmitError) and run.attempt == attempt and run.started


def _copy(exc: Exception) -> Exception:
    """Return an exception for one of several runs: each gets its own notes and traceback."""
    if isinstance(exc, SubmitError):
        copy = SubmitError(str(exc), maybe_accepted=exc.maybe_accepted)
    else:
        copy = SubmitError(f"submitting failed: {type(exc).__name__}: {exc}")
    copy.__cause__ = exc.__cause__ if isinstance(exc, SubmitError) else exc
    return copy


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
