"""``python -m wove.worker.stdio``: the worker process that ``StdioEnvironmentExecutor`` starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tasks for the parent process until it ends; the options are those of ``wove worker stdio``."""
    from wove.worker.services.command import run_stdio, stdio_parser

    return run_stdio(stdio_parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
