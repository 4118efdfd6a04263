"""What ``check`` does once it is connected: extensions, round trips, a real run, the clocks.

Owns: these steps, their causes and remedies. Never: has a task whose module the worker would
have to have; ``time.time`` is everywhere.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import statistics
import struct
import time
from typing import Any

import websocket
import wove
from wove.environment import EnvironmentExecutionError

from .. import frames
from .._framing import FrameReader, Violation
from .._wire import EndOfStream
from ..errors import ConnectionLost, DeliveryTimeout, HandshakeRejected, PayloadError
from ..futures import WebSocketExecutor
from ..options import LinkOptions
from ..security import link_options
from ..session import open_session
from ..timing import Clock, Deadline
from ..transport import TransportClosed
from ._check_dial import Dial
from ._check_report import Step

__all__ = ["Offset", "clock", "extensions", "from_date", "goodbye", "round_trips", "run"]

_PINGS = 5
# A result that is not there this long after its deadline will not come.
_GRACE = 5.0
_OURS = (
    "x-wove-sync",
    "x-wove-max-message",
    "x-wove-worker",
    "x-wove-cancels",
    "x-wove-server-nonce",
    "x-wove-server-signature",
)
_CANCELS = frozenset({"queued", "coroutines", "calls"})
_BY_NAME = "it takes no pickles, only calls by name (result_format='json'), and has answered the run so"
_LOST_CODES = {
    1001: "It stops or restarts: try again.",
    1008: "It refuses this host: check --security on both sides.",
    1009: "A message was too large: see --max-message-bytes of the worker.",
    1011: "It failed: see its log.",
    1012: "It restarts: try again.",
    1013: "It is overloaded: try again later.",
}


@dataclasses.dataclass(frozen=True)
class Offset:
    """By how many seconds the worker's clock is ahead of ours, give or take ``error``."""

    ahead: float
    error: float
    source: str


def extensions(seen: Dial) -> Step:
    """Say what the worker service answered of itself."""
    assert seen.transport is not None
    features, limit = seen.transport.features, seen.transport.peer_max_message_bytes
    others = sorted(name for name in seen.answer if name.startswith("x-wove-") and name not in _OURS)
    facts: dict[str, Any] = {
        "foreign": features is None,
        "features": sorted(features or ()),
        "max_message_bytes": limit,
        "worker": seen.transport.worker or None,
        "cancels": None if seen.transport.cancels is None else sorted(seen.transport.cancels & _CANCELS),
        "other_headers": others,
    }
    if features is None:
        detail = "none: a worker service of another make (no X-Wove-Sync), spoken to in plain Wove"
        remedy = (
            "Nothing to do if that is so: runs end with their connection and heartbeats get twice the time. "
            "If it is wove-ws-sync worker, something between drops its headers."
        )
        return Step(name="extensions", status="warn", detail=detail, remedy=remedy, facts=facts)
    detail = ", ".join(sorted(features)) or "none in common"
    if limit is not None:
        detail += f"; messages up to {_size(limit)}"
    if facts["cancels"] is not None:
        detail += f"; a cancel stops {', '.join(facts['cancels']) or 'nothing for certain'}"
    if seen.transport.worker:
        detail += f"; instance {seen.transport.worker[:8]}"
    if others:
        detail += f"; also {', '.join(others)}"
    return Step(name="extensions", status="ok", detail=detail, facts=facts)


