"""F35: the end of a future reaches everybody, wherever an exception strikes the thread that brings it."""

from __future__ import annotations

import concurrent.futures
import linecache
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from fault_helpers import WAIT, until
from strikes import Struck, struck

from wove_ws_sync import _condition, _run_future
from wove_ws_sync._run_future import RunFuture

OURS = {_run_future.__file__, _condition.__file__}
ENDS: list[dict[str, Any]] = [
    {"type": "task_cancelled", "run_id": "r", "acknowledged": True},
    {"type": "task_error", "run_id": "r", "error": "no"},
]


class Keeper:
    """Notes who has ended."""

    on_event = None

    def __init__(self) -> None:
        self.count = 0

    def ended(self, future: RunFuture[Any]) -> None:
        self.count += 1


def strike(act: Callable[[], Any], step: int) -> bool:
    """Call *act* and raise at its line number *step*; tell whether it came so far."""
    left = step

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in OURS or frame.f_code.co_name == "<listcomp>":
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # No signal is heard between the end of a "with" block and the release of its lock.
        if event == "line" and not line.startswith("with "):
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Struck
        return trace

    return struck(act, trace)


@pytest.mark.parametrize("end", ENDS, ids=["cancelled", "error"])
def test_f35_a_strike_at_any_line_of_an_end(end: dict[str, Any]) -> None:
    """Brought again, it wakes who waits for one future or for several, and calls each callback once."""
    step, came = 0, True
    while came:
        keeper = Keeper()
        future: RunFuture[Any] = RunFuture("r", keeper)
        called: list[int] = []
        for number in range(3):
            future.add_done_callback(lambda _, number=number, called=called: called.append(number))
        waiting = [
            threading.Thread(target=future._await_end, args=(WAIT,)),
            threading.Thread(target=concurrent.futures.wait, args=([future], WAIT)),
        ]
        for thread in waiting:
            thread.start()
        until(lambda future=future: future._own_condition._waiters and future._waiters)
        came = strike(lambda future=future: future._on_event(end), step)
        if came:
            future._on_event(end)
        for thread in waiting:
            thread.join(WAIT)
        assert not any(thread.is_alive() for thread in waiting), step
        assert (called, future.done()) == ([0, 1, 2], True), step
        assert future.cancelled() is (end["type"] == "task_cancelled")
        assert keeper.count
        step += 1
    assert step > 20


def test_every_callback_is_called_and_the_first_exit_goes_on() -> None:
    """What one raises costs no other its call: SystemExit and KeyboardInterrupt neither."""
    future: RunFuture[Any] = RunFuture("r", Keeper())
    called: list[type[BaseException]] = []

    def raising(kind: type[BaseException]) -> Callable[[Any], None]:
        def callback(future: Any) -> None:
            called.append(kind)
            raise kind

        return callback

    kinds = [SystemExit, ValueError, KeyboardInterrupt, ZeroDivisionError]
    for kind in kinds:
        future.add_done_callback(raising(kind))
    with pytest.raises(SystemExit):
        future._on_event(ENDS[1])
    assert called == kinds


def test_who_waits_after_the_end_is_told_nothing_again() -> None:
    """An end that is brought again, as a callback raised, is no news for those that came meanwhile."""
    future: RunFuture[Any] = RunFuture("r", Keeper())
    other: RunFuture[Any] = RunFuture("s", Keeper())
    asked = threading.Event()

    def leave(future: Any) -> None:
        thread.start()
        until(lambda: other._waiters)
        raise SystemExit

    def wait() -> None:
        returned.append(concurrent.futures.wait([future, other], WAIT).not_done)
        asked.set()

    returned: list[set[Any]] = []
    thread = threading.Thread(target=wait)
    future.add_done_callback(leave)
    with pytest.raises(SystemExit):
        future._on_event(ENDS[1])
    assert not asked.wait(0.1)
    other._on_event({**ENDS[1], "run_id": "s"})
    thread.join(WAIT)
    assert returned == [set()]


def test_a_future_keeps_nobody_that_waited() -> None:
    """Or one result that is kept would keep those of all that were waited for together."""
    futures: list[RunFuture[Any]] = [RunFuture(f"r{number}", Keeper()) for number in range(2)]
    thread = threading.Thread(target=concurrent.futures.wait, args=(list(futures), WAIT))
    thread.start()
    until(lambda: all(future._waiters for future in futures))
    for future in futures:
        future._on_event(ENDS[1])
    thread.join(WAIT)
    other = weakref.ref(futures.pop())
    del future, thread
    assert other() is None
    assert futures[0].done()
