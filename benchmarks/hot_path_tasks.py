"""The empty task of hot_path.py: light to import, because an RQ work horse pays for that once per job."""

from __future__ import annotations


def noop(value: int) -> int:
    return value
