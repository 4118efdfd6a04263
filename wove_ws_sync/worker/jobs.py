"""The user's code of one run: unpickle or import it, call it, await it, encode what comes out.

Owns: everything that executes user code, and the terminal event that follows from it.
Never: runs on the event loop that serves connections; never lets an exception of a
task out, be it SystemExit; never touches a socket.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .. import current, payloads
from .._exact import to_json
from ..frames import encode
from . import surroundings, telemetry
from .commands import RunTask
from .events import cancelled_event, error_event, plain_error, service_error
from .registry import UnknownTask, call_of
from .voice import Voice

__all__ = ["Job", "Report"]

#: Gets ("started" | "progress" | "heartbeat" | "log" | "ended", the encoded event), from any thread.
Report = Callable[[str, bytes], None]
#: Takes over an awaitable, to be driven on a loop in the given context.
Adopt = Callable[["Job", Awaitable[Any], contextvars.Context], None]


class Job:
    """One execution. An engine calls ``run`` in a thread of its own, at most once.

    An engine that executes elsewhere sends ``order()`` there, where a Job of its own is made of
    it, and ``relay``s what that one reports.

    ``limit`` is the largest message in bytes that the host accepts. ``coroutine`` is set
    while an awaitable of the task is being driven; ``cancel_requested`` and ``abandoned``
    (nobody wants the result) are set by others and only looked at here.
    """

    __slots__ = (
        "_command",
        "_limit",
        "_report",
        "_traced",
        "_voice",
        "abandoned",
        "attempts",
        "cancel_requested",
        "coroutine",
        "done",
        "future",
        "task",
    )

    def __init__(self, command: RunTask, report: Report, limit: int) -> None:
        self._command = command
        self._report = report
        self._limit = limit
        self._voice: Voice | None = None
        self._traced: telemetry.Traced | None = None
        self.abandoned = False
        self.attempts = 0  # the engine's
        self.cancel_requested = False
        self.coroutine = False
        self.done = False
        self.future: Any = None  # the engine's
        self.task: asyncio.Task[None] | None = None  # of the loop that drives the coroutine

    @property
    def run_id(self) -> str:
        """Return the id of the run."""
        return self._command.run_id

    @property
    def task_id(self) -> str:
        """Return the id of the task."""
        return self._command.task_id

    def order(self) -> tuple[RunTask, int]:
        """Return what a Job elsewhere is made of: the command and the limit."""
        return self._command, self._limit

    def relay(self, kind: str, event: bytes) -> None:
        """Report what the Job elsewhere reports."""
        if kind == "ended":
            self.done = True
        elif self.abandoned:
            return
        self._report(kind, event)

    def relay_cancelled(self) -> None:
        """Report that the Job elsewhere was stopped."""
        self.relay("ended", cancelled_event(self.run_id, self.task_id))

    def run(self, adopt: Adopt) -> None:
        """Execute the task in this thread; hand an awaitable that it returns to *adopt*."""
        try:
            contextvars.Context().run(surroundings.call, self._run_guarded, adopt)
        except BaseException as exc:
            if self.coroutine:  # that is still to be driven
                raise
            self._broken(exc)

    def _run_guarded(self, adopt: Adopt) -> None:
        try:
            self._run(adopt)
        except BaseException as exc:
            self.coroutine = False  # nobody has adopted it
            self._broken(exc)

    def _run(self, adopt: Adopt) -> None:
        if self.abandoned:
            return
        run_id, task_id = self._command.run_id, self._command.task_id
        self._voice = Voice(self, run_id, task_id, self._report)
        current.enter(current.CurrentRun(run_id, task_id, self._voice), self._voice)
        head = {"type": "task_started", "run_id": run_id, "task_id": task_id}
        self._report("started", encode(head))
        if self._command.otel:
            self._traced = telemetry.begin(self._command)
        try:
            function, positional, args = self._load()
        except BaseException as exc:
            self._failed_payload(exc)
            return
        try:
            value = function(*positional, **args)
            awaitable = inspect.isawaitable(value)
        except asyncio.CancelledError:
            self._cancelled()
        except BaseException as exc:
            self._failed(exc)
        else:
            del function, positional, args
            if not awaitable:
                self._returned(value)
                return
            self.coroutine = True
            adopt(self, value, contextvars.copy_context())

    def forget(self) -> None:
        """Drop the payload of a job that will never run; its place in a queue may live on for long."""
        command = self._command
        self._command = RunTask(
            command.run_id, command.task_id, "", None, None, command.cancel_mode, name=command.name
        )

    async def drive(self, awaitable: Awaitable[Any]) -> None:
        """Await what the task returned and report how it ended."""
        try:
            await self._drive(awaitable)
        except BaseException as exc:
            self._broken(exc)

    async def _drive(self, awaitable: Awaitable[Any]) -> None:
        try:
            value = await surroundings.awaited(awaitable)
        except asyncio.CancelledError:
            self._cancelled()
        except BaseException as exc:
            self._failed(exc)
        else:
            self._returned(value)

    def refuse(self, awaitable: Awaitable[Any]) -> None:
        """End the job whose awaitable is not to be driven any more: it was cancelled before."""
        try:
            stop = getattr(awaitable, "close", None) or getattr(awaitable, "cancel", None)
            if stop is not None:
                stop()
        except BaseException as exc:
            self._failed(exc)
        else:
            self._cancelled()

    def _load(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return what to call, its positional arguments and the others."""
        command = self._command
        if command.name:
            call = call_of(command)
            self.forget()
            return call
        function, args = self._unpickle()
        return function, [], args

    def _unpickle(self) -> tuple[Any, dict[str, Any]]:
        command = self._command
        function = payloads.decode_value(command.callable_pickle)
        args = {} if command.args_pickle is None else payloads.decode_value(command.args_pickle)
        # The text of large arguments must not stay in memory while the task runs.
        self.forget()
        if not callable(function):
            raise TypeError(f"callable_pickle holds a {type(function).__name__}, which cannot be called")
        if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
            raise TypeError("args_pickle must hold a dictionary of keyword arguments")
        return function, args

    def _end(
        self, event: bytes, outcome: str = "result", error: str = "", exc: BaseException | None = None
    ) -> None:
        if self._traced is not None:
            self._traced.end(outcome, error, exc)
        if self._voice is not None:
            self._voice.close()
            self._voice = None  # the two know each other, which only the collector would undo
        self.done = True
        self._report("ended", event)

    def _broken(self, exc: BaseException) -> None:
        """End the job although reporting how it ended has failed, as it does when memory is short."""
        if self.done:
            raise exc
        message = (
            f"How the task ended could not be reported ({_describe(exc)}). It may have been executed. "
            "If memory was short, return less at once or have fewer --workers."
        )
        if self._traced is not None:
            self._traced.end("error", "ReportFailed", exc)
        self.relay("ended", service_error(self.run_id, self.task_id, "ReportFailed", message, retryable=True))

    def _cancelled(self) -> None:
        self._end(cancelled_event(self._command.run_id, self._command.task_id), "cancelled")

    def _error(
        self, error: Mapping[str, Any], exception: bytes | None = None, exc: BaseException | None = None
    ) -> None:
        run_id, task_id, plain = self._command.run_id, self._command.task_id, bool(self._command.name)
        event = error_event(run_id, task_id, error, exception, plain=plain)
        if len(event) > self._limit and exception is not None:
            event = error_event(run_id, task_id, error)
        if len(event) > self._limit:
            short = {**error, "message": str(error["message"])[:512], "traceback": ""}
            event = error_event(run_id, task_id, short, plain=plain)
        self._end(event, "error", str(error["kind"]), exc)

    def _failed_payload(self, exc: BaseException) -> None:
        """Report that the task could not be had, so that nothing of it ran."""
        cause = exc.__cause__ or exc
        if self._command.name:
            message = f"The worker service cannot call {self._command.name!r}: {_text(exc)[:1024]}."
            kind = "UnknownTask" if isinstance(exc, UnknownTask) else "PayloadDecodeError"
            self._error(plain_error(kind, message, "payload", text=_traceback(cause)))
            return
        message = (
            f"The task could not be unpickled by the worker service ({_describe(cause)}). "
            "Check that both sides have the same modules and compatible versions."
        )
        self._error(plain_error("PayloadDecodeError", message, "payload", text=_traceback(cause)))

    def _failed(self, exc: BaseException) -> None:
        """Report the task's own exception."""
        if self.cancel_requested and isinstance(exc, concurrent.futures.CancelledError):
            self._cancelled()
            return
        if self.abandoned:
            self._end(b"", "error", type(exc).__name__, exc)
            return
        error = plain_error(type(exc).__name__, _text(exc), "task", text=_traceback(exc))
        self._error(error, None if self._command.name else _pickled(exc), exc)

    def _returned(self, value: Any) -> None:
        """Report the task's result, or why it cannot travel."""
        if self.abandoned:
            self._end(b"")
            return
        kind, named = type(value), bool(self._command.name)
        event: dict[str, Any] = {"type": "task_result", "run_id": self.run_id, "task_id": self.task_id}
        try:
            encoded = to_json(value, "the result") if named else payloads.encode_value(value)
            del value  # three of it would be in memory
            event["result" if named else "result_pickle"] = encoded
            message_bytes = encode(event) if len(encoded) < self._limit else b""
        except BaseException as exc:
            message = (
                f"The task returned a {kind.__module__}.{kind.__qualname__} that cannot be "
                f"{'carried by JSON' if named else 'pickled'} ({_describe(exc)}). "
                f"A result must be {'plain JSON' if named else 'picklable'} to travel back to the host."
            )
            name = "ResultNotJSON" if named else type(exc).__name__
            self._error(plain_error(name, message, "result", text=_traceback(exc)))
            return
        if not message_bytes or len(message_bytes) > self._limit:
            self._too_large(len(message_bytes) or len(encoded))
            return
        self._end(message_bytes)

    def _too_large(self, size: int) -> None:
        message = (
            f"The result of task {self._command.task_id!r} takes {size} bytes as a message; "
            f"this host accepts {self._limit}. Return less, or where to find it, or raise "
            "executor_config.max_message_bytes of the host (Wove's own executor has no such setting)."
        )
        self._error(plain_error("ResultTooLarge", message, "result"))


