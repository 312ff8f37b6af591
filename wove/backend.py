"""The callback transport as adapters see it: payloads going out, the URL to come back to."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wove.errors import ConfigurationError, EncodeError
from wove.security import NONCE_SIZE, SecretRing, run_key, seal_payload, webhook_token
from wove.wire import encode_callable, encode_value, pack_message

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

    from wove.frames import Frame

#: Messages from this size, in bytes, do not pass through the broker: workers fetch them.
FETCH_FROM = 256 * 1024

VERSION = 1

#: What the fields of runs that share another one's job begin with; see :func:`shared_name`.
JOINED = "joined:"


@dataclass(frozen=True, slots=True)
class BuiltPayload:
    """A run ready to be submitted.

    Attributes:
        blob: the signed bytes for the broker.
        nonce: from which both sides derive the key of the run's events.
        message: what workers fetch, for a message too large for the broker; else None.
    """

    blob: bytes
    nonce: bytes
    message: list[Buffer] | None


def build_payload(
    frame: Frame,
    *,
    environment: str,
    ring: SecretRing,
    callback_url: str,
    max_body: int | None = None,
    nonce: bytes | None = None,
    expires: float | None = None,
    plain: bool = False,
    withdrawn: int | None = None,
) -> BuiltPayload:
    """Encode and sign a ``run_task`` frame.

    Args:
        frame: the command.
        environment: the environment's name.
        ring: its primary secret signs.
        callback_url: where workers report to.
        max_body: the largest outcome, in bytes, that will be taken there.
        nonce: that of the run's earlier attempts, so that what they say can be verified as well.
        expires: seconds after which no worker takes it any more; None for never.
        plain: send the callable by name and plain data only, and ask the worker for the same.
        withdrawn: how often, so far, the callback server has taken a run back that was submitted.

    Raises:
        EncodeError: the callable or an argument cannot be sent; nothing was submitted.
    """
    attachments: list[Buffer] = []
    delivery = frame.get("delivery") or {}
    nonce = nonce or secrets.token_bytes(NONCE_SIZE)
    head = {
        "v": VERSION,
        "run_id": frame["run_id"],
        "task_id": frame["task_id"],
        "attempt": delivery.get("attempt", 1),
        "nonce": nonce,
        "callback": callback_url,
        "sent_at": time.time(),
        "heartbeat": delivery.get("heartbeat_seconds"),
        "timeout": delivery.get("timeout"),
        "start_timeout": delivery.get("start_timeout"),
        "keep": delivery.get("keep", False),
        "attended": delivery.get("attended", True),
        "max_body": max_body,
        "expires": expires,
        "plain": plain,
    }
    if withdrawn is not None:
        head["withdrawn"] = withdrawn
    if delivery.get("key") is not None:
        # By which backends that can do so let runs of other processes share the job.
        head["key"] = delivery["key"]
    call = _encode_call(frame, attachments, plain)
    # Work that may outlive its submitter has to have everything with it.
    if delivery.get("keep") or sum(memoryview(part).nbytes for part in attachments) < FETCH_FROM:
        message = pack_message({**head, **call}, attachments)
        return BuiltPayload(seal_payload(ring, environment, message), nonce, None)
    large = pack_message(call, attachments)
    digest = hashlib.sha256()
    for part in large:
        digest.update(part)
    size = sum(memoryview(part).nbytes for part in large)
    message = pack_message({**head, "fetch": [size, digest.digest()]}, [])
    return BuiltPayload(seal_payload(ring, environment, message), nonce, large)


def _encode_call(frame: Frame, attachments: list[Buffer], plain: bool) -> dict[str, Any]:
    positional, keywords = list(frame.get("positional", ())), dict(frame["args"])
    if plain:
        from wove.no_pickle import encode_plain_arguments, plain_reference

        setting = 'executor_config["pickle"] is False'
        return {
            "callable": plain_reference(frame["callable"], setting),
            "args": encode_plain_arguments(positional, keywords, attachments, setting),
        }
    return {
        "callable": encode_callable(frame["callable"], attachments),
        "args": encode_arguments(positional, keywords, attachments),
    }


def encode_arguments(positional: list[Any], keywords: dict[str, Any], attachments: list[Buffer]) -> list[Any]:
    """Encode arguments as one value.

    Raises:
        EncodeError: one of them cannot be sent; names it.
    """
    try:
        return encode_value([positional, keywords], attachments)
    except EncodeError:
        # Together they are encoded at once; one by one they tell which of them it is.
        for name, value in [*((f"argument {i}", v) for i, v in enumerate(positional)), *keywords.items()]:
            try:
                encode_value(value, [])
            except EncodeError as exc:
                raise EncodeError(f"{name}: {exc}") from None
        raise


def as_text(blob: bytes) -> str:
    """Return the payload for backends whose messages hold only text."""
    return base64.b64encode(blob).decode("ascii")


def summarize_call(frame: Frame) -> str:
    """Describe the arguments by name and type, for logs and dashboards; never by value.

    Values may be secrets, and may be large.
    """
    parts = [f"<{type(value).__name__}>" for value in frame.get("positional", ())]
    parts += [f"{name}=<{type(value).__name__}>" for name, value in frame["args"].items()]
    return f"({', '.join(parts)})"[:300]


def job_id(frame: Frame) -> str:
    """Return the id under which a backend knows this attempt of a run.

    The first attempt goes by the run's id. Later ones have ids of their own: a backend may
    remember that the first was revoked, or still hold its remains.
    """
    attempt = (frame.get("delivery") or {}).get("attempt", 1)
    return str(frame["run_id"]) if attempt == 1 else f"{frame['run_id']}-{attempt}"


def shared_name(environment: str, queue: str, key: str) -> str:
    """Return the name under which a backend keeps who shares the runs with an idempotency key.

    Of a fixed length, and the same in every process.
    """
    parts = hashlib.sha256()
    for part in (environment, queue, key):
        encoded = part.encode("utf-8", "surrogatepass")
        # With their lengths, so that no two ways to cut the text are the same.
        parts.update(f"{len(encoded)}:".encode() + encoded)
    return f"wove:shared:{parts.hexdigest()[:32]}"


def failure_webhook(
    run_id: str,
    nonce: bytes,
    *,
    environment: str,
    ring: SecretRing,
    callback_url: str,
    job: str | None = None,
) -> dict[str, str]:
    """Return the ``url`` and ``token`` by which a backend itself reports that a run has failed.

    ``job`` is the attempt's id there, see :func:`job_id`; the run's own when it is not given.
    """
    key = run_key(ring.primary, environment, run_id, nonce)
    return {
        "url": f"{callback_url}/wove/v1/failed/{job or run_id}",
        "token": webhook_token(key, job or run_id),
    }


def resolve_callback_url(config: Mapping[str, Any], host: str, port: int) -> str:
    """Return the URL that workers call: ``callback_url``, or the listener's own address.

    ``{hostname}`` and ``{port}`` in ``callback_url`` are filled in.

    Raises:
        ConfigurationError: an unusable URL, or a wildcard address without ``callback_url``.
    """
    configured = config.get("callback_url")
    if configured is None:
        if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
            raise ConfigurationError(
                f'callback_host "{host}" listens on every address, and workers need one of them: set '
                'executor_config["callback_url"], for example "http://{hostname}:{port}"'
            )
        scheme = "http" if config.get("callback_tls") is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    if not isinstance(configured, str) or not configured.startswith(("http://", "https://")):
        raise ConfigurationError(
            f'executor_config["callback_url"] begins with http:// or https://; got {configured!r}'
        )
    if config.get("callback_tls") is not None and not configured.startswith("https://"):
        raise ConfigurationError(
            f'executor_config["callback_url"] is {configured!r}, and the listener speaks TLS ("callback_tls"): it begins '
            "with https://"
        )
    try:
        url = configured.format(hostname=os.environ.get("HOSTNAME") or socket.gethostname(), port=port)
        parts = urlsplit(url)
        if not parts.hostname or parts.query or parts.fragment or (parts.port == 0 and port):
            raise ValueError("it needs a host, and takes no port 0, query or fragment")
    except Exception as exc:
        raise ConfigurationError(
            'executor_config["callback_url"] is a URL that may contain {hostname} and {port}, and nothing else in '
            f"braces; got {configured!r} ({type(exc).__name__}: {exc})"
        ) from None
    return url.rstrip("/")
