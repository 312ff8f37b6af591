"""What a worker takes: origins, environments, functions; how it reaches a callback server."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from wove.errors import ConfigurationError, EncodeError, PayloadRejectedError
from wove.no_pickle import decode_plain, encode_plain, encode_plain_arguments, plain_reference
from wove.wire import decode_value, encode_value
from wove.worker import connection, transport
from wove.worker.admission import admission
from wove.worker.allowed import AllowList
from wove.worker.connection import split_url
from wove.worker.origins import read_origin

if TYPE_CHECKING:
    from collections.abc import Iterator


class TestOrigins:
    """WOVE_CALLBACK_ALLOW."""

    @pytest.mark.parametrize(
        ("allowed", "origin", "taken"),
        [
            ("https://app.example:8443", "https://app.example:8443", True),
            ("https://app.example:8443", "https://app.example:8444", False),
            ("https://app.example:8443", "http://app.example:8443", False),
            ("https://app.example", "https://app.example:1234", True),
            ("https://app.example", "https://APP.example", True),
            ("https://app.example:443", "https://app.example", True),
            ("http://app.example:80", "http://app.example", True),
            ("https://app.example", "https://app.example.evil.test", False),
            ("https://app.example", "https://evil-app.example", False),
            ("https://*.example", "https://app.example", True),
            ("https://*.example", "https://example", False),
            ("https://*.example", "https://appexample", False),
            ("https://*.example", "https://app.example.evil.test", False),
            ("http://10.0.0.5, http://[::1]:80", "http://[::1]", True),
            ("http://10.0.0.5", "http://10.0.0.50", False),
            ("http://a", "http://a:x", False),
        ],
    )
    def test_whole_origins_are_compared(
        self, allowed: str, origin: str, taken: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_CALLBACK_ALLOW", allowed)
        if taken:
            admission().check_origin(origin)
        else:
            with pytest.raises(
                PayloadRejectedError, match="which WOVE_CALLBACK_ALLOW on this worker does not list"
            ):
                admission().check_origin(origin)

    def test_without_it_any_is_taken(self) -> None:
        admission().check_origin("http://anywhere:1")

    @pytest.mark.parametrize(
        "text",
        ["app.example", "ftp://a", "https://", "https://a/path", "http://u@a", "http://*", "http://a*b", ""],
    )
    def test_unusable_lists(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_CALLBACK_ALLOW", text)
        with pytest.raises(ConfigurationError, match="WOVE_CALLBACK_ALLOW"):
            admission()

    def test_an_origin_is_read(self) -> None:
        assert read_origin("https://A.example./") == ("https", "a.example", None)

    @pytest.mark.parametrize(
        "url", ["http://user@host", "http://a b", "http://a\r\nb", "http://a?b", "http://a#b", "http://a\\b"]
    )
    def test_a_callback_url_has_a_plain_host(self, url: str) -> None:
        with pytest.raises(ValueError, match="a callback URL begins with"):
            split_url(url)


class TestEnvironments:
    """WOVE_ENVIRONMENTS."""

    def test_names_and_patterns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_ENVIRONMENTS", "reports, mail-*")
        admission().check_environment("reports")
        admission().check_environment("mail-eu")
        with pytest.raises(
            PayloadRejectedError, match=r"environment 'finance'.*WOVE_ENVIRONMENTS only: reports, mail-\*"
        ):
            admission().check_environment("finance")

    def test_an_empty_list_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_ENVIRONMENTS", " , ")
        with pytest.raises(ConfigurationError, match="lists nothing"):
            admission()


class TestFunctions:
    """WOVE_ALLOW."""

    def test_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_ALLOW", "wove_tests.tasks:*, json:loads")
        functions = admission().functions
        assert functions is not None
        assert functions.patterns == ("wove_tests.tasks:*", "json:loads")
        assert functions.find("json:loads")("1") == 1
        for described in (
            "json:dumps",
            "os:system",
            "json:__name__",
            "wove_tests.tasks:os.system",
            ["pickle", 0, 1],
        ):
            with pytest.raises(PayloadRejectedError):
                functions.find(described)

    @pytest.mark.parametrize("text", ["", " ,", "tasks", "*:run", ":x"])
    def test_unusable_lists(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_ALLOW", text)
        with pytest.raises(ConfigurationError):
            AllowList.from_environment()


class Thing:
    """A class of the user's."""


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: Any = None
for _ in range(70):
    DEEP = [DEEP]


