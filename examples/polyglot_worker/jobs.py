"""The functions of the Node.js worker, for Python code to name: their bodies are in jobs.mjs."""

from __future__ import annotations


def word_count(text: str) -> dict[str, int]:
    """Count the words of a text."""
    raise NotImplementedError("runs on the Node.js worker")


def sum_of_squares(numbers: list[float], *, scale: float = 1) -> float:
    """Add up squares; reports progress."""
    raise NotImplementedError("runs on the Node.js worker")


def nap(seconds: float) -> str:
    """Take a while, unless cancelled."""
    raise NotImplementedError("runs on the Node.js worker")


def divide(a: float, b: float) -> float:
    """Divide, or fail as JavaScript fails."""
    raise NotImplementedError("runs on the Node.js worker")
