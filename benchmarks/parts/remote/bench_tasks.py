"""What every contender runs; importable by callers and workers alike."""

import time


def noop(value):
    """Return what came in."""
    return value


def nap(value):
    """Take 100 ms, and hardly any processor."""
    time.sleep(0.1)
    return value
