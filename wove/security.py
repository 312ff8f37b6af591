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
import os
import re
import secrets
import socket
import stat
import struct
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from wove.errors import ConfigurationError, PayloadRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from typing_extensions import Buffer

#: Shortest secret, in bytes, that is accepted.
MIN_SECRET = 16
#: Bytes of a signature.
TAG_SIZE = 32
#: Bytes of a run's nonce.
NONCE_SIZE = 16

#: Up to so many bytes are signed by one call.
_AT_ONCE = 16 * 1024
_MAGIC = b"WOVE\x01"
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_LENGTH = struct.Struct(">I")


class Secret:
    """One shared secret with the id that peers name it by. Never shows its value."""

    __slots__ = ("_value", "kid")

    def __init__(self, value: bytes, kid: str | None = None) -> None:
        if len(value) < MIN_SECRET:
            raise ConfigurationError(
                f"a secret needs at least {MIN_SECRET} bytes and this one has {len(value)}; make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        if kid is not None and not _KEY_ID.fullmatch(kid):
            raise ConfigurationError(
                "a secret's key id, before its colon, has 1 to 32 letters, digits, dots, dashes and underscores; a "
                "secret without an id contains no colon"
            )
        self._value = value
        self.kid = kid or hmac.digest(value, b"wove/1 key id", "sha256").hex()[:8]

    def __repr__(self) -> str:
        return f"Secret(kid={self.kid!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled")

    def derive(self, info: str, environment: str) -> bytes:
        """Return the 32-byte key for ``info`` in ``environment`` (HKDF-SHA256)."""
        return _hkdf(self._value, info.encode(), environment.encode())


