"""The command ``wove``. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import wove

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    return _demo(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here: `wove --version` needs none of it.
    from wove.demo import show

    return show.run(arguments.redis_url, arguments.only, serve=arguments.serve)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wove", description="Await any Python function on the Celery or RQ fleet you already run."
    )
    parser.add_argument("--version", action="version", version=f"wove {wove.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="run functions on a real Celery and a real RQ worker, started for the occasion",
        description=(
            "Starts a Redis server, a Celery worker and an RQ worker, analyses every module of the Python "
            "standard library on them, shows a failing and a cancelled task, and takes everything down again."
        ),
    )
    demo.add_argument(
        "--redis-url",
        metavar="URL",
        help="use this Redis instead of starting one; works on a queue of its own and leaves no key behind",
    )
    demo.add_argument("--only", choices=("celery", "rq"), help="one fleet instead of both")
    demo.add_argument(
        "--serve",
        action="store_true",
        help="only start Redis and the workers, print a program to use them with, and wait for Ctrl-C",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
