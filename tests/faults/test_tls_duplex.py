"""TLS with both directions busy for long: a link never loses a connection that nobody ended.

The transport alone is tested so, with key updates, in ``tests/integration/test_tls.py``.
"""

from __future__ import annotations

import random
import threading
import time

import pytest
from fault_helpers import MIB, WAIT, descriptors, link_of, own_threads, resident
from ws_peer import in_thread

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

SECONDS = 600.0


def turned(data: bytes) -> bytes:
    return data[::-1]


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize(
    "seconds",
    [2.0, pytest.param(SECONDS, marks=[pytest.mark.slow, pytest.mark.soak])],
    ids=["short", "long"],
)
def test_f41_no_connection_is_lost_without_a_cause(seconds: float) -> None:
    """16 threads, small and large, with every timeout on: right results over one connection."""
    timing = {"ping_interval": 0.2, "pong_timeout": WAIT, "open_timeout": WAIT}
    watched = {"delivery_timeout": WAIT, "delivery_heartbeat_seconds": WAIT / 2}
    with LoopbackWorker(workers=8, tls=True) as worker:
        with WebSocketExecutor(**worker.config, **timing, **watched) as pool:
            assert pool.submit(turned, b"12").result(WAIT) == b"21"
            before = (descriptors(), len(own_threads()))
            memory = 0
            stop = threading.Event()

            def talk(number: int) -> int:
                rng, count = random.Random(number), 0
                while not stop.is_set():
                    size = MIB if rng.random() < 0.01 else rng.randrange(2000)
                    data = rng.randbytes(size)
                    assert pool.submit(turned, data).result(WAIT) == data[::-1]
                    count += 1
                return count

            talking = [in_thread(talk, number) for number in range(16)]
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at and not any(future.done() for future in talking):
                stop.wait(1.0)
                memory = memory or resident()
            stop.set()
            counts = [future.result(WAIT) for future in talking]
            assert min(counts) > 0 and sum(counts) > 100
            stats = link_of(pool).stats()
            assert (stats["dials"], stats.get("losses", 0), stats["runs"]) == (1, 0, 0)
            assert (descriptors(), len(own_threads())) == before
            assert resident() - memory < 128 * MIB
