"""F35: a signal handler raises between any two steps of a decision, and the run table is put in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from run_machine import Runs
from strikes import Struck, struck

import wove_ws_sync
from wove_ws_sync import _alarms, _book, _checks, _line, _losses, _run, errors, frames, options, runs, timing
from wove_ws_sync.options import DeliveryOptions
from wove_ws_sync.runs import Loss, RunState

PACKAGE = str(Path(wove_ws_sync.__file__).parent)
# The table and what it is made of: an exception strikes at every step of these ...
OURS = {module.__file__ for module in (runs, _alarms, _book, _line, _losses, _run)}
# ... and at none of these, which hold nothing that could be left half done.
VALUES = {module.__file__ for module in (errors, frames, options, timing, _checks)}


def strike(act: Callable[[], Any], step: int) -> bool:
    """Call *act* and raise before its step number *step* inside the table; tell whether it came so far."""
    left = step
    passed: set[str] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        file = frame.f_code.co_filename
        if file not in OURS:
            if file.startswith(PACKAGE):
                passed.add(file)
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Struck
        return trace

    came_so_far = struck(act, trace)
    assert passed <= VALUES, "the table has a part that nothing strikes: add it to OURS"
    return came_so_far


def machine() -> Runs:
    """Return a table with runs in every state and in line for slots."""
    made = Runs()
    made.connect(1.0, 2)
    for policy in ("cancel", "requeue", "detach"):
        for limit in (None, 2):
            for mode in ("best_effort", "require_ack"):
                options = DeliveryOptions(
                    delivery_orphan_policy=policy,
                    delivery_cancel_mode=mode,
                    delivery_max_in_flight=limit,
                    delivery_timeout=20.0,
                )
                made.send(options, "a", True)
                made.register(options, "a")
    made.receive("r3", "task_started", 0, None)
    made.cancel("r3")
    made.lose(10.0, False)
    made.resume(["alive", "unknown"])
    return made


def register(made: Runs) -> None:
    options = DeliveryOptions(delivery_max_in_flight=2, delivery_timeout=5.0)
    run = made.new_run(options, "a")
    made.table.register(run, made.now)
    made.registered[run.run_id] = run


def cancel_each(made: Runs) -> None:
    for run in made.table.of_all():
        made.apply(made.table.cancel(run, made.now))


ACTS: dict[str, Callable[[Runs], Any]] = {
    "register": register,
    "post": lambda made: made.post(refused=True),
    "cancel": cancel_each,
    "abandon": lambda made: made.apply(made.table.abandon("a")),
}


# All steps of one act take seconds of computing: on a busy machine too long for one test.
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("act", ACTS)
def test_f35_a_strike_between_any_two_steps(act: str, part: int) -> None:
    """Nothing is lost, nothing ends twice, no slot is left taken: mend() takes up where it broke off."""
    step, came = part, True
    while came:
        made = machine()
        known = set(made.registered)
        came = strike(lambda made=made: ACTS[act](made), step)
        if came:
            for run in made.table.of_all():
                made.registered.setdefault(run.run_id, run)
            made.apply_again(made.table.mend(made.now))
        made.look()
        assert known <= set(made.registered)
        for run in made.alive():
            assert run.state is not RunState.QUEUED or run.receipt is None
        made.teardown()
        step += PARTS
    assert step > 100


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("act", ["cancel", "abandon"])
@pytest.mark.parametrize("meanwhile", ["receive", "lose"])
def test_f35_another_thread_comes_before_it_is_mended(act: str, meanwhile: str, part: int) -> None:
    """What was being ended when the exception struck has that end, whatever arrives in between."""
    step, came = part, True
    while came:
        made = machine()
        came = strike(lambda made=made: ACTS[act](made), step)
        if came:
            runs_left = made.table.of_all()
            for run in runs_left:
                made.registered.setdefault(run.run_id, run)
            if meanwhile == "receive":
                for run in runs_left:
                    event = {"type": "task_result", "run_id": run.run_id}
                    made.apply(made.table.receive(event, made.now, run.generation or 0))
            else:
                made.apply(made.table.lost(made.generation, Loss(), made.now, None))
            made.apply_again(made.table.mend(made.now))
        made.look()
        made.teardown()
        step += 4 * PARTS  # one in four: all would take a minute
    assert step > 100
