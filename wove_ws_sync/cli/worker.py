"""``wove-ws-sync worker``: run a worker service until a signal ends it.

Owns: the options, the one line on stdout, signals and the exit code. Never: serves a host itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import signal
import ssl
import sys
import threading
from typing import Any, NoReturn

__all__ = ["register"]

_LEVELS = ("debug", "info", "warning", "error")
#: Threads that are still busy get this long, in seconds, before the process ends without them.
_EXIT_TIMEOUT = 1.0
#: How long, in seconds, a thread that computes in Python keeps the others waiting. A fifth of the
#: default: with 32 such threads the service still gets its turn several times a second.
_SWITCH_INTERVAL = 0.001


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "worker",
        help="run a worker service",
        description="Run tasks for hosts. Prints its URL as the one line on stdout when it is ready. "
        "SIGTERM lets it finish what runs; Ctrl-C, or a second SIGTERM, stops it at once.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8765, help="0 takes a free one (default: %(default)s)")
    add("--path", default="/wove", help="path of the URL (default: %(default)s)")
    add("--security", metavar="env:VARIABLE", help="environment variable that holds the shared secret")
    add("--engine", type=_engine, default="threads", metavar="ENGINE",
        help="what runs the tasks: threads (the default), processes, dask:ADDRESS, or module:factory "
        "for a function that returns a concurrent.futures.Executor")  # fmt: skip
    add("--workers", type=_positive, metavar="N",
        help="tasks at once (default: CPUs + 4, at most 32; processes: CPUs; others: theirs)")  # fmt: skip
    add("--max-message-bytes", type=_positive, default=256 * 1024 * 1024, metavar="BYTES",
        help="largest message accepted from a host (default: 256 MiB)")  # fmt: skip
    add("--max-kept-bytes", type=_positive, default=512 * 1024 * 1024, metavar="BYTES",
        help="what results may take that have not arrived, for each host (default: 512 MiB)")  # fmt: skip
    add("--tls-cert", metavar="FILE", help="certificate chain (PEM); makes the URL wss://")
    add("--tls-key", metavar="FILE", help="private key of the certificate (PEM)")
    add("--tls-client-ca", metavar="FILE", help="accept only hosts with a certificate of this CA (PEM)")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="how long runs may take to end after SIGTERM (default: %(default)s)")  # fmt: skip
    add("--insecure", action="store_true", help="allow other machines without TLS and security")
    add("--log-level", choices=_LEVELS, default="info", help="what goes to stderr (default: %(default)s)")
    add(
        "--until-stdin-closes",
        action="store_true",
        help="stop at once when stdin ends, as it does with its parent",
    )
    parser.set_defaults(run=_run)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 0 to 65535")
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 on")
    return seconds


def _engine(text: str) -> str:
    from ..worker.engines import check_engine

    try:
        return check_engine(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _run(options: argparse.Namespace) -> int:
    _log_to_stderr(options.log_level.upper())
    sys.setswitchinterval(_SWITCH_INTERVAL)
    if os.getcwd() not in sys.path:  # last: nothing that is installed is hidden by a file that lies there
        sys.path.append(os.getcwd())
    if (options.tls_cert is None) != (options.tls_key is None):
        return _fail("--tls-cert and --tls-key go together.", 2)
    if options.tls_client_ca is not None and options.tls_cert is None:
        return _fail("--tls-client-ca needs --tls-cert and --tls-key.", 2)
    try:
        context = _ssl_context(options)
    except (OSError, ssl.SSLError) as exc:
        files = [options.tls_cert, options.tls_key, options.tls_client_ca]
        named = ", ".join(str(file) for file in files if file is not None)
        return _fail(f"the certificate files {named} cannot be used: {_reason(exc)}.", 1)
    code, clean = asyncio.run(_serve(options, context))
    if not clean or not _threads_ended():
        _leave_now(code)
    return code


def _leave_now(code: int) -> NoReturn:
    """Flush and end the process, although a task still runs; it may hold any lock of the streams."""

    def flush() -> None:
        logging.getLogger("wove_ws_sync.worker").warning("A task still runs in its thread; leaving it.")
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=flush, name="wove-ws-flush-0", daemon=True)
    thread.start()
    thread.join(_EXIT_TIMEOUT)
    os._exit(code)


def _log_to_stderr(level: str) -> None:
    """Give the service a handler apart from that of the tasks, whose records run user code in its lock."""
    own = logging.getLogger("wove_ws_sync")
    for logger in (logging.getLogger(), own):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
    own.propagate = False


async def _serve(options: argparse.Namespace, context: ssl.SSLContext | None) -> tuple[int, bool]:
    """Serve until a signal; return the exit code and whether nothing is left running."""
    from ..worker.service import WorkerService

    orders = _Orders(asyncio.get_running_loop())
    orders.watch_signals()
    try:
        service = WorkerService(
            host=options.host,
            port=options.port,
            path=options.path,
            security=options.security,
            engine=options.engine,
            workers=options.workers,
            ssl_context=context,
            max_message_bytes=options.max_message_bytes,
            max_kept_bytes=options.max_kept_bytes,
            insecure=options.insecure,
        )
        await service.start()
    except (ValueError, TypeError) as exc:
        return _fail(str(exc), 2), True
    except OSError as exc:
        where = f"{options.host}:{options.port}"
        return _fail(f"cannot listen on {where}: {_reason(exc)}. Choose another --port or --host.", 1), True
    except RuntimeError as exc:
        return _fail(str(exc), 1), True
    print(service.url, flush=True)
    if options.until_stdin_closes:
        orders.watch_stdin()
    await orders.anything.wait()
    if orders.stop.is_set():
        return 0, await service.stop(_EXIT_TIMEOUT)
    drain = asyncio.create_task(service.drain(options.drain_timeout))
    stopped = asyncio.create_task(orders.stop.wait())
    await asyncio.wait([drain, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if drain.done():
        return 0, drain.result()
    drain.cancel()
    await asyncio.wait([drain])
    return 0, await service.stop(_EXIT_TIMEOUT)


def _fail(message: str, code: int) -> int:
    print(f"wove-ws-sync worker: {message}", file=sys.stderr)
    return code


def _reason(exc: OSError) -> str:
    text = exc.strerror or str(exc)
    return f"{text} ({exc.filename})" if exc.filename else text


def _ssl_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    if options.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A key with a passphrase must fail and not ask the terminal of a service.
    context.load_cert_chain(options.tls_cert, options.tls_key, password=lambda: b"")
    if options.tls_client_ca is not None:
        context.load_verify_locations(options.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Orders:
    """What the world outside wants of the service: first to drain, then, or at once, to stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.anything = asyncio.Event()
        self.stop = asyncio.Event()

    def watch_signals(self) -> None:
        """Take SIGTERM for an order to drain, a second one or SIGINT for one to stop."""
        for number, order in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._stop)):
            try:
                self._loop.add_signal_handler(number, order)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_, order=order: self._loop.call_soon_threadsafe(order))

    def watch_stdin(self) -> None:
        """Take the end of stdin for an order to stop."""
        threading.Thread(target=self._read_stdin, name="wove-ws-stdin-0", daemon=True).start()

    def _read_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop ended first
            self._loop.call_soon_threadsafe(self._stop)

    def _terminate(self) -> None:
        if self.anything.is_set():
            self._stop()
        self.anything.set()

    def _stop(self) -> None:
        self.stop.set()
        self.anything.set()


def _threads_ended() -> bool:
    """Wait a moment for threads that would hold up the exit of the interpreter."""
    others = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and not thread.daemon
    ]
    for thread in others:
        thread.join(_EXIT_TIMEOUT / len(others))
    return not any(thread.is_alive() for thread in others)
