"""A worker service as a process of its own: listen, say so, run until told to end, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wove.errors import ConfigurationError
from wove.worker.services.service import DRAIN_SECONDS, Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

logger = logging.getLogger("wove.worker")

#: Connections that the kernel accepts while the loop is busy.
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens, and how.

    Attributes:
        host: an address of this machine.
        port: 0 for any free one.
        unix: path of a Unix socket, instead of both.
        tls_cert: path of a PEM file with the certificate chain; None for plain text.
        tls_key: path of its key, when that stands in a file of its own.
        tls_client_ca: path of the authorities whose clients are let in; None for anybody.
        insecure: whether plain text, or the cookie as secret, is meant on other addresses than loopback.
    """

    host: str = "127.0.0.1"
    port: int = 0
    unix: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    insecure: bool = False

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        from ipaddress import ip_address

        if self.unix is not None:
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, service: Service) -> None:
        """Refuse what other hosts could misuse.

        Raises:
            ConfigurationError: says which option is missing.
        """
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigurationError("--tls-key needs --tls-cert")
        if self.local or self.insecure:
            return
        if self.tls_cert is None:
            raise ConfigurationError(
                f"--host {self.host} can be reached from other hosts, and plain text can be read on the way: give "
                "--tls-cert and --tls-key, or --insecure behind a proxy that speaks TLS"
            )
        if service.security.mode == "none" or not service.security.is_shared:
            raise ConfigurationError(
                f"--host {self.host} can be reached from other hosts, and whoever reaches it could run code: set "
                "WOVE_SECRET, or --security env:VARIABLE, to a secret that the callers have too"
            )

    def url(self, scheme: str, port: int) -> str:
        """Return what callers call."""
        if self.unix is not None:
            return f"unix://{os.path.abspath(self.unix)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.tls_cert else ''}://{host}:{port}/"

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS settings.

        Raises:
            ConfigurationError: a file cannot be read, or holds no certificate.
        """
        if self.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f"--tls-cert {self.tls_cert} (--tls-key {self.tls_key}): {exc}"
            ) from None
        if self.tls_client_ca is not None:
            try:
                context.load_verify_locations(self.tls_client_ca)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigurationError(f"--tls-client-ca {self.tls_client_ca}: {exc}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


async def serve_application(
    application: Callable[[Service], web.Application], service: Service, address: Address, *, scheme: str
) -> None:
    """Serve an aiohttp application until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: the address cannot be bound, or an option cannot be used.
    """
    from aiohttp import web

    from wove.callback_server.guard import KEEP_ALIVE_SECONDS, Guard
    from wove.worker.services.http import GUARD

    address.check(service)
    tls = address.tls()
    app = application(service)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        # A caller that has gone is noticed, and its runs with it.
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        lingering_time=0,
        auto_decompress=False,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        site: web.BaseSite
        if address.unix is not None:
            site = web.UnixSite(runner, address.unix, ssl_context=tls, backlog=BACKLOG)
        else:
            site = web.TCPSite(
                runner, address.host, address.port, ssl_context=tls, backlog=BACKLOG, reuse_address=True
            )
        await start_listening(site.start, address)
        guard: Guard = app[GUARD]
        server = runner.server
        if server is None:
            raise RuntimeError("aiohttp started no server")
        sweeper = asyncio.create_task(guard.sweep(server))
        try:
            port = 0 if address.unix is not None else int(runner.addresses[0][1])
            await run_until_told(service, address.url(scheme, port))
        finally:
            sweeper.cancel()
    finally:
        await runner.cleanup()


async def start_listening(start: Callable[[], object], address: Address) -> None:
    """Bind the address.

    Raises:
        ConfigurationError: it cannot be bound.
    """
    try:
        done = start()
        if asyncio.iscoroutine(done):
            await done
    except (OSError, RuntimeError) as exc:
        where = address.unix or f"{address.host} port {address.port}"
        reason = getattr(exc, "strerror", None) or str(exc)
        raise ConfigurationError(
            f"cannot listen on {where}: {reason}; choose another --port (0 for any free one) or --host"
        ) from exc


async def run_until_told(service: Service, url: str) -> None:
    """Say that the service is ready; wait for SIGTERM or SIGINT; drain. A second signal ends the draining."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    again = asyncio.Event()

    def hear() -> None:
        (again if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear)
    try:
        sys.stdout.write(f"wove worker: ready on {url}\n")
        sys.stdout.flush()
        await told.wait()
        logger.info("told to end: no new runs, %d are open", len(service.hub))
        draining = asyncio.create_task(service.drain(DRAIN_SECONDS))
        hurried = asyncio.create_task(again.wait())
        await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurried):
            task.cancel()
        await asyncio.wait((draining, hurried))
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
