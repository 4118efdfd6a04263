"""Make Wove's ``executor="websocket"`` mean this package.

Owns: the one place where Wove is patched, and its undoing. Never: changes what other
executor names mean.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import wove
from wove import environment as wove_environment

from . import _fork
from .aio import AsyncWebSocketEnvironmentExecutor

__all__ = ["config", "install", "uninstall"]

_FACTORY = "build_executor_from_name"
_Factory = Callable[[str], wove.EnvironmentExecutor]
# Guards the swap of Wove's factory.
_lock = threading.Lock()
_installed = False
# Wove's own factory, and what ours took the place of: that one, or what somebody made of it, or of ours.
_wove_factory: _Factory | None = None
_replaced: _Factory | None = None
_below = threading.local()


def install() -> None:
    """Route ``executor="websocket"`` of every later weave through this package. Idempotent, thread-safe.

    Raises RuntimeError if the installed Wove has no place to do so.
    """
    global _installed, _wove_factory, _replaced
    _fork.check()
    with _lock:
        if _installed:
            return
        present = getattr(wove_environment, _FACTORY, None)
        if present is None:
            raise RuntimeError(
                f"wove {wove.__version__} builds its executors in another way; "
                "wove_ws_sync works with wove 2.0."
            )
        if present is not _build:
            _wove_factory, _replaced = _wove_factory or present, present
            setattr(wove_environment, _FACTORY, _build)
        _installed = True


def uninstall() -> None:
    """Restore Wove's own websocket executor for later weaves. Idempotent, thread-safe."""
    global _installed, _replaced
    _fork.check()
    with _lock:
        if _installed and getattr(wove_environment, _FACTORY) is _build:  # or somebody patched Wove after us
            setattr(wove_environment, _FACTORY, _replaced)
            _replaced = _wove_factory  # for whoever wrapped ours
        _installed = False


@functools.wraps(wove.config, assigned=(), updated=())  # for its signature alone
def config(**settings: Any) -> Any:
    """Call :func:`install`, then ``wove.config`` with the same keywords, and return what it returns."""
    install()
    return wove.config(**settings)


@_fork.in_child
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


def _build(name: str) -> wove.EnvironmentExecutor:
    if name == "websocket" and _installed:
        return AsyncWebSocketEnvironmentExecutor()
    assert _wove_factory is not None and _replaced is not None
    if getattr(_below, "entered", False):  # what ours took the place of calls ours
        return _wove_factory(name)
    _below.entered = True
    try:
        return _replaced(name)
    finally:
        _below.entered = False
