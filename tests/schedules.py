"""Seeded schedules of faults: what goes wrong while threads submit, and what came of every run.

``play`` starts a worker service behind a ``FaultProxy``, has threads submit runs, and spoils
connections or the worker each time that so many runs have ended. The same seed gives the same
plan; where it strikes is up to the threads.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_proxy import FaultProxy
from ledger import executions, processes, record

from wove_ws_sync import ConnectionLost, RunFuture, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

__all__ = ["CUTS", "RESTARTS", "Outcome", "play"]

WAIT = 120.0
THREADS = 4

# What may happen to the connection while the worker lives, and to the worker itself.
CUTS = ("reset", "fin", "cut up", "cut down", "slow")
RESTARTS = ("kill", "terminate")


@dataclasses.dataclass
class Outcome:
    """What came of the runs of one schedule: numbers by kind, and what the ledger says."""

    results: int
    losses: list[str]
    wrong: list[str]
    ends: Counter[str]
    executed: Counter[str]
    pids: dict[str, set[int]]
    stats: Counter[str]

    def check(self, policy: str, runs: int, *, alive: bool) -> None:
        """Assert the promises of *policy*; *alive* says that no worker died."""
        assert self.wrong == []
        assert self.results + len(self.losses) == runs
        assert set(self.ends.values()) == {1} and len(self.ends) == runs
        if alive or policy == "requeue":
            assert self.losses == [], self.stats
        if alive:
            assert set(self.executed.values()) == {1} and len(self.executed) == runs
        for run, count in self.executed.items():
            # The ledger of a run that was lost says at most one execution too.
            assert count == len(self.pids[run]), f"{run} ran twice in one process"
            assert count == 1 or policy == "requeue", f"{run} ran {count} times under {policy}"
        assert self.stats["runs"] == 0


def play(seed: int, policy: str, runs: int, folder: Path, faults: tuple[str, ...], count: int) -> Outcome:
    """Have *runs* submitted while *count* faults out of *faults* strike; return what came of them."""
    rng = random.Random(seed)
    ledger = folder / "ledger"
    ledger.mkdir()
    plan = [rng.choice(faults) for _ in range(count)]
    while plan.count("cut up") > 3:  # a message inside which a fourth connection ends is given up
        plan[plan.index("cut up")] = "cut down"
    moments = sorted(rng.randrange(runs) for _ in plan)
    with LoopbackWorker(workers=8) as worker, FaultProxy(worker.url, rng=rng) as proxy:
        pool = WebSocketExecutor(
            proxy.url_for(worker.url),
            security=worker.security,
            delivery_orphan_policy=policy,
            reconnect_max_delay=0.2,
        )
        with pool:
            pool.submit(int).result(WAIT)  # who was never connected gets the error of the first dial
            crowd = _Crowd(pool, ledger, runs, rng.randrange(3000))
            for moment, fault in zip(moments, plan, strict=True):
                crowd.wait(moment)
                _strike(fault, proxy, worker, rng, lambda: len(crowd.ended) == runs)
            proxy.heal()
            results, losses, wrong = crowd.collect()
            assert pool.link is not None
            stats = pool.link.stats()
    return Outcome(results, losses, wrong, crowd.ended, executions(ledger), processes(ledger), stats)


class _Crowd:
    """Threads that submit, and what became of what they submitted."""

    def __init__(self, pool: WebSocketExecutor, ledger: Path, runs: int, padding: int) -> None:
        # How often each run ended, by its done-callback.
        self.ended: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._futures: dict[int, RunFuture[Any]] = {}

        def submit(first: int) -> None:
            for number in range(first, runs, THREADS):
                answer = [number, "x" * padding]
                future = pool.submit(_record_slowly, str(ledger), f"run-{number}", answer, number % 20)
                self._futures[number] = future
                future.add_done_callback(self._note)

        self._threads = [threading.Thread(target=submit, args=(first,)) for first in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _note(self, future: Any) -> None:
        with self._changed:
            self.ended[future.run_id] += 1
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Wait until so many runs have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ended) >= count, WAIT), "the runs stand still"

    def collect(self) -> tuple[int, list[str], list[str]]:
        """Return how many runs brought their own result, what was lost, and what is wrong."""
        for thread in self._threads:
            thread.join(WAIT)
        results, losses, wrong = 0, [], []
        for number, future in sorted(self._futures.items()):
            try:
                answer = future.result(WAIT)[0]
                results += 1
                if answer != number:
                    wrong.append(f"run {number} got the result of {answer}")
            except ConnectionLost as exc:
                losses.append(
                    f"run {number}: {exc} (attempt {exc.attempt}, {exc.maybe_executed}: {exc.reason})"
                )
            except Exception as exc:
                wrong.append(f"run {number}: {exc!r}")
        self.wait(len(self._futures))
        return results, losses, wrong


def _record_slowly(folder: str, run: str, answer: Any, milliseconds: int) -> Any:
    record(folder, run)
    time.sleep(milliseconds / 1000.0)
    return answer


def _strike(
    fault: str, proxy: FaultProxy, worker: LoopbackWorker, rng: random.Random, over: Callable[[], bool]
) -> None:
    if fault in ("reset", "fin"):
        proxy.end_all("rst" if fault == "reset" else "fin")
    elif fault in ("cut up", "cut down"):
        toxics = proxy.up if fault == "cut up" else proxy.down
        open_ones = proxy.open_passages()
        passed = [(one.up if fault == "cut up" else one.down).passed for one in open_ones]
        proxy.set(toxics, cut_after=max(passed, default=0) + rng.randrange(1, 4_000))
        proxy.wait_for(lambda: over() or not any(one.open for one in open_ones))
        proxy.set(toxics, cut_after=None)
    elif fault == "slow":
        proxy.set(latency=0.005, jitter=0.01, slice_bytes=rng.choice([7, 100, 1400]))
        proxy.end_all("rst")
    elif fault == "kill":
        worker.kill()
        worker.restart()
    else:
        worker.stop(timeout=WAIT)
        worker.restart()
