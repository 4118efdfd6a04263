"""A man in the middle gets nothing executed and nothing delivered, and harms no run beyond its policy."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
import wove
from fault_helpers import WAIT, link_of, until
from middle import Frame, Middle, Tape
from raw_host import RawHost
from websockets.exceptions import InvalidStatus

from wove_ws_sync import ConnectionLost, HandshakeRejected, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

TEXT, CLOSE = 1, 8
SECRET = "a secret of this test, 0123456789"


def worker_with_secret() -> LoopbackWorker:
    """Return a worker service that knows the secret of its siblings."""
    return LoopbackWorker(
        workers=4, security=False, args=["--security", "env:SIBLINGS"], env={"SIBLINGS": SECRET}
    )


def port_of(worker: LoopbackWorker) -> int:
    return int(worker.url.rpartition(":")[2].partition("/")[0])


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with worker_with_secret() as running:
        yield running


@pytest.fixture
def middle(worker: LoopbackWorker) -> Iterator[Middle]:
    with Middle(port_of(worker)) as listening:
        yield listening


def executor(middle: Middle, **config: Any) -> WebSocketExecutor:
    return WebSocketExecutor(
        f"ws://127.0.0.1:{middle.port}/wove",
        security={"type": "signed", "secret": SECRET},
        **{"seal": "require", "worker_auth": "require", "reconnect_initial_delay": 0.01, **config},
    )


class Once:
    """Do something to one frame, or to two that follow each other; let everything else pass."""

    def __init__(self, deed: str, wait_for: int) -> None:
        self.done = False
        self._deed = deed
        self._left = wait_for
        self._held: Frame | None = None

    def __call__(self, frame: Frame) -> list[Frame]:
        if self._held is not None:
            held, self._held, self.done = self._held, None, True
            return [frame, held]
        if self._left:
            self._left -= 1
            return [frame]
        if self.done:
            return [frame]
        if self._deed == "swap":
            self._held = frame
            return []
        self.done = True
        if self._deed == "flip":
            return [frame.flipped()]
        if self._deed == "flip the tag":
            return [frame.flipped(-1)]
        if self._deed == "drop":
            return []
        if self._deed == "repeat":
            return [frame, frame]
        assert self._deed == "unsealed"
        return [frame._replace(head=bytes([0x80 | TEXT]) + frame.head[1:])]


DEEDS = ["flip", "flip the tag", "drop", "repeat", "swap", "unsealed"]


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("way", ["up", "down"])
def test_f42_a_changed_message_ends_the_connection_and_hurts_no_run(
    middle: Middle, tmp_path: Path, way: str, deed: str
) -> None:
    """Everything that waits is delivered again, and every result is the one that the task returned."""
    once = Once(deed, wait_for=1)
    with executor(middle, delivery_orphan_policy="requeue", max_requeues=10) as pool:
        # One after the other, or several events would share a message.
        first = [pool.submit(ledger.record, str(tmp_path), f"a{number}", number) for number in range(2)]
        assert [future.result(WAIT) for future in first] == [0, 1]
        # A drop shows by the next message, so others must follow.
        setattr(middle, way, once)
        more = []
        for number in range(200):
            if once.done and link_of(pool).stats()["losses"]:
                break
            more.append(pool.submit(ledger.record, str(tmp_path), f"b{number}", number))
            with contextlib.suppress(TimeoutError):
                more[-1].result(0.2)
        assert [future.result(WAIT) for future in more] == list(range(len(more)))
        until(lambda: link_of(pool).stats()["losses"] == 1)
    assert once.done
    # The worker service is the same one: what was delivered twice was executed once.
    assert set(ledger.executions(tmp_path).values()) == {1}


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_run_that_is_not_to_be_delivered_again_is_told(middle: Middle, way: str) -> None:
    """The loss is one like any other, and its close code is 1008."""
    setattr(middle, way, Once("flip", wait_for=0))
    with executor(middle, delivery_orphan_policy="fail", resume_window=0.0) as pool:
        with pytest.raises(ConnectionLost) as caught:
            pool.submit(ledger.record, "/nowhere", "never", None).result(WAIT)
        assert caught.value.close_code == 1008
        assert "sealed message" in caught.value.reason


def test_messages_of_another_connection_do_not_open(middle: Middle, tmp_path: Path) -> None:
    """Two connections of one host, with one secret: what one sealed is nothing to the other."""
    swapped: list[Frame] = []

    def steal(frame: Frame) -> list[Frame]:
        swapped.append(frame)
        return [frame]

    def plant(frame: Frame) -> list[Frame]:
        return [swapped[0]] if middle.up is plant and len(middle.tapes) == 2 else [frame]

    middle.up = steal
    with executor(middle) as pool:
        assert pool.submit(ledger.record, str(tmp_path), "mine", 1).result(WAIT) == 1
        middle.up = plant
        with executor(middle, ping_interval=9.5, delivery_orphan_policy="fail", resume_window=0.0) as other:
            with pytest.raises(ConnectionLost):
                other.submit(ledger.record, str(tmp_path), "other", 2).result(WAIT)
    assert ledger.executions(tmp_path) == {"mine": 1}


# -- the handshake -------------------------------------------------------------------------


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda head: re.sub(rb"(?im)^%b:.*\r\n" % name.encode(), b"", head)


def replaced(pattern: bytes, by: bytes) -> Callable[[bytes], bytes]:
    def change(head: bytes) -> bytes:
        changed, count = re.subn(pattern, by, head, flags=re.IGNORECASE)
        assert count
        return changed

    return change


NONCE = b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
REQUESTS = {
    "seal is stripped": replaced(rb",seal", b""),
    "the proof is stripped": without("X-Wove-Host-Proof"),
    "the nonce is replaced": replaced(rb"(X-Wove-Host-Nonce: )\S+", rb"\1" + NONCE),
    "another host": replaced(rb"(X-Wove-Host: )\S+", rb"\1" + b"f" * 32),
    "a larger limit": replaced(rb"(X-Wove-Max-Message: )\S+", rb"\g<1>999999999999"),
    "a header more": replaced(rb"\r\n\r\n$", b"\r\nX-Wove-More: 1\r\n\r\n"),
}
STRIPPED_REQUESTS = {
    "it looks like Wove's own": lambda head: without("X-Wove-Host-Nonce")(
        without("X-Wove-Host-Proof")(without("X-Wove-Sync")(head))
    ),
}
ANSWERS = {
    "seal is stripped": replaced(rb",seal", b""),
    "the proof is stripped": without("X-Wove-Server-Signature"),
    "the nonce is stripped": without("X-Wove-Server-Nonce"),
    "the nonce is replaced": replaced(rb"(X-Wove-Server-Nonce: )\S+", rb"\1" + NONCE),
    "everything is stripped": replaced(rb"X-Wove-[^\r]*\r\n", b""),
    "another worker": replaced(rb"(X-Wove-Worker: )\S+", rb"\1" + b"f" * 32),
}


@pytest.mark.parametrize("change", REQUESTS.values(), ids=REQUESTS)
def test_f42_a_changed_request_is_refused(middle: Middle, change: Callable[[bytes], bytes]) -> None:
    """The worker service notices; nothing of the host is looked at."""
    middle.on_request = change
    with executor(middle) as pool, pytest.raises(HandshakeRejected) as caught:
        pool.submit(abs, -1).result(WAIT)
    assert caught.value.status == 401


@pytest.mark.parametrize("change", STRIPPED_REQUESTS.values(), ids=STRIPPED_REQUESTS)
def test_f42_a_stripped_request_is_refused(middle: Middle, change: Callable[[bytes], bytes]) -> None:
    """The worker service does not take it for a host of another make: there is no signature of Wove's."""
    middle.on_request = change
    with executor(middle) as pool, pytest.raises(HandshakeRejected) as caught:
        pool.submit(abs, -1).result(WAIT)
    assert caught.value.status == 401


