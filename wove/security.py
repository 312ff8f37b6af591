"""Secrets, key derivation, and the signatures on payloads, events and replies.

Everything is signed with HMAC-SHA256 over length-prefixed fields, and the raw bytes are
verified before anything is decoded. From one secret, HKDF-SHA256 (RFC 5869) with the
environment's name as salt derives separate keys for payloads and for events, so that
neither can be reflected as the other; each run has an event key of its own, derived from
its id and a nonce. No key ever crosses the broker.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Any

from wove.errors import PayloadRejectedError
from wove.keyring import MIN_SECRET, Secret, SecretRing, cookie_path, find_secrets, is_cookie
from wove.refusals import refusals

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from wove.network_security import NetworkExecutorSecurity

#: Names of :mod:`wove.keyring` and :mod:`wove.network_security` are known by this module's name as well.
__all__ = [
    "MIN_SECRET", "NetworkExecutorSecurity", "Secret", "SecretRing", "beat_tag", "cancel_tag", "cookie_path",
    "event_mac", "event_tag", "fetch_tag", "find_secrets", "is_cookie", "mac", "open_payload", "part_tag", "refusals", "reply_tag",
    "run_key", "same", "scrub", "seal_payload", "webhook_token", "without_passwords",
]  # fmt: skip

#: Bytes of a signature.
TAG_SIZE = 32
#: Bytes of a run's nonce.
NONCE_SIZE = 16

#: How every payload begins: the name, and the version of what follows.
PAYLOAD_MAGIC = b"WOVE\x01"
#: Up to so many bytes are signed by one call.
_AT_ONCE = 16 * 1024
_LENGTH = struct.Struct(">I")


def mac(key: bytes, fields: Iterable[bytes | str], parts: Iterable[Buffer] = ()) -> bytes:
    """Return the HMAC-SHA256 of length-prefixed ``fields``, then of ``parts`` as one field."""
    pieces: list[Buffer] = []
    for field in fields:
        raw = field.encode() if isinstance(field, str) else field
        pieces.append(_LENGTH.pack(len(raw)) + raw)
    # The parts come last and end the message: their length needs no prefix.
    parts = list(parts)
    if sum([len(part) if type(part) is bytes else memoryview(part).nbytes for part in parts]) <= _AT_ONCE:
        return hmac.digest(key, b"".join((*pieces, *parts)), "sha256")  # a third of the time
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in (*pieces, *parts):
        digest.update(part)
    return digest.digest()


def _begun(key: bytes, fields: Iterable[bytes | str]) -> hmac.HMAC:
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for field in fields:
        raw = field.encode() if isinstance(field, str) else field
        digest.update(_LENGTH.pack(len(raw)) + raw)
    return digest


def same(expected: bytes, given: bytes) -> bool:
    """Compare two signatures in constant time."""
    return hmac.compare_digest(expected, given)


# --- payloads: submitter -> worker, through the broker ------------------------


def seal_payload(ring: SecretRing, environment: str, message: Sequence[Buffer]) -> bytes:
    """Sign a message for the broker: magic, key id, environment, signature, message."""
    kid, name = ring.primary.kid.encode(), environment.encode()
    tag = _payload_tag(ring.primary, kid, name, message)
    return b"".join((PAYLOAD_MAGIC, bytes((len(kid),)), kid, bytes((len(name),)), name, tag, *message))


def open_payload(ring: SecretRing, payload: bytes) -> tuple[str, Secret, memoryview]:
    """Verify a payload.

    Returns:
        The environment's name, the secret it was signed with and the message's bytes.

    Raises:
        PayloadRejectedError: the payload is not Wove's, or not signed by a known secret.
    """
    if not payload.startswith(PAYLOAD_MAGIC):
        raise PayloadRejectedError("not a Wove payload, or one of another protocol version")
    try:
        at = len(PAYLOAD_MAGIC)
        kid, at = _short_field(payload, at)
        name, at = _short_field(payload, at)
    except IndexError:
        raise PayloadRejectedError("the payload is cut short") from None
    tag, message = payload[at : at + TAG_SIZE], memoryview(payload)[at + TAG_SIZE :]
    secret = ring.get(kid.decode("utf-8", "replace"))
    if secret is None:
        raise PayloadRejectedError(
            f"the payload is signed with a secret that this worker does not have (it uses {ring.source}): "
            "give the submitter and its workers the same WOVE_SECRET",
            reason="signature",
        )
    if not same(_payload_tag(secret, kid, name, [message]), tag):
        raise PayloadRejectedError(
            f"the payload's signature is wrong: it was changed on its way, or signed with another secret than "
            f"{ring.source}: give the submitter and its workers the same WOVE_SECRET",
            reason="signature",
        )
    return name.decode(), secret, message


def _short_field(data: bytes, at: int) -> tuple[bytes, int]:
    length = data[at]
    end = at + 1 + length
    if end > len(data):
        raise IndexError
    return data[at + 1 : end], end


def _payload_tag(secret: Secret, kid: bytes, name: bytes, message: Sequence[Buffer]) -> bytes:
    key = secret.derive("wove/1 payload", name.decode("utf-8", "replace"))
    return mac(key, ("wove/1 payload", kid, name), message)


# --- events: worker -> submitter, over HTTP -----------------------------------


def run_key(secret: Secret, environment: str, run_id: str, nonce: bytes) -> bytes:
    """Return the key that signs the events of one run; both sides derive it."""
    return mac(secret.derive("wove/1 event", environment), (run_id, nonce))


def event_tag(key: bytes, run_id: str, codec: str, final: bool, body: Sequence[Buffer]) -> bytes:
    """Sign the body of an events request."""
    return mac(key, _event_fields(run_id, codec, final), body)


def event_mac(key: bytes, run_id: str, codec: str, final: bool) -> hmac.HMAC:
    """Return what becomes :func:`event_tag` as it is updated by the body, piece by piece."""
    return _begun(key, _event_fields(run_id, codec, final))


def _event_fields(run_id: str, codec: str, final: bool) -> tuple[str, ...]:
    return ("wove/1 event", run_id, codec, "1" if final else "0")


def reply_tag(key: bytes, request_tag: bytes, body: bytes) -> bytes:
    """Sign the callback server's reply to the request with ``request_tag``."""
    return mac(key, ("wove/1 reply", request_tag), (body,))


