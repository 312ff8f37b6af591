"""What the benchmark of large values runs, on both sides."""

import numpy


# numpy, which this names, is part of what a process holds before.
def double(array: numpy.ndarray) -> numpy.ndarray:
    """Return a new array of the size."""
    return array * 2


def begin():
    """Forget the peak so far, and return the bytes that this process holds."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak():
    """Return the most bytes that this process held since."""
    return _status("VmHWM")


def _status(name):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(name)
