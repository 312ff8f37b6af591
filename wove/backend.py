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
from wove.shared_parts import FETCH_FROM, Part, as_part, size_of
from wove.tables import encode_small, pack_table
from wove.wire import encode_callable, encode_value, pack_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from wove.frames import Frame
    from wove.shared_parts import SharedCallable
    from wove.tables import Row

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
        part: what workers fetch once for several runs, where there is such a thing.
    """

    blob: bytes
    nonce: bytes
    message: list[Buffer] | None
    part: Part | None = None


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
    head = _head(frame, nonce, callback_url, max_body, expires, plain, withdrawn)
    shared: SharedCallable | None = None if plain else frame.get("shared")
    # Work that may outlive its submitter has to have everything with it.
    keep = bool(delivery.get("keep"))
    part = shared.part() if shared is not None and not keep else None
    call = _encode_call(frame, attachments, plain, part)
    if keep or size_of(attachments) < FETCH_FROM:
        message = pack_message({**head, **call}, attachments)
        return BuiltPayload(seal_payload(ring, environment, message), nonce, None, part)
    large = as_part(pack_message(call, attachments))
    message = pack_message({**head, "fetch": large.claim}, [])
    return BuiltPayload(seal_payload(ring, environment, message), nonce, large.message, part)


def _head(
    frame: Frame,
    nonce: bytes,
    callback_url: str,
    max_body: int | None,
    expires: float | None,
    plain: bool,
    withdrawn: int | None,
) -> dict[str, Any]:
    """Return what a payload says of its run beside the call itself."""
    delivery = frame.get("delivery") or {}
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
        # There may be a copy of it: however young it is, its worker asks before it starts.
        "ask": is_repeated(frame),
    }
    if withdrawn is not None:
        head["withdrawn"] = withdrawn
    if delivery.get("key") is not None:
        # By which backends that can do so let runs of other processes share the job.
        head["key"] = delivery["key"]
    return head


def encode_row(frame: Frame, *, plain: bool) -> Row | None:
    """Encode the arguments of a run that may travel with others.

    Returns:
        Its row in the table of a batch; None for a run that has to travel alone: its arguments are
        large, or cannot be sent, or are no plain data where that is asked for.
    """
    found = encode_small([list(frame.get("positional", ())), frame["args"]])
    if found is None or (plain and found[0] == "pickle"):
        return None
    return frame["run_id"], *found


def build_batch(
    frame: Frame,
    rows: Sequence[Row],
    *,
    environment: str,
    ring: SecretRing,
    callback_url: str,
    max_body: int | None = None,
    expires: float | None = None,
    plain: bool = False,
    withdrawn: int | None = None,
) -> BuiltPayload:
    """Sign several runs of one callable together.

    Args:
        frame: stands for all of them: its ``run_id`` is the batch's, its ``callable`` and ``delivery`` are theirs.
        rows: one for each, of :func:`encode_row`.
        environment: the environment's name.
        ring: its primary secret signs.
        callback_url: where workers report to.
        max_body: the largest request with outcomes, in bytes, that will be taken there.
        expires: seconds after which no worker takes them any more; None for never.
        plain: send the callable by name, and ask the worker for plain data.
        withdrawn: as for :func:`build_payload`.

    Raises:
        EncodeError: the callable cannot be sent, or is too large to travel with the calls.
    """
    attachments: list[Buffer] = [pack_table(rows)]
    nonce = secrets.token_bytes(NONCE_SIZE)
    head = _head(frame, nonce, callback_url, max_body, expires, plain, withdrawn)
    call, part = _encode_shared(frame, attachments, plain)
    if size_of(attachments) >= FETCH_FROM:
        raise EncodeError("a batch that does not fit into one message")
    message = pack_message({**head, **call, "batch": len(rows)}, attachments)
    return BuiltPayload(seal_payload(ring, environment, message), nonce, None, part)


def _encode_shared(
    frame: Frame, attachments: list[Buffer], plain: bool
) -> tuple[dict[str, Any], Part | None]:
    """Encode the callable of a batch."""
    if plain:
        from wove.no_pickle import plain_reference

        return {"callable": plain_reference(frame["callable"], 'executor_config["pickle"] is False')}, None
    shared: SharedCallable | None = frame.get("shared")
    if shared is None:
        return {"callable": encode_callable(frame["callable"], attachments)}, None
    part = shared.part()
    if part is not None:
        return {"part": part.claim}, part
    return {"callable": shared.describe(attachments)}, None


def _encode_call(
    frame: Frame, attachments: list[Buffer], plain: bool, part: Part | None = None
) -> dict[str, Any]:
    positional, keywords = list(frame.get("positional", ())), dict(frame["args"])
    if plain:
        from wove.no_pickle import encode_plain_arguments, plain_reference

        setting = 'executor_config["pickle"] is False'
        return {
            "callable": plain_reference(frame["callable"], setting),
            "args": encode_plain_arguments(positional, keywords, attachments, setting),
        }
    if part is not None:
        return {"part": part.claim, "args": encode_arguments(positional, keywords, attachments)}
    shared: SharedCallable | None = frame.get("shared")
    described = (
        shared.describe(attachments)
        if shared is not None
        else encode_callable(frame["callable"], attachments)
    )
    return {"callable": described, "args": encode_arguments(positional, keywords, attachments)}


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
    if "runs" in frame:
        return f"[{frame['runs']} run{'s' if frame['runs'] > 1 else ''}]"
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


def is_repeated(frame: Frame) -> bool:
    """Tell whether this very attempt was submitted before, and the backend may have it."""
    return bool((frame.get("delivery") or {}).get("repeated"))


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