def test_f42_a_stripped_request_is_noticed_by_default(middle: Middle, tmp_path: Path) -> None:
    """Once a link has been sealed, it is never again without."""
    with executor(middle, seal="auto", worker_auth="auto", delivery_orphan_policy="requeue") as pool:
        assert pool.submit(ledger.record, str(tmp_path), "a", 1).result(WAIT) == 1
        middle.on_request = STRIPPED_REQUESTS["it looks like Wove's own"]
        middle.up = Once("flip", wait_for=0)
        with pytest.raises(ConnectionLost) as caught:
            pool.submit(ledger.record, str(tmp_path), "b", 2).result(WAIT)
        assert isinstance(caught.value.__cause__, HandshakeRejected)
        assert "restart this process or set executor_config.seal='off'" in str(caught.value.__cause__)
    assert ledger.executions(tmp_path) == {"a": 1}


@pytest.mark.parametrize("change", ANSWERS.values(), ids=ANSWERS)
def test_f42_a_changed_answer_is_refused(middle: Middle, change: Callable[[bytes], bytes]) -> None:
    """The host notices before it has sent a message; with what to do about it."""
    middle.on_answer = change
    with executor(middle) as pool, pytest.raises(HandshakeRejected, match="what is between") as caught:
        pool.submit(abs, -1).result(WAIT)
    assert caught.value.status == 101
    assert [frame for tape in middle.tapes for frame in tape.frames if frame.opcode != CLOSE] == []


