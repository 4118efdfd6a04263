"""Whatever happens in whatever order: the run table ends every run once and loses nothing."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import settings
from run_machine import SESSIONS, Runs

from wove_ws_sync.frames import EVENTS
from wove_ws_sync.options import DeliveryOptions
from wove_ws_sync.runs import RunState

DELIVERY_CHOICES: dict[str, list[Any]] = {
    "delivery_timeout": [None, None, 3.0, 20.0],
    "delivery_heartbeat_seconds": [None, None, 2.0],
    "delivery_cancel_mode": ["best_effort", "require_ack"],
    "delivery_orphan_policy": ["fail", "cancel", "requeue", "requeue", "detach"],
    "delivery_max_in_flight": [None, None, 2],
}


def walk(seed: int, steps: int) -> Counter[str]:
    """Take the same machine for a long walk, which hypothesis keeps short; return what was met."""
    pick = random.Random(seed)
    machine = Runs()
    machine.connect(1.0, pick.choice([2, 3]))
    met: Counter[str] = Counter()
    for _ in range(steps):
        known = list(machine.registered)[-30:]
        limbo = machine.table.limbo()
        what = pick.choices(
            ["send", "receive", "lose", "resume", "forsake", "tick", "cancel", "drain", "post", "abandon"],
            [30, 30, 8, 10, 3, 8, 4, 2, 10, 0.2],
        )[0]
        if what == "send":
            chosen = {key: pick.choice(values) for key, values in DELIVERY_CHOICES.items()}
            machine.send(DeliveryOptions(**chosen), pick.choice(SESSIONS), pick.random() < 0.7)
        elif what == "receive" and known:
            kind, stopping = pick.choice(sorted(EVENTS)), pick.choice([None, None, True, False])
            machine.receive(pick.choice(known), kind, pick.choice([0, 0, 1]), stopping)
        elif what == "lose" and machine.alive():
            machine.lose(pick.choice([None, 1.0, 10.0, 10.0]), pick.random() < 0.3)
        elif what == "resume" and limbo:
            machine.resume(pick.choices(["alive", "alive", "finished", "unknown", "lost"], k=len(limbo)))
        elif what == "forsake" and limbo:
            machine.forsake()
        elif what == "tick":
            machine.tick(pick.choice([0.0, 0.1, 0.5, 2.5]), pick.random() < 0.1)
        elif what == "cancel" and known:
            machine.cancel(pick.choice(known))
        elif what == "drain":
            machine.drain()
        elif what == "post":
            machine.post(refused=pick.random() < 0.1)
        elif what == "abandon":
            machine.abandon(pick.choice(SESSIONS))
        machine.look()
        met["suspects"] += machine.table._line._suspect is not None
        met["cancelling"] += any(run.state is RunState.CANCELLING for run in machine.alive())
    met.update(machine.table.counts)
    machine.teardown()
    return met


def test_long_walks_meet_everything() -> None:
    """Thousands of steps: nothing ends twice or never, and every kind of second chance is met."""
    met: Counter[str] = Counter()
    for seed in range(12):
        met += walk(seed, 400)
    assert min(met[what] for what in ("requeues", "resends", "resumed_runs", "suspects", "cancelling")) > 10


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
