"""``wove-ws-sync worker``: run a worker service until a signal ends it.

Owns: the options, the one line on stdout and the exit code. Never: serves a host itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import math
import os
import ssl
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from ._worker_config import ConfigError, Settled, remember_defaults, settle
from ._worker_logs import FORMATS, log_to_stderr
from ._worker_orders import Orders

if TYPE_CHECKING:
    from ..worker.tls import RenewingContext

__all__ = ["register"]

#: Exit codes; 1 is all else that goes wrong at run time.
_USAGE, _NO_PORT, _NO_SECRET, _NO_CERTIFICATE, _NO_ENGINE, _NO_NONCES = 2, 10, 11, 12, 13, 14
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
        epilog="An option may also stand in the environment, as in WOVE_WS_WORKER_MAX_KEPT_BYTES, or in the "
        "file, as in max_kept_bytes = 1000000; a flag wins over the environment, that over the file. "
        "Exit codes: 0 ended as asked, 1 failed, 2 wrong usage or configuration, 10 the port cannot be had, "
        "11 the secret is missing, 12 the certificate files cannot be used, 13 the engine cannot be had, "
        "14 the nonce store cannot be used.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8765, help="0 takes a free one (default: %(default)s)")
    add("--path", default="/wove", help="path of the URL (default: %(default)s)")
    add(
        "--security",
        type=_security,
        metavar="env:VARIABLE",
        help="environment variable that holds the shared secret; file:PATH for a TOML file with several "
        "keys, which is read again when it changes",
    )
    add("--require-seal", action=_Switch, default=False, help="refuse hosts whose messages are not sealed")
    add("--engine", type=_engine, default="threads", metavar="ENGINE",
        help="what runs the tasks: threads (the default), processes, dask:ADDRESS, or module:factory "
        "for a function that returns a concurrent.futures.Executor")  # fmt: skip
    add("--workers", type=_positive, metavar="N",
        help="tasks at once (default: CPUs + 4, at most 32; processes: CPUs; others: theirs)")  # fmt: skip
    add("--registry", action="append", default=[], metavar="MODULE",
        help="call only what its __all__ lists, by name; unpickle nothing (repeatable)")  # fmt: skip
    add("--around", default="", metavar="MODULE:NAME",
        help="context manager that is entered around each task, wove_ws_sync.contrib.django.worker:around "
        "for Django")  # fmt: skip
    add("--max-message-bytes", type=_positive, default=256 * 1024 * 1024, metavar="BYTES",
        help="largest message accepted from a host (default: 256 MiB)")  # fmt: skip
    add("--max-kept-bytes", type=_positive, default=512 * 1024 * 1024, metavar="BYTES",
        help="what results may take that have not arrived, for each host (default: 512 MiB)")  # fmt: skip
    add("--max-queue", type=_positive, default=100_000, metavar="N",
        help="runs that may wait to begin, of all hosts (default: %(default)s)")  # fmt: skip
    add("--max-in-flight", type=_positive, default=10_000, metavar="N",
        help="runs of a host under way, beyond which its reading pauses (default: %(default)s)")  # fmt: skip
    add("--dedupe-window", type=_seconds, default=300.0, metavar="SECONDS",
        help="how long a result is given again for its idempotency key (default: %(default)s)")  # fmt: skip
    add("--nonce-store", type=_nonce_store, default="memory", metavar="STORE",
        help="where handshakes are remembered, so that none is taken twice: memory (the default), file:PATH "
        "for the services of this machine, redis://HOST:PORT/DB, or redis:env:VARIABLE for a URL with a "
        "password")  # fmt: skip
    add("--tls-cert", metavar="FILE", help="certificate chain (PEM); makes the URL wss://")
    add("--tls-key", metavar="FILE", help="private key of the certificate (PEM)")
    add("--tls-client-ca", metavar="FILE", help="accept only hosts with a certificate of this CA (PEM)")
    add("--tls-min-version", choices=("1.2", "1.3"), default="1.2", help="of TLS (default: %(default)s)")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="how long runs may take to end after SIGTERM (default: %(default)s)")  # fmt: skip
    add("--insecure", action=_Switch, default=False, help="allow other machines without TLS and security")
    add("--log-level", choices=_LEVELS, default="info", help="what goes to stderr (default: %(default)s)")
    add(
        "--until-stdin-closes",
        action=_Switch,
        default=False,
        help="stop at once when stdin ends, as it does with its parent",
    )
    add(
        "--log-format", choices=FORMATS, default="text", help="json: one object a line (default: %(default)s)"
    )
    add("--otel", type=_otel, metavar="SETUP",
        help="trace and count tasks with OpenTelemetry; env configures its SDK by the OTEL_* variables, "
        "module:function calls that in each process that executes tasks")  # fmt: skip
    add("--config", metavar="FILE", help="take options from this TOML file")
    add("--print-config", action="store_true", help="print what is in force, and from where, and exit")
    add(
        "--reload", action=_Switch, default=False, help="for development: start anew when a *.py file changes"
    )
    add("--reload-dir", action="append", default=[], metavar="DIR",
        help="where to look for changes, may be repeated (default: the working directory)")  # fmt: skip
    remember_defaults(parser)
    parser.set_defaults(run=functools.partial(_run, parser))


_Switch = argparse.BooleanOptionalAction


def _number(text: str, kind: Any = int) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def _security(text: str) -> str:
    kind, _, name = text.partition(":")
    if text != "none" and not (kind in ("env", "file") and name):
        raise argparse.ArgumentTypeError(
            "it must be 'env:VARIABLE', which names the environment variable of the secret, "
            "or 'file:PATH', and not a secret itself (not shown)"
        )
    return text


def _port(text: str) -> int:
    port: int = _number(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 0 to 65535")
    return port


def _positive(text: str) -> int:
    number: int = _number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _seconds(text: str) -> float:
    seconds: float = _number(text, float)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 on")
    return seconds


def _engine(text: str) -> str:
    from ..worker.engines import check_engine

    try:
        return check_engine(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _otel(text: str) -> str:
    from ..worker.telemetry import check_setup

    try:
        return check_setup(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _nonce_store(text: str) -> str:
    from ..worker.nonces import check_nonce_store

    try:
        return check_nonce_store(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        settled = settle(parser, given, os.environ)
    except ConfigError as exc:
        return _fail(str(exc), _USAGE)
    options = settled.options
    if given.print_config:
        print(settled.to_toml(), end="")
        return 0
    log_to_stderr(options.log_level, options.log_format)
    for remark in settled.ignored:
        logging.getLogger("wove_ws_sync.worker").warning(remark)
    if options.reload:
        from ._worker_reload import serve_reloading

        return serve_reloading(settled)
    return _run_service(settled)


def _run_service(settled: Settled) -> int:
    options = settled.options
    sys.setswitchinterval(_SWITCH_INTERVAL)
    if os.getcwd() not in sys.path:  # last: nothing that is installed is hidden by a file that lies there
        sys.path.append(os.getcwd())
    if (options.tls_cert is None) != (options.tls_key is None):
        return _fail(settled.blame("--tls-cert and --tls-key go together."), _USAGE)
    if options.tls_client_ca is not None and options.tls_cert is None:
        return _fail(settled.blame("--tls-client-ca needs --tls-cert and --tls-key."), _USAGE)
    kind, _, secret = (options.security or "none").partition(":")
    if kind == "env" and not os.environ.get(secret):
        state = "is empty" if secret in os.environ else "is not set"
        return _fail(settled.blame(f"the secret of --security is missing: {secret!r} {state}."), _NO_SECRET)
    if options.tls_min_version != "1.2" and options.tls_cert is None:
        return _fail(settled.blame("--tls-min-version needs --tls-cert and --tls-key."), _USAGE)
    from ..worker.keyring import Keyring

    try:
        Keyring(options.security)
    except RuntimeError as exc:
        return _fail(settled.blame(f"--security cannot be used: {exc}"), _NO_SECRET)
    except (ValueError, TypeError) as exc:
        return _fail(settled.blame(f"--security: {exc}"), _USAGE)
    try:
        context = _tls(options)
    except (OSError, ssl.SSLError) as exc:
        files = [options.tls_cert, options.tls_key, options.tls_client_ca]
        named = ", ".join(str(file) for file in files if file is not None)
        return _fail(f"the certificate files {named} cannot be used: {_reason(exc)}.", _NO_CERTIFICATE)
    from ..worker import surroundings

    try:
        surroundings.use(options.around)
    except ValueError as exc:
        return _fail(settled.blame(f"--around: {exc}"), _USAGE)
    code, clean = asyncio.run(_serve(settled, context))
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


async def _serve(settled: Settled, context: RenewingContext | None) -> tuple[int, bool]:
    """Serve until a signal; return the exit code and whether nothing is left running."""
    from ..worker.engines import EngineError
    from ..worker.nonces import NonceStoreError
    from ..worker.service import WorkerService

    options = settled.options
    orders = Orders(asyncio.get_running_loop())
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
            max_queue=options.max_queue,
            max_in_flight=options.max_in_flight,
            dedupe_window=options.dedupe_window,
            nonce_store=options.nonce_store,
            require_seal=options.require_seal,
            insecure=options.insecure,
            registry=options.registry,
            otel=options.otel or "",
        )
        await service.start()
    except (ValueError, TypeError) as exc:
        return _fail(settled.blame(str(exc)), _USAGE), True
    except OSError as exc:
        where = f"{options.host}:{options.port}"
        remedy = "Choose another --port or --host."
        return _fail(f"cannot listen on {where}: {_reason(exc)}. {remedy}", _NO_PORT), True
    except NonceStoreError as exc:
        return _fail(settled.blame(f"--nonce-store cannot be used: {exc}"), _NO_NONCES), True
    except RuntimeError as exc:
        return _fail(str(exc), _NO_ENGINE if isinstance(exc, EngineError) else 1), True
    reminder = asyncio.create_task(context.remind_daily()) if context is not None else None
    print(service.url, flush=True)
    if options.until_stdin_closes:
        orders.watch_stdin()
    await orders.anything.wait()
    if reminder is not None:
        reminder.cancel()
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


def _tls(options: argparse.Namespace) -> RenewingContext | None:
    from ..worker.tls import RenewingContext

    if options.tls_cert is None:
        return None
    return RenewingContext(
        options.tls_cert, options.tls_key, options.tls_client_ca, min_version=options.tls_min_version
    )


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
