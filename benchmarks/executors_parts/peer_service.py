"""Our worker service for callers of Wove 2.0.3: the same engine, its wire format. Started by executors.py.

2.0.3 sends JSON with pickles in base64 and wants the events of a run in one answer. For trusted callers on
loopback only: nothing is verified.
"""

import asyncio
import base64
import json
import secrets
import sys

import cloudpickle

from wove.exchange import VERSION, Packet
from wove.wire import encode_value, pack_message
from wove.worker.services.hub import Listener
from wove.worker.services.service import Service


async def answer(service, raw):
    """Run the command in ``raw`` and return its events, in 2.0.3's form."""
    frame = json.loads(raw)
    keywords = cloudpickle.loads(base64.b64decode(frame["args_pickle"])) if frame.get("args_pickle") else {}
    attachments = [base64.b64decode(frame["callable_pickle"])]
    envelope = {
        "type": "run_task",
        "v": VERSION,
        "run_id": secrets.token_hex(16),
        "task_id": frame["task_id"],
        "attempt": 1,
        "callable": ["pickle", 0, 1],
        "args": encode_value([[], keywords], attachments),
    }
    listener = Listener()
    service.hub.take(Packet(b"".join(pack_message(envelope, attachments))), listener)
    packets = []
    while not listener.done:
        packets += await listener.take_within(5)
    packets += await listener.take_within(0)
    service.hub.delivered(listener.ended)
    ids = {"run_id": frame["run_id"], "task_id": frame["task_id"]}
    events = [{"type": "task_started", **ids}]
    for parts in packets:
        event = Packet(b"".join(parts)).event()
        if event["type"] == "task_result":
            result = base64.b64encode(cloudpickle.dumps(event["result"])).decode("ascii")
            events.append({"type": "task_result", **ids, "result_pickle": result})
        elif event["type"] == "task_error":
            events.append({"type": "task_error", **ids, "error": event["error"]})
    return json.dumps({"events": events}, separators=(",", ":"))


async def serve_http(service, websocket):
    """Serve HTTP, or a WebSocket."""
    from aiohttp import WSMsgType, web

    async def post(request):
        return web.Response(body=(await answer(service, await request.read())).encode())

    async def connect(request):
        socket = web.WebSocketResponse(max_msg_size=0, compress=False)
        await socket.prepare(request)
        runs = set()

        async def run(raw):
            await socket.send_str(await answer(service, raw))

        async for message in socket:
            if message.type is WSMsgType.TEXT and '"run_task"' in message.data[:200]:
                task = asyncio.ensure_future(run(message.data))
                runs.add(task)
                task.add_done_callback(runs.discard)
        return socket

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.get("/", connect), web.post("/", post)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    scheme = "ws" if websocket else "http"
    print(f"ready on {scheme}://127.0.0.1:{runner.addresses[0][1]}/", flush=True)
    await asyncio.Event().wait()


async def serve_grpc(service):
    """Serve the generic method."""
    import grpc

    async def send(body, context):
        return (await answer(service, body)).encode()

    handlers = {"Send": grpc.unary_unary_rpc_method_handler(send)}
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("wove.network_executor.WorkerService", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


async def main(kind, processes):
    """Serve until this process is ended."""
    service = Service(security="none", processes=processes, name="peer")
    await service.start()
    if kind == "grpc":
        await serve_grpc(service)
    else:
        await serve_http(service, kind == "websocket")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
