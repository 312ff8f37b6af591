"""Secrets, keys and signatures: nothing is decoded that is not signed."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import secrets
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import msgpack
import pytest
from wove_tests.recorder import record_calls

from wove.backend import build_payload
from wove.errors import ConfigurationError, PayloadRejectedError
from wove.exposure import check_listener, check_plain_http
from wove.security import (
    Secret,
    SecretRing,
    beat_tag,
    cancel_tag,
    cookie_path,
    event_tag,
    fetch_tag,
    find_secrets,
    is_cookie,
    mac,
    open_payload,
    reply_tag,
    run_key,
    same,
    scrub,
    seal_payload,
    webhook_token,
)
from wove.worker.assignment import Assignment

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW, OTHER = "old-secret-of-16+", "new-secret-of-16+", "other-secret-of-16+"
MESSAGE = [b"the ", bytearray(b"message")]


def ring(*values: str) -> SecretRing:
    """Make a ring of secrets."""
    return SecretRing.parse(",".join(values), "a test")


class TestSecret:
    """A secret is long enough, and never shows itself."""

    @pytest.mark.parametrize("value", ["", "x", "x" * 15])
    def test_a_short_secret_is_refused_with_the_command_that_makes_one(self, value: str) -> None:
        with pytest.raises(ConfigurationError, match=r"at least 16 bytes .*secrets\.token_urlsafe") as caught:
            Secret(value.encode())
        assert f"has {len(value)}" in str(caught.value)

    def test_sixteen_bytes_are_enough(self) -> None:
        assert Secret(b"x" * 16).kid

    def test_no_text_of_it_shows_the_value(self) -> None:
        value = secrets.token_hex(16)
        secret = Secret(value.encode())
        held = SecretRing([secret], "a test")
        for text in (
            repr(secret),
            str(secret),
            f"{secret}",
            repr(held),
            str(held),
            repr([secret]),
            secret.kid,
        ):
            assert value not in text
            assert value[:8] not in text
        assert not hasattr(secret, "__dict__")

    def test_the_message_about_a_short_secret_does_not_show_it(self) -> None:
        for read in (lambda: Secret(b"hunter2"), lambda: ring("hunter2"), lambda: ring(NEW, "kid:hunter2")):
            with pytest.raises(ConfigurationError) as caught:
                read()
            assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("dump", [pickle.dumps, cloudpickle.dumps, copy.copy, copy.deepcopy])
    def test_it_is_neither_pickled_nor_copied(self, dump: Callable[[Any], Any]) -> None:
        with pytest.raises(TypeError, match="a Secret is never pickled"):
            dump(Secret(b"x" * 16))

    def test_a_ring_is_not_pickled_either(self) -> None:
        with pytest.raises(TypeError, match="a Secret is never pickled"):
            pickle.dumps(ring(NEW))

    def test_keys_are_derived_by_hkdf_sha256(self) -> None:
        # RFC 5869, test case 3: no salt, no info.
        key = Secret(b"\x0b" * 22).derive("", "")
        assert key.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"

    def test_every_purpose_environment_and_secret_has_a_key_of_its_own(self) -> None:
        keys = {
            Secret(value.encode()).derive(info, environment)
            for value in (OLD, NEW)
            for info in ("wove/1 payload", "wove/1 event")
            for environment in ("", "reports", "mail")
        }
        assert len(keys) == 12


class TestRing:
    """Several secrets: the first signs, all verify."""

    def test_secrets_and_ids_are_read(self) -> None:
        held = SecretRing.parse(f" 2026:{NEW} , {OLD},", "a test")
        assert held.primary.kid == "2026"
        assert held.get("2026") is held.primary
        assert held.get(Secret(OLD.encode()).kid) is not None
        assert held.get("2025") is None

    def test_an_id_of_its_own_is_stable_and_differs_by_secret(self) -> None:
        assert ring(OLD).primary.kid == ring(OLD).primary.kid != ring(NEW).primary.kid

    @pytest.mark.parametrize("text", ["", " , ,"])
    def test_an_empty_setting_is_refused_by_its_name(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^WOVE_SECRET holds no secret"):
            SecretRing.parse(text, "WOVE_SECRET")

    def test_a_short_one_among_several_is_refused_by_the_name_of_the_setting(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^WOVE_SECRET: a secret needs at least 16 bytes"):
            SecretRing.parse(f"{NEW},short", "WOVE_SECRET")

    def test_of_two_secrets_with_one_id_the_first_is_meant(self) -> None:
        held = SecretRing.parse(f"k:{NEW},k:{OLD}", "a test")
        assert held.get("k") is held.primary

    @pytest.mark.parametrize("kid", ["k" * 33, "", "a b", "ä", "a/b"])
    def test_what_is_no_id_is_refused_and_not_shown(self, kid: str) -> None:
        # A secret with a colon in it is easily taken for an id and a secret, and ids are sent in clear.
        with pytest.raises(
            ConfigurationError, match="WOVE_SECRET: a secret's key id, before its colon"
        ) as caught:
            SecretRing.parse(f"{kid}:{NEW}", "WOVE_SECRET")
        assert not kid or f"{kid}:" not in str(caught.value)

    def test_the_ids_are_listed(self) -> None:
        assert sorted(SecretRing.parse(f"b:{NEW},a:{OLD}", "a test").kids) == ["a", "b"]


class TestPayloads:
    """Submitter to worker, through a broker that anyone may write to."""

    def test_what_was_sealed_is_opened(self) -> None:
        name, secret, message = open_payload(ring(NEW), seal_payload(ring(NEW), "räports", MESSAGE))
        assert (name, secret.kid, bytes(message)) == ("räports", ring(NEW).primary.kid, b"the message")

    def test_the_secret_is_not_in_it(self) -> None:
        assert NEW.encode() not in seal_payload(ring(NEW), "reports", MESSAGE)

    def test_rotation(self) -> None:
        before, during, after = ring(OLD), ring(NEW, OLD), ring(NEW)
        # Both rings are in force while the fleet is restarted, one worker after another.
        for submitter, worker in (
            (before, during),
            (during, during),
            (during, after),
            (ring(OLD, NEW), before),
        ):
            assert (
                bytes(open_payload(worker, seal_payload(submitter, "reports", MESSAGE))[2]) == b"the message"
            )
        with pytest.raises(PayloadRejectedError):
            open_payload(after, seal_payload(before, "reports", MESSAGE))

    def test_another_secret_is_refused_and_the_mend_is_named(self) -> None:
        with pytest.raises(PayloadRejectedError, match=r"a test.*the same WOVE_SECRET"):
            open_payload(ring(NEW), seal_payload(ring(OTHER), "reports", MESSAGE))

    def test_another_secret_under_the_same_id_is_refused(self) -> None:
        with pytest.raises(PayloadRejectedError, match="signature is wrong"):
            open_payload(ring(f"k:{NEW}"), seal_payload(ring(f"k:{OTHER}"), "reports", MESSAGE))

    def test_every_flipped_bit_is_noticed(self) -> None:
        held, payload = ring(NEW), seal_payload(ring(NEW), "reports", MESSAGE)
        for position in range(len(payload)):
            for bit in range(8):
                changed = bytearray(payload)
                changed[position] ^= 1 << bit
                with pytest.raises(PayloadRejectedError):
                    open_payload(held, bytes(changed))

    def test_every_cut_and_every_addition_is_noticed(self) -> None:
        held, payload = ring(NEW), seal_payload(ring(NEW), "reports", MESSAGE)
        for length in range(len(payload)):
            with pytest.raises(PayloadRejectedError):
                open_payload(held, payload[:length])
        with pytest.raises(PayloadRejectedError):
            open_payload(held, payload + b"\x00")

    def test_a_signature_does_not_serve_another_environment(self) -> None:
        payload = seal_payload(ring(NEW), "reports", MESSAGE)
        with pytest.raises(PayloadRejectedError):
            open_payload(ring(NEW), payload.replace(b"reports", b"repairs"))

    @pytest.mark.parametrize("payload", [b"", b"WOVE", b"WOVE\x02" + bytes(100), b"\x80\x04}.", bytes(1000)])
    def test_what_is_no_payload_is_refused(self, payload: bytes) -> None:
        with pytest.raises(PayloadRejectedError):
            open_payload(ring(NEW), payload)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is decoded."""
    return record_calls(monkeypatch, (msgpack, "unpackb"), (pickle, "loads"))


