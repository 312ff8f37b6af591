"""How many runs travel together, without any of them."""

from __future__ import annotations

from typing import Any

import pytest

from wove import ConfigurationError
from wove.executors import batching
from wove.executors.batching import ENOUGH_SECONDS, LINGER_SECONDS, MAX_AUTO, SCOUTS, Batching

TASK = "module.function"


def frame(**delivery: Any) -> dict[str, Any]:
    return {"delivery": {"attempt": 1, "mapped": True, **delivery}}


def plan(
    batches: Batching,
    waiting: int,
    *,
    in_flight: int = 0,
    open_runs: int = 10_000,
    waited: float = 0.0,
    unstarted: int = 0,
) -> list[int]:
    return batches.plan(TASK, waiting, in_flight, open_runs, waited, lambda: unstarted)


def told(batches: Batching, seconds: float, *slots: str, times: int = 10, count: int = 100) -> None:
    """Let workers say how long runs took."""
    listener = batches.listener(TASK)
    for _ in range(times):
        for slot in slots or ("one",):
            listener(slot, count, seconds * count)


class TestSetting:
    @pytest.mark.parametrize("value", [0, -1, 513, 1.5, True, "all", [], "AUTO"])
    def test_what_it_cannot_be(self, value: object) -> None:
        with pytest.raises(ConfigurationError, match=r'executor_config\["batch"\]'):
            Batching.read({"batch": value}, plain=False)

    @pytest.mark.parametrize(
        ("config", "mapped", "expected"),
        [
            ({}, True, True),
            ({}, False, False),
            ({"batch": 1}, True, False),
            ({"batch": 7}, False, True),
            ({"batch": "auto"}, False, True),
        ],
    )
    def test_who_travels_with_others(self, config: dict[str, Any], mapped: bool, expected: bool) -> None:
        assert bool(Batching.read(config, plain=False).takes(frame(mapped=mapped))) is expected

    def test_workers_in_other_languages_get_single_runs(self) -> None:
        assert not Batching.read({}, plain=True).takes(frame())
        assert Batching.read({"batch": "auto"}, plain=True).takes(frame())

    @pytest.mark.parametrize(
        "delivery",
        [
            {"attempt": 2},
            {"keep": True},
            {"key": "k"},
            {"alone": True},
            {"repeated": True},
            {"attended": False},
        ],
    )
    def test_who_goes_alone(self, delivery: dict[str, Any]) -> None:
        assert not Batching("auto").takes(frame(**delivery))

    def test_a_number_is_kept_to(self) -> None:
        assert plan(Batching(10), 25, in_flight=99) == [9, 8, 8]


class TestScouts:
    def test_few_go_ahead(self) -> None:
        assert plan(Batching("auto"), 500) == [1] * SCOUTS

    def test_no_more_go_while_nobody_takes_them(self) -> None:
        assert plan(Batching("auto"), 500, in_flight=SCOUTS, unstarted=SCOUTS, waited=60.0) == []

    def test_more_go_as_they_are_begun(self) -> None:
        assert len(plan(Batching("auto"), 500, in_flight=SCOUTS, unstarted=0)) == SCOUTS
        assert len(plan(Batching("auto"), 500, in_flight=40, unstarted=0)) == 40


class TestSize:
    def test_short_ones_fill_the_target(self) -> None:
        batches = Batching("auto")
        told(batches, 0.001)
        assert plan(batches, 500) == [50, 50]

    def test_it_grows_by_steps(self) -> None:
        batches = Batching("auto")
        sizes = []
        for _ in range(5):
            told(batches, 1e-6, times=1)
            sizes.append(plan(batches, 1000)[0])
        assert sizes == [4, 16, 64, MAX_AUTO, MAX_AUTO]

    def test_it_shrinks(self) -> None:
        batches = Batching("auto")
        told(batches, 1e-6)
        told(batches, 0.01)
        assert plan(batches, 500) == [5, 5]

    def test_long_ones_go_alone_and_at_once(self) -> None:
        batches = Batching("auto")
        told(batches, 3.0, count=1)
        assert plan(batches, 70, in_flight=999) == [1] * 70

    def test_nobody_gets_more_than_a_fair_share(self) -> None:
        batches = Batching("auto")
        told(batches, 1e-6, "a", "b", "c", "d")
        assert plan(batches, 80, open_runs=80) == [10] * 8

    def test_a_worker_that_is_silent_is_not_counted_any_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = Batching("auto")
        told(batches, 1e-6, "a", "b")
        told(batches, 1e-6, "a")
        now = batching.time.monotonic() + 2 * batching.SLOT_SECONDS
        monkeypatch.setattr(batching.time, "monotonic", lambda: now)
        told(batches, 1e-6, "a")
        assert len(plan(batches, 1000)) == batching.SHARES


class TestPatience:
    @pytest.fixture
    def batches(self) -> Batching:
        batches = Batching("auto")
        told(batches, 0.001, "a", "b")
        return batches

    def test_few_wait_for_others_while_everybody_is_busy(self, batches: Batching) -> None:
        assert plan(batches, 10, in_flight=2) == []
        assert plan(batches, 10, in_flight=2, waited=LINGER_SECONDS) == [10]
        assert plan(batches, 60, in_flight=2) == [30, 30]

    def test_few_do_not_wait_for_an_idle_worker(self, batches: Batching) -> None:
        assert plan(batches, 10, in_flight=1) == [10]

    def test_all_wait_while_everybody_has_enough(self, batches: Batching) -> None:
        assert plan(batches, 500, in_flight=4, waited=ENOUGH_SECONDS / 2) == []

    def test_nobody_waits_for_long(self, batches: Batching) -> None:
        assert sum(plan(batches, 500, in_flight=4, waited=ENOUGH_SECONDS)) == 500
