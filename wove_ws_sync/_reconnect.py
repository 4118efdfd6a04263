"""When to dial again, and for how long it is worth waiting for that: pure state.

Owns: the count of failures, the patience with a lost connection, the cool-down after a final
answer. Never: dials, waits or asks what time it is; the link's state lock guards every call.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from .errors import AuthenticationRejected, HandshakeRejected
from .options import LinkOptions
from .timing import Backoff

__all__ = ["Reconnect", "is_final"]

# A connection that lasted so many seconds was a good one, whatever came over it.
_STABLE = 10.0
# So many seconds at least a run without a deadline waits for any worker to be reached again.
_LEAST_PATIENCE = 10.0
# Such a part of the resume window before its end is the last dial that may still save what waits for it.
_LAST_CALL = 0.05
# So many seconds nobody is asked again who said no for good.
_COOL_DOWN = 5.0
# A worker that wants more time than this, in seconds, to stop gets no more patience for it.
_LONGEST_DRAIN = 3600.0


class Reconnect:
    """*spread* returns a random number from [-1, 1] for each delay's jitter."""

    def __init__(self, options: LinkOptions, spread: Callable[[], float]) -> None:
        self._patience = max(options.resume_window, _LEAST_PATIENCE)
        self._last_call = options.resume_window * _LAST_CALL
        self._backoff = Backoff(options.reconnect_initial_delay, options.reconnect_max_delay)
        self._spread = spread
        # Dials in a row that brought nothing.
        self._failures = 0
        # Until when runs without a deadline wait for a connection; None while there is a good one.
        self._patient_until: float | None = None
        self._refusal: tuple[BaseException, float] | None = None

    def proven(self) -> None:
        """Note an event of a worker: the handshake alone does not show that one is behind it."""
        self._failures, self._patient_until = 0, None

    def lost(self, now: float, up_since: float) -> None:
        """Note that a connection was lost."""
        if self._patient_until is None or now >= up_since + _STABLE:
            self._failures, self._patient_until = 0, now + self._patience

    def draining(self, now: float, timeout: Any) -> None:
        """Note that the worker says it stops within *timeout* seconds, to be replaced by another."""
        plain = isinstance(timeout, int | float) and 0 <= timeout <= _LONGEST_DRAIN
        self._failures, self._patient_until = 0, now + self._patience + (timeout if plain else 0.0)

    def next_dial(self, exc: BaseException, now: float, limbo_until: float | None = None) -> float:
        """Return when to dial after *exc*, a server's own wish included, and count the failure.

        That is sooner than the delays say where runs would not live to see it: those in limbo wait
        until *limbo_until*, those without a deadline until the patience is over.
        """
        moment = now + self._backoff.delay(self._failures, self._spread())
        self._failures += 1
        last_call = None if limbo_until is None else limbo_until - self._last_call
        for last in (last_call, self._patient_until):
            if last is not None and now < last < moment:
                moment = last
        return max(moment, now + (getattr(exc, "retry_after", None) or 0.0))

    def worth_waiting(self, moment: float) -> bool:
        """Tell whether a run without a deadline waits for a dial at *moment*."""
        return self._patient_until is not None and moment <= self._patient_until

    def refused(self, exc: BaseException, now: float) -> None:
        """Note a final answer; what is wrong on this side costs nobody a dial."""
        if isinstance(exc, OSError):
            self._refusal = (exc, now + _COOL_DOWN)

    def refusal(self, now: float) -> BaseException | None:
        """Return the final answer that still stands."""
        if self._refusal is not None and now < self._refusal[1]:
            return self._refusal[0]
        return None


def is_final(exc: BaseException) -> bool:
    """Tell whether dialling again would only get the same answer."""
    if isinstance(exc, AuthenticationRejected):  # the token endpoint's, too, whatever its status
        return True
    if isinstance(exc, HandshakeRejected):
        return exc.status is None or exc.status in (101, 401, 403, 404, 426) or 300 <= exc.status < 400
    return isinstance(exc, ssl.SSLCertVerificationError | ValueError | RuntimeError)