def test_by_default_too_a_wrong_proof_is_refused(middle: Middle) -> None:
    """``auto`` takes a worker service that proves nothing, not one whose proof is wrong."""
    middle.on_answer = ANSWERS["the nonce is replaced"]
    with executor(middle, seal="auto", worker_auth="auto") as pool:
        with pytest.raises(HandshakeRejected, match="its signature is wrong"):
            pool.submit(abs, -1).result(WAIT)


# -- what was recorded ------------------------------------------------------------------------


def recorded(middle: Middle, folder: Path) -> Tape:
    """Return what a host with one run sent."""
    with executor(middle) as pool:
        assert pool.submit(ledger.record, str(folder), "recorded", "done").result(WAIT) == "done"
    return middle.tapes[-1]


def replay(port: int, tape: Tape) -> tuple[int, int | None]:
    """Send what is on *tape*; return the HTTP status and the code of the close frame, if there was one."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as sock:
        sock.sendall(tape.request[0])
        reader = sock.makefile("rb")
        status = int(reader.readline().split()[1])
        while reader.readline().strip():
            pass
        if status != 101:
            return status, None
        sock.sendall(b"".join(frame.bytes for frame in tape.frames))
        while True:
            head = reader.read(2)
            if len(head) < 2:
                return status, None
            payload = reader.read(head[1])
            if head[0] & 0x0F == CLOSE:
                return status, int.from_bytes(payload[:2], "big")


def test_f42_a_recording_is_worth_nothing(worker: LoopbackWorker, middle: Middle, tmp_path: Path) -> None:
    """Played to the same worker service, to a sibling, and to the same one after a restart: no run."""
    with worker_with_secret() as other:
        tape = recorded(middle, tmp_path)
        assert tape.frames
        assert replay(port_of(worker), tape) == (401, None)
        assert replay(port_of(other), tape) == (101, 1008)
        with Middle(port_of(other)) as second:
            tape = recorded(second, tmp_path)
            assert replay(port_of(other), tape) == (401, None)
            other.restart()
            assert replay(port_of(other), tape) == (101, 1008)
            assert replay(port_of(other), tape) == (401, None)
    assert ledger.executions(tmp_path) == {"recorded": 2}


def test_a_recorded_handshake_does_not_break_into_a_connection(tmp_path: Path) -> None:
    """Played to the worker service that the host is connected to by now, it takes nobody's place."""
    with worker_with_secret() as worker, Middle(port_of(worker)) as middle:
        with executor(middle) as pool:
            assert pool.submit(ledger.record, str(tmp_path), "a", 1).result(WAIT) == 1
            worker.restart()
            until(lambda: link_of(pool).stats()["losses"] == 1)
            assert pool.submit(ledger.record, str(tmp_path), "b", 2).result(WAIT) == 2
            assert replay(port_of(worker), middle.tapes[0]) == (101, 1008)
            assert pool.submit(ledger.record, str(tmp_path), "c", 3).result(WAIT) == 3
            assert link_of(pool).stats()["losses"] == 1


@pytest.mark.parametrize("config", [{}, {"seal": "auto", "worker_auth": "auto"}], ids=["require", "auto"])
def test_a_recorded_handshake_without_its_extensions(tmp_path: Path, config: dict[str, str]) -> None:
    """One that seals because it must has no signature of Wove's, and is worth nothing anywhere.

    By default it has one, for worker services of another make: a sibling that asks for seals refuses it.
    """
    strict = LoopbackWorker(
        workers=2,
        security=False,
        args=["--security", "env:SIBLINGS", "--require-seal"],
        env={"SIBLINGS": SECRET},
    )
    with worker_with_secret() as first, worker_with_secret() as second, strict:
        with Middle(port_of(first)) as middle:
            with executor(middle, **config) as pool:
                assert pool.submit(abs, -1).result(WAIT) == 1
            head = STRIPPED_REQUESTS["it looks like Wove's own"](middle.tapes[0].request[0])
            tape = Tape([head], middle.tapes[0].frames)
        assert replay(port_of(strict), tape) == ((403, None) if config else (401, None))
        assert replay(port_of(second), tape) == ((101, 1007) if config else (401, None))
        with WebSocketExecutor(strict.url, security={"type": "signed", "secret": SECRET}) as pool:
            assert pool.submit(abs, -1).result(WAIT) == 1
        known = wove.NetworkExecutorSecurity(mode="signed", secret=SECRET)
        headers = known.headers_for(transport="websocket", target="/wove", body=b"")
        with pytest.raises(InvalidStatus, match="403"), RawHost(strict, headers=headers):
            pass
        until(lambda: "would not be sealed" in strict.log)
