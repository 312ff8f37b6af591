// As much of Redis's protocol (RESP) as taking work from a list needs.

import net from "node:net";

/** One connection; commands are answered in their order. */
export class Redis {
  constructor(url) {
    const { hostname, port, username, password, pathname } = new URL(url);
    this.waiting = [];
    this.buffer = Buffer.alloc(0);
    this.socket = net.connect(Number(port) || 6379, hostname || "127.0.0.1");
    this.socket.on("data", (chunk) => this.#take(chunk));
    this.socket.on("error", (error) => this.#fail(error));
    this.socket.on("close", () => this.#fail(new Error("Redis has closed the connection")));
    const first = [];
    if (password) first.push(this.call("AUTH", ...(username ? [username] : []), decodeURIComponent(password)));
    if (pathname.length > 1) first.push(this.call("SELECT", pathname.slice(1)));
    this.ready = Promise.all(first);
  }

  /** Send a command and return its answer: null, a number, a Buffer, or an array of these. */
  call(...args) {
    const parts = [Buffer.from(`*${args.length}\r\n`)];
    for (const arg of args) {
      const raw = Buffer.isBuffer(arg) ? arg : Buffer.from(String(arg));
      parts.push(Buffer.from(`$${raw.length}\r\n`), raw, Buffer.from("\r\n"));
    }
    return new Promise((resolve, reject) => {
      if (this.failure) return reject(this.failure);
      this.waiting.push({ resolve, reject });
      this.socket.write(Buffer.concat(parts));
    });
  }

  close() {
    this.socket.destroy();
  }

  #fail(error) {
    this.failure ??= error;
    for (const { reject } of this.waiting.splice(0)) reject(this.failure);
  }

  #take(chunk) {
    this.buffer = Buffer.concat([this.buffer, chunk]);
    for (;;) {
      const found = parse(this.buffer, 0);
      if (!found) return;
      this.buffer = this.buffer.subarray(found.end);
      const { resolve, reject } = this.waiting.shift();
      found.value instanceof Error ? reject(found.value) : resolve(found.value);
    }
  }
}

/** Return the answer that begins at `at` and where it ends, or null while it is not all there. */
function parse(data, at) {
  const line = data.indexOf("\r\n", at);
  if (line < 0) return null;
  const text = data.toString("utf8", at + 1, line);
  let end = line + 2;
  switch (String.fromCharCode(data[at])) {
    case "+": return { value: text, end };
    case "-": return { value: new Error(text), end };
    case ":": return { value: Number(text), end };
    case "$": {
      const size = Number(text);
      if (size < 0) return { value: null, end };
      if (data.length < end + size + 2) return null;
      return { value: data.subarray(end, end + size), end: end + size + 2 };
    }
    case "*": {
      if (Number(text) < 0) return { value: null, end };
      const value = [];
      for (let i = 0; i < Number(text); i++) {
        const item = parse(data, end);
        if (!item) return null;
        value.push(item.value);
        end = item.end;
      }
      return { value, end };
    }
    default: throw new Error("this is not Redis");
  }
}
