// What a worker in any language needs of Wove's wire format (docs/wire-format.md): read a payload, verify it before
// anything of it is decoded, report signed JSON frames. Node's own modules, nothing else.

import crypto from "node:crypto";
import fs from "node:fs";
import http from "node:http";
import https from "node:https";
import os from "node:os";

const MAGIC = Buffer.from("WOVE\x01", "latin1");
const TAG_SIZE = 32;
const MAX_DEPTH = 192;

/** A payload that is not signed with our secret, or that we do not take. */
export class Rejected extends Error {}

// --- secrets and signatures --------------------------------------------------

/** Read `secret` or `kid:secret`, several separated by commas, as WOVE_SECRET holds them. */
export function readSecrets(text) {
  const ring = new Map();
  for (const item of (text ?? "").split(",").map((part) => part.trim()).filter(Boolean)) {
    const colon = item.indexOf(":");
    const value = Buffer.from(item.slice(colon + 1));
    if (value.length < 16) throw new Error("WOVE_SECRET: a secret needs at least 16 bytes");
    const kid = colon < 0 ? hmac(value, [Buffer.from("wove/1 key id")]).toString("hex").slice(0, 8) : item.slice(0, colon);
    if (!ring.has(kid)) ring.set(kid, value);
  }
  if (!ring.size) throw new Error("set WOVE_SECRET to the submitter's secret");
  return ring;
}

const hmac = (key, parts) => parts.reduce((digest, part) => digest.update(part), crypto.createHmac("sha256", key)).digest();

/** HMAC over fields, each preceded by its length, then over `rest`, which ends the message. */
function mac(key, fields, rest = []) {
  const parts = [];
  for (const field of fields) {
    const raw = Buffer.from(field);
    const length = Buffer.alloc(4);
    length.writeUInt32BE(raw.length);
    parts.push(length, raw);
  }
  return hmac(key, [...parts, ...rest]);
}

const derive = (secret, info, environment) => Buffer.from(crypto.hkdfSync("sha256", secret, environment, info, 32));
const same = (a, b) => a.length === b.length && crypto.timingSafeEqual(a, b);

// --- payloads ----------------------------------------------------------------

/** Verify a payload (base64 text) and return the run it asks for. */
export function openPayload(ring, text) {
  const raw = Buffer.from(text, "base64");
  if (!raw.subarray(0, MAGIC.length).equals(MAGIC)) throw new Rejected("not a Wove payload");
  let at = MAGIC.length;
  const short = () => {
    const field = raw.subarray(at + 1, at + 1 + (raw[at] ?? 0));
    at += 1 + field.length;
    return field;
  };
  const kid = short();
  const environment = short();
  const tag = raw.subarray(at, at + TAG_SIZE);
  const message = raw.subarray(at + TAG_SIZE);
  const secret = ring.get(kid.toString());
  if (!secret) throw new Rejected("signed with a secret that this worker does not have");
  const key = derive(secret, "wove/1 payload", environment);
  if (!same(mac(key, ["wove/1 payload", kid, environment], [message]), tag)) throw new Rejected("the signature is wrong");
  // From here on the bytes are the submitter's.
  const [run, attachments] = unpackMessage(message);
  if (run.v !== 1) throw new Rejected(`a payload of version ${run.v}`);
  run.kid = kid.toString();
  run.key = mac(derive(secret, "wove/1 event", environment), [run.run_id, run.nonce]);
  run.attachments = attachments;
  return run;
}

/** Return what is called and with what; large messages are fetched first. */
export async function loadCall(run) {
  let call = run;
  let attachments = run.attachments;
  if (run.fetch) {
    const [size, digest] = run.fetch;
    const headers = { "Wove-Key": run.kid, "Wove-Signature": mac(run.key, ["wove/1 fetch", run.run_id]).toString("hex") };
    const reply = await send(run, "GET", `/wove/v1/payloads/${run.run_id}`, headers, null, size);
    if (reply.status !== 200) throw new Error(`the arguments are not to be had: ${reply.status}`);
    if (!crypto.createHash("sha256").update(reply.body).digest().equals(digest)) throw new Error("the arguments changed on their way");
    [call, attachments] = unpackMessage(reply.body);
  }
  if (typeof call.callable !== "string") throw new Rejected("the function was sent by value: set \"pickle\": False in the environment");
  const [codec, first, count] = call.args;
  if (!["data", "tagged"].includes(codec) || count !== 1) {
    throw new Rejected("the arguments are a pickle: set \"pickle\": False in the environment");
  }
  const [positional, keywords] = unpack(attachments[first], codec === "tagged");
  return { name: call.callable, positional, keywords };
}

