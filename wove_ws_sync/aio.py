"""The asyncio shim: what Wove drives when ``executor="websocket"`` is this package.

Owns: which ``start()`` a ``send()`` or ``recv()`` belongs to, and the hop from the link's
threads into an event loop. Never: blocks the loop, keeps a thread or a table of runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import wove

from . import payloads, security
from ._carry import Carrier
from .errors import DeliveryTimeout
from .frames import TERMINAL_EVENTS
from .link import LinkState
from .options import DeliveryOptions, LinkOptions
from .runs import Run
from .session import SPARABLE, Session, open_session
from .sync import NOT_STARTED, check_frame, frame_delivery, run_defaults
from .timing import Deadline

__all__ = ["AsyncWebSocketEnvironmentExecutor"]

# Up to this many bytes of values are sent from the loop's own thread without blocking it;
# more goes through a thread that may wait for the network.
_INLINE_BYTES = 256 * 1024
# What a frame has beside its values, at the most.
_FRAME_BYTES = 4096
# So many small messages share a system call, while the worker begins with the ones before.
_TOGETHER = 32


class _Inbox:
    """The events one ``recv()`` loop waits for. Belongs to its loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[dict[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> dict[str, Any]:
        while not self._events:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()


class _Group:
    """The ``start()`` calls of one weave: one session, an inbox for each environment.

    A weave whose environments share an executor instance does not say on ``send()`` which
    of them it means, so every inbox gets every event; Wove ignores runs it does not know.
    """

    def __init__(self, session: Session, run_config: Mapping[str, Any] | None, carrier: Carrier) -> None:
        self.carrier = carrier
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.session = session
        self.run_config = run_config
        self.defaults = run_defaults(run_config)
        self.inboxes: list[_Inbox] = []
        self.starts = 0
        self._arrived: deque[dict[str, Any]] = deque()
        self._scheduled = False
        self._unsent: int | None = None
        self._beating: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, command: Mapping[str, Any], delivery: DeliveryOptions, deadline: Deadline) -> Run:
        """Send without blocking. The first message of a loop turn leaves at once, the others together."""
        if self._unsent is None:
            self._unsent = 0
            self.loop.call_soon(self._flush)
            flush = True
        else:
            self._unsent += 1
            flush = self._unsent % _TOGETHER == 0
        return self.session.submit(
            command, delivery, self.sink, deadline=deadline, wait=False, flush=flush, block=False
        )

    def submit_and_wait(
        self, command: Mapping[str, Any], delivery: DeliveryOptions, deadline: Deadline, unwanted: list[str]
    ) -> Run:
        """Send in a thread that may wait for the network; cancel what has become *unwanted* meanwhile."""
        run = self.session.submit(command, delivery, self.sink, deadline=deadline)
        if run.run_id in unwanted:
            self.session.cancel(run.run_id)
        return run

    def _flush(self) -> None:
        if self._unsent:
            self.session.link.flush()
        self._unsent = None

    def sink(self, event: dict[str, Any]) -> None:
        """Take an event from one of the link's threads; many events make one wake-up."""
        kind = event["type"]  # Wove's receiver raises for progress, which it does not know
        if kind == "progress" or (kind in SPARABLE and self.session.drops(self._waiting())):
            return
        self._arrived.append(event)
        if not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._hand_out)

    def _waiting(self) -> int:
        return len(self._arrived) + max((len(inbox) for inbox in self.inboxes), default=0)

    def _hand_out(self) -> None:
        self._scheduled = False
        while self._arrived:
            event = self._arrived.popleft()
            if event["type"] in TERMINAL_EVENTS:
                self._beating.pop(event["run_id"], None)
            for inbox in self.inboxes:
                inbox.put(event)

    def keep_beating(self, run_id: str, interval: float) -> None:
        """Show Wove a heartbeat for as long as the link holds the run to be alive.

        Wove's own timer knows no margin, no log as a sign of life and no suspended host;
        the link's watchdog does, and ends the run itself when it must.
        """
        self._beating[run_id] = interval
        self._beat(run_id)
        if self._timer is not None and self._timer.when() > self.loop.time() + interval / 3.0:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_later(interval / 3.0, self._beat_all)

    def _beat_all(self) -> None:
        self._timer = None
        for run_id in self._beating:
            self._beat(run_id)
        if self._beating:
            self._timer = self.loop.call_later(min(self._beating.values()) / 3.0, self._beat_all)

    def _beat(self, run_id: str) -> None:
        for inbox in self.inboxes:
            inbox.put({"type": "heartbeat", "run_id": run_id})

    def close(self) -> None:
        self._beating.clear()
        if self._timer is not None:
            self._timer.cancel()
        self.session.close()


