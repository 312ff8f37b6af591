"""Where secrets come from: files that are read again when they change, and nothing half configured."""

from __future__ import annotations

import logging
import os
import secrets
from typing import TYPE_CHECKING

import pytest

from wove.errors import ConfigurationError
from wove.exposure import check_listener
from wove.keyring import SecretRing, current_secrets, find_secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONE, TWO = "one-secret-of-thirty-two-characters", "two-secret-of-thirty-two-characters"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write WOVE_SECRET_FILE, whole at once as a careful administrator does."""
    path = tmp_path / "secret"
    monkeypatch.delenv("WOVE_SECRET", raising=False)
    monkeypatch.setenv("WOVE_SECRET_FILE", str(path))

    def write(text: str, mode: int = 0o600) -> Path:
        draft = tmp_path / "draft"
        draft.write_text(text)
        draft.chmod(mode)
        draft.replace(path)
        return path

    return write


class TestSecretFile:
    """WOVE_SECRET_FILE."""

    @pytest.mark.parametrize(
        "text", [f"a:{ONE}\nb:{TWO}\n", f"a:{ONE},b:{TWO}", f"# old\r\na:{ONE}\r\n\r\nb:{TWO}"]
    )
    def test_several_secrets(self, write: Callable[..., Path], text: str) -> None:
        path = write(text)
        ring = find_secrets()
        assert ring.primary.kid == "a"
        assert sorted(ring.kids) == ["a", "b"]
        assert str(path) in ring.source

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o666, 0o620, 0o601])
    def test_one_that_others_can_read_or_change_is_refused(
        self, write: Callable[..., Path], mode: int
    ) -> None:
        path = write(ONE, mode)
        with pytest.raises(ConfigurationError, match=f"can be read or changed by others: chmod 600 {path}"):
            find_secrets()

    @pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
    def test_its_group_may_read_it(self, write: Callable[..., Path], mode: int) -> None:
        write(ONE, mode)
        assert find_secrets().primary

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "holds no secret"),
            ("# none\n", "holds no secret"),
            ("short", "at least 16 bytes"),
            ("x" * 70_000, "no file of secrets"),
        ],
    )
    def test_an_unusable_one_is_refused_and_not_shown(
        self, write: Callable[..., Path], text: str, message: str
    ) -> None:
        write(text)
        with pytest.raises(ConfigurationError, match=message) as caught:
            find_secrets()
        assert not text.strip() or text not in str(caught.value)

    def test_a_missing_one_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WOVE_SECRET")
        for path in (tmp_path / "nowhere", tmp_path):
            monkeypatch.setenv("WOVE_SECRET_FILE", str(path))
            with pytest.raises(ConfigurationError, match="cannot be read"):
                find_secrets()

    def test_both_settings_are_refused(
        self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(ONE)
        monkeypatch.setenv("WOVE_SECRET", TWO)
        with pytest.raises(ConfigurationError, match="both set"):
            find_secrets()

    def test_a_change_is_in_force_at_once(self, write: Callable[..., Path]) -> None:
        write(f"a:{ONE}")
        first = current_secrets()
        assert current_secrets() is first
        write(f"a:{ONE}\nb:{TWO}")
        assert sorted(current_secrets().kids) == ["a", "b"]
        write(f"b:{TWO}")
        assert current_secrets().kids == ["b"]

    def test_a_broken_change_leaves_the_old_ones_in_force(
        self, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(f"a:{ONE}")
        assert current_secrets().kids == ["a"]
        write("shor")
        for _ in range(3):
            assert current_secrets().kids == ["a"]
        assert caplog.text.count("stay in force") == 1
        os.unlink(path)
        assert current_secrets().kids == ["a"]
        write(f"b:{TWO}")
        assert current_secrets().kids == ["b"]

    def test_a_broken_one_from_the_start_is_an_error(self, write: Callable[..., Path]) -> None:
        write("shor")
        with pytest.raises(ConfigurationError, match="at least 16"):
            current_secrets()

    def test_other_hosts_may_have_it(self, write: Callable[..., Path]) -> None:
        write(ONE)
        check_listener("0.0.0.0", find_secrets(), {})


def test_a_short_secret_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    value = secrets.token_hex(10)
    SecretRing.parse(value, "WOVE_SECRET")
    assert "WOVE_SECRET: a secret of 20 bytes is short" in caplog.text
    assert value not in caplog.text
    caplog.clear()
    SecretRing.parse(secrets.token_urlsafe(32), "WOVE_SECRET")
    assert caplog.records == []
    assert logging.getLogger("wove.security").name


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111"])
def test_a_public_address_is_not_listened_on_without_tls(host: str) -> None:
    ring = SecretRing.parse(ONE, "a test")
    with pytest.raises(ConfigurationError, match=r'without TLS: set executor_config\["callback_tls"\]'):
        check_listener(host, ring, {})
    check_listener(host, ring, {"callback_tls": {}})
    check_listener(host, ring, {"insecure": True})
    for private in ("10.0.0.1", "0.0.0.0", "a.name"):
        check_listener(private, ring, {})
