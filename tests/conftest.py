"""Fixtures that every test gets without asking: nothing of a test outlives it.

``no_leaks`` fails a test that leaves a run, a thread or a descriptor behind;
``wove_defaults`` takes back what it told ``wove.config``, ``wove_executor`` what
``install()`` changed. Waiting is bounded and spent by a failing test only.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wove.runtime

# What a test leaves gets this long to end on its own account, in seconds.
SETTLE_TIMEOUT = 10.0


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("wove-ws-")}


def _descriptors() -> set[str]:
    """Return what this process holds open as "number -> target"; nothing where there is no /proc."""
    found: set[str] = set()
    try:
        numbers = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return found
    for number in numbers:
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


def _busy_links() -> set[Any]:
    """Return every link of this process with runs in flight, also one that only its test knows."""
    if not _threads():  # a run in flight keeps the threads of its link alive; looking costs 15 ms
        return set()
    from wove_ws_sync.link import Link

    return {link for link in gc.get_objects() if type(link) is Link and link.stats()["runs"]}


def _close_links() -> None:
    if "wove_ws_sync.session" in sys.modules:
        sys.modules["wove_ws_sync.session"].close_links()


def _settled(left: Callable[[], set[Any]], timeout: float) -> set[Any]:
    """Return what is *left* when nothing is, or after *timeout* seconds."""
    pause = threading.Event()
    end = time.monotonic() + timeout
    while remains := left():
        if time.monotonic() >= end:
            return remains
        gc.collect()  # what only a cycle keeps alive is not a leak
        pause.wait(0.02)
    return remains


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a run in flight, a thread of ours or a descriptor."""
    links, threads, descriptors = weakref.WeakSet(_busy_links()), _threads(), _descriptors()
    yield
    busy = [repr(link) for link in _settled(lambda: _busy_links() - set(links), SETTLE_TIMEOUT)]
    _close_links()  # links outlive their last session by idle_timeout, on purpose
    leaks = {
        "runs": busy,
        "threads": sorted(t.name for t in _settled(lambda: _threads() - threads, SETTLE_TIMEOUT)),
        "descriptors": sorted(_settled(lambda: _descriptors() - descriptors, SETTLE_TIMEOUT)),
    }
    if found := {what: names for what, names in leaks.items() if names}:
        pytest.fail(f"the test left behind: {found}", pytrace=False)


@pytest.fixture(autouse=True)
def wove_defaults(no_leaks: None) -> Iterator[None]:
    """Put the process-wide settings of ``wove.config`` back to Wove's defaults after each test."""
    yield
    vars(wove.runtime.runtime).clear()
    vars(wove.runtime.runtime).update(vars(wove.runtime.RuntimeConfig()))


@pytest.fixture(autouse=True)
def wove_executor(no_leaks: None) -> Iterator[None]:
    """Give ``executor="websocket"`` back to Wove after a test that called ``install()``."""
    yield
    if "wove_ws_sync.plugin" in sys.modules:
        sys.modules["wove_ws_sync.plugin"].uninstall()
