"""What a forked child must forget.

Owns: the one fork hook of the package and the list of what to call in the child. Never:
takes a lock or writes to a socket there; the child only drops what is its parent's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["forget_in_child", "in_child"]


class Inherited(Protocol):
    """What may not be used in a child as its parent left it: locks that nobody there will release."""

    def abandon_after_fork(self) -> None:
        """Drop what is the parent's and make fresh locks; take none."""


_hooks: list[Callable[[], None]] = []
_objects: weakref.WeakSet[Inherited] = weakref.WeakSet()


def in_child(hook: Callable[[], None]) -> Callable[[], None]:
    """Have *hook* called in every forked child, before anything else of this package runs there."""
    _hooks.append(hook)
    return hook


def forget_in_child(inherited: Inherited) -> None:
    """Have ``abandon_after_fork()`` of an object called in every forked child, for as long as it lives."""
    _objects.add(inherited)


def _run_hooks() -> None:
    for hook in _hooks:
        hook()
    for inherited in list(_objects):
        inherited.abandon_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_hooks)
