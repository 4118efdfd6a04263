"""``wove-ws-sync worker``: run a worker service until a signal ends it.

Owns: the options, the one line on stdout, signals and the exit code. Never: serves a host itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from ._worker_log import log_to_stderr
from ._worker_reload import serve_and_reload
from ._worker_settings import SETTINGS, SettingError, Settings, add_flags, settle

if TYPE_CHECKING:
    from ..worker.service import WorkerService

__all__ = ["register"]

# Exit codes.
_FAILURE, _USAGE, _ADDRESS, _SECRET, _CERTIFICATE, _ENGINE = 1, 2, 3, 4, 5, 6
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
        epilog="Each option may also be set by the environment (--max-kept-bytes by "
        "WOVE_WS_WORKER_MAX_KEPT_BYTES) or by a line of the file of --config (max_kept_bytes = 1000000); "
        "what comes first of these counts. Exit codes: 0 it was stopped, 1 it failed, 2 an option is wrong, "
        "3 the port cannot be had, 4 the secret is missing, 5 the certificate files cannot be used, "
        "6 the engine cannot be had.",
    )
    parser.add_argument("--config", metavar="FILE", help="settings as TOML (also WOVE_WS_WORKER_CONFIG)")
    parser.add_argument("--print-config", action="store_true", help="print every setting and its source")
    add_flags(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given = vars(options)
    try:
        settings = settle(given, os.environ, options.config or os.environ.get("WOVE_WS_WORKER_CONFIG"))
    except SettingError as exc:
        return _fail(str(exc), _USAGE)
    for variable in settings.unknown:
        _say(f"the environment variable {variable} is none of its settings and has no effect")
    if options.print_config:
        print(settings.as_toml(), end="")
        return 0
    if settings.reload:
        return _reload(options, settings)
    return _work(settings)


def _reload(options: argparse.Namespace, settings: Settings) -> int:
    arguments = [] if options.config is None else ["--config", options.config]
    for setting in SETTINGS:
        value = vars(options).get(setting.name)
        if setting.name not in ("reload", "reload_dir") and value is not None:
            arguments += [setting.flag] if value is True else [setting.flag, str(value)]
    try:
        return serve_and_reload(arguments, settings.reload_dir or [os.getcwd()], _say)
    except ModuleNotFoundError as exc:
        if exc.name != "watchfiles":
            raise
        install = 'pip install "wove_ws_sync[reload]"'
        return _fail(f"--reload needs the package 'watchfiles', which is not installed: {install}", _FAILURE)


def _work(settings: Settings) -> int:
    log_to_stderr(settings.log_level, settings.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL)
    if os.getcwd() not in sys.path:  # last: nothing that is installed is hidden by a file that lies there
        sys.path.append(os.getcwd())
    if (settings.tls_cert is None) != (settings.tls_key is None):
        return _fail("--tls-cert and --tls-key go together.", _USAGE)
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        return _fail("--tls-client-ca needs --tls-cert and --tls-key.", _USAGE)
    try:
        context = _ssl_context(settings)
    except (OSError, ssl.SSLError) as exc:
        files = [settings.tls_cert, settings.tls_key, settings.tls_client_ca]
        named = ", ".join(str(file) for file in files if file is not None)
        return _fail(f"the certificate files {named} cannot be used: {_reason(exc)}.", _CERTIFICATE)
    code, clean = asyncio.run(_serve(settings, context))
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


async def _serve(settings: Settings, context: ssl.SSLContext | None) -> tuple[int, bool]:
    """Serve until a signal; return the exit code and whether nothing is left running."""
    from ..worker.engines import EngineError

    orders = _Orders(asyncio.get_running_loop())
    orders.watch_signals()
    try:
        service = _make_service(settings, context)
    except EngineError as exc:
        return _fail(str(exc), _ENGINE), True
    except (ValueError, TypeError) as exc:
        return _fail(str(exc), _USAGE), True
    except RuntimeError as exc:  # the variable of the secret is not set
        return _fail(str(exc), _SECRET), True
    try:
        await service.start()
    except EngineError as exc:
        return _fail(str(exc), _ENGINE), True
    except ValueError as exc:
        return _fail(str(exc), _USAGE), True
    except OSError as exc:
        where = f"{settings.host}:{settings.port}"
        text = f"cannot listen on {where}: {_reason(exc)}. Choose another --port or --host."
        return _fail(text, _ADDRESS), True
    except RuntimeError as exc:
        return _fail(str(exc), _FAILURE), True
    print(service.url, flush=True)
    if settings.until_stdin_closes:
        orders.watch_stdin()
    await orders.anything.wait()
    if orders.stop.is_set():
        return 0, await service.stop(_EXIT_TIMEOUT)
    drain = asyncio.create_task(service.drain(settings.drain_timeout))
    stopped = asyncio.create_task(orders.stop.wait())
    await asyncio.wait([drain, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if drain.done():
        return 0, drain.result()
    drain.cancel()
    await asyncio.wait([drain])
    return 0, await service.stop(_EXIT_TIMEOUT)


def _make_service(settings: Settings, context: ssl.SSLContext | None) -> WorkerService:
    from ..worker.service import WorkerService

    return WorkerService(
        host=settings.host,
        port=settings.port,
        path=settings.path,
        security=settings.security,
        engine=settings.engine,
        workers=settings.workers,
        ssl_context=context,
        max_message_bytes=settings.max_message_bytes,
        max_kept_bytes=settings.max_kept_bytes,
        max_queue=settings.max_queue,
        max_in_flight=settings.max_in_flight,
        dedupe_window=settings.dedupe_window,
        insecure=settings.insecure,
    )


def _fail(message: str, code: int) -> int:
    _say(message)
    return code


def _say(message: str) -> None:
    print(f"wove-ws-sync worker: {message}", file=sys.stderr)


def _reason(exc: OSError) -> str:
    text = exc.strerror or str(exc)
    return f"{text} ({exc.filename})" if exc.filename else text


def _ssl_context(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A key with a passphrase must fail and not ask the terminal of a service.
    context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
    if settings.tls_client_ca is not None:
        context.load_verify_locations(settings.tls_client_ca)
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