def _pickled(exc: BaseException) -> bytes | None:
    """Return *exc* for ``exception_pickle``; None if the host could not raise it as itself."""
    if not isinstance(exc, Exception) or isinstance(exc, StopIteration | StopAsyncIteration):
        return None  # a host must not raise these inside its own loop
    try:
        pickled, again = _there_and_back(exc)
        if again is None or _text(again) != _text(exc):
            bare, remade = _there_and_back(_Bare(exc))
            if remade is not None and _text(remade) == _text(exc):
                return bare
    except BaseException:  # it cannot be pickled
        return None
    return None if again is None else pickled


def _there_and_back(value: Any) -> tuple[bytes, Exception | None]:
    """Return the pickle of *value* and the exception that comes out of it, None if none does."""
    pickled = payloads.encode_value(value)
    try:
        again = payloads.decode_value(pickled)
    except BaseException:
        again = None
    return pickled, again if isinstance(again, Exception) else None


class _Bare:
    """Pickle an exception so that it is made without its ``__init__``, which may want other arguments."""

    def __init__(self, exc: Exception) -> None:
        self._exc = exc

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self._exc)
        return kind.__new__, (kind, *self._exc.args), vars(self._exc)


def _traceback(exc: BaseException) -> str:
    """Return the whole chain as text, without the frames of this module at its start."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(exc), exc, trace))
    except BaseException as fault:
        return f"{type(exc).__name__} (its traceback could not be formatted: {type(fault).__name__})"


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as fault:
        return f"(str() of this {type(exc).__name__} failed: {type(fault).__name__})"


def _describe(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {_text(exc)[:1024]}"
