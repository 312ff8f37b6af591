"""What ``wove doctor`` says without a fleet."""

from __future__ import annotations

import socket

import pytest

from wove.doctor import _callback_host


@pytest.fixture
def unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(host: str, port: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find_nothing)


@pytest.mark.usefixtures("unknown_host")
def test_a_callback_host_without_an_address_is_named() -> None:
    (found,) = _callback_host({"callback_url": "http://app.example:{port}"})
    assert found.state == "unknown"  # workers may find it all the same
    assert "app.example has no address here" in found.text
    assert "callback_url" in found.mend


@pytest.mark.parametrize(
    "config", [{}, {"callback_url": "http://127.0.0.1:{port}"}, {"callback_url": "http://localhost:8000"}]
)
def test_one_with_an_address_is_nothing_to_speak_of(config: dict[str, str]) -> None:
    assert list(_callback_host(config)) == []
