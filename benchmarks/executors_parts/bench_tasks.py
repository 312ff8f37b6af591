"""What the benchmark runs; importable on both sides."""


def noop(value):
    """Return what came in."""
    return value
