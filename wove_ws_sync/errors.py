"""Every error that this package raises on its own account.

Owns: the exception types and how they travel through pickle. Never: decides when one is raised.

Each type also is the type that callers of Wove, of ``concurrent.futures`` or of the
standard library already catch.
"""

from __future__ import annotations

import concurrent.futures
import copyreg
from typing import Any

import wove
from wove.environment import EnvironmentExecutionError

__all__ = [
    "AuthenticationRejected",
    "ConnectionLost",
    "DeliveryCancelled",
    "DeliveryTimeout",
    "ExecutorClosed",
    "ForkedError",
    "HandshakeRejected",
    "PayloadError",
]


class _Details:
    """Carry keyword attributes through pickle and copy."""

    args: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], details: dict[str, Any]) -> Any:
    error = kind(*args)
    error.__dict__.update(details)
    return error


class ConnectionLost(_Details, wove.DeliveryOrphanedError, ConnectionError):
    """Tell that the connection broke while a run was on its way.

    ``run_id`` names the run (None for the link as a whole), ``close_code`` is that of the close frame
    that ended it, the worker service's or ours (None if there was none), ``reason`` the text in it, or
    else what was seen on this side. ``attempt`` counts deliveries from 1, and ``maybe_executed`` is
    False only if the last byte of the run had not left this process.
    """

    def __init__(
        self,
        message: str = "The connection to the worker service was lost.",
        *,
        run_id: str | None = None,
        close_code: int | None = None,
        reason: str = "",
        attempt: int = 1,
        maybe_executed: bool = True,
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.close_code = close_code
        self.reason = reason
        self.attempt = attempt
        self.maybe_executed = maybe_executed


class HandshakeRejected(_Details, ConnectionError):
    """Tell that the worker service answered the handshake, and the answer was no.

    ``status`` is the HTTP status (101 if the upgrade was not valid, None if the answer was not
    HTTP); ``retry_after`` is the server's wish in seconds, at most 60, if it named one. The response
    body is never part of the message.
    """

    def __init__(
        self,
        message: str = "The worker service rejected the handshake.",
        *,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class AuthenticationRejected(HandshakeRejected, PermissionError):
    """Tell that the worker service answered 401 or 403, or that a token endpoint gave no token.

    ``status`` is that of the one who answered.
    """


class DeliveryTimeout(_Details, wove.DeliveryTimeoutError, TimeoutError):
    """Tell that a run missed its ``delivery_timeout`` or its heartbeats.

    ``cancel_acknowledged`` says whether the worker confirmed the cancellation that
    followed, ``late_result`` whether a result came after the deadline and was dropped. The
    ``__cause__`` of a run that no connection carried is what the last dial ended with.
    """

    def __init__(
        self,
        message: str = "Delivery timeout exceeded.",
        *,
        run_id: str | None = None,
        cancel_acknowledged: bool = False,
        late_result: bool = False,
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.cancel_acknowledged = cancel_acknowledged
        self.late_result = late_result


class DeliveryCancelled(_Details, concurrent.futures.CancelledError):
    """Tell that a run was cancelled; ``acknowledged`` says whether the worker confirmed it."""

    def __init__(
        self,
        message: str = "The run was cancelled.",
        *,
        run_id: str | None = None,
        acknowledged: bool = False,
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.acknowledged = acknowledged


class PayloadError(EnvironmentExecutionError):
    """Tell that a result or an exception arrived and could not be unpickled here, or was not to be.

    ``payload`` has Wove's keys: kind, message, traceback, retryable, source.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced(self)


class ExecutorClosed(RuntimeError):
    """Tell that the executor or its link was already shut down."""


class ForkedError(RuntimeError):
    """Tell that a run, a future or a link belongs to the parent of this forked process."""


def _reduced(error: EnvironmentExecutionError) -> tuple[Any, ...]:
    return (type(error), (error.payload,), error.__dict__)


# Wove's own can be pickled, but not be loaded again: a process pool would break on one.
copyreg.pickle(EnvironmentExecutionError, _reduced)
