"""What hypothesis builds for ``test_fuzz``: things that look right enough to get past the first check."""

from __future__ import annotations

import json
import struct

from fuzz_targets import ACCEPT, PICKLE, SECRET, without_shown
from hypothesis import strategies as st
from ws_peer import frame

from wove_ws_sync.options import LinkOptions

# The handshake's answer

NAMES = (
    *(
        "Upgrade",
        "connection",
        "Sec-WebSocket-Accept",
        "Sec-WebSocket-Protocol",
        "X-Wove-Sync",
        "X-Wove-Worker",
        "X-Wove-Server-Nonce",
        "X-Wove-Server-Signature",
    ),
    *("X-Wove-Max-Message", "X-Wove-Cancels", "Retry-After", "Date", "Set-Cookie", ""),
)
VALUES = (
    *("websocket", "Upgrade", ACCEPT, "1; f=resume,ack", "1;;;=,", "0" * 32, "1" * 30, "-1", "1e9", "nan"),
    *("Tue, 15 Nov 1994 08:12:31 GMT", "Tue, 99 Nov 99999 99:99:99 +9999", "\xb2", "a=b; Path=/", ""),
)
STATUSES = ("HTTP/1.1 101 Switching Protocols", "HTTP/1.1 503 x", "HTTP/1.0 200", "HTTP/2 101")
GOOD = (
    ("Upgrade", ": ", "websocket"),
    ("Connection", ": ", "Upgrade"),
    ("Sec-WebSocket-Accept", ": ", ACCEPT),
)
latin = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=30)
statuses = st.sampled_from(STATUSES) | latin
line = st.tuples(
    st.sampled_from(NAMES) | latin,
    st.sampled_from([": ", ":", " : ", ""]),
    st.sampled_from(VALUES) | latin,
)
lines = st.lists(line, max_size=8)

# Messages

KINDS = (
    *("task_result", "task_error", "task_cancelled", "task_started", "heartbeat", "log", "progress"),
    *("resume_state", "draining", "run_task", "cancel_task", "shutdown", "resume", "event_ack"),
    *("attach_task", "detach_task", "task_progress", ""),
)
KEYS = (
    *("run_id", "task_id", "events", "result", "result_pickle", "error", "error_pickle", "exception"),
    *("exception_pickle", "callable_pickle", "args_pickle", "delivery", "delivery_cancel_mode", "run_ids"),
    *("more", "delivery_heartbeat_seconds", "delivery_orphan_policy", "delivery_idempotency_key", "done"),
    *("total", "message", "level", "alive", "finished", "unknown", "timeout"),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308, float("inf"), float("nan"), -0.0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*KINDS, PICKLE, "r", "\ud800", "best_effort", "require_ack", "detach"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
frames_like = st.builds(
    lambda kind, run_id, fields: {"type": kind, "run_id": run_id, **fields},
    st.sampled_from(KINDS),
    st.sampled_from(["r", "r", "r", "", 7, None]),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=5),
)
messages = (
    frames_like
    | st.lists(frames_like, max_size=3)
    | st.fixed_dictionaries({"events": st.lists(frames_like, max_size=3) | values})
    | values
)
ODD = (
    b"",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 5_000,
    b'{"type":"log","type":"task_result","run_id":"r","run_id":7}',
    b'"\\ud800"',
    b"\xff\xfe[\x00]\x00",
    b"\xef\xbb\xbf[]",
    b"[1e999, -1e999, NaN, Infinity]",
    b'{"type":"task_error","run_id":"r","error_pickle":"' + PICKLE.encode() + b'","result_pickle":"x"}',
)

# Frames

some_frames = st.lists(
    st.builds(
        frame,
        st.integers(0, 15),
        st.binary(max_size=140) | st.text(max_size=40).map(str.encode),
        fin=st.booleans(),
        rsv=st.sampled_from([0, 0, 0, 0, 1, 4]),
        mask=st.sampled_from([b"", b"", b"", b"abcd"]),
    ),
    max_size=6,
).map(b"".join)
claims = st.builds(
    lambda first, length: struct.pack("!BBQ", first, 127, length),
    st.sampled_from([0x81, 0x01, 0x80, 0x89]),
    st.integers(0, 2**64 - 1),
)
# What carries a pickle that could be loaded is left out: a host with the secret may run code.
harmless_frames = messages.filter(lambda message: PICKLE not in json.dumps(message)).map(
    lambda message: frame(1, json.dumps(message).encode(), mask=b"\1\2\3\4")
)

# Requests to a worker service

SIGNED_NAMES = (
    *("X-Wove-Key", "X-Wove-Timestamp", "X-Wove-Nonce", "X-Wove-Signature", "Authorization"),
    *("X-Wove-Host-Nonce", "X-Wove-Host-Proof", "Sec-WebSocket-Key"),
)
OUR_NAMES = ("X-Wove-Sync", "X-Wove-Host", "X-Wove-Max-Message", "X-Wove-Resume-Window")
HEADER_VALUES = (
    *("default", "1764000000", "9" * 15, "9" * 16, "\u0661", "nan", "1e3", "-1", "v1=", "v1=" + "0" * 64),
    *("Bearer x", "Basic eDp5", "Basic \udc80", "1", "1; f=resume,ack,drain,progress", "1;f=;f=", "0" * 32),
    *("inf", "1e400", " "),
)
wire_text = st.binary(max_size=40).map(
    lambda raw: raw.replace(b"\n", b"").decode("utf-8", "surrogateescape"),
)
header_pairs = st.lists(
    st.tuples(st.sampled_from([*SIGNED_NAMES, *OUR_NAMES]), wire_text | st.sampled_from(HEADER_VALUES)),
    max_size=9,
)


def _request(method: str, path: str, fields: list[tuple[str, str, str]], end: str) -> bytes:
    return ("\r\n".join([f"{method} {path} HTTP/1.1", *map("".join, fields)]) + end).encode("latin-1")


requests = st.builds(
    _request,
    st.sampled_from(["GET", "POST", "HEAD", "", "PRI"]),
    st.sampled_from(["/wove", "/", "/status.json?hold", "/metrics", "*", "http://x/wove", "/" + "a" * 9000]),
    lines,
    st.sampled_from(["\r\n", "\r\n\r\n", "", "\r\n\r\nxxxx"]),
)

# Configuration

OPTION_NAMES = sorted({*LinkOptions.__slots__, "security", "url", "headers"} | {"pin", "URL", ""})
PIECES = (
    *(SECRET, "ws://", "wss://", "http://", "localhost", "@", ":", "/", "?", "#", "\\", "\0", "é", "\ud800"),
    *("env:", "%", "[::1]", "signed", "bearer", "\r\n", "none"),
)
SECURITY_KEYS = (
    "type",
    "secret",
    "token",
    "key",
    "keys",
    "secret_env",
    "token_env",
    "clock_skew_seconds",
    "x",
)
odd_objects = st.sampled_from([object(), b"x", 1j, {1, 2}, print, float("nan"), 10**400, [[]], range(3)])
secretive = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
security_like = st.dictionaries(
    st.sampled_from(SECURITY_KEYS) | st.text(max_size=3),
    secretive | scalars | odd_objects,
    max_size=4,
)
option_values = scalars | odd_objects | secretive | st.lists(secretive, max_size=2) | security_like
configs = st.dictionaries(
    st.sampled_from(OPTION_NAMES) | st.text(max_size=5),
    option_values,
    max_size=6,
).map(
    lambda config: {
        **({"url": "ws://localhost/"} if len(config) % 2 else {}),
        **without_shown(config),
    }
)
