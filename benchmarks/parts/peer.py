"""Wove 2.0.3 in a virtual environment of its own, beside the same releases of everything else."""

from __future__ import annotations

import subprocess
import venv
from importlib import metadata

from parts.processes import BUILD, say

VERSION = "2.0.3"
#: What it runs with has the versions that this project runs with.
_SHARED = ("celery[redis]", "kombu", "billiard", "rq", "redis", "cloudpickle", "numpy")


def peer_python() -> str | None:
    """Return the interpreter that has Wove 2.0.3, installing it when it is not there; None when that fails."""
    packages = [f"wove=={VERSION}"]
    packages += [f"{name}=={metadata.version(name.partition('[')[0])}" for name in _SHARED]
    folder = BUILD / "peer"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(packages)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return str(python)
    say(f"installing Wove {VERSION} into {folder.relative_to(BUILD.parents[1])}, once")
    try:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", *packages], check=True
        )
    except (OSError, subprocess.SubprocessError) as exc:
        say(f"Wove {VERSION} cannot be installed ({exc}): its column stays empty")
        return None
    stamp.write_text(wanted, "utf-8")
    return str(python)
