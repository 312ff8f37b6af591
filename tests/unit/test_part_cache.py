"""What a worker process keeps of the parts it has fetched."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from wove_tests.callbacks import wait_until

from wove.buffers import MAPPED_FROM, Original
from wove.worker import parts
from wove.worker.parts import PartCache, cache_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 15.0


def name(digest: str) -> tuple[str, str, bytes]:
    return ("kid", "tests", digest.encode())


def original(data: bytes) -> Original:
    made = Original(len(data))
    made.data[:] = data
    return made


class Source:
    """Loads parts, and counts."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.loads: list[str] = []

    def get(self, cache: PartCache, digest: str) -> memoryview:
        def load() -> Original:
            self.loads.append(digest)
            return original(digest.encode() * self.size)

        return cache.get(name(digest), load).copy()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache() -> Iterator[PartCache]:
    made = PartCache(limit=30)
    yield made
    made.clear()


@pytest.mark.parametrize("size", [10, MAPPED_FROM + 1])
def test_it_is_loaded_once_and_each_has_a_copy_of_its_own(size: int) -> None:
    cache, source = PartCache(limit=size), Source(size)
    first, second = source.get(cache, "a"), source.get(cache, "a")
    assert first == second == b"a" * size
    first[0] = second[-1] = 0
    assert source.get(cache, "a") == b"a" * size, "what one task changed, another would see"
    cache.clear()
    assert first[1:] == b"a" * (size - 1), "what is dropped is there for those who have it"
    assert source.loads == ["a"]


def test_a_system_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    made = original(b"a" * MAPPED_FROM)
    copy = made.copy()
    copy[0] = 0
    assert made.copy() == b"a" * MAPPED_FROM


def test_no_file_is_left_open() -> None:
    def files() -> int:
        return len(os.listdir("/dev/fd"))

    before = files()
    made = original(b"a" * MAPPED_FROM)
    copy = made.copy()
    assert made.copy() == copy
    del made, copy
    assert files() == before


def test_other_secrets_and_environments_have_their_own(cache: PartCache) -> None:
    for kid, environment in [("one", "tests"), ("two", "tests"), ("one", "others")]:
        found = cache.get((kid, environment, b"a"), lambda: Original(3))
        assert found.data.nbytes == 3
    assert cache.bytes == 9


def test_the_longest_unused_goes_first(cache: PartCache, source: Source) -> None:
    for digest in "abcadabc":
        source.get(cache, digest)
    # b made room for d; then c for b, and d for c.
    assert source.loads == ["a", "b", "c", "d", "b", "c"]
    assert cache.bytes == 30


def test_who_asks_meanwhile_waits_for_the_first(cache: PartCache) -> None:
    loading, go_on = threading.Event(), threading.Event()
    loads = []

    def load() -> Original:
        loads.append(1)
        loading.set()
        assert go_on.wait(PATIENCE)
        return original(b"abc")

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(cache.get, name("a"), load) for _ in range(4)]
        assert loading.wait(PATIENCE)
        go_on.set()
        assert [one.result(PATIENCE).data for one in asked] == [b"abc"] * 4
    assert len(loads) == 1


def test_when_the_first_has_no_luck_the_others_try_for_themselves(cache: PartCache) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def fail() -> Original:
        loading.set()
        assert go_on.wait(PATIENCE)
        raise ConnectionError("cut")

    with ThreadPoolExecutor(3) as pool:
        unlucky = pool.submit(cache.get, name("a"), fail)
        assert loading.wait(PATIENCE)
        others = [pool.submit(cache.get, name("a"), lambda: Original(3)) for _ in range(2)]
        go_on.set()
        with pytest.raises(ConnectionError):
            unlucky.result(PATIENCE)
        assert [other.result(PATIENCE).data.nbytes for other in others] == [3, 3]
    assert not cache._coming


def test_what_nobody_asks_for_is_dropped(source: Source) -> None:
    cache = PartCache(limit=30, idle=0.01)
    source.get(cache, "a")
    wait_until(lambda: cache.bytes == 0, "it is dropped")
    wait_until(lambda: cache._timer is None, "the timer has ended")
    source.get(cache, "a")
    assert source.loads == ["a", "a"]
    cache.clear()


def test_a_forked_child_begins_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_caches", {})
    mine = parts.cache()
    assert parts.cache() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert parts.cache() is not mine


@pytest.mark.parametrize(("text", "expected"), [("", 256 * 1024 * 1024), ("0", 0), ("5000", 5000), ("-1", 0)])
def test_the_setting(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv("WOVE_CACHE_BYTES", text)
    assert cache_bytes() == expected


def test_a_setting_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WOVE_CACHE_BYTES", "256M")
    assert cache_bytes() == parts.CACHE_BYTES
    assert "WOVE_CACHE_BYTES is a whole number of bytes, not '256M'" in caplog.text