class TestWorkerSide:
    """A worker verifies before it decodes."""

    @pytest.fixture
    def payload(self) -> bytes:
        """A payload that this process's workers accept."""
        frame = {"run_id": "a" * 32, "task_id": "task", "callable": len, "args": {}, "positional": ((1, 2),)}
        built = build_payload(
            frame, environment="reports", ring=find_secrets(), callback_url="http://127.0.0.1:1"
        )
        return built.blob

    def test_an_intact_payload_is_decoded(self, payload: bytes, decoders: list[str]) -> None:
        assignment = Assignment(payload)
        assert (assignment.run_id, assignment.environment) == ("a" * 32, "reports")
        assert decoders == ["unpackb"]
        assert assignment.load() == (len, ((1, 2),), {})

    def test_nothing_of_a_changed_payload_is_decoded(self, payload: bytes, decoders: list[str]) -> None:
        for position in range(len(payload)):
            changed = bytearray(payload)
            changed[position] ^= 1 << (position % 8)
            for form in (bytes(changed), base64.b64encode(changed).decode()):
                with pytest.raises(PayloadRejectedError):
                    Assignment(form)
        assert decoders == []

    @pytest.mark.parametrize(
        "payload", [b"", "", "no base64!", "ä", None, 5, {"payload": b""}, b"\x80\x04K\x01."]
    )
    def test_nothing_of_anything_else_is_decoded(self, payload: Any, decoders: list[str]) -> None:
        with pytest.raises(PayloadRejectedError):
            Assignment(payload)
        assert decoders == []


