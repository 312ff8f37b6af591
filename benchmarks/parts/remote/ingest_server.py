"""A callback server alone, of this project or of Wove 2.0.3; as drive.py."""

import asyncio
import json
import os
import secrets
import sys
import time

ENVIRONMENT = "benchmark"
PATIENCE = 10


class Listener:
    """This project's: the one that all environments of a process share."""

    def __init__(self):
        self.frames = 0
        self.cpu = 0.0

    async def open(self, count):
        """Open runs, and say how events for them are signed."""
        from wove.callback_server import hub
        from wove.callback_server.runs import OpenRun
        from wove.security import find_secrets

        self.lease = hub.acquire("127.0.0.1", 0)
        ring = find_secrets()
        runs = []
        for _ in range(count):
            run_id, nonce = secrets.token_hex(16), secrets.token_bytes(16)
            runs.append([run_id, nonce.hex()])
            self.lease.open_run(
                OpenRun(
                    run_id=run_id,
                    task_id="bench.task",
                    environment=ENVIRONMENT,
                    ring=ring,
                    nonce=nonce,
                    sink=self.take,
                    max_body=1 << 20,
                )
            )
        return {"port": self.lease.port, "runs": runs, "path": "", "environment": ENVIRONMENT}

    def take(self, batch):
        """Count frames, in the listener's thread."""
        self.frames += len(batch)
        return True

    async def reset(self):
        """Begin to count."""
        self.frames, self.cpu = 0, time.process_time()
        return {}

    async def counted(self, frames):
        """Wait until as many have arrived; the processor seconds since ``reset``."""
        deadline = time.monotonic() + PATIENCE
        while self.frames < frames:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.frames} of {frames} frames have arrived")
            await asyncio.sleep(0.01)
        return {"cpu": time.process_time() - self.cpu}


class PeerListener(Listener):
    """That of Wove 2.0.3."""

    async def open(self, count):
        """Make names up: it takes events for any."""
        from wove.backend import BackendCallbackServer

        self.server = BackendCallbackServer()
        await self.server.start()
        self.taking = asyncio.ensure_future(self.take_all())
        port = int(self.server.callback_url.rpartition(":")[2].partition("/")[0])
        path = "/" + self.server.callback_url.split("/", 3)[3]
        runs = [[f"bench:{secrets.token_hex(16)}", ""] for _ in range(count)]
        return {"port": port, "runs": runs, "path": path, "environment": ENVIRONMENT}

    async def take_all(self):
        while True:
            await self.server.recv()
            self.frames += 1


async def main(replies):
    """Answer until standard input ends."""
    listener = PeerListener() if sys.argv[1] == "peer" else Listener()
    while line := await asyncio.to_thread(sys.stdin.readline):
        ask = json.loads(line)
        try:
            answer = await getattr(listener, ask.pop("do"))(**ask)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"[:300]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        asyncio.run(main(stream))
    os._exit(0)
