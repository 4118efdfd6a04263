"""The service cannot judge a handshake just now.

Owns: that error. Never: is the host's fault, who would give up after a 401.
"""

from __future__ import annotations

__all__ = ["NotReady"]


class NotReady(Exception):
    """Something that is needed to judge is not there; ``retry_after`` is when it may be, in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