class _Here(NamedTuple):
    """Which ``start()`` a context belongs to, None behind its ``stop()`` or if it failed.

    *outer* is the one around that: a task of a weave may have run a weave of its own.
    """

    group: _Group | None
    inbox: _Inbox | None
    outer: _Here | None

    def living(self) -> _Here | None:
        """Return the innermost that was not stopped."""
        here: _Here | None = self
        while here is not None and not (here.group is not None and here.group.starts):
            here = here.outer
        return here


# For each executor instance. Weak, as the context of a task that lives long must not keep the executors
# of weaves that failed.
_current: ContextVar[Mapping[weakref.ref[Any], _Here]] = ContextVar("wove_ws_sync_current")


class AsyncWebSocketEnvironmentExecutor(wove.EnvironmentExecutor):
    """A Wove environment executor over the shared link.

    One instance may serve many weaves, threads and loops at once: a context variable set
    in ``start()`` tells them apart. ``copy.deepcopy`` returns the instance itself, as Wove
    copies its configuration.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def __del__(self) -> None:
        # A weave that failed while its other environments started never calls stop().
        for group in getattr(self, "_groups", ()):
            group.session.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncWebSocketEnvironmentExecutor:
        return self

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Join the link, dialling it in a thread of the loop's if it is not connected yet.

        Raises what ``SyncWebSocketEnvironmentExecutor.start`` raises.
        """
        outer = self._living()
        mine = outer is not None and outer.group is not None and outer.group.task is asyncio.current_task()
        if not mine:  # what a task has inherited is not its own to stop
            self._note(_Here(None, None, outer))
        options = security.link_options(environment_config)
        group = self._joinable(options, run_config)
        if group is None:
            self._close_stale()
            carrier = Carrier(options.context_vars)
            group = _Group(open_session(options, environment_name), run_config, carrier)
            try:
                if group.session.link.state is not LinkState.READY:
                    await asyncio.to_thread(group.session.connect)
            except BaseException:
                group.session.close()
                raise
            self._groups.append(group)
        inbox = _Inbox(group.loop)
        group.inboxes.append(inbox)
        group.starts += 1
        if outer is not None and (mine or outer.group is group):
            outer = outer.outer
        self._note(_Here(group, inbox, outer))

    async def send(self, frame: Mapping[str, Any]) -> None:
        """Send one command frame without blocking the loop.

        Raises RuntimeError before ``start()``, ValueError for unknown types, ids in flight
        and frames over ``max_message_bytes``, and whatever pickling the arguments raises.
        """
        group, _ = self._here()
        kind = check_frame(frame)
        if kind == "cancel_task":
            group.session.cancel(frame["run_id"])
            return
        if kind == "shutdown":
            group.session.abandon()
            return
        delivery = frame_delivery(frame, group.defaults)
        deadline = group.session.link.deadline(delivery)
        command = group.session.encode(group.carrier.wrap_frame(frame))
        size = sum(len(value) for value in command.values() if isinstance(value, bytes))
        if size <= _INLINE_BYTES and group.session.link.has_room(size + _FRAME_BYTES):
            run = group.submit(command, delivery, deadline)
        else:
            unwanted: list[str] = []
            try:
                run = await asyncio.to_thread(group.submit_and_wait, command, delivery, deadline, unwanted)
            except asyncio.CancelledError:  # nobody will cancel the run by its id: send() has not returned
                unwanted.append(frame["run_id"])
                group.session.cancel(frame["run_id"])
                raise
        if delivery.delivery_heartbeat_seconds is not None and not run.terminal:
            group.keep_beating(frame["run_id"], delivery.delivery_heartbeat_seconds)
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                group.session.cancel(frame["run_id"])
                raise

    async def recv(self) -> dict[str, Any]:
        """Return the next event frame, decoded in the loop's thread."""
        group, inbox = self._here()
        event = group.session.decode(await inbox.get())
        if event["type"] != "task_error":
            return event
        error = event["exception"]
        if isinstance(error, DeliveryTimeout):
            # Wove takes any TimeoutError for the end of the task's own timeout and cancels.
            event["exception"] = wove.DeliveryTimeoutError(str(error))
        elif isinstance(error.__cause__, payloads.RemoteTraceback):
            with contextlib.suppress(
                Exception
            ):  # an exception may refuse attributes: a frozen dataclass, say
                error.add_note(str(error.__cause__))  # Wove raises it "from None", which drops the cause
        return event

    async def stop(self) -> None:
        """End the runs of this ``start()`` by their orphan policies and let go of the link."""
        here = _current.get({}).get(weakref.ref(self)) or self._only_one()
        if here is None or here.group is None or not here.group.starts:
            return
        here.group.starts -= 1
        if here.group.starts:
            return
        self._close(here.group)
        self._note(_Here(None, None, here.living()))

    def _close(self, group: _Group) -> None:
        group.starts = 0
        group.close()
        with contextlib.suppress(ValueError):  # another thread was first
            self._groups.remove(group)

    def _close_stale(self) -> None:
        """Let go of what weaves have left that failed as they started, which nobody stops."""
        for group in [group for group in self._groups if group.loop.is_closed()]:
            self._close(group)

    def _note(self, here: _Here) -> None:
        """Have this context know where it is, and forget the executors that are gone."""
        known = {key: value for key, value in _current.get({}).items() if key() is not None}
        _current.set({**known, weakref.ref(self): here})

    def _living(self) -> _Here | None:
        here = _current.get({}).get(weakref.ref(self))
        return None if here is None else here.living()

    def _joinable(self, options: LinkOptions, run_config: Mapping[str, Any] | None) -> _Group | None:
        """Return the group of the same weave, if an environment of it was started already."""
        loop, here = asyncio.get_running_loop(), self._living()
        # All environments of a weave share that object, also those that a task of it starts.
        groups = [group for group in list(self._groups) if run_config and group.run_config is run_config]
        group = next((group for group in groups if group.loop is loop and group.starts), None)
        if group is None:
            group = None if here is None else here.group
            if group is None or group.task is not asyncio.current_task():
                return None
            if run_config and group.run_config:
                self._close(group)  # an earlier weave of this task failed as it started
                return None
        if group.session.link.options != options or group.carrier.names != options.context_vars:
            raise RuntimeError(
                "One executor instance was given to environments with different settings in one weave; "
                'give each environment its own instance, or executor="websocket".'
            )
        return group

    def _here(self) -> tuple[_Group, _Inbox]:
        here = self._living() if weakref.ref(self) in _current.get({}) else self._only_one()
        if here is None or here.group is None or here.inbox is None:
            raise RuntimeError(NOT_STARTED)
        return here.group, here.inbox

    def _only_one(self) -> _Here | None:
        """Return where code is that runs outside the context of start(): if there is one in its loop."""
        loop = asyncio.get_running_loop()
        groups = [group for group in list(self._groups) if group.loop is loop and group.starts]
        return _Here(groups[0], groups[0].inboxes[0], None) if len(groups) == 1 else None
