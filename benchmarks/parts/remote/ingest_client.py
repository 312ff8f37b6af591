"""Posts prepared requests to a callback server, over several connections; as drive.py."""

import base64
import json
import os
import pickle
import socket
import sys
import threading
import time

TRIES = 50


def signed_requests(port, path, runs, frames, environment):
    """Return complete HTTP requests, each for a run of its own: one outcome, or as much progress as asked for."""
    from wove import frames as vocabulary
    from wove.security import event_tag, find_secrets, run_key
    from wove.wire import encode_value, pack_message

    secret = find_secrets().primary
    codec = "application/msgpack"
    made = []
    for run_id, nonce in runs:
        final = frames == 1
        attachments = []
        if final:
            described = encode_value(1, attachments)
            batch = [vocabulary.event("task_result", run_id, "bench.task", 1, 1, result=described)]
        else:
            batch = [
                vocabulary.event("progress", run_id, "bench.task", 1, seq, fraction=seq / frames, message="")
                for seq in range(1, frames + 1)
            ]
        envelope = {
            "frames": batch,
            "execution": run_id[:16],
            "worker": {"host": "bench", "pid": os.getpid()},
        }
        body = b"".join(bytes(part) for part in pack_message(envelope, attachments))
        key = run_key(secret, environment, run_id, bytes.fromhex(nonce))
        tag = event_tag(key, run_id, codec, final, [body]).hex()
        head = (
            f"POST {path}/wove/v1/events/{run_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {codec}\r\n"
            f"Content-Length: {len(body)}\r\nWove-Key: {secret.kid}\r\nWove-Signature: {tag}\r\n"
            f"Wove-Final: {int(final)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


def plain_requests(port, path, runs, frames, environment):
    """Return the same for Wove 2.0.3, which signs nothing and takes one frame a request."""
    result = base64.b64encode(pickle.dumps(1)).decode()
    made = []
    for run_id, _ in runs:
        frame = {"type": "task_result", "run_id": run_id, "task_id": "bench.task", "result_pickle": result}
        body = json.dumps(frame, separators=(",", ":")).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


class Connection:
    """One connection, opened anew when the server closes it."""

    def __init__(self, port, kept):
        self.port = port
        self.kept = kept
        self.socket = None

    def post(self, request):
        """Send a request and wait for the head of the reply, which has no body; True when it was taken."""
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=30)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(request)
        reply = b""
        while b"\r\n\r\n" not in reply:
            more = self.socket.recv(4096)
            if not more:
                break
            reply += more
        if not self.kept:
            self.close()
        return reply.split(b" ", 2)[1:2] == [b"204"]

    def close(self):
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def post_all(port, requests, kept, failures):
    """Post one after another; where a connection is refused or reset, again."""
    connection = Connection(port, kept)
    for request in requests:
        for _ in range(TRIES):
            try:
                taken = connection.post(request)
                break
            except OSError:
                connection.close()
        else:
            taken = False
        if not taken:
            failures.append(request[:60])
    connection.close()


def main(replies):
    """Prepare, then post when told to."""
    prepared, port, kept = [], 0, True
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "prepare":
            make = plain_requests if ask["kind"] == "peer" else signed_requests
            port, kept = ask["port"], ask["kind"] != "peer"
            made = make(port, ask["path"], ask["runs"], ask["frames"], ask["environment"])
            prepared = [made[number :: ask["connections"]] for number in range(ask["connections"])]
            answer = {"requests": len(made)}
        else:
            failures = []
            threads = [
                threading.Thread(target=post_all, args=(port, mine, kept, failures)) for mine in prepared
            ]
            begun = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # One clock for all processes of a machine.
            answer = {"begin": begun, "end": time.monotonic()}
            if failures:
                answer = {"error": f"{len(failures)} requests were not taken, the first: {failures[0]!r}"}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        main(stream)
