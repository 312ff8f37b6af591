"""The shared secrets, and where they come from: the setting, the environment, a file, the user's cookie."""

from __future__ import annotations

import hmac
import logging
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wove.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("wove.security")

#: Shortest secret, in bytes, that is accepted, and that is accepted without a warning.
MIN_SECRET = 16
GOOD_SECRET = 32
#: Largest file, in bytes, that is read for secrets.
MAX_FILE = 64 * 1024

# No pattern: a forking worker would compile it for each job.
_KEY_ID = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_HASH_SIZE = 32


class Secret:
    """One shared secret with the id that peers name it by. Never shows its value."""

    __slots__ = ("_value", "kid")

    def __init__(self, value: bytes, kid: str | None = None) -> None:
        if len(value) < MIN_SECRET:
            raise ConfigurationError(
                f"a secret needs at least {MIN_SECRET} bytes and this one has {len(value)}; make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        if kid is not None and not (0 < len(kid) <= 32 and _KEY_ID.issuperset(kid)):
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
    extracted = hmac.digest(salt or bytes(_HASH_SIZE), secret, "sha256")
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
        """Read ``secret`` or ``kid:secret``, several separated by commas or line ends.

        Raises:
            ConfigurationError: no secret, or one that is too short; never shows its value.
        """
        entries: list[Secret] = []
        problem = ""
        for item in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
            kid, colon, value = item.partition(":")
            raw = (value if colon else item).encode("utf-8", "surrogateescape")
            try:
                entries.append(Secret(raw, kid if colon else None))
            except ConfigurationError as exc:
                problem = str(exc)
                break
            if len(raw) < GOOD_SECRET:
                logger.warning(
                    "%s: a secret of %d bytes is short, %d are safe whoever tries to guess it; make one with: "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'",
                    source, len(raw), GOOD_SECRET,
                )  # fmt: skip
        if problem:
            # Reporters of errors show local variables, of this frame too; and no error of another hangs on this one.
            text = item = kid = value = ""
            raw = b""
            raise ConfigurationError(f"{source}: {problem}")
        return cls(entries, source)


def find_secrets(configured: object = None) -> SecretRing:
    """Return the secrets of ``executor_config["security"]``, the environment or the cookie.

    Args:
        configured: the ``security`` setting: a string, or None for ``WOVE_SECRET``, else ``WOVE_SECRET_FILE``,
            else the user's cookie.

    Raises:
        ConfigurationError: an unusable setting; the message names where it came from.
    """
    if configured is not None:
        if not isinstance(configured, str):
            raise ConfigurationError(
                f'executor_config["security"] is a string, not {type(configured).__name__}'
            )
        return SecretRing.parse(configured, 'executor_config["security"]')
    # Not in a local variable, which reporters of errors show.
    path = os.environ.get("WOVE_SECRET_FILE")
    if "WOVE_SECRET" in os.environ and path is not None:
        raise ConfigurationError(
            "WOVE_SECRET and WOVE_SECRET_FILE are both set, and only one of them can be meant: unset the other"
        )
    if "WOVE_SECRET" in os.environ:
        return SecretRing.parse(os.environ["WOVE_SECRET"], "WOVE_SECRET")
    if path is not None:
        return _read_file(Path(path))
    return _parse_cookie(cookie_path())


_rings: dict[tuple[object, ...], SecretRing] = {}


def current_secrets() -> SecretRing:
    """Return the secrets of the environment as they are at this moment, from memory where nothing has changed.

    A worker asks for every payload: what changes in ``WOVE_SECRET_FILE`` is in force at once, without a restart.
    Files are not opened again until they look different.

    Raises:
        ConfigurationError: see :func:`find_secrets`.
    """
    path = os.environ.get("WOVE_SECRET_FILE")
    state: object = None
    if path is not None:
        try:
            info = os.stat(path)
            state = (info.st_ino, info.st_mtime_ns, info.st_size, info.st_mode)
        except OSError:
            state = None  # said below, when it is read
    key = (
        os.environ.get("WOVE_SECRET"),
        path,
        state,
        os.environ.get("XDG_CONFIG_HOME"),
        os.environ.get("HOME"),
    )
    ring = _rings.get(key)
    if ring is None:
        try:
            ring = find_secrets()
        except ConfigurationError as exc:
            # A file that is being written must not fail the tasks of that moment.
            ring = next((known for seen, known in reversed(_rings.items()) if path and seen[1] == path), None)
            if ring is None:
                raise
            logger.error("%s; the secrets that it held before stay in force", exc)
        if len(_rings) > 8:
            _rings.pop(next(iter(_rings)))
        _rings[key] = ring
    return ring


def _read_file(path: Path) -> SecretRing:
    source = f"WOVE_SECRET_FILE {path}"
    try:
        # Looked at through the descriptor that is read: it is the same file.
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if stat.S_ISREG(info.st_mode) and info.st_mode & 0o037:
                raise ConfigurationError(f"{source} can be read or changed by others: chmod 600 {path}")
            data = file.read(MAX_FILE + 1)
    except OSError as exc:
        raise ConfigurationError(
            f"{source} cannot be read ({exc.strerror}): name a file with the secret that this process's user can read"
        ) from None
    if len(data) > MAX_FILE:
        raise ConfigurationError(f"{source} is no file of secrets: it has more than {MAX_FILE} bytes")
    try:
        return SecretRing.parse(_uncommented(data), source)
    finally:
        data = b""  # see above


def _uncommented(data: bytes) -> str:
    lines = data.decode("utf-8", "surrogateescape").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


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
        return SecretRing.parse(path.read_bytes().decode("ascii").strip(), source)
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
    import secrets

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
