"""``wove-ws-sync check``: try to reach a worker service, step by step, and say what is wrong.

Owns: the options, the order of the steps and the exit code. Never: connects in another way
than the executors do, shows a secret.
"""

from __future__ import annotations

import argparse
import math
import os
import ssl
import sys
from collections.abc import Callable
from typing import Any

from .. import security
from .._route import tls_context
from ..options import LinkOptions
from ..timing import Clock
from . import _check_run
from ._check_dial import Dial, watched
from ._check_report import Report, Step, secrets_of, shown_url

__all__ = ["check", "register"]

_EPILOG = """\
exit codes, that of the first step that failed:
  0   all is well, warnings included
  2   options: wrong usage, an option or file that cannot be used
  10  name: no address for the host (or the proxy)
  11  tcp or proxy: no connection, or the proxy refuses
  12  tls: certificate, version, client certificate, plain text port
  13  handshake: no valid answer, or no in time
  14  handshake: not authenticated (HTTP 401 or 403)
  15  roundtrip: pings are not answered
  16  run: the no-op run did not return
  130 interrupted
"""


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="try to reach a worker service and say what is wrong",
        description="Go the way of an executor to a worker service: name, TCP, proxy, TLS, handshake, "
        "extensions, round trips, a real no-op run and the clocks. Each is a line, with cause and remedy "
        "where something is wrong.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("url", metavar="URL", help="ws:// or wss:// URL of the worker service")
    add("--security", metavar="env:VARIABLE",
        help="environment variable of the shared secret; bearer-env:VARIABLE for a bearer token")  # fmt: skip
    add("--ca-file", metavar="FILE", help="CA of the worker's certificate (PEM) in place of the system's")
    add("--client-cert-file", metavar="FILE", help="client certificate (PEM)")
    add("--client-key-file", metavar="FILE", help="private key of the client certificate (PEM)")
    add("--server-hostname", metavar="NAME", help="name that the certificate must have")
    add(
        "--tls-min-version",
        choices=("1.2", "1.3"),
        metavar="VERSION",
        help="of TLS, 1.2 or 1.3 (default: 1.2)",
    )
    add("--pinned-key", action="append", dest="pinned_keys", metavar="PIN",
        help="key that the certificate must have, sha256//...; repeatable: one of them")  # fmt: skip
    add(
        "--proxy",
        metavar="URL",
        help="HTTP proxy, http://[user:password@]host:port",
    )
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="send this header; repeatable")
    add(
        "--insecure",
        action="store_true",
        help="do without TLS, certificate check and security",
    )
    add("--timeout", type=_seconds, default=10.0, metavar="SECONDS",
        help="for the handshake and all before, for the pings, for a run (default: %(default)g)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run)
    _keep_quiet_about_arguments(parser)


def _keep_quiet_about_arguments(parser: argparse.ArgumentParser) -> None:
    """Have surplus arguments refused without showing them: a header that was not quoted holds a secret."""
    parse = parser.parse_known_args

    def parse_quietly(*arguments: Any) -> tuple[argparse.Namespace, list[str]]:
        parsed, surplus = parse(*arguments)
        if surplus:
            parser.error(f"{len(surplus)} arguments too many; write a header as --header 'Name: value'")
        return parsed, []

    parser.parse_known_args = parse_quietly  # type: ignore[assignment,method-assign]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("not a number of seconds above 0")
    return seconds


def _run(arguments: argparse.Namespace) -> int:
    report = Report((lambda _: None) if arguments.json else _print)
    try:
        check(lambda: _config(arguments), report)
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        _print(report.as_json())
    return report.exit_code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check(configured: Callable[[], dict[str, Any]], report: Report) -> None:
    """Take every step with the ``executor_config`` that *configured* returns, as far as it goes."""
    try:
        config = configured()
        options = security.link_options(config)
        tls_context(options)
    except (TypeError, ValueError, RuntimeError, OSError) as exc:
        report.add(_wrong_option(exc))
        report.skip_rest("the options cannot be used")
        return
    report.url, report.hidden = shown_url(options), secrets_of(options)
    report.add(_options_step(options, report.url))
    clock = Clock()
    seen = watched(options, clock)
    try:
        for step in seen.steps():
            report.add(step)
        _go_on(seen, config, options, report, clock)
    finally:
        _check_run.goodbye(seen)


def _go_on(seen: Dial, config: dict[str, Any], options: LinkOptions, report: Report, clock: Clock) -> None:
    """Take the steps behind the handshake, if it got so far."""
    last = report.steps[-1]
    offset = _check_run.from_date(seen)
    if seen.transport is None:
        reason = f"not possible without the step {last.name}"
        report.skip_rest(reason, but="clock" if offset is not None else "")
        if offset is not None:  # it came with the refusal
            report.add(_check_run.clock(offset, options, refused=last.exit_code == 14))
        return
    report.add(_check_run.extensions(seen))
    report.add(_check_run.round_trips(seen, clock))
    _check_run.goodbye(seen)
    step, better = _check_run.run(config, options.open_timeout)
    report.add(step)
    report.add(_check_run.clock(better or offset, options, refused=False))


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the executor_config that the arguments stand for."""
    headers: dict[str, str] = {}
    for number, line in enumerate(arguments.header, 1):
        name, colon, value = line.partition(":")
        if not colon or name.strip() in headers:
            raise ValueError(f"--header number {number} is no 'Name: value', or names one twice.")
        headers[name.strip()] = value.strip()
    names = ["security", "ca_file", "client_cert_file", "client_key_file", "server_hostname"]
    names += ["proxy", "tls_min_version", "pinned_keys"]
    config = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    way, _, variable = (arguments.security or "").partition(":")
    if way == "bearer-env":
        config["security"] = {"type": "bearer", "token_env": variable}
    return {
        "url": arguments.url,
        "headers": headers,
        "open_timeout": arguments.timeout,
        "insecure": arguments.insecure,
        **config,
    }


def _wrong_option(exc: Exception) -> Step:
    detail = str(exc)
    if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError):
        detail = f"{exc.strerror} ({exc.filename})" if exc.filename else str(exc.strerror)
    remedy = "The keys of executor_config are the options of this command: ca_file is --ca-file. See --help."
    return Step(name="options", status="fail", detail=detail, remedy=remedy)


def _options_step(options: LinkOptions, url: str) -> Step:
    step = Step(name="options", status="ok", detail=url, facts={"security": options.security.mode})
    if not options.insecure or options.secure:
        return step
    return Step(
        name="options",
        status="warn",
        detail=f"{url}, without TLS (--insecure)",
        remedy="What is sent can be read and changed on its way: use wss:// beyond this machine.",
        facts=step.facts,
    )
