"""What a forked child must forget, and how it finds out that it is one.

Owns: the one fork hook of the package, the list of what to call in the child, and the check
for forks that Python does not see. Never: takes a lock that the parent may have held, writes
to a socket; the child only drops what is its parent's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["check", "forget_in_child", "in_child"]


class Inherited(Protocol):
    """What may not be used in a child as its parent left it: locks that nobody there will release."""

    def abandon_after_fork(self) -> None:
        """Drop what is the parent's and make fresh locks; take none. May be called again."""


_hooks: list[Callable[[], None]] = []
_objects: weakref.WeakSet[Inherited] = weakref.WeakSet()
# The process whose state the package holds, and the one that is on its way to have it.
_pid = _renewing = os.getpid()
# Whose turn it is to forget, by process: a child must not wait for a lock of its parent's.
_turns: dict[int, threading.RLock] = {}


def in_child(hook: Callable[[], None]) -> Callable[[], None]:
    """Have *hook* called in every forked child, before anything else of this package runs there.

    It may be called again if an exception of a signal handler interrupts it.
    """
    _hooks.append(hook)
    return hook


def forget_in_child(inherited: Inherited) -> None:
    """Have ``abandon_after_fork()`` of an object called in every forked child, for as long as it lives."""
    check()  # or what is made in a child would be taken for its parent's
    _objects.add(inherited)


def check(*, wait: bool = True) -> None:
    """Forget what is the parent's, if this is a child whose fork Python did not see.

    Every public call begins here. uWSGI forks its workers in C and runs Python's hooks only if
    it is told to (``py-call-uwsgi-fork-hooks``). Without *wait*, for finalizers, the call returns
    at once while another thread is at it.
    """
    if os.getpid() != _pid:
        _forget(wait)


def _forget(wait: bool) -> None:
    pid = os.getpid()
    turn = _turns.setdefault(pid, threading.RLock())
    try:
        # Reentrant, as a finalizer or a signal handler may come here in the middle of it.
        if turn.acquire(blocking=wait) and pid not in (_pid, _renewing):
            _run_hooks()
    finally:
        with contextlib.suppress(RuntimeError):  # not acquired
            turn.release()


def _run_hooks() -> None:
    global _pid, _renewing
    _renewing = os.getpid()
    try:
        for hook in _hooks:
            hook()
        for inherited in list(_objects):
            inherited.abandon_after_fork()
        _pid = _renewing
    finally:
        _renewing = _pid  # after an exception the next call begins anew


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_hooks)
