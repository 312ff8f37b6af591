"""The command ``wove``. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

import wove

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MARKS = {"ok": "ok      ", "problem": "PROBLEM ", "unknown": "?       "}
_DOCTOR_KEYS = ("app", "broker_url", "callback_host", "callback_url", "queue", "queue_name", "redis_url")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here: `wove --version` needs none of it.
    from wove.demo import show

    return show.run(
        redis_url=arguments.redis_url, only=arguments.only, modules=arguments.modules, serve=arguments.serve
    )


def _doctor(arguments: argparse.Namespace) -> int:
    # As `celery -A` does: the project is in the folder one stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from wove.doctor import examine

    executor = "rq" if arguments.redis_url else "celery"
    config = {key: getattr(arguments, key) for key in _DOCTOR_KEYS if getattr(arguments, key) is not None}
    findings = []
    for finding in examine(executor, config, arguments.timeout):
        findings.append(finding)
        if not arguments.json:
            print(f"{_MARKS[finding.state]} {finding.text}")
            if finding.mend:
                print(f"    mend: {finding.mend}")
    if arguments.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    return 1 if any(finding.state == "problem" for finding in findings) else 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


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
        "--modules", metavar="N", type=_at_least_one, help="analyse only the first N modules, to be quicker"
    )
    demo.add_argument(
        "--serve",
        action="store_true",
        help="only start Redis and the workers, print a program to use them with, and wait for Ctrl-C",
    )
    demo.set_defaults(run=_demo)
    _add_doctor(commands)
    _add_worker(commands)
    return parser


def _add_worker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from wove.worker.services.command import add_worker

    add_worker(commands)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="find out why a task hangs: secret, broker, workers, callback URL, one trial call",
        description="Looks at what a call needs, in the order in which it needs it, then makes one call.",
    )
    fleet = doctor.add_mutually_exclusive_group(required=True)
    fleet.add_argument("--app", "-A", metavar="MODULE:APP", help="a Celery app, as in `celery -A`")
    fleet.add_argument("--broker-url", metavar="URL", help="a Celery broker")
    fleet.add_argument("--redis-url", metavar="URL", help="RQ's Redis")
    doctor.add_argument("--queue", metavar="NAME", help="the Celery queue (default: the app's own)")
    doctor.add_argument("--queue-name", metavar="NAME", help="the RQ queue (default: default)")
    doctor.add_argument("--callback-host", metavar="ADDRESS", help="where to listen for the worker")
    doctor.add_argument("--callback-url", metavar="URL", help="what the worker calls")
    doctor.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="seconds for the trial call (10)"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)


if __name__ == "__main__":
    sys.exit(main())
