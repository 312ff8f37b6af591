"""Settings of the network executors that cannot work fail in ``start``, with the mend in the message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from wove import ConfigurationError, ExecutorRuntime, MissingDispatchFeatureError
from wove.executors.policy import is_loopback

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "a-secret-of-more-than-16-bytes"
#: A host that nobody has, for documentation.
ELSEWHERE = "192.0.2.1"


async def refusal(executor: str, config: dict[str, Any]) -> str:
    """Return why the environment does not start."""
    with pytest.raises(ConfigurationError) as caught:
        await ExecutorRuntime({"there": {"executor": executor, "executor_config": config}}).start()
    assert caught.value.__notes__ == ["while starting environment 'there'"]
    return str(caught.value)


async def starts(executor: str, config: dict[str, Any]) -> None:
    """It starts; that the service is not there is another matter."""
    async with ExecutorRuntime({"there": {"executor": executor, "executor_config": config}}):
        pass


@pytest.mark.parametrize(
    ("executor", "config", "message"),
    [
        ("http", {}, 'executor_config["url"] is missing'),
        ("https", {}, 'executor_config["url"] is missing'),
        ("websocket", {}, 'executor_config["url"] is missing'),
        ("grpc", {}, 'executor_config["target"] is missing'),
        ("http", {"url": 7}, 'executor_config["url"] is a string'),
        ("http", {"url": "ftp://127.0.0.1/"}, "scheme 'ftp'"),
        ("http", {"url": "http://"}, "host None"),
        ("http", {"url": "http://127.0.0.1:99999/"}, "cannot be used"),
        ("http", {"url": "http://me:secret@127.0.0.1/"}, "without user"),
        ("http", {"url": "unix:relative.sock"}, "unix:///path"),
        ("websocket", {"url": "http://127.0.0.1/"}, "scheme 'http'"),
        ("https", {"url": "http://127.0.0.1:8300/"}, "insists on https://"),
        ("grpc", {"target": "http://127.0.0.1:1"}, "without http://"),
        ("grpc", {"target": "127.0.0.1"}, "needs a port"),
        ("grpc", {"target": "127.0.0.1:1", "method": "Send"}, "is /package.Service/Method"),
        (
            "grpc",
            {"target": "127.0.0.1:1", "metadata": {"Upper": "x"}},
            "'Upper' is no name of gRPC metadata",
        ),
        (
            "grpc",
            {"target": "127.0.0.1:1", "secure": "yes"},
            'executor_config["secure"] is True (TLS) or False',
        ),
        ("grpc", {"target": "127.0.0.1:1", "root_certificates": "x"}, 'of no use without "secure": True'),
        ("grpc", {"target": "127.0.0.1:1", "keep_alive": 0}, '["keep_alive"] is a number of seconds above 0'),
        (
            "http",
            {"url": "http://127.0.0.1/", "urll": 1},
            "unknown executor_config key 'urll'; did you mean 'url'",
        ),
        ("grpc", {"target": "127.0.0.1:1", "url": "x"}, "unknown executor_config key 'url'"),
        (
            "http",
            {"url": "http://127.0.0.1/", "timeout": "soon"},
            '["timeout"] is a number of seconds above 0',
        ),
        ("http", {"url": "http://127.0.0.1/", "connections": 0}, '["connections"] is a whole number from 1'),
        (
            "http",
            {"url": "http://127.0.0.1/", "max_message": 1.5},
            '["max_message"] is a whole number from 1',
        ),
        ("http", {"url": "http://127.0.0.1/", "headers": {"X": "a\r\nY: b"}}, '["headers"] is a mapping'),
        ("http", {"url": "http://127.0.0.1/", "headers": ["X"]}, '["headers"] is a mapping'),
        ("http", {"url": "http://127.0.0.1/", "insecure": 1}, '["insecure"] is True or False'),
        ("http", {"url": "http://127.0.0.1/", "security": "short"}, "needs at least 16 bytes"),
        (
            "websocket",
            {"url": "ws://127.0.0.1/", "open_timeout": -1},
            '["open_timeout"] is a number of seconds',
        ),
        (
            "https",
            {"url": "https://127.0.0.1/", "root_certificates": "/no/such.pem"},
            "'/no/such.pem' cannot be used",
        ),
        ("https", {"url": "https://127.0.0.1/", "root_certificates": 7}, '["root_certificates"] is the path'),
        ("https", {"url": "https://127.0.0.1/", "client_key": "/k"}, 'needs "client_certificate"'),
        (
            "grpc",
            {"target": "127.0.0.1:1", "secure": True, "root_certificates": "/no/such.pem"},
            'executor_config["root_certificates"]: the PEM file',
        ),
    ],
)
async def test_what_cannot_be_used(executor: str, config: dict[str, Any], message: str) -> None:
    assert message in await refusal(executor, config)


@pytest.mark.parametrize("executor", ["https", "websocket", "grpc"])
async def test_a_file_that_holds_no_certificate(executor: str, tmp_path: Path) -> None:
    path = tmp_path / "not-a-certificate.pem"
    path.write_text("hello")
    address: dict[str, Any] = {"url": "wss://127.0.0.1/" if executor == "websocket" else "https://127.0.0.1/"}
    if executor == "grpc":
        address = {"target": "127.0.0.1:1", "secure": True}
    text = await refusal(executor, {**address, "root_certificates": str(path)})
    assert "root_certificates" in text
    assert str(path) in text


PLAIN = [
    ("http", "url", f"http://{ELSEWHERE}/"),
    ("websocket", "url", f"ws://{ELSEWHERE}/"),
    ("grpc", "target", f"{ELSEWHERE}:8300"),
    ("http", "url", "http://localhost:8300/"),
]


@pytest.mark.parametrize(("executor", "key", "where"), PLAIN)
async def test_plain_text_to_another_host(executor: str, key: str, where: str) -> None:
    text = await refusal(executor, {key: where, "security": SECRET})
    assert "is another host, and plain text can be read" in text
    assert '"insecure": True' in text
    assert ("write 127.0.0.1" in text) == ("localhost" in where)


@pytest.mark.parametrize(
    ("executor", "config"),
    [
        ("http", {"url": f"https://{ELSEWHERE}/"}),
        ("https", {"url": f"https://{ELSEWHERE}/"}),
        ("websocket", {"url": f"wss://{ELSEWHERE}/"}),
        ("grpc", {"target": f"{ELSEWHERE}:8300", "secure": True}),
    ],
)
async def test_no_credentials_for_another_host(
    executor: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "nothing tells it that this is you" in await refusal(executor, {**config, "security": "none"})
    # A cookie file stands on this machine only.
    monkeypatch.delenv("WOVE_SECRET")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert 'set executor_config["security"]' in await refusal(executor, config)


@pytest.mark.parametrize(
    ("executor", "config"),
    [
        ("http", {"url": f"http://{ELSEWHERE}/", "insecure": True}),
        ("http", {"url": "http://127.0.0.1:8300/", "security": "none"}),
        ("http", {"url": "http://[::1]:8300/wove/?tenant=1"}),
        ("http", {"url": "unix:///run/wove.sock"}),
        ("https", {"url": f"https://{ELSEWHERE}/", "security": SECRET}),
        ("https", {"url": f"https://{ELSEWHERE}/", "security": {"mode": "bearer", "token": SECRET}}),
        ("grpc", {"target": "unix:/run/wove.sock"}),
        ("grpc", {"target": "[::1]:8300", "metadata": {"x-tenant": "one"}}),
        ("grpc", {"target": "ipv4:127.0.0.1:8300"}),
        ("grpc", {"target": f"dns:///{ELSEWHERE}:8300", "secure": True}),
    ],
)
async def test_what_is_allowed(executor: str, config: dict[str, Any]) -> None:
    await starts(executor, config)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("0.0.0.0", False),
        ("::ffff:8.8.8.8", False),
        ("2130706433", False),
        ("", False),
    ],
)
def test_local_is_a_literal_loopback_address(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    ("executor", "config", "module", "extra"),
    [
        ("http", {"url": "http://127.0.0.1/"}, "aiohttp", "dispatch"),
        ("websocket", {"url": "ws://127.0.0.1/"}, "aiohttp", "dispatch"),
        ("grpc", {"target": "127.0.0.1:1"}, "grpc", "grpc"),
    ],
)
async def test_a_missing_library_is_named_with_its_command(
    executor: str, config: dict[str, Any], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDispatchFeatureError, match=rf'pip install "wove\[{extra}\]"'):
        await starts(executor, config)
