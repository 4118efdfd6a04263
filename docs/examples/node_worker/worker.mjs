// A worker service for wove_ws_sync in JavaScript, without pickles on either side.
//
//     WOVE_WORKER_SECRET=... node worker.mjs [PORT]
//
// A host reaches it with executor_config {"url": ..., "security": "env:WOVE_WORKER_SECRET",
// "result_format": "json"}. It prints its URL when it is ready, and listens on this machine only: TLS
// is for a reverse proxy in front of it. The protocol is described in docs/reference/wire-protocol.

import { createHash, createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import http from "node:http";

import tasks from "./tasks.mjs";
import { WebSocketConnection, accept } from "./websocket.mjs";

const PATH = "/wove";
const MAX_MESSAGE = 16 * 1024 * 1024;
const CLOCK_SKEW = 300; // seconds
const INSTANCE = randomBytes(16).toString("hex");

const secret = process.env.WOVE_WORKER_SECRET;
if (!secret) {
  console.error("WOVE_WORKER_SECRET is not set: a worker service without a secret obeys everybody.");
  process.exit(11);
}

// -- who may connect -----------------------------------------------------------------------

const nonces = new Map(); // each with the moment from which its timestamp is too old anyway

/** Tells whether the handshake is signed with our secret, now, and for the first time. */
function isSigned(request) {
  const field = (name) => request.headers[`x-wove-${name}`] ?? "";
  const [timestamp, nonce] = [field("timestamp"), field("nonce")];
  const now = Date.now() / 1000;
  if (!/^\d{1,12}$/.test(timestamp) || Math.abs(now - Number(timestamp)) > CLOCK_SKEW || !nonce) return false;
  const bodyHash = createHash("sha256").update("").digest("hex");
  const canonical = ["wove-v1", "websocket", request.url, timestamp, nonce, bodyHash].join("\n");
  const expected = Buffer.from(`v1=${createHmac("sha256", secret).update(canonical).digest("hex")}`);
  const given = Buffer.from(field("signature"));
  if (given.length !== expected.length || !timingSafeEqual(given, expected)) return false;
  for (const [known, until] of nonces) if (until < now) nonces.delete(known);
  if (nonces.has(nonce) || nonces.size >= 100_000) return false;
  nonces.set(nonce, Number(timestamp) + CLOCK_SKEW);
  return true;
}

function refuse(socket, status) {
  socket.end(`HTTP/1.1 ${status} ${http.STATUS_CODES[status]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n`);
}

function upgrade(request, socket, early) {
  socket.on("error", () => socket.destroy());
  const key = request.headers["sec-websocket-key"];
  if (request.url.split("?")[0] !== PATH) return refuse(socket, 404);
  if (request.headers["sec-websocket-version"] !== "13" || !key) return refuse(socket, 400);
  if (!isSigned(request)) return refuse(socket, 401);
  const [version, parameters = ""] = (request.headers["x-wove-sync"] ?? "").split(";");
  const offered = parameters.trim().replace(/^f=/, "").split(",");
  const used = ["progress", "json"].filter((feature) => offered.includes(feature));
  const limit = Number(request.headers["x-wove-max-message"]) || 1024 * 1024 - 1;
  const headers = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"];
  headers.push(`Sec-WebSocket-Accept: ${accept(key)}`);
  if (version.trim() === "1") {
    headers.push(`X-Wove-Sync: 1${used.length ? `; f=${used}` : ""}`, `X-Wove-Max-Message: ${MAX_MESSAGE}`);
    headers.push(`X-Wove-Worker: ${INSTANCE}`, "X-Wove-Cancels: coroutines");
  }
  socket.write(`${headers.join("\r\n")}\r\n\r\n`);
  const host = new Host(socket, limit, used);
  if (early.length) host.connection.receive(early);
}

// -- one host ------------------------------------------------------------------------------

class Host {
  constructor(socket, limit, features) {
    Object.assign(this, { limit, features });
    this.runs = new Map();
    this.connection = new WebSocketConnection(socket, {
      maxMessage: MAX_MESSAGE,
      onMessage: (text) => this.obey(text),
      onEnd: () => this.abortAll(),
    });
  }

  obey(text) {
    let command;
    try {
      command = JSON.parse(text);
    } catch {
      return this.connection.close(1007, "not JSON");
    }
    if (command?.type === "shutdown") this.abortAll();
    if (typeof command?.run_id !== "string") return;
    if (command.type === "run_task" && !this.runs.has(command.run_id)) this.start(command);
    if (command.type === "cancel_task") this.runs.get(command.run_id)?.cancel(command.delivery_cancel_mode);
  }

  start(command) {
    const run = new Run(this, command);
    // Nothing of it is read: this program could not, and would not run what another one has made.
    if ("callable_pickle" in command || "args_pickle" in command) {
      return run.fail("PickleRefused", "This worker takes calls by name only: set result_format='json'.");
    }
    const { callable, positional = [], args = {} } = command;
    const wellFormed = Array.isArray(positional) && args !== null && typeof args === "object" && !Array.isArray(args);
    if (!wellFormed) return run.fail("MalformedFrame", "positional must be a list, args an object.");
    // Own properties only: "constructor" is no task.
    if (typeof callable !== "string" || !Object.hasOwn(tasks, callable)) {
      return run.fail("UnknownTask", `This worker has no task ${JSON.stringify(callable)}.`);
    }
    this.runs.set(run.id, run);
    run.execute(tasks[callable], positional, args);
  }

  abortAll() {
    for (const run of this.runs.values()) run.cancel("best_effort");
  }
}

// -- one run -------------------------------------------------------------------------------

class Run {
  constructor(host, command) {
    this.host = host;
    this.id = command.run_id;
    this.taskId = command.task_id;
    this.delivery = command.delivery ?? {};
    this.abort = new AbortController();
    this.ended = false;
  }

  say(type, fields = {}) {
    const event = JSON.stringify({ type, run_id: this.id, task_id: this.taskId, ...fields });
    if (Buffer.byteLength(event) <= this.host.limit) {
      this.host.connection.send(event);
    } else if (type === "task_result") {
      this.say("task_error", failure("ResultTooLarge", `This host accepts ${this.host.limit} bytes.`, "result"));
    } else if (type === "task_error") {
      this.say(type, failure(fields.error.kind, "The error is too long for this host.", fields.error.source));
    }
  }

  end(type, fields) {
    if (this.ended) return; // a run ends once: what comes after a cancel is dropped
    this.ended = true;
    clearInterval(this.beat);
    this.host.runs.delete(this.id);
    this.say(type, fields);
  }

  fail(kind, message, source = "executor", traceback = "") {
    this.end("task_error", failure(kind, message, source, traceback));
  }

  async execute(task, positional, args) {
    const interval = Number(this.delivery.delivery_heartbeat_seconds);
    if (interval > 0) this.beat = setInterval(() => this.say("heartbeat"), Math.max(10, (interval * 1000) / 3));
    this.say("task_started");
    const progress = (done, total = null, message = "") => {
      if (!this.ended && this.host.features.includes("progress")) this.say("progress", { done, total, message });
    };
    const log = (level, message) => {
      if (!this.ended) this.say("log", { level, message, logger: "tasks", created: Date.now() / 1000 });
    };
    try {
      const result = (await task({ positional, args, signal: this.abort.signal, progress, log })) ?? null;
      const fault = whyNotJSON(result);
      if (fault) this.fail("ResultNotJSON", `The task returned ${fault}, which JSON does not carry.`, "result");
      else this.end("task_result", { result });
    } catch (error) {
      if (this.abort.signal.aborted) this.end("task_cancelled");
      else this.fail(error?.name ?? "Error", String(error?.message ?? error), "task", String(error?.stack ?? ""));
    }
  }

  /** A task that is asked for an acknowledgement ends by itself; otherwise nobody waits for it. */
  cancel(mode = this.delivery.delivery_cancel_mode) {
    this.abort.abort();
    if (mode !== "require_ack") this.end("task_cancelled");
  }
}

function failure(kind, message, source, traceback = "") {
  return { error: { kind, message, traceback, retryable: false, source, adapter: "websocket" } };
}

/** Returns what JSON.stringify would leave out or turn into something else; "" if there is nothing. */
function whyNotJSON(value, depth = 100) {
  if (value === null || ["boolean", "string"].includes(typeof value)) return "";
  if (typeof value === "number") return Number.isFinite(value) ? "" : String(value);
  if (typeof value !== "object") return `a value of the type ${typeof value}`;
  if (depth === 0) return "something that nests too deep";
  const inside = (items) => items.map((item) => whyNotJSON(item, depth - 1)).find(Boolean) ?? "";
  if (Array.isArray(value)) return inside(value);
  if (Object.getPrototypeOf(value) !== Object.prototype) return `a ${value.constructor?.name ?? "strange object"}`;
  return inside(Object.values(value));
}

// -- the server ----------------------------------------------------------------------------

const server = http.createServer((request, response) => {
  response.writeHead(426, { "Content-Length": 0 }).end();
});
server.on("upgrade", upgrade);
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", () => {
  console.log(`ws://127.0.0.1:${server.address().port}${PATH}`);
});
process.on("SIGTERM", () => process.exit(0));
