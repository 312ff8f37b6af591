"""The delivery settings: what they may be, and how layers of them are merged."""

from __future__ import annotations

from typing import Any

import pytest

from wove.errors import ConfigurationError
from wove.policy import KEEPING, ORPHAN_POLICIES, SETTINGS, DeliveryPolicy, nearest


def key_of(account: int) -> str:
    """Return an idempotency key."""
    return f"account-{account}"


class TestPolicy:
    """Settings: the nearest layer wins, and a mistake is an error."""

    def test_the_documented_settings_and_defaults(self) -> None:
        assert {name: getattr(DeliveryPolicy(), name.removeprefix("delivery_")) for name in SETTINGS} == {
            "delivery_timeout": None,
            "delivery_start_timeout": None,
            "delivery_heartbeat_seconds": None,
            "delivery_cancel_mode": "best_effort",
            "delivery_cancel_timeout": 10.0,
            "delivery_idempotency_key": None,
            "delivery_max_in_flight": None,
            "delivery_orphan_policy": "cancel",
            "delivery_retries": 0,
        }

    def test_the_first_layer_wins_and_the_defaults_come_last(self) -> None:
        policy = DeliveryPolicy.resolve(
            {"delivery_timeout": 1},
            None,
            {"delivery_timeout": 2, "delivery_start_timeout": 2},
            {"delivery_timeout": 3, "delivery_start_timeout": 3, "delivery_cancel_timeout": 3},
            heartbeat_seconds=15.0,
        )
        assert (policy.timeout, policy.start_timeout, policy.cancel_timeout) == (1, 2, 3)
        assert policy.heartbeat_seconds == 15.0

    def test_none_in_a_near_layer_takes_a_far_setting_back(self) -> None:
        far = {"delivery_timeout": 3}
        assert DeliveryPolicy.resolve({"delivery_timeout": None}, far).timeout is None
        no_beats = {"delivery_heartbeat_seconds": None}
        assert DeliveryPolicy.resolve(no_beats, heartbeat_seconds=15.0).heartbeat_seconds is None

    def test_keys_of_others_are_left_to_them(self) -> None:
        assert DeliveryPolicy.resolve({"executor": "local", "timeout": -1}) == DeliveryPolicy()

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("delivery_timeot", "delivery_timeout"),
            ("delivery_heartbeat", "delivery_heartbeat_seconds"),
            ("delivery_retry", "delivery_retries"),
        ],
    )
    def test_a_misspelt_setting_is_named_together_with_the_nearest(self, key: str, meant: str) -> None:
        with pytest.raises(
            ConfigurationError, match=f"unknown delivery setting '{key}'; did you mean '{meant}'"
        ):
            DeliveryPolicy.resolve({key: 1})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("timeout", 0.001),
            ("timeout", 60),
            ("start_timeout", None),
            ("heartbeat_seconds", 15),
            ("cancel_mode", "require_ack"),
            ("cancel_timeout", 0.5),
            ("max_in_flight", 1),
            ("max_in_flight", None),
            ("orphan_policy", "fail"),
            ("orphan_policy", "detach"),
            ("orphan_policy", "requeue"),
            ("retries", 0),
            ("retries", 3),
            ("idempotency_key", None),
            ("idempotency_key", "nightly"),
            ("idempotency_key", "{order}"),
            ("idempotency_key", key_of),
        ],
    )
    def test_accepted_values(self, key: str, value: Any) -> None:
        assert getattr(DeliveryPolicy.resolve({f"delivery_{key}": value}), key) == value

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("timeout", 0),
            ("timeout", -1),
            ("timeout", "60"),
            ("timeout", True),
            ("timeout", float("nan")),
            ("timeout", float("inf")),
            ("start_timeout", []),
            ("heartbeat_seconds", 0.0),
            ("cancel_mode", "best-effort"),
            ("cancel_mode", None),
            ("cancel_mode", ["require_ack"]),
            ("cancel_timeout", None),
            ("cancel_timeout", 0),
            ("max_in_flight", 0),
            ("max_in_flight", 1.5),
            ("max_in_flight", True),
            ("orphan_policy", "keep"),
            ("orphan_policy", None),
            ("retries", -1),
            ("retries", False),
            ("retries", None),
            ("retries", 1.0),
            ("idempotency_key", ""),
            ("idempotency_key", 7),
            ("idempotency_key", b"nightly"),
        ],
    )
    def test_an_unusable_value_is_refused_together_with_its_key(self, key: str, value: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            DeliveryPolicy.resolve({f"delivery_{key}": value})
        assert str(caught.value).startswith(f"delivery_{key} is ")
        assert str(caught.value).endswith(f"got {value!r}")

    def test_a_far_layer_is_checked_although_a_near_one_wins(self) -> None:
        with pytest.raises(ConfigurationError, match="delivery_timeout"):
            DeliveryPolicy.resolve({"delivery_timeout": 1}, {"delivery_timeout": "x"})

    def test_the_nearest_name_or_all_of_them(self) -> None:
        assert nearest("reprots", ["mail", "reports"]) == "; did you mean 'reports'?"
        assert nearest("xyz", ["reports", "mail"]) == "; known: mail, reports"
        assert nearest("xyz", []) == ""


class TestWhatFollows:
    """What the settings mean for how a run is sent."""

    @pytest.mark.parametrize("orphan_policy", ORPHAN_POLICIES)
    def test_work_goes_on_without_its_submitter_only_where_that_is_asked_for(
        self, orphan_policy: str
    ) -> None:
        assert DeliveryPolicy(orphan_policy=orphan_policy).keeps_work == (orphan_policy in KEEPING)
        assert frozenset({"detach", "requeue"}) == KEEPING

    @pytest.mark.parametrize(
        ("policy", "again"),
        [
            ({}, False),
            ({"retries": 1}, True),
            ({"orphan_policy": "requeue"}, True),
            ({"orphan_policy": "detach"}, False),
        ],
        ids=str,
    )
    def test_what_may_be_sent_again_has_to_be_kept(self, policy: dict[str, Any], again: bool) -> None:
        assert DeliveryPolicy(**policy).sends_again is again
