"""Many hosts on one worker service: nothing lost, nothing that grows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fault_helpers import MIB, WAIT, resident

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker


def test_two_hundred_hosts_share_one_worker(record_property: Callable[[str, object], None]) -> None:
    """20,000 runs of 200 connected hosts in ten rounds: every result, and memory that stays flat."""
    with LoopbackWorker(args=["--log-level", "warning"]) as worker, contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(
                WebSocketExecutor(worker.url, security=worker.security, headers={"X-Number": str(number)})
            )
            for number in range(200)
        ]
        used = []
        for lap in range(10):
            futures = [pool.submit(pow, number, lap) for _ in range(10) for number, pool in enumerate(pools)]
            for number, future in enumerate(futures):
                assert future.result(WAIT) == (number % 200) ** lap
            assert worker.pid is not None
            used.append(resident(worker.pid))
        record_property("resident_mib", [round(size / MIB, 1) for size in used])
        assert max(used[5:]) < used[2] + 16 * MIB
