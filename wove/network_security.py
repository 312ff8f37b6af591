"""NetworkExecutorSecurity: how a network executor and its worker service know each other.

Three modes. ``signed`` (the default): every request carries an HMAC over method, host, target, key id,
timestamp, nonce and body, and every packet of the answer one that is bound to that request, so that neither
side decodes a byte of anybody else's. ``bearer``: a token, for services behind a gateway that speaks that;
the answer is as trustworthy as the TLS connection it comes over. ``none``: only for loopback.

Freshness needs no synchronised clocks: a request that is too old or from the future is answered with the
service's own time, signed, and the client signs again by that clock. A service accepts no timestamp that an
earlier process of it can have accepted, so a request is not replayed after a restart either.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from wove.errors import ConfigurationError, WoveError
from wove.nonces import NonceStore
from wove.policy import nearest
from wove.security import Secret, SecretRing, find_secrets, is_cookie, mac, same

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Shortest bearer token, in characters.
MIN_TOKEN = 16

_DOMAIN = "wove/1 network"
_KEY, _TIME, _NONCE, _SIGNATURE, _CLOCK = (
    "Wove-Key", "Wove-Timestamp", "Wove-Nonce", "Wove-Signature", "Wove-Clock",
)  # fmt: skip
_TIMESTAMP = re.compile(r"[0-9]{1,15}")
_HEX = re.compile(r"[0-9a-f]+")
_MODES = ("none", "signed", "bearer")
_MAPPING_KEYS = ("mode", "secret", "token", "type")


class NetworkSecurityError(WoveError, PermissionError):
    """A request or an answer is not from somebody who holds the secret or the token.

    ``clock`` is, for a request that is signed well but not fresh, what the service answers with.
    """

    def __init__(self, message: str, *, clock: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.clock = dict(clock or {})

    __str__ = RuntimeError.__str__


class Verified(NamedTuple):
    """A request that was verified: the key its answer is signed with (None: answers are not signed)."""

    key: bytes | None


class NetworkExecutorSecurity:
    """One side's credentials, and the nonces it has seen.

    Args:
        mode: ``"signed"``, ``"bearer"`` or ``"none"``.
        ring: the secrets of ``signed``; the first signs, all verify.
        tokens: the tokens of ``bearer``; the first is sent, all are accepted.
        source: where they came from, for messages.
    """

    __slots__ = ("_nonces", "_offset_ms", "_ring", "_tokens", "mode", "source")

    def __init__(
        self,
        mode: str = "none",
        *,
        ring: SecretRing | None = None,
        tokens: Sequence[str] = (),
        source: str = "security",
    ) -> None:
        if mode not in _MODES:
            raise ConfigurationError(f"{source}: a mode is one of {', '.join(_MODES)}; got {mode!r:.40}")
        if mode == "signed" and ring is None:
            raise ConfigurationError(f'{source}: mode "signed" needs a secret')
        if mode == "bearer" and not tokens:
            raise ConfigurationError(f'{source}: mode "bearer" needs a token')
        for token in tokens:
            if not isinstance(token, str) or len(token) < MIN_TOKEN or not token.isascii() or " " in token:
                raise ConfigurationError(
                    f"{source}: a bearer token has at least {MIN_TOKEN} ASCII characters and no spaces; make one with: "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
        self.mode = mode
        self.source = source
        self._ring = ring
        self._tokens = tuple(token.encode() for token in tokens)
        self._nonces = NonceStore()
        self._offset_ms = 0

    def __repr__(self) -> str:
        kids = f", kids={sorted(self._ring.kids)}" if self._ring is not None else ""
        return f"NetworkExecutorSecurity(mode={self.mode!r}{kids}, source={self.source!r})"

    def __reduce__(self) -> Any:
        raise TypeError("credentials are never pickled")

    @classmethod
    def from_config(
        cls, config: object = None, *, source: str = 'executor_config["security"]'
    ) -> NetworkExecutorSecurity:
        """Read the ``security`` setting.

        Args:
            config: None (``WOVE_SECRET``, else this user's cookie file), ``"none"``,
                ``"env:VARIABLE"`` (the variable holds a secret), a secret, or a mapping:
                ``{"mode": "signed", "secret": ...}``, ``{"mode": "bearer", "token": ...}``; a secret
                or token there may be ``"env:VARIABLE"``, or a comma-separated list of several.
            source: how messages call the setting.

        Raises:
            ConfigurationError: it cannot be used; names the setting, never shows a secret.
        """
        if isinstance(config, NetworkExecutorSecurity):
            return config
        if config is None:
            ring = find_secrets()
            return cls("signed", ring=ring, source=ring.source)
        if isinstance(config, str):
            return cls._from_text(config, source)
        if isinstance(config, Mapping):
            return cls._from_mapping(config, source)
        raise ConfigurationError(
            f'{source} is "none", "env:VARIABLE", a secret or a mapping; got {type(config).__name__}'
        )

    @classmethod
    def _from_text(cls, text: str, source: str) -> NetworkExecutorSecurity:
        if text == "none":
            return cls("none", source=source)
        value, where = _look_up(text, source)
        return cls("signed", ring=SecretRing.parse(value, where), source=where)

    @classmethod
    def _from_mapping(cls, config: Mapping[Any, Any], source: str) -> NetworkExecutorSecurity:
        for key in config:
            if key not in _MAPPING_KEYS:
                raise ConfigurationError(f"{source}: unknown key {key!r}{nearest(key, _MAPPING_KEYS)}")
        mode = config.get("mode", config.get("type", "signed"))
        if mode == "none":
            return cls("none", source=source)
        if mode not in _MODES:
            raise ConfigurationError(f"{source}: a mode is one of {', '.join(_MODES)}; got {mode!r:.40}")
        name = "secret" if mode == "signed" else "token"
        value = config.get(name)
        if value is None and mode == "signed":
            ring = find_secrets()
            return cls("signed", ring=ring, source=ring.source)
        if not isinstance(value, str):
            raise ConfigurationError(f'{source}: mode "{mode}" needs a {name}, which is a string')
        text, where = _look_up(value, source)
        if mode == "signed":
            return cls("signed", ring=SecretRing.parse(text, where), source=where)
        tokens = [token for token in (part.strip() for part in text.split(",")) if token]
        return cls("bearer", tokens=tokens, source=where)

    @property
    def signs_answers(self) -> bool:
        """Whether answers are signed, and have to be verified before they are decoded."""
        return self.mode == "signed"

    @property
    def is_shared(self) -> bool:
        """Whether another host can have the same credentials: a cookie file stands on one machine."""
        return self.mode == "bearer" or (self._ring is not None and not is_cookie(self._ring))

    # --- the side that asks ---------------------------------------------------

    def headers_for(
        self, *, method: str, host: str, target: str, body: Buffer | Sequence[Buffer] = b""
    ) -> dict[str, str]:
        """Return the headers that authenticate one request.

        Args:
            method: ``"POST"``, ``"GET"``, for gRPC ``"grpc"``.
            host: what the request's ``Host`` says; for gRPC the channel's target.
            target: path and query; for gRPC the method's path.
            body: the raw bytes as they are sent, or several buffers sent one after another.
        """
        if self.mode == "none":
            return {}
        if self.mode == "bearer":
            return {"Authorization": "Bearer " + self._tokens[0].decode()}
        secret = self._secrets().primary
        stamp = str(int(time.time() * 1000) + self._offset_ms)
        nonce = secrets.token_hex(16)
        tag = _request_tag(secret, (method, host, target, secret.kid, stamp, nonce), _parts(body))
        return {_KEY: secret.kid, _TIME: stamp, _NONCE: nonce, _SIGNATURE: tag.hex()}

    def metadata_for(
        self, *, method: str = "grpc", host: str, target: str, body: Buffer | Sequence[Buffer] = b""
    ) -> tuple[tuple[str, str], ...]:
        """Return gRPC metadata that authenticates one call; as :meth:`headers_for`."""
        headers = self.headers_for(method=method, host=host, target=target, body=body)
        return tuple((name.lower(), value) for name, value in headers.items())

    def answer_key(self, headers: Mapping[str, str]) -> bytes | None:
        """Return the key that the answer to a request with these (own) headers is signed with."""
        if self.mode != "signed":
            return None
        return _answer_key(self._secrets().primary, _lower(headers)["wove-signature"].encode())

    def learn_clock(self, own: Mapping[str, str], answer: Mapping[str, str]) -> bool:
        """Take the service's time from its signed refusal.

        Returns:
            True when the request is worth signing and sending again.
        """
        given = _lower(answer).get(_CLOCK.lower(), "")
        told, _, tag = given.partition(" ")
        key = self.answer_key(own)
        if key is None or not _TIMESTAMP.fullmatch(told):
            return False
        if not same(mac(key, (_DOMAIN, "clock", told)).hex().encode(), tag.encode("ascii", "replace")):
            return False
        self._offset_ms = int(told) - int(time.time() * 1000)
        return True

    # --- the side that is asked -----------------------------------------------

    def verify_headers(
        self,
        headers: Mapping[str, str] | Iterable[tuple[str, str]],
        *,
        method: str,
        host: str,
        target: str,
        body: Buffer | Sequence[Buffer] = b"",
    ) -> Verified:
        """Verify a request; its arguments are those of :meth:`headers_for`.

        Raises:
            NetworkSecurityError: it is not from a holder of the secret, or was seen before.
        """
        if self.mode == "none":
            return Verified(None)
        given = _lower(headers)
        if self.mode == "bearer":
            self._verify_token(given)
            return Verified(None)
        return self._verify_signature(given, method, host, target, _parts(body))

    def verify_metadata(
        self,
        metadata: Iterable[tuple[str, str]],
        *,
        method: str = "grpc",
        host: str,
        target: str,
        body: Buffer | Sequence[Buffer] = b"",
    ) -> Verified:
        """Verify a gRPC call; as :meth:`verify_headers`."""
        return self.verify_headers(metadata, method=method, host=host, target=target, body=body)

    def _verify_token(self, given: Mapping[str, str]) -> None:
        scheme, _, token = given.get("authorization", "").partition(" ")
        raw = token.encode("utf-8", "surrogateescape")
        # Every token is compared, whichever matches.
        matches = [hmac.compare_digest(known, raw) for known in self._tokens]
        if scheme.lower() != "bearer" or not any(matches):
            raise NetworkSecurityError("the bearer token is missing or wrong")

    def _verify_signature(
        self, given: Mapping[str, str], method: str, host: str, target: str, parts: Sequence[Buffer]
    ) -> Verified:
        try:
            kid, stamp, nonce = given["wove-key"], given["wove-timestamp"], given["wove-nonce"]
            signature = given["wove-signature"].encode("utf-8", "surrogateescape")
        except KeyError as missing:
            raise NetworkSecurityError(f"the request is not signed: no {missing.args[0]}") from None
        secret = self._secrets().get(kid)
        if secret is None:
            raise NetworkSecurityError("the request is signed with a secret that is not known here")
        if not _TIMESTAMP.fullmatch(stamp) or not _HEX.fullmatch(nonce) or not 16 <= len(nonce) <= 64:
            raise NetworkSecurityError("the request's timestamp or nonce is malformed")
        fields = (method, host, target, kid, stamp, nonce)
        expected = _request_tag(secret, fields, parts)
        if not same(expected.hex().encode(), signature):
            raise NetworkSecurityError(
                "the request's signature is wrong: another secret, or a proxy that changed its host, path or body"
            )
        key = _answer_key(secret, signature)
        self._check_fresh(int(stamp), nonce, key)
        return Verified(key)

    def _check_fresh(self, stamp: int, nonce: str, key: bytes) -> None:
        verdict = self._nonces.check(stamp, nonce)
        if verdict == "replayed":
            raise NetworkSecurityError("the request was seen before")
        if verdict:
            told = str(self._nonces.suggested_ms())
            tag = mac(key, (_DOMAIN, "clock", told)).hex()
            skew = (stamp - int(time.time() * 1000)) / 1000
            raise NetworkSecurityError(
                f"the request's clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}",
                clock={_CLOCK: f"{told} {tag}"},
            )

    def _secrets(self) -> SecretRing:
        if self._ring is None:
            raise RuntimeError("not in signed mode")
        return self._ring


class Seal:
    """Signs, or verifies, the packets of one stream, each with its number.

    Args:
        key: the stream's key; None leaves packets as they are.
        direction: one side's packets are not taken for the other's.
    """

    __slots__ = ("_direction", "_key", "_number")

    def __init__(self, key: bytes | None, direction: str) -> None:
        self._key = key
        self._direction = direction
        self._number = 0

    @property
    def size(self) -> int:
        """Bytes that a signature puts before each packet."""
        return 0 if self._key is None else 32

    def tag(self, parts: Sequence[Buffer]) -> bytes:
        """Return the next packet's signature."""
        if self._key is None:
            return b""
        self._number += 1
        return mac(self._key, (_DOMAIN, self._direction, str(self._number)), parts)

    def open(self, packet: memoryview) -> memoryview:
        """Verify the next packet and return it without its signature.

        Raises:
            NetworkSecurityError: the signature is wrong.
        """
        if self._key is None:
            return packet
        tag, body = packet[:32], packet[32:]
        if not same(self.tag([body]), bytes(tag)):
            raise NetworkSecurityError("a packet's signature is wrong: it was changed on its way")
        return body


def channel_key(key: bytes | None, nonce: bytes) -> bytes | None:
    """Derive the key of a connection that both sides have contributed randomness to."""
    return None if key is None else mac(key, (_DOMAIN, "channel", nonce))


def _look_up(text: str, source: str) -> tuple[str, str]:
    if not text.startswith("env:"):
        return text, source
    name = text.removeprefix("env:")
    value = os.environ.get(name)
    if not value:
        raise ConfigurationError(f"{source} names the environment variable {name!r}, which is not set")
    return value, f"the environment variable {name}"


def _request_tag(secret: Secret, fields: Sequence[str], parts: Sequence[Buffer]) -> bytes:
    key = secret.derive("wove/1 network", "")
    return mac(key, (_DOMAIN, "request", *(f.encode("utf-8", "surrogateescape") for f in fields)), parts)


def _answer_key(secret: Secret, signature: bytes) -> bytes:
    return mac(secret.derive("wove/1 network", ""), (_DOMAIN, "answer", signature))


def _parts(body: Buffer | Sequence[Buffer]) -> Sequence[Buffer]:
    if isinstance(body, (list, tuple)):
        return body
    return [cast("Buffer", body)]  # bytes are a sequence as well, which tells types nothing


def _lower(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, str]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    # gRPC metadata may hold bytes, which none of ours does.
    return {name.lower(): value for name, value in pairs if isinstance(value, str)}
