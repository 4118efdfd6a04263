"""One run: its state, and the events that this side makes about it.

Owns: :class:`Run`, the effects of a decision, and what an ending made here looks like. Never:
decides anything; :mod:`wove_ws_sync.runs` does.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

from .errors import ConnectionLost, DeliveryTimeout
from .options import DeliveryOptions
from .timing import Deadline

__all__ = [
    "CancelAtWorker",
    "Deliver",
    "DetachAtWorker",
    "Effect",
    "Loss",
    "Posted",
    "Receipt",
    "Run",
    "RunState",
    "cancelled",
    "connection_lost",
    "failed",
    "orphaned",
    "worker_stopping",
]


class RunState(enum.Enum):
    """Where a run is; the last five are final. LIMBO: it was sent, and the connection is lost."""

    QUEUED = "queued"
    SENT = "sent"
    RUNNING = "running"
    LIMBO = "limbo"
    CANCELLING = "cancelling"
    DONE = "done"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    ORPHANED = "orphaned"
    DETACHED = "detached"


_FINAL = frozenset(list(RunState)[-5:])


class Receipt(Protocol):
    """What the transport knows of one queued message."""

    @property
    def started(self) -> bool:
        """Tell whether a byte of it may have left."""

    @property
    def sent_at(self) -> float | None:
        """Return when the last byte left, None before."""

    @property
    def maybe_sent(self) -> bool:
        """Tell whether the last byte may have left, noted or not."""

    def withdraw(self) -> bool:
        """Take the message back; False if a byte of it may have left, or is about to."""


class Loss(NamedTuple):
    """How a connection ended: the peer's close code, if it sent one, and why."""

    close_code: int | None = None
    reason: str = ""


_UNKNOWN_LOSS = Loss()


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """One task execution on its way; mutable, guarded by the link's state lock.

    ``sink`` takes the run's event frames, outside every lock, in whichever thread brings
    them: the reader for what arrives, the watchdog for deadlines, a caller for cancels.
    ``generation`` is that of the connection that carries the run, None for none. ``needs``
    names the extension without which its message means nothing to a worker. ``begun`` tells
    whether the worker has said that it started the present delivery. ``asked`` is the
    connection over which the worker was asked what became of the run, and has not answered.
    """

    run_id: str
    task_id: str
    message: bytes = dataclasses.field(repr=False)  # holds the arguments
    delivery: DeliveryOptions
    session: Hashable
    environment: str
    sink: Callable[[dict[str, Any]], None]
    needs: str | None = None
    deadline: Deadline = Deadline()
    attempt: int = 1
    begun: bool = False
    cuts: int = 0
    futile: int = 0
    state: RunState = RunState.QUEUED
    generation: int | None = None
    asked: int | None = None
    receipt: Receipt | None = None
    life: float = 0.0
    alarm: float | None = None
    ack_by: float | None = None
    limbo_until: float | None = None
    loss: Loss = _UNKNOWN_LOSS
    timeout: DeliveryTimeout | None = None
    holds_slot: bool = False
    answered: bool = False

    @property
    def terminal(self) -> bool:
        """Tell whether the one terminal event has been decided."""
        return self.state in _FINAL

    @property
    def in_limbo(self) -> bool:
        """Tell whether it was sent over a connection that is lost, and nothing was decided since."""
        return self.receipt is not None and self.generation is None

    @property
    def reached_by(self) -> int | None:
        """Return the connection by which the worker hears of its end: what carries it, or asks for it."""
        return self.asked if self.generation is None else self.generation

    @property
    def maybe_seen(self) -> bool:
        """Tell whether a worker may have seen the whole of the present delivery."""
        return self.answered or (self.receipt is not None and self.receipt.maybe_sent)

    @property
    def maybe_executed(self) -> bool:
        """Tell whether a worker may have seen the whole of any delivery."""
        return self.attempt > 1 or self.maybe_seen

    def withdraw(self) -> bool:
        """Take the run back; False if a worker has seen it, or is about to."""
        if self.receipt is None or self.receipt.withdraw():
            return True
        self.answered = True
        return False


class Deliver(NamedTuple):
    """Give *event* to the run's sink."""

    run: Run
    event: dict[str, Any]

    def __repr__(self) -> str:
        return f"Deliver({self.run!r}, {self.event.get('type')!r})"


class CancelAtWorker(NamedTuple):
    """Send ``cancel_task`` by the connection number *generation*, which carried the run."""

    run: Run
    generation: int | None


class DetachAtWorker(NamedTuple):
    """Have the worker let go of the run and keep its result; as :class:`CancelAtWorker` otherwise."""

    run: Run
    generation: int | None


class Posted(NamedTuple):
    """Messages were given to a transport, and are to be sent."""


Effect = Deliver | CancelAtWorker | DetachAtWorker | Posted


def failed(run: Run, error: BaseException) -> dict[str, Any]:
    """Return the ``task_error`` event of an error made on this side."""
    return {
        "type": "task_error",
        "run_id": run.run_id,
        "task_id": run.task_id,
        "exception": error,
        "error": {
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": "",
            "retryable": isinstance(error, ConnectionError),
            "source": "transport",
        },
    }


def cancelled(run: Run, *, acknowledged: bool) -> dict[str, Any]:
    """Return the ``task_cancelled`` event of a cancellation that was decided on this side."""
    return {
        "type": "task_cancelled",
        "run_id": run.run_id,
        "task_id": run.task_id,
        "acknowledged": acknowledged,
    }


def connection_lost(run: Run, loss: Loss) -> ConnectionLost:
    """Return the error of a run whose connection broke."""
    policy = run.delivery.delivery_orphan_policy
    if policy == "cancel":
        code, reason = loss
        number = f"close code {code}" if code and str(code) not in reason else ""
        said = ": ".join(filter(None, [number, reason.rstrip(".")]))
        said = f" ({said})" if said else ""
        seen = "may have run" if run.maybe_executed else "had not been sent"
        text = (
            f"The connection to the worker service was lost{said}; run '{run.run_id}' {seen}. "
            "Submit it again if that is safe."
        )
    else:
        text = (
            f"Task '{run.task_id}' orphaned after receiver failure in environment "
            f"'{run.environment}' (policy='{policy}')."
        )
    return _lost(run, text, loss)


def orphaned(run: Run) -> ConnectionLost:
    """Return the error of a run whose session stopped."""
    text = (
        f"Task '{run.task_id}' became orphaned in environment '{run.environment}' "
        f"with policy '{run.delivery.delivery_orphan_policy}'."
    )
    return _lost(run, text, _UNKNOWN_LOSS)


def _lost(run: Run, text: str, loss: Loss) -> ConnectionLost:
    return ConnectionLost(
        text,
        run_id=run.run_id,
        close_code=loss.close_code,
        reason=loss.reason,
        attempt=run.attempt,
        maybe_executed=run.maybe_executed,
    )


def worker_stopping(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return the error of a worker that stops and hands the run back; None for any other event."""
    error = event.get("error")
    if event["type"] != "task_error" or not isinstance(error, dict) or error.get("kind") != "WorkerStopping":
        return None
    return error if error.get("retryable") is True and error.get("source") == "executor" else None
