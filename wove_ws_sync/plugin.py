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
# Guards the swap of Wove's factory.
_lock = threading.Lock()
_original: Callable[[str], wove.EnvironmentExecutor] | None = None


def install() -> None:
    """Route ``executor="websocket"`` of every later weave through this package. Idempotent, thread-safe.

    Raises RuntimeError if the installed Wove has no place to do so.
    """
    global _original
    _fork.check()
    with _lock:
        if _original is not None:
            return
        original = getattr(wove_environment, _FACTORY, None)
        if original is None:
            raise RuntimeError(
                f"wove {wove.__version__} builds its executors in another way; "
                "wove_ws_sync works with wove 2.0."
            )
        _original = original
        setattr(wove_environment, _FACTORY, _build)


def uninstall() -> None:
    """Restore Wove's own websocket executor for later weaves. Idempotent, thread-safe."""
    global _original
    _fork.check()
    with _lock:
        if _original is not None:
            if getattr(wove_environment, _FACTORY) is _build:  # or somebody else patched Wove after us
                setattr(wove_environment, _FACTORY, _original)
            _original = None


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
    if name == "websocket":
        return AsyncWebSocketEnvironmentExecutor()
    original = _original
    if original is None:  # a call that began before uninstall()
        return wove_environment.build_executor_from_name(name)
    return original(name)
