"""The way to the peer: name, address, proxy, certificate.

Owns: DNS, TCP, the HTTP CONNECT proxy and the TLS settings, all under one deadline.
Never: uses a proxy or a certificate that the configuration does not name; the
environment's proxies are ignored.
"""

from __future__ import annotations

import base64
import contextlib
import encodings.idna  # noqa: F401  # what getaddrinfo() and ssl would import in the thread that dials
import ipaddress
import itertools
import logging
import os
import queue
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from . import _pins, security
from ._secrets import Secret
from ._wire import NotHTTP, Wire
from .options import LinkOptions
from .timing import Clock, Deadline

__all__ = ["NOT_PINNED", "Witness", "connect", "nobody", "place", "tls_context", "warn"]

_log = logging.getLogger("wove_ws_sync.host")
_numbers = itertools.count(1)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
#: The verify_code of a certificate whose key is not a pinned one: OpenSSL's for what an application refuses.
NOT_PINNED = 50

_Addresses = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]

#: Is told of each stage of a dial that succeeded, with what came of it: "name" (the addresses), "tcp"
#: (the Wire), "proxy" (None), "tls" (the SSLObject), "answer" (status and headers, names in lower case).
Witness = Callable[[str, Any], None]


def nobody(stage: str, outcome: Any) -> None:
    """Be the witness of a dial that nobody watches."""


def place(options: LinkOptions) -> str:
    """Return ``host:port`` of the worker service, as messages name it."""
    return _host_port(options.host, options.port)


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def warn(text: str, *args: object) -> None:
    """Log a warning about a dial; a handler that fails must not fail the dial."""
    with contextlib.suppress(Exception):
        _log.warning(text, *args, stacklevel=2)


def connect(
    options: LinkOptions,
    context: ssl.SSLContext | None,
    deadline: Deadline,
    clock: Clock,
    witness: Witness = nobody,
) -> Wire:
    """Return the bytes' way to the worker service, TLS included, ready for the upgrade request.

    Raises OSError (its subclasses for names, refusals, timeouts and certificates), and
    ValueError if a target that is exempt from TLS or security as a local one is not local.
    """
    host, port = options.proxy_address or (options.host, options.port)
    addresses = _resolve(host, port, deadline, clock)
    witness("name", addresses)
    wire = Wire(_connect_any(addresses, deadline, clock), clock, deadline)
    try:
        if security.loopback_only(options) and not security.is_loopback_address(wire.peer_address()):
            raise ValueError(
                "websocket executor uses an insecure network transport. "
                "Use TLS or set executor_config.insecure=True for development. "
                f"({host} was reached at {wire.peer_address()}, which is not a loopback address.)"
            )
        witness("tcp", wire)
        if options.proxy:
            _tunnel(wire, options, options.proxy)
            witness("proxy", None)
        _set_options(wire, options)
        if context is not None:
            tls = wire.start_tls(context, (options.server_hostname or options.host).rstrip("."))
            _check_pin(tls, options)
            witness("tls", tls)
    except BaseException:
        wire.close()
        raise
    return wire


def _check_pin(tls: ssl.SSLObject, options: LinkOptions) -> None:
    """Refuse a worker service whose key is not a pinned one, whoever vouches for its certificate."""
    if options.pinned_keys is None:
        return
    certificate = tls.getpeercert(binary_form=True)
    try:
        pin = _pins.pin_of(certificate or b"")
    except ValueError:
        pin = "unknown"
    if pin not in options.pinned_keys:
        error = ssl.SSLCertVerificationError(1, "the key is not pinned")
        error.verify_code = NOT_PINNED
        error.verify_message = (
            f"its key is {pin}, which is not in executor_config.pinned_keys; "
            "add it once you know by another way that it is the worker's"
        )
        raise error


def _set_options(wire: Wire, options: LinkOptions) -> None:
    unanswered = int((options.ping_interval + options.pong_timeout) * 1000)
    for level, name, value in (
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        # Unlike keepalive it also ends a connection with unacknowledged bytes.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", min(unanswered, 2**31 - 1)),
    ):
        if hasattr(socket, name):  # not every system has all of them
            wire.set_option(level, getattr(socket, name), value)


