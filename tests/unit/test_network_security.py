"""Requests, answers and connections are known to be the other side's, and are taken once."""

from __future__ import annotations

import copy
import logging
import pickle
import time
from typing import TYPE_CHECKING, Any

import pytest

import wove.network_security as module
import wove.security
from wove.errors import ConfigurationError
from wove.network_security import (
    NetworkExecutorSecurity,
    NetworkSecurityError,
    Seal,
    channel_key,
)
from wove.nonces import AHEAD_MS, MAX_AGE_MS, NonceStore
from wove.security import find_secrets

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "a-secret-of-more-than-16-bytes"
OTHER = "another-secret-of-enough-bytes"
REQUEST: dict[str, Any] = {"method": "POST", "host": "workers:8300", "target": "/send?x=1", "body": b"body"}


class Clock:
    """Stands for ``time.time``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(module.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that moves by hand."""
    return Clock(monkeypatch)


def pair(clock: Clock, config: Any = SECRET, other: Any = None) -> tuple[Any, Any]:
    """A client, and a service that has run for a minute."""
    service = NetworkExecutorSecurity.from_config(config)
    clock.now += 60
    return NetworkExecutorSecurity.from_config(other or config), service


class TestConfig:
    """The forms that the setting may have."""

    def test_it_is_known_by_the_name_of_the_security_module(self) -> None:
        assert wove.security.NetworkExecutorSecurity is NetworkExecutorSecurity
        with pytest.raises(AttributeError):
            _ = wove.security.no_such_name

    @pytest.mark.parametrize(
        ("config", "mode"),
        [
            ("none", "none"),
            (SECRET, "signed"),
            ("env:THE_SECRET", "signed"),
            ({"mode": "none"}, "none"),
            ({"type": "none"}, "none"),
            ({"secret": SECRET}, "signed"),
            ({"mode": "signed", "secret": "env:THE_SECRET"}, "signed"),
            ({"mode": "signed"}, "signed"),
            ({"mode": "bearer", "token": "t" * 32}, "bearer"),
            ({"mode": "bearer", "token": "env:THE_SECRET"}, "bearer"),
            (None, "signed"),
        ],
    )
    def test_forms(self, config: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("THE_SECRET", SECRET)
        assert NetworkExecutorSecurity.from_config(config).mode == mode

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (7, 'is "none", "env:VARIABLE", a secret or a mapping; got int'),
            ("short", "needs at least 16 bytes"),
            ("", "holds no secret"),
            ("env:NOT_SET", "environment variable 'NOT_SET', which is not set"),
            ({"mode": "magic"}, "a mode is one of none, signed, bearer; got 'magic'"),
            ({"mode": ["signed"]}, "a mode is one of"),
            ({"mode": "bearer"}, 'mode "bearer" needs a token'),
            ({"mode": "bearer", "token": "short"}, "at least 16 ASCII characters"),
            ({"mode": "bearer", "token": "with a space in it, though long"}, "no spaces"),
            ({"mode": "bearer", "token": ","}, "needs a token"),
            ({"mode": "signed", "secret": 12345678901234567890}, "which is a string"),
            ({"mode": "signed", "secert": SECRET}, "unknown key 'secert'; did you mean 'secret'"),
        ],
    )
    def test_bad_ones_say_what_is_wrong(self, config: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as caught:
            NetworkExecutorSecurity.from_config(config)
        assert 'executor_config["security"]' in str(caught.value)

    def test_the_cookie_is_not_shared_and_a_secret_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert NetworkExecutorSecurity.from_config(SECRET).is_shared
        assert NetworkExecutorSecurity.from_config(None).is_shared  # WOVE_SECRET, in these tests
        monkeypatch.delenv("WOVE_SECRET")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert find_secrets().source.startswith("the cookie file")
        assert not NetworkExecutorSecurity.from_config(None).is_shared
        assert not NetworkExecutorSecurity.from_config("none").is_shared

    def test_nothing_shows_a_secret(self, caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
        caplog.set_level(logging.DEBUG)
        token = "bearer-token-0123456789"
        for config in (SECRET, {"mode": "bearer", "token": token}):
            security = NetworkExecutorSecurity.from_config(config)
            for text in (repr(security), str(security), f"{security}", caplog.text):
                assert SECRET not in text
                assert token not in text
            with pytest.raises(TypeError):
                pickle.dumps(security)
            with pytest.raises(TypeError):
                copy.deepcopy(security)


class TestSigned:
    """Method, host, target, key id, timestamp, nonce and body are all covered."""

    def test_a_good_request_passes_and_both_sides_know_the_answers_key(self, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**REQUEST)
        verified = service.verify_headers(headers, **REQUEST)
        assert verified.key == client.answer_key(headers)
        assert len(verified.key) == 32

    def test_a_body_in_parts_is_the_same_body(self, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**{**REQUEST, "body": [b"bo", memoryview(b"dy")]})
        service.verify_headers(headers, **REQUEST)

    def test_header_names_in_any_case_and_metadata(self, clock: Clock) -> None:
        client, service = pair(clock)
        headers = {name.upper(): value for name, value in client.headers_for(**REQUEST).items()}
        service.verify_headers(headers, **REQUEST)
        call = {"host": "workers:1", "target": "/a.B/C", "body": b"x"}
        metadata = client.metadata_for(**call)
        assert all(name == name.lower() for name, _ in metadata)
        service.verify_metadata(metadata, **call)

    @pytest.mark.parametrize("field", ["method", "host", "target", "body"])
    def test_any_other_request_is_refused(self, field: str, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**REQUEST)
        changed = {**REQUEST, field: REQUEST[field] + REQUEST[field][:1]}
        with pytest.raises(NetworkSecurityError, match="signature is wrong"):
            service.verify_headers(headers, **changed)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("Wove-Signature", "0" * 64),
            ("Wove-Signature", "\N{SNOWMAN}" * 64),
            ("Wove-Signature", "\udcff" * 64),
            ("Wove-Nonce", "0" * 32),
            ("Wove-Nonce", "not hexadecimal at all"),
            ("Wove-Nonce", ""),
            ("Wove-Timestamp", "nan"),
            ("Wove-Timestamp", "-1"),
            ("Wove-Timestamp", "1e9"),
            ("Wove-Timestamp", "9" * 400),
            ("Wove-Timestamp", "\N{ARABIC-INDIC DIGIT ONE}"),
            ("Wove-Key", "unknown"),
            ("Wove-Key", "\N{SNOWMAN}"),
        ],
    )
    def test_any_other_header_is_refused(self, name: str, value: str, clock: Clock) -> None:
        client, service = pair(clock)
        headers = {**client.headers_for(**REQUEST), name: value}
        with pytest.raises(NetworkSecurityError):
            service.verify_headers(headers, **REQUEST)

    @pytest.mark.parametrize("name", ["Wove-Signature", "Wove-Nonce", "Wove-Timestamp", "Wove-Key"])
    def test_a_missing_header_is_refused(self, name: str, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**REQUEST)
        del headers[name]
        with pytest.raises(NetworkSecurityError, match=f"not signed: no {name.lower()}"):
            service.verify_headers(headers, **REQUEST)

    def test_another_secret_is_refused(self, clock: Clock) -> None:
        client, service = pair(clock, SECRET, OTHER)
        with pytest.raises(NetworkSecurityError, match="a secret that is not known here"):
            service.verify_headers(client.headers_for(**REQUEST), **REQUEST)
        client, service = pair(clock, f"same:{SECRET}", f"same:{OTHER}")
        with pytest.raises(NetworkSecurityError, match="signature is wrong"):
            service.verify_headers(client.headers_for(**REQUEST), **REQUEST)

    def test_secrets_are_rotated_without_a_gap(self, clock: Clock) -> None:
        both = NetworkExecutorSecurity.from_config(f"{SECRET},{OTHER}")
        clock.now += 60
        for old in (SECRET, OTHER):
            client = NetworkExecutorSecurity.from_config(old)
            both.verify_headers(client.headers_for(**REQUEST), **REQUEST)


