"""What a report of progress is, on either side.

Owns: :class:`Progress`, its checks and its bounds. Never: sends one, never knows a run.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["MAX_TEXT", "Progress", "checked", "read"]

#: The longest message of a report, in characters; the rest is cut off.
MAX_TEXT = 256


class Progress(NamedTuple):
    """How far a run is: *done* of *total* (None: unknown), and a *message* for people."""

    done: float
    total: float | None = None
    message: str = ""

    @property
    def fraction(self) -> float:
        """Return which part is done, from 0.0 to 1.0; 0.0 as long as that is unknown."""
        if self.total is None or self.total <= 0:
            return 0.0
        return min(max(self.done / self.total, 0.0), 1.0)


def checked(done: Any, total: Any, message: Any) -> Progress:
    """Return what a task reports. Raises TypeError or ValueError for what is no report."""
    if not isinstance(message, str):
        raise TypeError(f"message must be a string, not {type(message).__name__}.")
    if len(message) > MAX_TEXT:
        message = message[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return Progress(_number("done", done), None if total is None else _number("total", total), message)


def _number(name: str, value: Any) -> float:
    kind = type(value)
    if kind is not int and kind is not float:
        if kind is bool or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, not {kind.__name__}.")
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, and no larger than a float can be.")
    number: float = value
    return number


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def read(event: Mapping[str, Any]) -> Progress | None:
    """Return what a peer's ``progress`` event says; None if its shape is wrong."""
    done, total, message = event.get("done"), event.get("total"), event.get("message", "")
    if not _is_number(done) or not (total is None or _is_number(total)) or not isinstance(message, str):
        return None
    return checked(done, total, message)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and _is_finite(value)
