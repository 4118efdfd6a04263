"""One user of a link, and the links of this process.

Owns: which options share which link, and what a session may do to its own runs. Never:
starts a thread, or touches another session's runs.
"""

from __future__ import annotations

import atexit
import os
import select
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from . import _fork, _named, _telemetry, frames, payloads
from .errors import ForkedError, PayloadError
from .link import Link, LinkState, too_large
from .options import DeliveryOptions, LinkOptions
from .runs import Run
from .timing import Clock, Deadline

__all__ = ["SPARABLE", "Session", "close_links", "exiting", "links", "open_session"]

_links: dict[LinkOptions, Link] = {}
# Every link that may still hold a descriptor, also those that closed for want of users.
_all_links: weakref.WeakSet[Link] = weakref.WeakSet()
# Guards both; held for look-ups only.
_links_lock = threading.Lock()
_exiting = False
#: Events that a receiver can do without.
SPARABLE = frozenset({"log", "heartbeat", "progress"})
# So many events may wait for a receiver before those are dropped.
_MOST_WAITING = 10_000
_FROM_HERE = Deadline()


class Session:
    """One ``start()`` … ``stop()``, one futures executor or one weave on a shared link.

    Thread-safe. Every method raises ForkedError in a process other than the one that made it.
    """

    def __init__(self, link: Link, environment: str) -> None:
        self.link = link
        self.environment = environment
        # What turns frames into messages and back: with pickles, or with names and plain JSON.
        self._format: Any = _named if link.options.result_format == "json" else payloads

    @property
    def foreign(self) -> bool:
        """Tell whether this process is a fork of the one that made the session."""
        return os.getpid() != self.link.pid

    def connect(self) -> None:
        """Wait for a usable connection, ``open_timeout`` at most; raises what the dial raised."""
        self.check_process()
        clock = Clock()
        # The dial keeps its own deadline and says precisely what was wrong: give it a moment more.
        self.link.connect(Deadline.after(self.link.options.open_timeout + 1.0, clock.monotonic()))

    def submit(
        self,
        command: Mapping[str, Any],
        delivery: DeliveryOptions,
        sink: Callable[[dict[str, Any]], None],
        *,
        deadline: Deadline = _FROM_HERE,
        wait: bool = True,
        flush: bool = True,
        block: bool = True,
    ) -> Run:
        """Send one ``run_task`` frame that :meth:`encode` has returned.

        Its events go to *sink*, called in the thread that brings them: reader, watchdog or a
        caller. *deadline* is that of ``Link.deadline`` before anything was pickled, or else counts from
        here; *wait*, *flush* and *block* are those of ``Link.submit``.

        Raises ValueError for a frame larger than ``max_message_bytes``, a run_id in flight, or an id
        of more than 4096 characters.
        """
        self.check_process()
        telemetry, options = _telemetry.host, self.link.options
        if telemetry is None:
            run = self._run(command, delivery, sink, deadline)
            self._send(run, wait=wait, flush=flush, block=block)
            return run
        address = options.host, options.port
        with telemetry.sending(command, sink, self.environment, address) as (command, sink):
            run = self._run(command, delivery, sink, deadline)
            self._send(run, wait=wait, flush=flush, block=block)
            return run

    def _send(self, run: Run, *, wait: bool, flush: bool, block: bool) -> None:
        limit = self.link.options.max_message_bytes
        if len(run.message) > limit:
            raise too_large(run.run_id, len(run.message), limit)
        self.link.submit(run, wait=wait, flush=flush, block=block)

    def attach(self, run_id: str, delivery: DeliveryOptions, sink: Callable[[dict[str, Any]], None]) -> Run:
        """Take a run that was detached, by this process or another with the same key; as :meth:`submit`.

        The run ends with an error of the kind UnknownRun if the worker service does not have it, and
        with RuntimeError if it keeps no runs at all.
        """
        self.check_process()
        command = {
            "type": "attach_task",
            "run_id": run_id,
            "task_id": run_id.rpartition(":")[0] or run_id,
            "delivery": delivery.as_frame({}),
        }
        run = self._run(command, delivery, sink, self.link.deadline(delivery), needs="resume")
        self.link.submit(run)
        return run

    def drops(self, waiting: int) -> bool:
        """Tell whether a receiver with so many events *waiting* does without a SPARABLE one, and count it.

        What nobody takes must not fill the memory: there may be any number of log records and
        heartbeats, while a run has few other events.
        """
        if waiting < _MOST_WAITING:
            return False
        self.link.count("dropped_backlog")
        return True

    def encode(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``run_task`` frame with its values as they travel, by ``result_format``.

        Raises whatever pickling raises, TypeError or ValueError for what JSON does not carry.
        """
        encoded: dict[str, Any] = self._format.encode_frame(frame)
        return encoded

    def decode(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return *event* with its values unpickled in the calling thread; count what cannot be."""
        decoded: dict[str, Any] = self._format.decode_event(event)
        if isinstance(decoded.get("exception"), PayloadError):
            self.link.count("decode_failures")
        return decoded

    def _run(
        self,
        command: Mapping[str, Any],
        delivery: DeliveryOptions,
        sink: Callable[[dict[str, Any]], None],
        deadline: Deadline,
        needs: str | None = None,
    ) -> Run:
        frames.check_ids(command["run_id"], command["task_id"])
        return Run(
            run_id=command["run_id"],
            task_id=command["task_id"],
            message=frames.encode(command),
            delivery=delivery,
            session=self,
            environment=self.environment,
            sink=sink,
            needs=needs,
            deadline=deadline,
        )

    def cancel(self, run_id: str) -> None:
        """Cancel one of this session's runs by its cancel mode; unknown and ended runs are ignored."""
        self.check_process()
        run = self.link.find(run_id)
        if run is not None and run.session is self:
            self.link.cancel(run)

    def abandon(self) -> None:
        """End this session's runs, each by its orphan policy; the session stays usable."""
        self.check_process()
        self.link.abandon(self)

    def close(self) -> None:
        """End this session's runs by their policies and let go of the link. Idempotent."""
        if not self.foreign:
            self.link.detach(self)

    def drop(self, _ending: Callable[[], bool] = sys.is_finalizing) -> bool:
        """Let go from a finalizer: waits for nobody; runs on their way go on.

        Returns whether there was anything of this process's to let go.
        """
        if not _ending():  # when the interpreter ends there may be no function left to call
            _fork.check(wait=False)
        if self.foreign:
            return False
        self.link.drop(self)
        return True

    def check_process(self) -> None:
        """Raise ForkedError in a fork of the process that made the session."""
        _fork.check()
        if self.foreign:
            raise ForkedError(
                "This session belongs to the parent of this forked process; make or start the executor here."
            )


def open_session(options: LinkOptions, environment: str = "") -> Session:
    """Return a new session on this process's link for *options*; nothing is dialled yet.

    Raises RuntimeError in a uWSGI process without threads, under eventlet's monkey patch, and under
    gevent's if that came after the import of this package.
    """
    _fork.check()
    _check_surroundings()
    while True:
        with _links_lock:
            link = _links.get(options)
            if link is None or link.pid != os.getpid() or link.state in (LinkState.CLOSING, LinkState.CLOSED):
                for closed in [known for known, of in _links.items() if of.state is LinkState.CLOSED]:
                    del _links[closed]  # or settings that are never used again would pile up
                link = _links[options] = Link(options)
                _all_links.add(link)
        session = Session(link, environment)
        if link.attach(session):
            return session


def _check_surroundings() -> None:
    """Raise RuntimeError where the link's threads could not do their work."""
    # Such a uWSGI keeps the interpreter to itself between two requests (it did so by default before
    # 2.0.27): the link's threads would stand still there, and the worker take this host for dead.
    if not getattr(sys.modules.get("uwsgi"), "has_threads", True):
        raise RuntimeError(
            "uWSGI runs this process without threads, which the connection to the worker service needs; "
            "start uWSGI with --enable-threads."
        )
    if not hasattr(select, "poll"):
        raise RuntimeError(
            "select.poll, which the connection to the worker service needs, is missing in this process: "
            "eventlet's monkey patch removes it. Use threads or gevent."
        )
    if _green() and not _green_from_the_start:  # classes of ours are made of locks of real threads
        raise RuntimeError(
            "gevent's monkey patch came after wove_ws_sync was imported; call gevent.monkey.patch_all() "
            "before any other import (with gunicorn --preload at the top of gunicorn.conf.py)."
        )


def _green() -> bool:
    """Tell whether threads are greenlets here."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


_green_from_the_start = _green()


def links() -> list[Link]:
    """Return the links of this process that are not closed."""
    _fork.check()
    with _links_lock:
        return [link for link in _links.values() if link.state is not LinkState.CLOSED]


def close_links(timeout: float | None = None) -> None:
    """Close every link of this process, each within *timeout* seconds (default: its ``close_timeout``).

    Runs still on their way end by their orphan policies; open executors must be made anew.
    """
    _fork.check()
    with _links_lock:
        closing = [link for link in _all_links if link.pid == os.getpid()]
        _links.clear()
    for link in closing:
        link.start_closing(tell=not _exiting)
    clock = Clock()
    started = clock.monotonic()
    for link in closing:  # all at once: the last one gets no more time than the first
        limit = link.options.close_timeout if timeout is None else timeout
        link.close(max(0.0, started + limit - clock.monotonic()))


@_fork.in_child
def _forget_links() -> None:
    global _links_lock
    _links_lock = threading.Lock()
    for link in list(_all_links):
        link.abandon_after_fork()
    _links.clear()
    _all_links.clear()


@atexit.register
def _close_at_exit() -> None:
    """Close without a word to futures: daemon threads that wait for them must not print tracebacks now."""
    global _exiting
    _exiting = True
    close_links()


def exiting() -> bool:
    """Tell whether the interpreter ends, so that no more results come."""
    return _exiting