class TestEvents:
    """Worker to submitter, over HTTP."""

    KEY = run_key(ring(NEW).primary, "reports", "a" * 32, b"n" * 16)

    def test_every_run_has_a_key_of_its_own(self) -> None:
        keys = {
            run_key(ring(secret).primary, environment, run_id, nonce)
            for secret in (OLD, NEW)
            for environment in ("reports", "mail")
            for run_id in ("a" * 32, "b" * 32)
            for nonce in (b"n" * 16, b"m" * 16)
        }
        assert len(keys) == 16

    def test_a_signature_serves_one_purpose_only(self) -> None:
        tags = {
            event_tag(self.KEY, "a", "b", True, []),
            event_tag(self.KEY, "a", "b", False, []),
            reply_tag(self.KEY, b"a", b"b"),
            beat_tag(self.KEY, "a", "b", 1, 1),
            cancel_tag(self.KEY, "a", "b", 1),
            fetch_tag(self.KEY, "a"),
            bytes.fromhex(webhook_token(self.KEY, "a")),
        }
        assert len(tags) == 7

    def test_everything_that_is_said_is_signed(self) -> None:
        body = [b"body"]
        tags = {
            event_tag(self.KEY, "a", "b", True, body),
            event_tag(self.KEY, "x", "b", True, body),
            event_tag(self.KEY, "a", "x", True, body),
            event_tag(self.KEY, "a", "b", True, [b"bodx"]),
            event_tag(b"k" * 32, "a", "b", True, body),
            beat_tag(self.KEY, "a", "b", 1, 1),
            beat_tag(self.KEY, "a", "b", 1, 2),
            beat_tag(self.KEY, "a", "b", 2, 1),
            beat_tag(self.KEY, "a", "x", 1, 1),
            reply_tag(self.KEY, b"request", b"ok"),
            reply_tag(self.KEY, b"another", b"ok"),
            reply_tag(self.KEY, b"request", b"no"),
        }
        assert len(tags) == 12

    def test_fields_do_not_run_into_each_other(self) -> None:
        assert mac(self.KEY, ["ab", "c"]) != mac(self.KEY, ["a", "bc"])
        assert mac(self.KEY, ["ab"]) != mac(self.KEY, ["a", "b"])
        assert mac(self.KEY, ["a"], [b"b"]) != mac(self.KEY, ["a", "b"])

    def test_how_the_body_is_split_into_buffers_does_not_matter(self) -> None:
        parts = [b"a", bytearray(b"bc"), memoryview(b"d")]
        assert mac(self.KEY, ["f"], parts) == mac(self.KEY, ["f"], [b"abcd"])

    def test_signatures_are_compared_whole(self) -> None:
        tag = mac(self.KEY, ["f"])
        assert same(tag, bytes(tag))
        assert not same(tag, tag[:-1])
        assert not same(tag, b"")