class TestPlain:
    """No pickles: what is no plain data is refused by its place and its type."""

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (Thing(), r"it is of type .*Thing"),
            ([1, {"a": (Thing(),)}], r"\[1\]\['a'\]\[0\] is of type .*Thing"),
            ({"x": {1, frozenset([1j])}}, r"\['x'\]\{\.\.\.\}\{\.\.\.\} is of type complex"),
            ({(1, 1j): 2}, r"the key \[.*\]\[1\] is of type complex"),
            (CYCLE, r"\[0\] contains itself"),
            (DEEP, "nested more than 64 deep"),
            ("\ud800", "cannot be written as plain data"),
            (type("Number", (int,), {})(1), "is of type .*Number"),
        ],
    )
    def test_refusals(self, value: Any, message: str) -> None:
        with pytest.raises(EncodeError, match=message):
            encode_plain(value, [])

    def test_what_is_shared_arrives_as_two(self) -> None:
        shared = [1]
        attachments: list[Any] = []
        descriptor = encode_plain([shared, shared, (shared,)], attachments)
        back = decode_plain(descriptor, [memoryview(part) for part in attachments], "x")
        assert back == [[1], [1], ([1],)]

    def test_a_value_that_grows_without_end_is_refused(self) -> None:
        value: Any = []
        for _ in range(40):
            value = [value, value]
        with pytest.raises(EncodeError, match="more than 1000000 lists"):
            encode_plain(value, [])

    def test_arguments_are_named(self) -> None:
        with pytest.raises(EncodeError, match=r"argument 1: it is of type .*Thing.*\(this setting\)"):
            encode_plain_arguments([1, Thing()], {}, [], "this setting")
        with pytest.raises(EncodeError, match=r"rows: \[0\] is of type .*Thing"):
            encode_plain_arguments([], {"rows": [Thing()]}, [], "this setting")

    def test_pickles_are_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attachments: list[Any] = []
        descriptor = encode_value(Thing(), attachments)
        assert descriptor[0] == "pickle"
        monkeypatch.setattr("wove.wire.pickle.loads", None)
        for described in (descriptor, ["data"], [], None, ["other", 0, 1]):
            with pytest.raises(Exception, match=r"plain data only|descriptor"):
                decode_plain(described, [memoryview(part) for part in attachments], "the arguments")

    def test_functions_have_a_name(self) -> None:
        assert plain_reference(decode_value, "x") == "wove.wire:decode_value"
        for func in (lambda: 1, Thing().__repr__):
            with pytest.raises(EncodeError, match="functions go by name only here"):
                plain_reference(func, "x")


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """Something that answers one request, and what it was asked."""
    asked: list[bytes] = []
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/else\r\nContent-Length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            while True:
                peer, _ = server.accept()
                with peer:
                    request = peer.recv(65_536)
                    if request == b"end":
                        return
                    asked.append(request)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield port, asked
        with socket.create_connection(("127.0.0.1", port)) as last:
            last.sendall(b"end")
        thread.join()


class TestTransport:
    """Directly, unless a proxy is asked for; never to where a redirect points."""

    def test_the_environments_proxies_are_not_asked(
        self, proxy: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy[0]}")
        with pytest.raises(ConnectionRefusedError):
            connection.request("http://127.0.0.1:1", "GET", "/x", {})
        assert proxy[1] == []

    def test_one_that_is_asked_for(
        self, proxy: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_PROXY", f"http://user:p%40ss@127.0.0.1:{proxy[0]}")
        line = transport.connect("http://callbacks.test:8000", 5)
        line.request("POST", "/wove", b"body")
        assert line.getresponse().status == 302
        line.close()
        head = proxy[1][0].decode()
        assert head.startswith(
            "POST http://callbacks.test:8000/wove HTTP/1.1\r\nHost: callbacks.test:8000\r\n"
        )
        assert "Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in head

    def test_a_tunnel_for_tls(self, proxy: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WOVE_PROXY", f"http://user:pass@127.0.0.1:{proxy[0]}")
        line = transport.connect("https://callbacks.test:8443", 5)
        with pytest.raises(OSError, match="Tunnel connection failed: 302"):
            line.request("POST", "/wove", b"secret body")
        line.close()
        head = proxy[1][0].decode()
        assert head.startswith("CONNECT callbacks.test:8443 HTTP/1.")
        assert "Proxy-Authorization: Basic" in head
        assert "secret body" not in head

    def test_a_redirect_is_an_answer(self, proxy: tuple[int, list[bytes]]) -> None:
        reply = connection.request(f"http://127.0.0.1:{proxy[0]}", "GET", "/x", {})
        assert reply.status == 302
        assert len(proxy[1]) == 1
        for kept in connection._local.connections.values():
            kept.close()
        connection._local.connections.clear()

    @pytest.mark.parametrize(
        "url", ["proxy:3128", "socks5://proxy", "https://proxy", "http://", "http://a:b:c"]
    )
    def test_an_unusable_proxy_is_refused_and_not_shown(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_PROXY", url)
        with pytest.raises(ConfigurationError, match=r"^WOVE_PROXY is the URL of an HTTP proxy") as caught:
            transport.connect("http://callbacks.test")
        assert url not in str(caught.value).replace("http://proxy.example:3128", "")
