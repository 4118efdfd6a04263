"""Commands of one connection that were read and not obeyed yet, as pure state.

Owns: their order, what may be obeyed before its turn, how much waits, when which run among
them owes a heartbeat. Never: a socket or a clock (``now`` is an argument), never obeys a
command itself.

==================== ==========================================================
command              read while runs wait here
==================== ==========================================================
event_ack, resume    obeyed at once
cancel_task          obeyed at once; a run that waits here never begins
shutdown             the same, for every run that waits here
any other            waits for its turn
==================== ==========================================================
"""

from __future__ import annotations

import collections
from typing import Any

from ..frames import InvalidMessage
from .commands import CancelTask, Command, EventAck, Resume, RunTask, Shutdown, Withdrawn
from .runs import BeatSchedule, Run, RunState

__all__ = ["Parked"]

#: What a command takes besides its message, about.
_OVERHEAD = 512


class Parked:
    """Commands that wait, or what was read instead of one; ``bytes`` is about what they take.

    ``beats`` has the runs whose host wants to hear of them; they are no accepted ones yet.
    """

    def __init__(self) -> None:
        self.bytes = 0
        # An OrderedDict finds its first entry at once, also when many before it are gone.
        self._items: collections.OrderedDict[int, tuple[int, Command | InvalidMessage]]
        self._items = collections.OrderedDict()
        self._runs: dict[str, int] = {}
        self._beating: dict[int, Run] = {}
        self._number = 0
        self.beats = BeatSchedule()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Command | InvalidMessage, size: int, now: float, owner: Any = None) -> bool:
        """Have *item*, a message of *size* bytes, wait; False if it is a run that waits already.

        *owner* is the host that gets its heartbeats.
        """
        self._number += 1
        if isinstance(item, RunTask):
            if item.run_id in self._runs:
                return False
            self._runs[item.run_id] = self._number
            if item.beat_interval is not None:
                run = self._beating[self._number] = Run(item, owner)
                self.beats.add(run, now)
        self._items[self._number] = (size + _OVERHEAD, item)
        self.bytes += size + _OVERHEAD
        return True

    def take(self) -> Command | InvalidMessage:
        """Return what has waited for longest."""
        return self._remove(next(iter(self._items)))

    def clear(self) -> None:
        """Forget everything."""
        while self._items:
            self.take()

    def overtakes(self, item: Command | InvalidMessage) -> list[Command]:
        """Return what is to be obeyed now that *item* has been read; nothing if it has to wait."""
        if isinstance(item, EventAck | Resume):
            return [item]
        if isinstance(item, CancelTask):
            number = self._runs.get(item.run_id)
            return [item] if number is None else [self._withdraw(number, item)]
        if isinstance(item, Shutdown):
            return [*(self._withdraw(number, None) for number in list(self._runs.values())), item]
        return []

    def _withdraw(self, number: int, cancel: CancelTask | None) -> Withdrawn:
        run = self._remove(number)
        assert isinstance(run, RunTask)
        return Withdrawn(run.run_id, run.task_id, None if cancel is None else cancel.cancel_mode)

    def _remove(self, number: int) -> Command | InvalidMessage:
        size, item = self._items.pop(number)
        self.bytes -= size
        if isinstance(item, RunTask):
            del self._runs[item.run_id]
        beating = self._beating.pop(number, None)
        if beating is not None:
            beating.state = RunState.ENDED  # as one that waits
        return item