class TestFreshness:
    """A request is taken once, and only for a while."""

    def test_a_replay_is_refused(self, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**REQUEST)
        service.verify_headers(headers, **REQUEST)
        with pytest.raises(NetworkSecurityError, match="seen before"):
            service.verify_headers(headers, **REQUEST)
        clock.now += MAX_AGE_MS / 1000 + 1
        with pytest.raises(NetworkSecurityError, match="behind"):
            service.verify_headers(headers, **REQUEST)

    def test_a_replay_is_refused_by_the_next_process(self, clock: Clock) -> None:
        client, service = pair(clock)
        clock.now += 100
        headers = client.headers_for(**REQUEST)
        service.verify_headers(headers, **REQUEST)
        again = NetworkExecutorSecurity.from_config(SECRET)
        for _ in range(5):
            with pytest.raises(NetworkSecurityError):
                again.verify_headers(headers, **REQUEST)
            clock.now += 1

    def test_also_one_whose_clock_was_ahead(self, clock: Clock) -> None:
        client, service = pair(clock)
        clock.now += AHEAD_MS / 1000
        headers = client.headers_for(**REQUEST)
        clock.now -= AHEAD_MS / 1000
        service.verify_headers(headers, **REQUEST)
        again = NetworkExecutorSecurity.from_config(SECRET)
        for _ in range(20):
            with pytest.raises(NetworkSecurityError):
                again.verify_headers(headers, **REQUEST)
            clock.now += 0.25

    @pytest.mark.parametrize("skew", [-3600.0, -301.0, 3.0, 3600.0])
    def test_another_clock_is_learnt_from_the_refusal(self, skew: float, clock: Clock) -> None:
        client, service = pair(clock)
        clock.now += skew
        headers = client.headers_for(**REQUEST)
        clock.now -= skew
        with pytest.raises(NetworkSecurityError, match=f"{abs(skew):.1f} s") as caught:
            service.verify_headers(headers, **REQUEST)
        clock.now += skew
        assert client.learn_clock(headers, caught.value.clock)
        headers = client.headers_for(**REQUEST)
        clock.now -= skew
        service.verify_headers(headers, **REQUEST)

    def test_a_service_that_has_just_started_is_understood_at_once(self, clock: Clock) -> None:
        client, _ = pair(clock)
        for moment in (0.0, 0.5, 1.0, 2.5):
            service = NetworkExecutorSecurity.from_config(SECRET)
            clock.now += moment
            headers = client.headers_for(**REQUEST)
            try:
                service.verify_headers(headers, **REQUEST)
            except NetworkSecurityError as exc:
                assert client.learn_clock(headers, exc.clock)
                clock.now += 0.01
                service.verify_headers(client.headers_for(**REQUEST), **REQUEST)

    def test_a_clock_that_is_not_the_services_is_not_believed(self, clock: Clock) -> None:
        client, service = pair(clock)
        headers = client.headers_for(**REQUEST)
        stranger = NetworkExecutorSecurity.from_config(OTHER)
        told = str(int(clock.now * 1000) + 10_000_000)
        for answer in (
            {},
            {"Wove-Clock": told},
            {"Wove-Clock": f"{told} {'0' * 64}"},
            {"Wove-Clock": f"{told} \N{SNOWMAN}"},
            {"Wove-Clock": "nan " + "0" * 64},
        ):
            assert not client.learn_clock(headers, answer)
        assert not stranger.learn_clock({**headers, "Wove-Signature": "x"}, {"Wove-Clock": f"{told} x"})
        service.verify_headers(client.headers_for(**REQUEST), **REQUEST)

    def test_the_store_stays_small_and_forgets_nothing_it_would_take_again(self, clock: Clock) -> None:
        store = NonceStore(capacity=1_000)
        clock.now += 60
        accepted: list[tuple[int, str]] = []
        for number in range(5_000):
            clock.now += 0.01
            stamp = int(clock.now * 1000)
            assert store.check(stamp, f"{number:032x}") == ""
            accepted.append((stamp, f"{number:032x}"))
            assert len(store) <= 1_000
        assert all(store.check(*seen) for seen in accepted)
        clock.now += MAX_AGE_MS / 1000 + 2
        assert store.check(int(clock.now * 1000), "f" * 32) == ""
        assert len(store) == 1

    def test_a_nonce_costs_the_same_however_many_there_are(self, clock: Clock) -> None:
        def cost(store: NonceStore, count: int) -> float:
            begun = time.perf_counter()
            for number in range(count):
                store.check(int(clock.now * 1000), f"{len(store)}-{number}")
            return (time.perf_counter() - begun) / count

        store = NonceStore()
        clock.now += 60
        few = min(cost(store, 1_000) for _ in range(3))
        cost(store, 50_000)
        many = min(cost(store, 1_000) for _ in range(3))
        assert many < 10 * few + 20e-6