@lru_cache(maxsize=256)
def _hkdf(secret: bytes, info: bytes, salt: bytes) -> bytes:
    extracted = hmac.digest(salt or bytes(TAG_SIZE), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


class SecretRing:
    """The secrets in force: the first signs, all verify, so that they can be rotated."""

    __slots__ = ("_by_kid", "primary", "source")

    def __init__(self, entries: Sequence[Secret], source: str) -> None:
        if not entries:
            raise ConfigurationError(f"{source} holds no secret")
        self.primary = entries[0]
        self.source = source
        self._by_kid = {entry.kid: entry for entry in reversed(entries)}

    def __repr__(self) -> str:
        return f"SecretRing(kids={sorted(self._by_kid)}, source={self.source!r})"

    def get(self, kid: str) -> Secret | None:
        """Return the secret with that id, or None."""
        return self._by_kid.get(kid)

    @property
    def kids(self) -> list[str]:
        """The ids of all secrets."""
        return list(self._by_kid)

    @classmethod
    def parse(cls, text: str, source: str) -> SecretRing:
        """Read ``secret`` or ``kid:secret``, several separated by commas.

        Raises:
            ConfigurationError: no secret, or one that is too short; never shows its value.
        """
        entries = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            kid, colon, value = item.partition(":")
            try:
                entries.append(
                    Secret(
                        (value if colon else item).encode("utf-8", "surrogateescape"), kid if colon else None
                    )
                )
            except ConfigurationError as exc:
                raise ConfigurationError(f"{source}: {exc}") from None
        return cls(entries, source)


def find_secrets(configured: object = None) -> SecretRing:
    """Return the secrets of ``executor_config["security"]``, ``WOVE_SECRET`` or the cookie.

    Args:
        configured: the ``security`` setting: a string, or None.

    Raises:
        ConfigurationError: an unusable setting; the message names where it came from.
    """
    if configured is not None:
        if not isinstance(configured, str):
            raise ConfigurationError(
                f'executor_config["security"] is a string, not {type(configured).__name__}'
            )
        return SecretRing.parse(configured, 'executor_config["security"]')
    text = os.environ.get("WOVE_SECRET")
    if text is not None:
        return SecretRing.parse(text, "WOVE_SECRET")
    path = cookie_path()
    return _parse_cookie(path)


COOKIE_SOURCE = "the cookie file"


def is_cookie(ring: SecretRing) -> bool:
    """Tell whether the ring comes from the per-user cookie, which no other host has."""
    return ring.source.startswith(COOKIE_SOURCE)


def cookie_path() -> Path:
    """Return where this user's cookie stands: ``$XDG_CONFIG_HOME/wove/cookie``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(base) if base else Path.home() / ".config") / "wove" / "cookie"
    except RuntimeError:
        raise ConfigurationError(
            "this user has no home directory to keep a cookie in: set WOVE_SECRET"
        ) from None


def _parse_cookie(path: Path) -> SecretRing:
    source = f"{COOKIE_SOURCE} {path}"
    try:
        if not path.exists():
            _create_cookie(path)
        info = path.stat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise ConfigurationError(f"{source} can be read by others: chmod 600 {path}, or set WOVE_SECRET")
        return SecretRing.parse(path.read_text(encoding="ascii").strip(), source)
    except UnicodeDecodeError:
        raise ConfigurationError(f"{source} holds no secret: remove it, or set WOVE_SECRET") from None
    except OSError as exc:
        raise ConfigurationError(
            f"{source} cannot be used ({exc.strerror}): set WOVE_SECRET on the submitter and its workers"
        ) from exc


def _create_cookie(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written whole under another name, then linked: a second process sees all of it or
    # nothing, and the first one to link wins.
    draft = path.with_name(f".cookie-{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_urlsafe(32).encode())
        os.close(handle)
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)


def mac(key: bytes, fields: Iterable[bytes | str], parts: Iterable[Buffer] = ()) -> bytes:
    """Return the HMAC-SHA256 of length-prefixed ``fields``, then of ``parts`` as one field."""
    pieces: list[Buffer] = []
    for field in fields:
        raw = field.encode() if type(field) is str else field
        pieces.append(_LENGTH.pack(len(raw)) + raw)  # type: ignore[operator]
    # The parts come last and end the message: their length needs no prefix.
    parts = list(parts)
    if sum([len(part) if type(part) is bytes else memoryview(part).nbytes for part in parts]) <= _AT_ONCE:
        return hmac.digest(key, b"".join((*pieces, *parts)), "sha256")  # a third of the time
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in (*pieces, *parts):
        digest.update(part)
    return digest.digest()


def same(expected: bytes, given: bytes) -> bool:
    """Compare two signatures in constant time."""
    return hmac.compare_digest(expected, given)


# --- payloads: submitter -> worker, through the broker ------------------------


def seal_payload(ring: SecretRing, environment: str, message: Sequence[Buffer]) -> bytes:
    """Sign a message for the broker: magic, key id, environment, signature, message."""
    kid, name = ring.primary.kid.encode(), environment.encode()
    tag = _payload_tag(ring.primary, kid, name, message)
    return b"".join((_MAGIC, bytes((len(kid),)), kid, bytes((len(name),)), name, tag, *message))


def open_payload(ring: SecretRing, payload: bytes) -> tuple[str, Secret, memoryview]:
    """Verify a payload.

    Returns:
        The environment's name, the secret it was signed with and the message's bytes.

    Raises:
        PayloadRejectedError: the payload is not Wove's, or not signed by a known secret.
    """
    if not payload.startswith(_MAGIC):
        raise PayloadRejectedError("not a Wove payload, or one of another protocol version")
    try:
        at = len(_MAGIC)
        kid, at = _short_field(payload, at)
        name, at = _short_field(payload, at)
    except IndexError:
        raise PayloadRejectedError("the payload is cut short") from None
    tag, message = payload[at : at + TAG_SIZE], memoryview(payload)[at + TAG_SIZE :]
    secret = ring.get(kid.decode("utf-8", "replace"))
    if secret is None:
        raise PayloadRejectedError(
            f"the payload is signed with a secret that this worker does not have (it uses {ring.source}): "
            "give the submitter and its workers the same WOVE_SECRET"
        )
    if not same(_payload_tag(secret, kid, name, [message]), tag):
        raise PayloadRejectedError(
            f"the payload's signature is wrong: it was changed on its way, or signed with another secret than "
            f"{ring.source}: give the submitter and its workers the same WOVE_SECRET"
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
    return mac(key, ("wove/1 event", run_id, codec, "1" if final else "0"), body)


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


def check_listener(host: str, ring: SecretRing) -> None:
    """Refuse a listener that other hosts reach without a secret that they share.

    Raises:
        ConfigurationError: says which setting is missing.
    """
    if host in _LOCAL_HOSTS or not is_cookie(ring):
        return
    raise ConfigurationError(
        f'callback_host "{host}" can be reached from other hosts, which do not have this user\'s cookie: '
        'set WOVE_SECRET (or executor_config["security"]) to one secret on the submitter and its workers'
    )


def check_plain_http(callback_url: str, config: Mapping[str, Any]) -> None:
    """Refuse callbacks that would cross the internet unencrypted. Resolves the host; may block.

    Raises:
        ConfigurationError: plain HTTP to a public address, without ``insecure``.
    """
    insecure = config.get("insecure", False)
    if type(insecure) is not bool:
        raise ConfigurationError(f'executor_config["insecure"] is True or False; got {insecure!r}')
    parts = urlsplit(callback_url)
    if insecure or parts.scheme != "http" or not parts.hostname or parts.hostname in _LOCAL_HOSTS:
        return
    try:
        found = {item[4][0] for item in socket.getaddrinfo(parts.hostname, None)}
    except OSError:
        return  # a name that only the workers' network knows
    public = sorted(address for address in map(str, found) if ip_address(address.partition("%")[0]).is_global)
    if public:
        raise ConfigurationError(
            f'callback_url "{callback_url}" is plain HTTP to the public address {public[0]}: outcomes are signed, but '
            'anybody on the way can read them. Use an https:// URL (a reverse proxy), or set "insecure": True'
        )


def __getattr__(name: str) -> Any:
    # The network executors' credentials have a module of their own, and are known by this one's name.
    if name == "NetworkExecutorSecurity":
        from wove.network_security import NetworkExecutorSecurity

        return NetworkExecutorSecurity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
