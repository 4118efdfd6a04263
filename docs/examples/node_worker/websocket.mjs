// The server's side of RFC 6455, as far as Wove needs it: text messages, fragments, ping and close.
// It is here so that this example needs Node.js alone; with the package "ws" it is one import.

import { createHash } from "node:crypto";

const [CONTINUATION, TEXT, CLOSE, PING, PONG] = [0x0, 0x1, 0x8, 0x9, 0xa];
const MOST_UNSENT = 64 * 1024 * 1024;

export function accept(key) {
  return createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
}

class Violation extends Error {
  constructor(code, reason) {
    super(reason);
    this.code = code;
  }
}

export class WebSocketConnection {
  /** Calls onMessage(text) for each message, and onEnd() once. */
  constructor(socket, { maxMessage, onMessage, onEnd }) {
    Object.assign(this, { socket, maxMessage, onMessage });
    this.chunks = [];
    this.buffered = 0;
    this.fragments = null; // of the message that has begun
    this.fragmentBytes = 0;
    this.closing = false;
    socket.setNoDelay(true);
    socket.on("data", (chunk) => this.receive(chunk));
    socket.on("error", () => socket.destroy());
    socket.on("end", () => socket.end());
    socket.on("close", onEnd);
  }

  send(text) {
    if (this.closing || this.socket.destroyed) return;
    this.write(TEXT, Buffer.from(text, "utf8"));
    if (this.socket.writableLength > MOST_UNSENT) this.socket.destroy(); // a host that does not read
  }

  close(code, reason = "") {
    if (this.closing) return;
    const text = Buffer.from(reason.slice(0, 100), "utf8");
    const payload = Buffer.alloc(2 + text.length);
    payload.writeUInt16BE(code);
    text.copy(payload, 2);
    this.write(CLOSE, payload);
    this.closing = true;
    this.socket.end();
    setTimeout(() => this.socket.destroy(), 2000).unref();
  }

  write(opcode, payload) {
    const extended = payload.length < 126 ? 0 : payload.length < 65536 ? 2 : 8;
    const head = Buffer.alloc(2 + extended);
    head[0] = 0x80 | opcode;
    head[1] = extended === 0 ? payload.length : extended === 2 ? 126 : 127;
    if (extended === 2) head.writeUInt16BE(payload.length, 2);
    if (extended === 8) head.writeBigUInt64BE(BigInt(payload.length), 2);
    this.socket.cork();
    this.socket.write(head);
    this.socket.write(payload);
    this.socket.uncork();
  }

  receive(chunk) {
    this.chunks.push(chunk);
    this.buffered += chunk.length;
    try {
      while (!this.closing && this.readFrame());
    } catch (error) {
      if (!(error instanceof Violation)) throw error;
      this.close(error.code, error.message);
    }
  }

  /** Returns the first `size` bytes that have arrived, as one buffer; null if there are fewer. */
  peek(size) {
    if (this.buffered < size) return null;
    if (this.chunks[0].length < size) this.chunks = [Buffer.concat(this.chunks)];
    return this.chunks[0].subarray(0, size);
  }

  drop(size) {
    this.chunks[0] = this.chunks[0].subarray(size);
    this.buffered -= size;
    if (this.chunks[0].length === 0) this.chunks.shift();
  }

  /** Deals with one frame; returns false if it has not arrived whole. */
  readFrame() {
    let head = this.peek(2);
    if (head === null) return false;
    const [first, second] = head;
    const opcode = first & 0x0f;
    const extended = { 126: 2, 127: 8 }[second & 0x7f] ?? 0;
    head = this.peek(2 + extended + 4);
    if (first & 0x70 || !(second & 0x80)) throw new Violation(1002, "a reserved bit, or no mask");
    if (head === null) return false;
    const short = second & 0x7f;
    const size = extended === 2 ? head.readUInt16BE(2) : extended ? Number(head.readBigUInt64BE(2)) : short;
    const whole = Boolean(first & 0x80);
    if (opcode >= 0x8 && (size > 125 || !whole)) throw new Violation(1002, "a control frame of that kind");
    // Before anything is kept of it.
    if (size + this.fragmentBytes > this.maxMessage) throw new Violation(1009, "the message is too large");
    const frame = this.peek(head.length + size);
    if (frame === null) return false;
    const mask = Buffer.from(frame.subarray(head.length - 4, head.length));
    const payload = Buffer.from(frame.subarray(head.length));
    this.drop(frame.length);
    for (let at = 0; at < size; at++) payload[at] ^= mask[at & 3];
    this.obey(opcode, payload, whole);
    return true;
  }

  obey(opcode, payload, whole) {
    if (opcode === PING) this.write(PONG, payload);
    else if (opcode === CLOSE) this.close(payload.length >= 2 ? payload.readUInt16BE(0) : 1000);
    else if (opcode === TEXT || opcode === CONTINUATION) this.join(opcode, payload, whole);
    else if (opcode !== PONG) throw new Violation(opcode === 0x2 ? 1003 : 1002, "not a text message");
  }

  join(opcode, payload, whole) {
    if ((opcode === TEXT) !== (this.fragments === null)) throw new Violation(1002, "fragments out of order");
    this.fragments ??= [];
    this.fragments.push(payload);
    this.fragmentBytes += payload.length;
    if (!whole) return;
    const message = Buffer.concat(this.fragments);
    this.fragments = null;
    this.fragmentBytes = 0;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(message);
    } catch {
      throw new Violation(1007, "not UTF-8");
    }
    this.onMessage(text);
  }
}