class TestBearer:
    """A token, for services that stand behind something which speaks that."""

    def test_any_of_several_tokens(self, clock: Clock) -> None:
        service = NetworkExecutorSecurity.from_config({"mode": "bearer", "token": f"{SECRET},{OTHER}"})
        for token in (SECRET, OTHER):
            client = NetworkExecutorSecurity.from_config({"mode": "bearer", "token": token})
            headers = client.headers_for(**REQUEST)
            assert headers == {"Authorization": f"Bearer {token}"}
            assert service.verify_headers(headers, **REQUEST).key is None
            service.verify_metadata(client.metadata_for(host="h", target="/a.B/C"), host="h", target="/a.B/C")

    @pytest.mark.parametrize(
        "value", ["", "Bearer", f"Basic {SECRET}", "Bearer wrong", "Bearer \N{SNOWMAN}", f"Bearer {SECRET}x"]
    )
    def test_anything_else_is_refused(self, value: str) -> None:
        service = NetworkExecutorSecurity.from_config({"mode": "bearer", "token": SECRET})
        with pytest.raises(NetworkSecurityError, match="missing or wrong"):
            service.verify_headers({"Authorization": value}, **REQUEST)
        with pytest.raises(NetworkSecurityError):
            service.verify_headers({}, **REQUEST)

    def test_refusals_are_permission_errors(self) -> None:
        assert issubclass(NetworkSecurityError, PermissionError)
        assert str(NetworkSecurityError("why")) == "why"


