"""Whatever arrives, nothing crashes, hangs, is unpickled unasked or grows without bound.

``WOVE_WS_FUZZ_EXAMPLES`` is how many examples each test takes, other ones each time; by default
they are few and the same ones. ``tests/fuzz`` goes on with what these tests begin.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import fuzz_strategies as some
import fuzz_targets
import pytest
from fault_helpers import MIB, resident
from fuzz_targets import LOADED, PICKLE, SECRET
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_host import RawHost, signed
from service_thread import ServiceThread, fetch
from ws_peer import frame

EXAMPLES = int(os.environ.get("WOVE_WS_FUZZ_EXAMPLES", "0"))


def fuzzed(few: int) -> Any:
    """Take *few* examples, always the same, unless more are asked for."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """Fail if the tests of this module made the process much larger."""
    before = resident()
    yield
    assert resident() - before < 150 * MIB


# The handshake's answer


@fuzzed(120)
@given(some.statuses, some.lines, st.booleans(), st.sampled_from(["\r\n", "\n"]), st.binary(max_size=50))
@example("HTTP/1.1 101 Switching Protocols", [("X-Wove-Max-Message", ": ", "9" * 400)], True, "\r\n", b"")
@example("HTTP/1.1 503 x", [("Retry-After", ": ", "Mon, 01 Jan 0001 00:00:00 -2359")], False, "\r\n", b"")
@example("HTTP/1.1 503 x", [("Retry-After", ": ", f"Tue, 15 Nov 1995 8:2:{10**80} GMT")], False, "\r\n", b"")
def test_answers_to_the_handshake(
    status: str, fields: list[tuple[str, str, str]], good: bool, end: str, behind: bytes
) -> None:
    """A structured answer, with what an upgrade needs or without."""
    head = [status, *map("".join, [*(some.GOOD if good else []), *fields]), "", ""]
    fuzz_targets.response_head(end.join(head).encode("latin-1") + behind)


@fuzzed(100)
@given(st.binary(max_size=400), st.booleans())
@example(b"H" * 70_000, True)
@example(b"\r\n" * 40_000, True)
def test_bytes_in_place_of_an_answer(data: bytes, http: bool) -> None:
    """Anything, and anything that begins like HTTP."""
    fuzz_targets.response_head((b"HTTP/1.1 101 x\r\n" if http else b"") + data)


# Messages


@fuzzed(200)
@given(some.messages)
def test_messages_of_the_right_and_the_wrong_shape(message: Any) -> None:
    """For the host and for the worker: both read the other's messages and their own."""
    for ascii_only in (True, False):
        data = json.dumps(message, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        fuzz_targets.event_message(data)
        fuzz_targets.command_message(data)


@fuzzed(100)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_messages_of_any_bytes(data: bytes) -> None:
    """What is no JSON is one kind of error."""
    fuzz_targets.event_message(data)
    fuzz_targets.command_message(data)


@pytest.mark.parametrize("data", some.ODD, ids=range(len(some.ODD)))
def test_odd_messages(data: bytes) -> None:
    """Deep, huge, doubled, half a character."""
    fuzz_targets.event_message(data)
    fuzz_targets.command_message(data)


@pytest.mark.parametrize("kind", sorted({*some.KINDS} - {"task_result", "task_error"}))
def test_only_answers_are_unpickled(kind: str) -> None:
    """A pickle in any other message stays a text."""
    pickles = {f"{name}_pickle": PICKLE for name in ("result", "error", "exception", "args")}
    event = {"type": kind, "run_id": "r", **pickles}
    for message in (event, [event], {"events": [event]}):
        del LOADED[:]
        fuzz_targets.event_message(json.dumps(message).encode())
        fuzz_targets.command_message(json.dumps(message).encode())
        assert not LOADED


def test_the_planted_pickle_tells() -> None:
    """It would be seen if it were loaded."""
    event = {"type": "task_result", "run_id": "r", "result_pickle": PICKLE}
    fuzz_targets.event_message(json.dumps(event).encode())
    assert LOADED == ["planted"]


# Frames


@fuzzed(200)
@given(some.some_frames, st.binary(max_size=60) | some.claims, st.none() | st.integers(0, 600))
@example(frame(1, b"x", fin=False) * 2, b"", None)
@example(struct.pack("!BBQ", 0x81, 127, 1 << 40), b"x" * 100_000, None)
def test_streams_of_frames(data: bytes, behind: bytes, cut: int | None) -> None:
    """Frames in any order, with any bits, claims of any length, cut anywhere."""
    fuzz_targets.frame_stream((data + behind)[:cut])
    fuzz_targets.sealed_stream((data + behind)[:cut])


@fuzzed(200)
@given(st.binary(max_size=60))
@example(b"")
@example(bytes(40))
def test_sealed_messages(data: bytes) -> None:
    """Whatever is sent, and whatever is done to the bits of what was sealed."""
    fuzz_targets.sealed_message(data)


# A stranger at the worker's door


@fuzzed(200)
@given(some.header_pairs)
def test_headers_of_strangers(pairs: list[tuple[str, str]]) -> None:
    """None gets in without the secret, and none is an error of another kind."""
    data = "\n".join(f"{name}: {value}" for name, value in pairs).encode("utf-8", "surrogateescape")
    fuzz_targets.greeting(data)
    fuzz_targets.credentials(data)


# Configuration


@fuzzed(250)
@given(some.configs)
def test_configurations(config: dict[str, Any]) -> None:
    """A wrong one is a TypeError, a ValueError or a RuntimeError without what may be secret in it."""
    fuzz_targets.options_of(config)


@pytest.mark.parametrize("value", [{"security": {"secret": SECRET}}, [{"secret": SECRET}], ([SECRET],)])
@pytest.mark.parametrize("key", ["ping_interval", "ca_file", "insecure", "context_vars", "max_requeues"])
def test_a_configuration_in_the_wrong_place(key: str, value: Any) -> None:
    """What is nested where nothing belongs is not shown: it may be all of another configuration."""
    fuzz_targets.options_of({"url": "ws://localhost", key: value})


@fuzzed(50)
@given(some.odd_objects | some.scalars | st.dictionaries(some.scalars, some.scalars, max_size=2))
def test_what_is_no_configuration(config: Any) -> None:
    """Neither are these."""
    fuzz_targets.options_of(config)


# A whole service


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceThread]:
    with ServiceThread(security={"secret": SECRET}, max_message_bytes=64 * 1024) as running:
        yield running


