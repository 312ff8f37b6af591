"""Worker services as processes of their own, started through the command line; and a throw-away authority."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import trustme

from wove.demo.managed import ManagedProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

SUPPORT = Path(__file__).resolve().parents[1]
_READY = re.compile(r"^wove worker: ready on (\S+)$", re.MULTILINE)


class Certificates(NamedTuple):
    """Paths of PEM files: an authority, and what it has signed for 127.0.0.1."""

    authority: str
    certificate: str
    key: str


def make_certificates(folder: Path) -> Certificates:
    """Make an authority that lives as long as the folder."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = Certificates(*(str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    authority.cert_pem.write_to_path(paths.authority)
    issued.private_key_pem.write_to_path(paths.key)
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(paths.certificate, append=number > 0)
    return paths


class WorkerService(ManagedProcess):
    """``wove worker <kind>`` on a free port, or on the one it is given."""

    def __init__(
        self,
        kind: str,
        *args: str,
        port: int = 0,
        certificates: Certificates | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        command = [sys.executable, "-m", "wove.cli", "worker", kind, "--port", str(port), *args]
        if certificates is not None:
            command += ["--tls-cert", certificates.certificate, "--tls-key", certificates.key]
        self._authority = certificates.authority if certificates is not None else None
        # Services import the helpers of the tests, as a real one imports the project's code.
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        super().__init__(command, name=f"{kind}-service", env={"PYTHONPATH": path, **(env or {})})

    @property
    def address(self) -> str:
        """What callers call, as the service says itself."""
        found = _READY.search(self.log_text())
        assert found, self.log_text()
        return found.group(1)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.address.rstrip("/").rpartition(":")[2])

    @property
    def config(self) -> dict[str, Any]:
        """The ``executor_config`` of its callers."""
        config: dict[str, Any] = {"target" if self.kind == "grpc" else "url": self.address}
        if self._authority is not None:
            config["root_certificates"] = self._authority
            if self.kind == "grpc":
                config["secure"] = True
        return config

    def definition(self, **changes: Any) -> dict[str, Any]:
        """The environment definition of its callers."""
        config = {**self.config, **changes.pop("executor_config", {})}
        return {"executor": self.kind, "executor_config": config, **changes}

    def _is_ready(self) -> bool:
        return _READY.search(self.log_text()) is not None


def child_pids(pid: int) -> list[int]:
    """Return the processes that a process has started (Linux)."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    found = [int(part) for part in text.split()]
    # A process is started by whichever thread of its parent does it.
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(part) for part in (thread / "children").read_text().split()]
    return sorted(set(found))