def beat_tag(key: bytes, run_id: str, execution: str, attempt: int, count: int) -> bytes:
    """Sign one beat of an execution; ``count`` grows with each, so that none is replayed."""
    return mac(key, ("wove/1 beat", run_id, execution, str(attempt), str(count)))


def cancel_tag(key: bytes, run_id: str, execution: str, count: int) -> bytes:
    """Sign the word that cancels a run, in reply to the beat with ``count``."""
    return mac(key, ("wove/1 cancel", run_id, execution, str(count)))


def fetch_tag(key: bytes, run_id: str) -> bytes:
    """Sign a worker's request for the message that was too large for the broker."""
    return mac(key, ("wove/1 fetch", run_id))


def part_tag(key: bytes, run_id: str) -> bytes:
    """Sign a worker's request for what the run shares with other runs."""
    return mac(key, ("wove/1 part", run_id))


def webhook_token(key: bytes, job_id: str) -> str:
    """Return the token by which RQ's own webhook proves that it speaks of this job of the run."""
    return mac(key, ("wove/1 webhook", job_id)).hex()


def scrub(text: str) -> str:
    """Take the user information out of URLs in ``text``: ``redis://:pw@host`` names no password."""
    pieces = text.split("://")
    for index, piece in enumerate(pieces[1:], start=1):
        authority = piece.split("/", 1)[0]
        if "@" in authority:
            pieces[index] = "***@" + piece[authority.rindex("@") + 1 :]
    return "://".join(pieces)


def without_passwords(exc: BaseException) -> BaseException | None:
    """Return ``exc`` as a cause that may be shown, or None where it or its own causes name a URL's user."""
    seen: BaseException | None = exc
    for _ in range(8):
        if seen is None:
            break
        text = str(seen)
        if scrub(text) != text:
            return None
        seen = seen.__cause__ or seen.__context__
    return exc


def __getattr__(name: str) -> Any:
    # The network executors' credentials have a module of their own, and are known by this one's name.
    if name == "NetworkExecutorSecurity":
        from wove.network_security import NetworkExecutorSecurity

        return NetworkExecutorSecurity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