def _size(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count % 2**20 == 0 else f"{count:,} bytes"


# -- pings on the connection of the dial ---------------------------------------------------


def round_trips(seen: Dial, clock: Clock) -> Step:
    """Ping a few times, all within ``open_timeout`` seconds."""
    transport, timeout = seen.transport, seen.options.open_timeout
    assert transport is not None
    began, times = time.perf_counter(), []
    seen.wire.deadline = Deadline.after(timeout, clock.monotonic())
    reader = FrameReader(seen.wire, seen.options.max_message_bytes)
    try:
        for _ in range(_PINGS):
            pinged = time.perf_counter()
            transport.ping()
            while not transport.pump():
                seen.wire.wait_writable(timeout)
            _await_pong(reader)
            times.append(time.perf_counter() - pinged)
    except (OSError, TransportClosed, Violation) as exc:
        cause, remedy = _unanswered(exc, timeout)
        seconds = time.perf_counter() - began
        return Step(name="roundtrip", status="fail", detail=cause, remedy=remedy, seconds=seconds)
    low, middle = min(times), statistics.median(times)
    return Step(
        name="roundtrip",
        status="ok",
        detail=f"{len(times)} pings: {_ms(low)} at least, {_ms(middle)} in the median",
        seconds=time.perf_counter() - began,
        facts={"pings": len(times), "min_seconds": low, "median_seconds": middle},
    )


def _await_pong(reader: FrameReader) -> None:
    while True:
        opcode, _, payload = reader.next_frame()
        if opcode == websocket.ABNF.OPCODE_PONG:
            return
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            code = struct.unpack("!H", payload[:2])[0] if payload else None
            reason = bytes(payload[2:]).decode("utf-8", "replace")
            raise TransportClosed("closed", close_code=code, reason=reason)


def _unanswered(exc: Exception, timeout: float) -> tuple[str, str]:
    if isinstance(exc, TransportClosed) and str(exc) == "closed":
        return _closed(exc.close_code, exc.reason, "right after the handshake")
    if isinstance(exc, TimeoutError):
        cause = f"no pong within {timeout:g} s: connections would be cut after ping_interval and pong_timeout"
        return (
            cause,
            "Check that the worker service is not stuck and that proxies let pings pass.",
        )
    if isinstance(exc, Violation):
        return (
            f"the worker service broke the websocket protocol: {exc.reason}",
            "See what is between, and its log.",
        )
    if isinstance(exc, EndOfStream | TransportClosed):
        return "the worker service ended the connection right after the handshake", "See its log."
    return (
        f"the connection broke: {getattr(exc, 'strerror', None) or exc}",
        "See the log of the worker service.",
    )


def _closed(code: int | None, reason: str, when: str) -> tuple[str, str]:
    with_what = f" with code {code}" if code is not None else ""
    because = f" ({reason})" if reason else ""
    return (
        f"the worker service closed the connection{with_what}{because} {when}",
        _LOST_CODES.get(code or 0, "See the log of the worker service and of the proxies between."),
    )


def goodbye(seen: Dial) -> None:
    """End the connection of the dial as a host does that wants nothing more."""
    transport = seen.transport
    if transport is None:
        return
    with contextlib.suppress(TransportClosed, OSError):
        transport.post(frames.encode({"type": "shutdown"}))
        transport.close(1000, "")
        transport.pump()
    transport.abort()
    transport.dispose()


# -- a run, as any program has it ------------------------------------------------------------


def run(config: dict[str, Any], timeout: float) -> tuple[Step, Offset | None]:
    """Run ``time.time`` there through an executor; return the step, and what it tells of the clock."""
    began = time.perf_counter()
    # No waiting for a connection that broke: what is wrong is to be seen.
    own = {**config, "resume_window": 0.0, "idle_timeout": 0.0}
    pool = WebSocketExecutor(**own, delivery_timeout=timeout, delivery_orphan_policy="fail")
    session = open_session(link_options(own))
    try:
        session.connect()  # a run would wait for a worker service that is not to be reached
        connected = pool.submit(time.time).result(timeout + _GRACE)
        first = time.perf_counter() - began
        before, again = time.time(), time.perf_counter()
        there = pool.submit(time.time).result(timeout + _GRACE)
        warm, after = time.perf_counter() - again, time.time()
        if not isinstance(there, float) or not isinstance(connected, float):
            raise TypeError(f"time.time returned a {type(there).__name__}")
    except Exception as exc:
        if isinstance(exc, EnvironmentExecutionError) and exc.payload.get("kind") == "PickleRefused":
            return Step(name="run", status="skip", detail=_BY_NAME), None
        cause, remedy = _failed_run(exc, timeout)
        seconds = time.perf_counter() - began
        facts = {"error": type(exc).__name__}
        return Step(
            name="run", status="fail", detail=cause, remedy=remedy, seconds=seconds, facts=facts
        ), None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        session.close()
    step = Step(
        name="run",
        status="ok",
        detail=f"{_ms(first)} with its connection, {_ms(warm)} over the same one again",
        seconds=first + warm,
        facts={"first_seconds": first, "warm_seconds": warm},
    )
    return step, Offset(there - (before + after) / 2, (after - before) / 2, "run")


def _failed_run(exc: Exception, timeout: float) -> tuple[str, str]:
    if isinstance(exc, ConnectionLost):
        return _closed(exc.close_code, exc.reason, "during the run")
    if isinstance(exc, DeliveryTimeout | concurrent.futures.TimeoutError):
        cause = f"no result within {timeout:g} s"
        return (
            cause,
            "All its workers may be busy (--workers), or it is stuck: see its log; --timeout waits longer.",
        )
    if isinstance(exc, HandshakeRejected | OSError):
        return (
            f"a second connection failed: {exc}",
            "Something between may allow one connection at a time.",
        )
    if isinstance(exc, PayloadError):
        remedy = "Compare the versions of Python and cloudpickle on both sides."
        return f"the result could not be unpickled: {exc}", remedy
    if isinstance(exc, EnvironmentExecutionError):
        cause = f"the worker service could not run it: {exc.payload.get('kind')}: {exc}"
        return cause, "See the log of the worker service."
    cause = f"it raised {type(exc).__name__}: {exc}"
    return (
        cause,
        "See the log of the worker service, and compare the versions on both sides.",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000.0:.1f} ms"


# -- clocks --------------------------------------------------------------------------------


def from_date(seen: Dial) -> Offset | None:
    """Return what the Date header of the answer tells of the worker's clock; it has whole seconds."""
    try:
        moment = email.utils.parsedate_to_datetime(seen.answer.get("date", ""))
    except (ValueError, TypeError, IndexError):
        return None
    if moment.tzinfo is None:  # -0000, which HTTP does not have
        moment = moment.replace(tzinfo=datetime.UTC)
    # It was made between our request and the answer, up to a second after what it says.
    waited = seen.moments["answer"] - max(at for stage, at in seen.moments.items() if stage != "answer")
    return Offset(moment.timestamp() + 0.5 - (seen.answered_at - waited / 2), 0.5 + waited / 2, "date")


def clock(offset: Offset | None, options: LinkOptions, *, refused: bool) -> Step:
    """Compare the clocks; *refused* says that the handshake was not authenticated."""
    if offset is None:
        detail = "unknown: no run returned, and the answer to the handshake, if any, has no date"
        return Step(name="clock", status="skip", detail=detail)
    security = wove.NetworkExecutorSecurity.from_config(options.security.value)
    limit, signed = float(security.clock_skew_seconds), security.mode == "signed"
    apart = max(0.0, abs(offset.ahead) - offset.error)
    side = "ahead of" if offset.ahead > 0 else "behind"
    detail = f"the worker's clock is {abs(offset.ahead):.1f} s {side} this one"
    if apart == 0.0:
        detail = "no difference that could be measured"
    detail += f" (give or take {offset.error:.3f} s)"
    facts = {"ahead_seconds": offset.ahead, "error_seconds": offset.error, "source": offset.source}
    remedy = ""
    if signed:
        detail += f"; signed handshakes allow {limit:g} s"
        facts["limit_seconds"] = limit
        if apart > limit / 2:
            remedy = "Set both clocks, best by NTP, or signatures will be taken for outdated ones."
            if refused and apart > limit:
                remedy = "This is why the handshake was not accepted: set both clocks, best by NTP."
    return Step(name="clock", status="warn" if remedy else "ok", detail=detail, remedy=remedy, facts=facts)