def exchange(service: ServiceThread, data: bytes, *, request: bytes = b"") -> None:
    """Send *data*, after a *request* that is accepted, and read until the service has enough of it."""
    with socket.create_connection(("127.0.0.1", service.port), 30) as client, contextlib.suppress(OSError):
        client.sendall(request)
        assert not request or client.recv(65536).startswith(b"HTTP/1.1 101 ")
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass


@fuzzed(25)
@given(st.binary(max_size=300) | some.requests)
def test_a_service_goes_on_whatever_strangers_send(service: ServiceThread, data: bytes) -> None:
    """It answers its probe afterwards."""
    exchange(service, data)
    assert fetch(service.port, "/healthz").status == 200


def upgrade_request(service: ServiceThread) -> bytes:
    """Return the handshake of a host that has the secret."""
    key = base64.b64encode(os.urandom(16)).decode()
    fields = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key}
    fields |= {"Sec-WebSocket-Version": "13", **signed(service)}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    return f"GET /wove HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


@fuzzed(25)
@given(st.lists(some.harmless_frames, max_size=4).map(b"".join) | some.some_frames | st.binary(max_size=200))
def test_a_service_goes_on_whatever_hosts_send(service: ServiceThread, data: bytes) -> None:
    """Also those that have the secret: another host, which was there before, is served."""
    with RawHost(service, headers=signed(service)) as other:
        exchange(service, data, request=upgrade_request(service))
        other.run(lambda: 7)
        assert other.result() == 7
