"""Exceptions as signal handlers raise them, at a step that a test chooses."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Struck(BaseException):
    """What the signal handler raises."""


def struck(act: Callable[[], Any], trace: Callable[[FrameType, str, Any], Any]) -> bool:
    """Call *act* under *trace*, which may raise Struck; tell whether that came out."""
    before = sys.gettrace()
    gc.disable()  # what other tests have left behind has finalizers, which are no part of the act
    sys.settrace(trace)
    try:
        act()
    except Struck:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False