function unpackMessage(body) {
  const end = 4 + body.readUInt32BE(0);
  const envelope = unpack(body.subarray(4, end));
  const attachments = [];
  let at = end;
  for (const size of envelope.sizes) {
    attachments.push(body.subarray(at, at + size));
    at += size;
  }
  if (at !== body.length) throw new Rejected("the attachments do not fill the message");
  return [envelope, attachments];
}

// --- msgpack, as much of it as the format uses -------------------------------

/** Decode msgpack; with `tagged`, mappings that stand for something else become that. */
export function unpack(data, tagged = false) {
  let at = 0;
  const take = (size) => {
    if (at + size > data.length) throw new Rejected("msgpack is cut short");
    at += size;
    return at - size;
  };
  const big = (value) => (Number.isSafeInteger(Number(value)) ? Number(value) : value);
  const unsigned = (size) => (size === 8 ? big(data.readBigUInt64BE(take(8))) : data.readUIntBE(take(size), size));
  const signed = (size) => (size === 8 ? big(data.readBigInt64BE(take(8))) : data.readIntBE(take(size), size));
  const bytes = (size) => data.subarray(take(size), at);
  const list = (size, depth) => {
    const items = [];
    for (let i = 0; i < size; i++) items.push(read(depth));
    return items;
  };
  const map = (size, depth) => {
    const object = Object.create(null); // a key may be called __proto__
    for (let i = 0; i < size; i++) {
      const key = read(depth);
      object[String(key)] = read(depth);
    }
    return tagged && "__wove__" in object ? untag(object) : object;
  };
  const read = (depth) => {
    if (depth > MAX_DEPTH) throw new Rejected("nested too deep");
    const kind = data[take(1)];
    if (kind < 0x80) return kind;
    if (kind < 0x90) return map(kind & 0x0f, depth + 1);
    if (kind < 0xa0) return list(kind & 0x0f, depth + 1);
    if (kind < 0xc0) return bytes(kind & 0x1f).toString();
    if (kind >= 0xe0) return kind - 0x100;
    switch (kind) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return bytes(unsigned(1 << (kind - 0xc4)));
      case 0xca: return data.readFloatBE(take(4));
      case 0xcb: return data.readDoubleBE(take(8));
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return unsigned(1 << (kind - 0xcc));
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: return signed(1 << (kind - 0xd0));
      case 0xd9: case 0xda: case 0xdb: return bytes(unsigned(1 << (kind - 0xd9))).toString();
      case 0xdc: case 0xdd: return list(unsigned(kind === 0xdc ? 2 : 4), depth + 1);
      case 0xde: case 0xdf: return map(unsigned(kind === 0xde ? 2 : 4), depth + 1);
      default: throw new Rejected(`msgpack type ${kind.toString(16)} is not part of this protocol`);
    }
  };
  const value = read(0);
  if (at !== data.length) throw new Rejected("bytes after the value");
  return value;
}

const REBUILD = {
  tuple: (v) => v, set: (v) => new Set(v), frozenset: (v) => new Set(v), dict: (v) => new Map(v), int: (v) => BigInt(v),
  datetime: (v) => v, date: (v) => v, time: (v) => v, timedelta: (v) => v, decimal: (v) => v, uuid: (v) => v,
};

function untag({ __wove__: tag, v }) {
  if (!Object.hasOwn(REBUILD, tag)) throw new Rejected(`unknown tag ${tag}`);
  return REBUILD[tag](v);
}

/** Write a value as JSON frames carry it. */
export function toPlain(value) {
  if (value === undefined) return null;
  if (typeof value === "bigint") return { __wove__: "int", v: (value < 0n ? "-0x" : "0x") + (value < 0n ? -value : value).toString(16) };
  if (typeof value === "number" && !Number.isFinite(value)) {
    return { __wove__: "float", v: Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf" };
  }
  if (value instanceof Uint8Array) return { __wove__: "bytes", v: Buffer.from(value).toString("base64") };
  if (value instanceof Set) return { __wove__: "set", v: [...value].map(toPlain) };
  if (value instanceof Map) return { __wove__: "dict", v: [...value].map(([key, item]) => [toPlain(key), toPlain(item)]) };
  if (Array.isArray(value)) return value.map(toPlain);
  if (typeof value === "object" && value !== null) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, toPlain(item)]));
  }
  return value;
}

