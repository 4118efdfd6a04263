"""What a forked child must forget.

Owns: the one fork hook of the package and the list of what to call in the child. Never:
takes a lock or writes to a socket there; the child only drops what is its parent's.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["in_child"]

_hooks: list[Callable[[], None]] = []


def in_child(hook: Callable[[], None]) -> Callable[[], None]:
    """Have *hook* called in every forked child, before anything else of this package runs there."""
    _hooks.append(hook)
    return hook


def _run_hooks() -> None:
    for hook in _hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_hooks)
