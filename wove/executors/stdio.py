"""The stdio executor: tasks run in child processes of this one."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import ConfigurationError
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.events import CommandEncoder, EventDecoder
from wove.executors.settings import check_keys, whole_number
from wove.wire import require_msgpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer

    from wove.frames import Frame
    from wove.worker.services.processes import ChildProcesses

_KEYS = ("command", "cwd", "env", "idle_seconds", "max_tasks_per_process", "processes", "threads")


class StdioEnvironmentExecutor(EnvironmentExecutor):
    """Runs tasks in worker processes that it starts, over a private pipe to each.

    ``executor_config``: ``command`` (a list or a string; default this Python with ``-m wove.worker.stdio``),
    ``processes`` (1), ``threads`` (synchronous tasks at once per process, 40; not together with ``command``),
    ``cwd``, ``env`` (variables in addition), ``max_tasks_per_process``, ``idle_seconds`` (end a process that
    had nothing to do for so long; the next task starts it again).

    What tasks print, their child processes and C code included, arrives as ``log`` frames.
    """

    default_heartbeat_seconds = 15.0

    def __init__(self) -> None:
        self._channel: FrameChannel | None = None
        self._children: ChildProcesses | None = None
        self._encoder: CommandEncoder | None = None
        self._decoder: EventDecoder | None = None

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Start the processes; see :meth:`EnvironmentExecutor.start`."""
        require_msgpack()
        check_keys(environment_name, environment_config, _KEYS)
        from wove.worker.services.processes import ChildProcesses

        command, env = _command(environment_config)
        channel = FrameChannel()
        self._channel = channel
        self._encoder = CommandEncoder(environment_name)
        self._decoder = EventDecoder(channel.put, environment_name)
        self._children = ChildProcesses(
            command,
            name=f"environment {environment_name!r}",
            processes=whole_number(environment_config, "processes", 1) or 1,
            env=env,
            cwd=environment_config.get("cwd"),
            max_tasks_per_process=whole_number(environment_config, "max_tasks_per_process", None),
            idle_seconds=_idle_seconds(environment_config),
        )
        await self._children.start()

    async def send(self, frame: Frame) -> None:
        """Take a command; see :meth:`EnvironmentExecutor.send`."""
        children, encoder, decoder = self._children, self._encoder, self._decoder
        if children is None or encoder is None or decoder is None:
            raise RuntimeError("the stdio executor is not started")
        if frame["type"] == frames.RUN_TASK:
            _run(children, decoder, frame, await encoder.encode(frame))
        elif frame["type"] == frames.CANCEL_TASK:
            children.cancel(frame["run_id"])

    def post(self, frame: Frame, done: Callable[[BaseException | None], None]) -> bool:
        """Take a command that is encoded at once; see :meth:`EnvironmentExecutor.post`."""
        children, encoder, decoder = self._children, self._encoder, self._decoder
        if children is None or encoder is None or decoder is None:
            return False
        parts = encoder.encode_light(frame)
        if parts is None:
            return False
        _run(children, decoder, frame, parts)
        done(None)
        return True

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand events over; see :meth:`EnvironmentExecutor.attach`."""
        return self._channel is not None and self._channel.attach(take)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        if self._channel is None:
            raise RuntimeError("the stdio executor is not started")
        return await self._channel.get()

    async def stop(self) -> None:
        """End the processes; see :meth:`EnvironmentExecutor.stop`."""
        children, self._children = self._children, None
        if children is not None:
            await children.close()
        if self._encoder is not None:
            self._encoder.close()
        if self._decoder is not None:
            self._decoder.close()
        if self._channel is not None:
            self._channel.close()


def _run(children: ChildProcesses, decoder: EventDecoder, frame: Frame, parts: list[Buffer]) -> None:
    attempt = (frame.get("delivery") or {}).get("attempt", 1)
    children.run_parts(
        frame["run_id"], frame["task_id"], attempt, parts, decoder.take, take=decoder.take_packet
    )


def _command(config: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return what a process is started with, and the variables that are set for it."""
    env = config.get("env") or {}
    if not hasattr(env, "items") or not all(type(x) is str for pair in env.items() for x in pair):
        raise ConfigurationError('executor_config["env"] is a mapping of strings to strings')
    cwd = config.get("cwd")
    if cwd is not None and not os.path.isdir(cwd):
        raise ConfigurationError(f'executor_config["cwd"] is a folder; {cwd!r} is none')
    configured = config.get("command")
    threads = whole_number(config, "threads", None)
    if configured is None:
        from wove.worker.services.child import SEARCH_PATH

        command = [sys.executable, "-m", "wove.worker.stdio"]
        if threads is not None:
            command += ["--threads", str(threads)]
        # The same interpreter on the same machine: what can be imported here can be imported there.
        search_path = os.pathsep.join(folder for folder in sys.path if folder)
        return command, {SEARCH_PATH: search_path, **env}
    if threads is not None:
        raise ConfigurationError(
            'executor_config["threads"] is for the default command: put --threads into "command" instead'
        )
    if isinstance(configured, str):
        try:
            configured = shlex.split(configured)
        except ValueError as exc:
            raise ConfigurationError(
                f'executor_config["command"] cannot be split into words: {exc}'
            ) from None
    if (
        not isinstance(configured, (list, tuple))
        or not configured
        or not all(type(w) is str for w in configured)
    ):
        raise ConfigurationError(
            'executor_config["command"] is a program with its arguments, as a list of strings or one string; '
            f"got {configured!r:.200}"
        )
    return list(configured), dict(env)


def _idle_seconds(config: Mapping[str, Any]) -> float | None:
    value = config.get("idle_seconds")
    if value is None or (type(value) in (int, float) and value > 0):
        return value
    raise ConfigurationError(f'executor_config["idle_seconds"] is a number of seconds above 0; got {value!r}')
