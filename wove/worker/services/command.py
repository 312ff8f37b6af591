"""``wove worker stdio|http|grpc|websocket``: the command line of the worker services."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wove.errors import WoveError
from wove.worker.allowed import AllowList
from wove.worker.services.runner import DEFAULT_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable


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
        help='no pickles: only functions of this pattern, as in "myapp.tasks:*", and plain data; may be repeated',
    )


def allow_list(arguments: argparse.Namespace) -> AllowList | None:
    """Return what ``--allow`` says."""
    return AllowList(arguments.allow) if arguments.allow else None


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
