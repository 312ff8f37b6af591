"""BackendAdapterEnvironmentExecutor: an adapter to submit by, a callback server to hear from."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.adapters.registry import adapter_names, check_modules, load_adapter
from wove.backend import BuiltPayload, build_payload, failure_webhook, resolve_callback_url
from wove.errors import ConfigurationError, SubmitError
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.settings import check_keys
from wove.security import check_listener, find_secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from wove.adapters.base import BackendAdapter
    from wove.callback_server.hub import Lease
    from wove.frames import Frame
    from wove.security import SecretRing

__all__ = ["BackendAdapterEnvironmentExecutor", "adapter_names"]

logger = logging.getLogger("wove.executors")

#: ``executor_config`` keys that every adapter shares.
SHARED_KEYS = (
    "callback_host", "callback_max_body", "callback_port", "callback_url", "insecure", "security",
)  # fmt: skip
#: Largest outcome, in bytes, unless ``callback_max_body`` says otherwise.
DEFAULT_MAX_BODY = 256 * 1024 * 1024
#: Seconds that one call of an adapter may take.
SUBMIT_SECONDS = 30.0
CONTROL_SECONDS = 10.0
CLOSE_SECONDS = 2.0
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
    and ``{port}`` are filled in), ``callback_max_body`` (bytes), ``security`` (the secret)
    and ``insecure``.
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
        self._lane: _Lane | None = None
        self._channel: FrameChannel | None = None
        self._waiting: list[tuple[Frame, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._submissions: dict[str, Any] = {}

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Check the settings, share a callback listener and start the adapter."""
        adapter_class = self._adapter_class or load_adapter(self.name)
        modules = self._required_modules
        check_modules(
            self.name,
            adapter_class.required_modules if modules is None else modules,
            adapter_class.install_hint,
        )
        if adapter_class.config_keys is not None:
            check_keys(environment_name, environment_config, (*SHARED_KEYS, *adapter_class.config_keys))
        self._environment = environment_name
        self._ring: SecretRing = find_secrets(environment_config.get("security"))
        self._max_body = _whole(environment_config, "callback_max_body", DEFAULT_MAX_BODY, 1)
        self._channel = FrameChannel()
        self._lane = _Lane(environment_name)
        self._lease = await self._listen(environment_config)
        self._callback_url = resolve_callback_url(environment_config, self._lease.host, self._lease.port)
        self._adapter = adapter_class(
            name=environment_name,
            config=environment_config,
            callback_url=self._callback_url,
            run_config=run_config,
        )
        await self._lane.call(self._adapter.start, SUBMIT_SECONDS, "start")

    async def _listen(self, config: Mapping[str, Any]) -> Lease:
        from wove.callback_server.hub import acquire

        host = config.get("callback_host", "127.0.0.1")
        if not isinstance(host, str) or not host:
            raise ConfigurationError(f'executor_config["callback_host"] is an address; got {host!r}')
        port = _whole(config, "callback_port", 0, 0)
        if port > 65_535:
            raise ConfigurationError(f'executor_config["callback_port"] is from 0 to 65535; got {port}')
        check_listener(host, self._ring, config)
        resolve_callback_url(config, host, port)  # an unusable URL is found before anything listens
        return await asyncio.to_thread(acquire, host, port)

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
            self._submissions.pop(frame["run_id"], None)
        return frame

    async def stop(self) -> None:
        """Close the adapter, release the listener; see :meth:`EnvironmentExecutor.stop`."""
        adapter, self._adapter = self._adapter, None
        lease, self._lease = self._lease, None
        lane, self._lane = self._lane, None
        if self._flushing is not None:
            self._flushing.cancel()
        if lease is not None:
            await _drain(lease)
        if adapter is not None and lane is not None:
            try:
                await lane.call(adapter.close, CLOSE_SECONDS, "close")
            except Exception as exc:
                logger.warning("environment %r: closing the adapter failed: %s", adapter.name, exc)
            adapter.release_threads()
        if lane is not None:
            lane.stop()
        if lease is not None:
            await asyncio.to_thread(lease.release)
        if self._channel is not None:
            self._channel.close()
        self._submissions.clear()

    # --- submitting -----------------------------------------------------------

    async def _submit(self, frame: Frame) -> None:
        # What is submitted in one turn of the loop, or while a batch is under way, leaves together.
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[None] = loop.create_future()
        self._waiting.append((frame, accepted))
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush(), name="wove-flush")
        await accepted

    async def _flush(self) -> None:
        while self._waiting and self._lane is not None:
            batch = [item for item in self._waiting[:MAX_BATCH] if not item[1].done()]
            del self._waiting[:MAX_BATCH]
            if not batch:
                continue
            sending = [frame for frame, _ in batch]
            try:
                results = await self._lane.call(lambda: self._send_batch(sending), SUBMIT_SECONDS, "submit")  # noqa: B023
            except BaseException as exc:
                failure = exc if isinstance(exc, Exception) else SubmitError("the environment was stopped")
                results = [failure] * len(batch)
                if not isinstance(exc, Exception):
                    self._settle(batch, results)
                    raise
            self._settle(batch, results)

    def _settle(self, batch: list[tuple[Frame, asyncio.Future[None]]], results: list[Any]) -> None:
        for (frame, accepted), result in zip(batch, results, strict=True):
            run_id = frame["run_id"]
            if isinstance(result, BaseException):
                if self._lease is not None:
                    self._lease.close_run(run_id)
                if not accepted.done():
                    accepted.set_exception(result)
                continue
            # Nobody waits for a run that was cancelled meanwhile; its worker will be told.
            if not accepted.done():
                self._submissions[run_id] = result
                accepted.set_result(None)

    async def _send_batch(self, batch: list[Frame]) -> list[Any]:
        """Encode, sign and submit; in the lane's thread, so that the caller's loop is free."""
        adapter, lease = self._adapter, self._lease
        if adapter is None or lease is None:
            raise SubmitError("the environment was stopped")
        results: list[Any] = [None] * len(batch)
        ready: list[tuple[bytes, Frame]] = []
        places: list[int] = []
        for place, frame in enumerate(batch):
            try:
                built = self._build(frame)
            except Exception as exc:
                results[place] = exc
                continue
            self._open_run(lease, frame, built)
            ready.append((built.blob, self._public(frame, built)))
            places.append(place)
        if ready:
            for place, result in zip(places, await adapter.submit_many(ready), strict=True):
                results[place] = result
        return results

    def _build(self, frame: Frame) -> BuiltPayload:
        return build_payload(
            frame, environment=self._environment, ring=self._ring, callback_url=self._callback_url
        )

    def _open_run(self, lease: Lease, frame: Frame, built: BuiltPayload) -> None:
        from wove.callback_server.runs import OpenRun

        if self._channel is None:
            raise SubmitError("the environment was stopped")
        # Before it is submitted: a fast worker may report before the broker has answered us.
        lease.open_run(
            OpenRun(
                run_id=frame["run_id"],
                task_id=frame["task_id"],
                environment=self._environment,
                ring=self._ring,
                nonce=built.nonce,
                sink=self._channel.put,
                max_body=self._max_body,
                message=built.message,
                attempt=(frame.get("delivery") or {}).get("attempt", 1),
            )
        )

    def _public(self, frame: Frame, built: BuiltPayload) -> Frame:
        webhook = failure_webhook(
            frame["run_id"],
            built.nonce,
            environment=self._environment,
            ring=self._ring,
            callback_url=self._callback_url,
        )
        return {**frame, "failure_webhook": webhook}

    # --- cancelling -----------------------------------------------------------

    async def _cancel(self, frame: Frame) -> None:
        run_id = frame["run_id"]
        adapter, lane, lease = self._adapter, self._lane, self._lease
        if adapter is None or lane is None or lease is None:
            return
        # First the worker: over its open beat it hears of it at once.
        lease.cancel_run(run_id)
        submission = self._submissions.pop(run_id, None)
        never_starts = await lane.call(
            lambda: adapter.cancel(run_id, submission, frame), CONTROL_SECONDS, "cancel"
        )
        if never_starts and self._channel is not None:
            lease.close_run(run_id)
            attempt = (frame.get("delivery") or {}).get("attempt", 1)
            self._channel.put([frames.event(frames.TASK_CANCELLED, run_id, frame["task_id"], attempt, 2**31)])


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


class _Lane:
    """The thread and the loop in which an adapter's methods run.

    Whatever an adapter does there, the caller's loop stays free and the caller's deadline holds.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"wove-lane-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            _cancel_all(self._loop)
            self._loop.close()

    async def call(self, method: Callable[[], Awaitable[Any]], seconds: float, what: str) -> Any:
        """Await ``method()`` in the lane.

        Raises:
            SubmitError: it took longer than ``seconds``.
            Exception: what it raised.
        """

        async def body() -> Any:
            return await method()

        future = asyncio.run_coroutine_threadsafe(body(), self._loop)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not limit.expired():
                raise  # the adapter's own
            raise SubmitError(
                f"the adapter's {what}() took longer than {seconds:g} s", maybe_accepted=what == "submit"
            ) from None

    def stop(self) -> None:
        """End the loop; a call that hangs keeps its daemon thread, and nothing else."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(0.5)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=0.5))


def _whole(config: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise ConfigurationError(f'executor_config["{key}"] is a whole number from {least}; got {value!r}')
    return value
