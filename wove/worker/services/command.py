"""``wove worker stdio|http|grpc|websocket``: the command line of the worker services."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wove.errors import ConfigurationError, WoveError
from wove.worker.services.engine import DEFAULT_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.worker.allowed import AllowList

#: What brings the libraries that a service needs.
_EXTRAS = {"aiohttp": "dispatch", "msgpack": "dispatch", "cloudpickle": "dispatch", "grpc": "grpc"}


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``least``."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    return whole_number


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how tasks run."""
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=DEFAULT_THREADS,
        metavar="N",
        help=f"synchronous tasks at once, per process ({DEFAULT_THREADS})",
    )
    parser.add_argument(
        "--allow",
        action="append",
        metavar="MODULE:NAME",
        help='no pickles: only functions of this pattern, as in "myapp.tasks:*", and plain data; may be repeated (WOVE_ALLOW)',
    )


def allow_list(arguments: argparse.Namespace) -> AllowList | None:
    """Return what ``--allow`` says, else ``WOVE_ALLOW``."""
    from wove.worker.allowed import AllowList

    return AllowList(arguments.allow) if arguments.allow else AllowList.from_environment()


def stdio_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m wove.worker.stdio``."""
    parser = argparse.ArgumentParser(prog="python -m wove.worker.stdio", description=__doc__)
    add_task_options(parser)
    return parser


def run_stdio(arguments: argparse.Namespace) -> int:
    """Serve the executor that has started this process."""
    from wove.worker.services.child import serve_parent

    try:
        serve_parent(threads=arguments.threads, allow=allow_list(arguments))
    except WoveError as exc:
        print(f"wove worker stdio: {exc}", file=sys.stderr)
        return 2
    return 0


def add_worker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``worker`` to the commands of ``wove``."""
    worker = commands.add_parser(
        "worker",
        help="run tasks for the stdio, http, grpc or websocket executor",
        description="The other side of an executor: takes tasks, runs them, reports what becomes of them.",
    )
    kinds = worker.add_subparsers(dest="kind", metavar="kind", required=True)
    stdio = kinds.add_parser("stdio", help="started by the stdio executor; not by hand")
    add_task_options(stdio)
    stdio.set_defaults(run=run_stdio)
    for kind, text in (
        ("http", "for {'executor': 'http' or 'https', 'executor_config': {'url': ...}}"),
        ("grpc", "for {'executor': 'grpc', 'executor_config': {'target': ...}}"),
        ("websocket", "for {'executor': 'websocket', 'executor_config': {'url': ...}}"),
    ):
        service = kinds.add_parser(kind, help=text)
        _add_service_options(service)
        service.set_defaults(run=run_service)


def _add_service_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=at_least(0), default=8300, metavar="N", help="port (8300); 0 for a free one"
    )
    parser.add_argument("--unix", metavar="PATH", help="a Unix socket instead of host and port")
    add_task_options(parser)
    parser.add_argument(
        "--processes",
        type=at_least(0),
        default=1,
        metavar="N",
        help="processes that run the tasks (1); 0 runs them in the service's own",
    )
    parser.add_argument(
        "--security",
        metavar="env:VARIABLE",
        help='"env:VARIABLE" with the secret, or "none"; default WOVE_SECRET, else this user\'s cookie file',
    )
    parser.add_argument(
        "--bearer", metavar="env:VARIABLE", help="take this bearer token instead of signatures"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM certificate chain; turns TLS on")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM key, when it is not in the same file")
    parser.add_argument(
        "--tls-client-ca", metavar="FILE", help="let in only clients with a certificate of these"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="plain text on other addresses than loopback is meant"
    )
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="what is logged (info)",
    )


def run_service(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    import asyncio
    import logging
    import os

    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # As `celery -A` does: the project is in the folder one stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        asyncio.run(_serve(arguments))
    except WoveError as exc:
        print(f"wove worker {arguments.kind}: {exc}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as exc:
        extra = _EXTRAS.get(exc.name or "")
        if extra is None:
            raise
        print(f'wove worker {arguments.kind} needs {exc.name}: pip install "wove[{extra}]"', file=sys.stderr)
        return 2
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    from wove.worker.services.listen import Address, serve_application
    from wove.worker.services.service import Service

    address = Address(
        host=arguments.host,
        port=arguments.port,
        unix=arguments.unix,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        tls_client_ca=arguments.tls_client_ca,
        insecure=arguments.insecure,
    )
    security = _security(arguments)
    service = Service(
        security=security,
        threads=arguments.threads,
        processes=arguments.processes,
        allow=arguments.allow or (),
        name=arguments.kind,
    )
    if arguments.kind == "grpc":
        from wove.worker.services.grpc import serve_grpc

        await serve_grpc(service, address)
    elif arguments.kind == "http":
        from wove.worker.services.http import http_application

        await serve_application(http_application, service, address, scheme="http")
    else:
        from wove.worker.services.websocket import websocket_application

        await serve_application(websocket_application, service, address, scheme="ws")


def _security(arguments: argparse.Namespace) -> object:
    if arguments.bearer is not None:
        if arguments.security is not None:
            raise ConfigurationError("--bearer and --security exclude each other")
        _insist_on_variable("--bearer", arguments.bearer)
        return {"mode": "bearer", "token": arguments.bearer}
    if arguments.security not in (None, "none"):
        _insist_on_variable("--security", arguments.security)
    return arguments.security


def _insist_on_variable(option: str, value: str) -> None:
    if not value.startswith("env:"):
        # Everybody on the machine can read a command line.
        raise ConfigurationError(f"{option} is env:VARIABLE: a secret does not belong on the command line")
