// A worker without Python: takes Wove's runs from an RQ or a Celery queue in Redis.
//
//     WOVE_SECRET=... node worker.mjs rq     redis://127.0.0.1:6379/0 node
//     WOVE_SECRET=... node worker.mjs celery redis://127.0.0.1:6379/0 node

import zlib from "node:zlib";

import { functions } from "./jobs.mjs";
import { Redis } from "./redis.mjs";
import { loadCall, openPayload, readSecrets, Rejected, Reporter, toPlain } from "./wove.mjs";

const BEAT_MS = 5_000;

// --- what the queues hold ----------------------------------------------------

const BACKENDS = {
  // RQ: a list of job ids, and a hash for each job. The queue's serializer has to be JSON.
  rq: async (redis, queue) => {
    const [, id] = await redis.call("BLPOP", `rq:queue:${queue}`, 0);
    const key = `rq:job:${id}`;
    const data = await redis.call("HGET", key, "data");
    if (!data) return null; // cancelled meanwhile
    await redis.call("DEL", key);
    const [, , args] = JSON.parse(zlib.inflateSync(data));
    return args[0];
  },
  // Celery: a list of messages, each with its body in base64.
  celery: async (redis, queue) => {
    const [, message] = await redis.call("BRPOP", queue, 0);
    const { headers, body, properties } = JSON.parse(message);
    if (headers.task !== "wove.run") {
      console.error(`not a task of Wove's, dropped: ${headers.task}`);
      return null;
    }
    const text = properties.body_encoding === "base64" ? Buffer.from(body, "base64").toString() : body;
    return JSON.parse(text)[0][0];
  },
};

// --- one run -----------------------------------------------------------------

async function execute(payload) {
  const run = openPayload(ring, payload);
  const reporter = new Reporter(run);
  const leave = await reporter.post("task_started", { fence: true });
  if (leave === 410 || leave === 409) return; // cancelled, or another worker is at it
  const beat = setInterval(() => reporter.post("heartbeat").catch(() => {}), BEAT_MS);
  try {
    const result = await compute(run, reporter);
    if (reporter.cancelled) await reporter.finish("task_cancelled");
    else await reporter.finish("task_result", { result: toPlain(result) });
  } catch (error) {
    const source = error instanceof Rejected ? "worker" : "task";
    const described = { kind: error.name, message: error.message, traceback: error.stack ?? "", retryable: false, source };
    await reporter.finish("task_error", { error: described });
  } finally {
    clearInterval(beat);
  }
}

async function compute(run, reporter) {
  const { name, positional, keywords } = await loadCall(run);
  if (!Object.hasOwn(functions, name)) throw new Rejected(`${name} is not a function of this worker`);
  const progress = (fraction, message = "") => reporter.post("progress", { fraction, message });
  return functions[name](positional, keywords, { progress, get cancelled() { return reporter.cancelled; } });
}

// --- all of them -------------------------------------------------------------

const [backend, url, queue] = process.argv.slice(2);
if (!Object.hasOwn(BACKENDS, backend ?? "") || !url || !queue) {
  console.error("usage: node worker.mjs rq|celery redis://HOST:PORT/DATABASE QUEUE");
  process.exit(2);
}
const ring = readSecrets(process.env.WOVE_SECRET);
const redis = new Redis(url);
await redis.ready;
console.log(`listening on ${queue}`);
for (;;) {
  const payload = await BACKENDS[backend](redis, queue);
  if (payload === null) continue;
  try {
    await execute(payload);
  } catch (error) {
    // What is not signed cannot be answered; anything else was tried.
    console.error(`${error.name}: ${error.message}`);
  }
}