// --- events ------------------------------------------------------------------

/** Reports on one run; `cancelled` turns true when its caller gives it up. */
export class Reporter {
  constructor(run) {
    this.run = run;
    this.seq = 0;
    this.cancelled = false;
    this.execution = crypto.randomBytes(8).toString("hex");
    this.worker = { host: os.hostname(), pid: process.pid, backend: "node" };
  }

  /** Send one frame and return the callback server's status. */
  async post(type, fields = {}, final = false) {
    const { run } = this;
    const frame = { type, run_id: run.run_id, task_id: run.task_id, attempt: run.attempt, seq: ++this.seq, ...fields };
    const body = Buffer.from(JSON.stringify({ execution: this.execution, worker: this.worker, frames: [frame] }));
    const tag = mac(run.key, ["wove/1 event", run.run_id, "application/json", final ? "1" : "0"], [body]);
    const headers = {
      "Content-Type": "application/json", "Wove-Key": run.kid, "Wove-Final": final ? "1" : "0", "Wove-Signature": tag.toString("hex"),
    };
    const reply = await send(run, "POST", `/wove/v1/events/${run.run_id}`, headers, body);
    const cancel = mac(run.key, ["wove/1 reply", tag], [Buffer.from("cancel")]);
    if (same(Buffer.from(reply.headers["wove-cancel"] ?? "", "hex"), cancel)) this.cancelled = true;
    return reply.status;
  }

  /** Deliver the outcome; the callback server may be out for a moment. */
  async finish(type, fields = {}) {
    for (let wait = 100; ; wait = Math.min(2 * wait, 10_000)) {
      let problem;
      try {
        const status = await this.post(type, fields, true);
        if (status < 300 || status === 410) return;
        if (status === 401 || status === 413) throw Object.assign(new Error(`it answered ${status}`), { final: true });
        problem = `it answered ${status}`;
      } catch (error) {
        if (error.final || wait >= 10_000) throw error;
        problem = error.message;
      }
      console.error(`the outcome of run ${this.run.run_id} is not delivered yet: ${problem}`);
      await new Promise((resolve) => setTimeout(resolve, wait * (0.5 + Math.random())));
    }
  }
}

// One connection for everything: that it is lost tells the submitter that this process is.
const agents = { "http:": new http.Agent({ keepAlive: true }), "https:": null };

function secureAgent() {
  const read = (name) => (process.env[name] ? fs.readFileSync(process.env[name]) : undefined);
  agents["https:"] ??= new https.Agent({
    keepAlive: true, minVersion: "TLSv1.2", ca: read("WOVE_CA"), cert: read("WOVE_CERT"), key: read("WOVE_KEY") ?? read("WOVE_CERT"),
  });
  return agents["https:"];
}

/** Refuse a callback to anywhere but the origins of WOVE_CALLBACK_ALLOW, where that is set. */
function checkOrigin(url) {
  const allowed = process.env.WOVE_CALLBACK_ALLOW;
  if (!/^https?:$/.test(url.protocol) || url.username || url.password) throw new Rejected(`no callback URL: ${url.origin}`);
  if (!allowed) return;
  const origins = allowed.split(",").map((part) => new URL(part.trim()));
  if (!origins.some((origin) => origin.origin === url.origin)) throw new Rejected(`WOVE_CALLBACK_ALLOW does not list ${url.origin}`);
}

function send(run, method, path, headers, body, maxReply = 65_536) {
  const url = new URL(run.callback.replace(/\/$/, "") + path);
  checkOrigin(url);
  const [client, agent] = url.protocol === "https:" ? [https, secureAgent()] : [http, agents["http:"]];
  return new Promise((resolve, reject) => {
    const length = body ? { "Content-Length": body.length } : {};
    const request = client.request(url, { method, agent, headers: { ...headers, ...length }, timeout: 10_000 }, (response) => {
      const chunks = [];
      let size = 0;
      response.on("data", (chunk) => {
        size += chunk.length;
        if (size > maxReply) request.destroy(new Error("the callback server's reply is too long"));
        chunks.push(chunk);
      });
      response.on("end", () => resolve({ status: response.statusCode, headers: response.headers, body: Buffer.concat(chunks) }));
      response.on("error", reject);
    });
    request.on("timeout", () => request.destroy(new Error("the callback server does not answer")));
    request.on("error", reject);
    request.end(body);
  });
}