def _resolve(host: str, port: int, deadline: Deadline, clock: Clock) -> _Addresses:
    """Return every address of *host*, asked in a thread: a resolver that stalls cannot be interrupted."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    answers: queue.SimpleQueue[_Addresses | BaseException] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as exc:
            answers.put(exc)

    threading.Thread(target=ask, name=f"wove-ws-resolver-{next(_numbers)}", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.remaining(clock.monotonic()))
    except queue.Empty:
        raise TimeoutError("the name was not resolved in time") from None
    if isinstance(answer, BaseException):
        try:
            raise answer
        finally:
            del answer  # the exception's traceback holds this frame: no cycle
    return answer


def _connect_any(addresses: _Addresses, deadline: Deadline, clock: Clock) -> socket.socket:
    """Return a socket connected to the first address that answers.

    Each address gets its share of the time left, so that a silent one leaves time for the next.
    """
    error: OSError = socket.gaierror(socket.EAI_NONAME, "the name has no address")
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        remaining = deadline.remaining(clock.monotonic())
        if remaining == 0.0:
            break
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(None if remaining is None else remaining / (len(addresses) - position))
            raw.connect(address)
            return raw
        except OSError as exc:
            raw.close()
            error = exc
        except BaseException:
            raw.close()
            raise
    try:
        raise error
    finally:
        del error


def _connect_request(target: str, proxy: Secret) -> memoryview:
    """Return the request to the proxy; no frame that may fail afterwards has its password in a variable."""
    account = urllib.parse.urlsplit(proxy.reveal())
    request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if account.username is not None:
        user = ":".join(map(urllib.parse.unquote, (account.username, account.password or "")))
        request += f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
    return memoryview(f"{request}\r\n".encode("latin-1"))


def _tunnel(wire: Wire, options: LinkOptions, proxy: Secret) -> None:
    """Have the HTTP proxy connect the wire to the worker service."""
    target = _host_port(options.host, options.port)
    wire.send(_connect_request(target, proxy))
    name = _host_port(*(options.proxy_address or ("", 0)))
    try:
        words = wire.read_head().split(None, 2)
    except NotHTTP as exc:
        raise ConnectionError(f"The proxy {name} did not answer CONNECT properly: {exc}.") from None
    status = words[1].decode("ascii", "replace") if len(words) > 1 else ""
    if len(status) != 3 or not status.startswith("2"):
        raise ConnectionError(f"The proxy {name} refused to connect to {target} (HTTP {status[:3]}).")
    if wire.buffered and options.secure:
        raise ConnectionError(f"The proxy {name} sent bytes of its own into the connection to {target}.")


def tls_context(options: LinkOptions) -> ssl.SSLContext | None:
    """Return the TLS settings for one dial, None for ws://; files are read anew, as they may be rotated.

    Raises OSError or ssl.SSLError that names the key of the file that is missing or malformed.
    """
    if not options.secure:
        return None
    if os.environ.get("SSLKEYLOGFILE"):
        warn("SSLKEYLOGFILE is set: the TLS keys of this connection are written to a file")
    ca_file = options.ca_file
    context: ssl.SSLContext = _load("ca_file", ca_file, ssl.create_default_context, cafile=ca_file)
    context.minimum_version = _VERSIONS[options.tls_min_version]
    # Without renegotiation a write never has to wait for a read.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    if options.client_cert_file:
        _load(
            "client_cert_file",
            options.client_cert_file,
            context.load_cert_chain,
            certfile=options.client_cert_file,
            keyfile=options.client_key_file,
            password=str,  # an encrypted key is an error, never a prompt on the terminal
        )
    if options.insecure:
        but = ", only its key is (pinned_keys)" if options.pinned_keys else ""
        warn("executor_config.insecure=True: the certificate of %s is not verified%s", place(options), but)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load(key: str, path: str | None, loader: Any, **arguments: Any) -> Any:
    try:
        return loader(**arguments)
    except ssl.SSLError as exc:
        text = f"executor_config.{key} {path!r} is not a usable PEM file ({exc.reason or 'malformed'})"
        raise ssl.SSLError(exc.errno or 1, text) from None
    except OSError as exc:
        raise OSError(exc.errno, f"executor_config.{key} cannot be read: {exc.strerror}", path) from None