class TestNone:
    """No credentials at all."""

    def test_everything_passes(self) -> None:
        security = NetworkExecutorSecurity.from_config("none")
        assert security.headers_for(**REQUEST) == {}
        assert security.verify_headers({}, **REQUEST).key is None
        assert not security.signs_answers


class TestSeal:
    """Packets of an answer come whole, unchanged, in their order, and from the right side."""

    KEY = bytes(range(32))

    def test_there_and_back(self) -> None:
        sender, receiver = Seal(self.KEY, "answer"), Seal(self.KEY, "answer")
        for packet in (b"one", b"", b"three" * 1000):
            sealed = sender.tag([packet[:2], packet[2:]]) + packet
            assert receiver.open(memoryview(sealed)) == packet

    @pytest.mark.parametrize("key", [bytes(32), None])
    def test_another_key_is_refused(self, key: bytes | None) -> None:
        sealed = Seal(key, "answer").tag([b"x" * 64]) + b"x" * 64
        with pytest.raises(NetworkSecurityError):
            Seal(self.KEY, "answer").open(memoryview(sealed))

    def test_order_direction_and_every_bit_count(self) -> None:
        sender = Seal(self.KEY, "up")
        first, second = (sender.tag([b"data"]) + b"data" for _ in range(2))
        with pytest.raises(NetworkSecurityError):
            Seal(self.KEY, "up").open(memoryview(second))
        with pytest.raises(NetworkSecurityError):
            Seal(self.KEY, "down").open(memoryview(first))
        for place in range(len(first)):
            changed = bytearray(first)
            changed[place] ^= 1
            with pytest.raises(NetworkSecurityError):
                Seal(self.KEY, "up").open(memoryview(changed))
        with pytest.raises(NetworkSecurityError):
            Seal(self.KEY, "up").open(memoryview(first[:20]))

    def test_without_a_key_packets_pass_as_they_are(self) -> None:
        assert Seal(None, "answer").tag([b"x"]) == b""
        assert Seal(None, "answer").open(memoryview(b"x")) == b"x"
        assert channel_key(None, b"nonce") is None
        assert channel_key(self.KEY, b"a") != channel_key(self.KEY, b"b")