@pytest.fixture
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder without a cookie, for a user without a secret."""
    monkeypatch.delenv("WOVE_SECRET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


class TestCookie:
    """One user's processes on one machine need no setting."""

    def test_it_is_made_on_first_use_and_kept(self, config_home: Path) -> None:
        held = find_secrets()
        assert is_cookie(held)
        assert str(cookie_path()) in held.source
        assert find_secrets().primary.kid == held.primary.kid
        assert cookie_path() == config_home / "wove" / "cookie"

    def test_nobody_else_can_read_it_whatever_the_umask(self, config_home: Path) -> None:
        umask = os.umask(0)
        try:
            find_secrets()
        finally:
            os.umask(umask)
        assert stat.S_IMODE(cookie_path().stat().st_mode) == 0o600
        assert stat.S_IMODE(cookie_path().parent.stat().st_mode) == 0o700

    def test_many_first_users_agree_on_one(self, config_home: Path) -> None:
        crowd = 12
        start = threading.Barrier(crowd)
        found: list[Any] = []

        def first_use() -> None:
            start.wait(20)
            try:
                found.append(find_secrets().primary.kid)
            except BaseException as exc:
                found.append(exc)

        threads = [threading.Thread(target=first_use) for _ in range(crowd)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == [find_secrets().primary.kid] * crowd
        assert os.listdir(config_home / "wove") == ["cookie"]

    def test_it_is_never_seen_half_written(self, config_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[SecretRing] = []
        write = os.write

        def slow_write(handle: int, data: bytes) -> int:
            count = write(handle, data[:5])
            monkeypatch.setattr(os, "write", write)
            seen.append(find_secrets())  # another process, meanwhile
            return count + write(handle, data[5:])

        monkeypatch.setattr(os, "write", slow_write)
        assert find_secrets().primary.kid == seen[0].primary.kid
        assert os.listdir(config_home / "wove") == ["cookie"]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
    def test_it_is_refused_when_others_can_get_at_it(self, config_home: Path, mode: int) -> None:
        find_secrets()
        cookie_path().chmod(mode)
        with pytest.raises(ConfigurationError, match=f"chmod 600 {cookie_path()}, or set WOVE_SECRET"):
            find_secrets()

    def test_it_is_refused_when_it_is_somebody_elses(
        self, config_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find_secrets()
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        with pytest.raises(ConfigurationError, match="set WOVE_SECRET"):
            find_secrets()

    @pytest.mark.parametrize("content", [b"", b"short", "sécret-of-16-bytes".encode()])
    def test_it_is_refused_when_its_content_is_unusable(self, config_home: Path, content: bytes) -> None:
        cookie_path().parent.mkdir(parents=True)
        cookie_path().write_bytes(content)
        cookie_path().chmod(0o600)
        with pytest.raises(ConfigurationError, match="cookie"):
            find_secrets()

    def test_a_folder_that_cannot_be_written_is_named_together_with_the_mend(self, config_home: Path) -> None:
        config_home.write_text("a file where a folder should be")
        with pytest.raises(ConfigurationError, match=f"{cookie_path()} cannot be used .*set WOVE_SECRET"):
            find_secrets()

    def test_a_user_without_a_home_is_told_what_to_set(
        self, config_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(ConfigurationError, match=r"no home directory .*set WOVE_SECRET"):
            find_secrets()

    def test_without_a_configuration_folder_it_lies_in_the_home(
        self, config_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setenv("HOME", "/home/someone")
        assert cookie_path() == Path("/home/someone/.config/wove/cookie")


class TestFindSecrets:
    """The setting, then the variable, then the cookie."""

    def test_the_setting_goes_before_the_variable(
        self, config_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_SECRET", OLD)
        assert find_secrets(NEW).primary.kid == ring(NEW).primary.kid
        assert find_secrets().primary.kid == ring(OLD).primary.kid
        assert not is_cookie(find_secrets())
        assert not config_home.exists()

    def test_an_empty_variable_is_an_error_and_no_cookie(
        self, config_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_SECRET", "")
        with pytest.raises(ConfigurationError, match="WOVE_SECRET holds no secret"):
            find_secrets()

    @pytest.mark.parametrize("setting", [b"bytes-of-16-bytes", 5, ["list"], True])
    def test_a_setting_that_is_no_text_is_refused(self, setting: object) -> None:
        with pytest.raises(ConfigurationError, match=r'executor_config\["security"\] is a string, not'):
            find_secrets(setting)


class TestListener:
    """Other hosts have no cookie."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
    def test_the_cookie_is_enough_on_this_machine(self, config_home: Path, host: str) -> None:
        check_listener(host, find_secrets())

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.com", ""])
    def test_an_address_that_others_reach_needs_a_secret(self, config_home: Path, host: str) -> None:
        with pytest.raises(ConfigurationError, match=r'set WOVE_SECRET \(or executor_config\["security"\]\)'):
            check_listener(host, find_secrets())
        check_listener(host, ring(NEW))


class TestPlainHttp:
    """Outcomes do not cross the internet unencrypted by accident."""

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:8000",
            "http://localhost:8000",
            "http://[::1]:8000",
            "http://10.1.2.3:8000",
            "http://192.168.0.9",
            "http://[fd00::1]:8000",
            "https://8.8.8.8",
            "https://example.com/wove",
        ],
    )
    def test_private_addresses_and_https_need_nothing(self, url: str) -> None:
        check_plain_http(url, {})

    @pytest.mark.parametrize("url", ["http://8.8.8.8:8000", "http://[2606:4700::1111]:8000/wove"])
    def test_plain_http_to_a_public_address_is_refused_unless_it_is_wanted(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match=r'use an https:// URL .* or set "insecure": True'):
            check_plain_http(url, {})
        check_plain_http(url, {"insecure": True})

    def test_a_name_is_what_it_resolves_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        addresses = {"inside": ["10.0.0.1"], "outside": ["10.0.0.1", "8.8.8.8"]}

        def resolve(host: str, port: object) -> list[Any]:
            if host not in addresses:
                raise OSError("unknown name")
            return [(2, 1, 6, "", (address, 0)) for address in addresses[host]]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        check_plain_http("http://inside:8000", {})
        check_plain_http("http://known-to-the-workers-only:8000", {})
        with pytest.raises(ConfigurationError, match=r"public address 8\.8\.8\.8"):
            check_plain_http("http://outside:8000", {})

    @pytest.mark.parametrize("value", ["yes", 1, None])
    def test_an_unusable_setting_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=r'executor_config\["insecure"\] is True or False; got'):
            check_plain_http("https://example.com", {"insecure": value})


class TestScrub:
    """Error texts of brokers hold URLs, and URLs hold passwords."""

    @pytest.mark.parametrize(
        ("text", "scrubbed"),
        [
            ("nothing to hide", "nothing to hide"),
            ("redis://host:6379/0", "redis://host:6379/0"),
            ("redis://:pw@host/0", "redis://***@host/0"),
            ("cannot reach amqp://user:p@ss@host//vhost now", "cannot reach amqp://***@host//vhost now"),
            ("redis://a:b@one/0 or redis://c:d@two/1", "redis://***@one/0 or redis://***@two/1"),
            ("http://host/path@here", "http://host/path@here"),
        ],
    )
    def test_user_information_is_taken_out_of_urls(self, text: str, scrubbed: str) -> None:
        assert scrub(text) == scrubbed
