"""Who may be talked to, and how this host proves who it is.

Owns: the rule for targets without TLS or authentication, the headers of the handshake, signed by
``wove.NetworkExecutorSecurity``, and the key that proves the host to a worker service of this
package. Never: keeps or shows a secret; environment variables and files are read anew for each
handshake, so that a rotated secret is picked up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import ipaddress
import marshal
import math
import os
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import wove

from . import _oauth2
from ._address import check_headers, web_address
from ._keys import Key, KeyPair, SharedKey, private_key, public_key, read_secret
from ._secrets import Headers
from .options import LinkOptions

if TYPE_CHECKING:
    from ._proof import HostProof

__all__ = [
    "handshake_headers",
    "host_key",
    "host_proof",
    "is_local_host",
    "is_loopback_address",
    "link_options",
    "loopback_only",
    "ready_to_dial",
    "token_refused",
]

# What weaves configure again and again; each starts with its executor_config, of which only a hash is kept.
_known: dict[bytes, LinkOptions] = {}
_SALT = os.urandom(16)
_MOST_KNOWN = 64


def link_options(config: Mapping[str, Any]) -> LinkOptions:
    """Return the options for an ``executor_config`` that may be dialled.

    Raises TypeError or ValueError for what is wrong in it, RuntimeError if the environment
    variable of the secret is not set; the texts are Wove's where it has one. Thread-safe.
    A configuration that was found right is not checked again.
    """
    try:
        key = hashlib.blake2b(_marshalled(config), key=_SALT).digest()
    except (ValueError, TypeError):  # holds something else than plain values: a path, say
        return _checked_options(config)
    options = _known.get(key)
    if options is None:
        options = _checked_options(config)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = options
    return options


def _marshalled(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of plain values; dictionaries may be of a kind that does not show its values."""
    return marshal.dumps(
        {key: dict(value) if isinstance(value, dict) else value for key, value in dict(config).items()}
    )


def _checked_options(config: Mapping[str, Any]) -> LinkOptions:
    options = LinkOptions.from_config(config)
    mode = options.security.mode
    if not options.insecure and not _is_local(options):
        if not options.secure:
            raise ValueError(
                "websocket executor uses an insecure network transport. "
                "Use TLS or set executor_config.insecure=True for development."
            )
        if mode == "none":
            raise ValueError(
                "websocket executor requires executor_config.security for non-local endpoints. "
                "Use security='env:VARIABLE' or set executor_config.insecure=True for development."
            )
    key = host_key(options)
    for name in ("seal", "worker_auth"):
        if getattr(options, name) == "require" and key is None:
            raise ValueError(
                f"executor_config.{name}='require' has nothing to check with; set executor_config.security "
                "to a secret that both sides know, 'env:VARIABLE'."
            )
    if mode == "ed25519" and options.seal == "off":
        raise ValueError(
            "executor_config.seal='off' does not go with key pairs: a signature alone could be passed on "
            "to another worker service. Leave the key out for the default, 'auto'."
        )
    if mode == "oauth2":
        _check_oauth2(options)
    headers = _headers(options, key, "checked without a token")
    # What a proof needs is imported by making one here: a process that is forked while a thread that
    # dials imports a module could never import it.
    host_proof(options, headers)
    importlib.import_module("._seal", __package__)
    return options


def handshake_headers(options: LinkOptions) -> Headers:
    """Return every header of the handshake that is not WebSocket's own, freshly signed.

    The signature covers ``options.target``. Call it once per dial: it holds a nonce and the
    time. Raises RuntimeError if the environment variable or the file of the secret is not there,
    ValueError if what is in it cannot be used. With "oauth2" it may fetch a token, within
    ``open_timeout`` seconds, and raises what comes of that. Thread-safe.
    """
    token = _tokens(options).token(options.open_timeout) if options.security.mode == "oauth2" else ""
    return _headers(options, host_key(options), token)


def ready_to_dial(options: LinkOptions) -> tuple[LinkOptions, Headers]:
    """Return the options for a dial that begins now, and the headers of its handshake.

    The time that it took to fetch a token is taken off ``open_timeout``.
    """
    began = time.monotonic()
    headers = handshake_headers(options)
    if options.security.mode != "oauth2":
        return options, headers
    left = options.open_timeout - (time.monotonic() - began)
    if left <= 0:
        raise TimeoutError("timed out during opening handshake")
    return dataclasses.replace(options, open_timeout=left), headers


def token_refused(options: LinkOptions, headers: Mapping[str, str]) -> None:
    """Forget the token in *headers*, to which a worker service said 401: the next dial fetches another."""
    if options.security.mode == "oauth2":
        _tokens(options).drop(headers["Authorization"].removeprefix("Bearer "))


def host_proof(options: LinkOptions, headers: Mapping[str, str]) -> HostProof | None:
    """Return the host's proof for a handshake with *headers*; None if nothing is to be proven.

    Its ``headers`` are signed anew, by the key of the proof, and offer the extension ``seal`` unless
    it is off. Raises as :func:`handshake_headers`.
    """
    if options.seal == options.worker_auth == "off":
        return None
    key = host_key(options)
    if key is None:
        return None
    from ._proof import HostProof

    unsigned = {name: value for name, value in headers.items() if name != "X-Wove-Signature"}
    offered = Headers(unsigned) | _credentials(options, key)
    if options.seal != "off":
        known = offered.get("X-Wove-Sync", "1")
        offered["X-Wove-Sync"] = f"{known},seal" if "f=" in known else f"{known}; f=seal"
    return HostProof(key, options.target, offered)


def host_key(options: LinkOptions) -> Key | None:
    """Return what this host proves itself with; None for tokens and for no security.

    Raises as :func:`handshake_headers`.
    """
    config = options.security.value
    if options.security.mode == "ed25519":
        label = "executor_config.security"
        private = private_key(config["private_key_file"], f"{label}.private_key_file")
        public = public_key(config["worker_key_file"], f"{label}.worker_key_file")
        return KeyPair(config["key"], private, public)
    if options.security.mode != "signed":
        return None
    if isinstance(config, dict) and ("keys" in config or "secret_file" in config):
        label, newest = "executor_config.security", config
        if "keys" in config:
            label, newest = f"{label}.keys[0]", config["keys"][0]
        return SharedKey(newest.get("key", "default"), read_secret(newest, label))
    try:
        security = wove.NetworkExecutorSecurity.from_config(config)
    except UnicodeEncodeError:  # it carries the secret that it could not encode
        security = None
    if security is None:
        raise ValueError("executor_config.security has a secret that is not valid Unicode; use plain text.")
    if not security.secret:
        raise ValueError(
            "executor_config.security has an empty secret; set 16 random bytes or more, "
            "for example from secrets.token_urlsafe(32), best as security='env:VARIABLE'."
        )
    skew = security.clock_skew_seconds
    if not math.isfinite(skew) or skew <= 0:
        raise ValueError(
            f"executor_config.security.clock_skew_seconds must be a number of seconds above 0, got {skew}; "
            "leave the key out for the default, 300.0."
        )
    return SharedKey(security.key, security.secret)


def is_local_host(host: str) -> bool:
    """Tell whether *host* (no brackets) is a loopback address or exactly ``localhost``.

    Other spellings that a resolver may take for loopback (``127.1``, ``localhost.``, names
    below ``localhost``) are not local: what is compared here must be what is dialled.
    """
    return host.lower() == "localhost" or is_loopback_address(host)


def is_loopback_address(ip: str) -> bool:
    """Tell whether *ip* is an address of 127/8, ``::1``, or one of 127/8 mapped into IPv6."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def loopback_only(options: LinkOptions) -> bool:
    """Tell whether the target is acceptable only because it is on this machine.

    Then the address of the connected peer must be checked too, as a name server or a hosts
    file may call anything ``localhost``.
    """
    unprotected = not options.secure or options.security.mode == "none"
    return unprotected and not options.insecure and _is_local(options)


def _is_local(options: LinkOptions) -> bool:
    proxy = options.proxy_address
    # Behind a proxy "localhost" is the proxy's own machine.
    return is_local_host(options.host) and (proxy is None or is_local_host(proxy[0]))


def _tokens(options: LinkOptions) -> _oauth2.TokenSource:
    """Return where the tokens come from. A name that is taken for local must be that when it is connected."""
    server = web_address("token_url", options.security.value["token_url"])
    by_loopback = not server.secure and not options.insecure
    return _oauth2.source_for(options.security, is_loopback_address if by_loopback else None)


def _check_oauth2(options: LinkOptions) -> None:
    """Check what needs no connection."""
    server = web_address("token_url", options.security.value["token_url"])
    if not (server.secure or options.insecure or is_local_host(server.host)):
        raise ValueError(
            "executor_config.security.token_url must be an https:// URL, as the client secret goes there. "
            "Use https:// or set executor_config.insecure=True for development."
        )
    _oauth2.check_usable(options.security.value)


def _headers(options: LinkOptions, key: Key | None, token: str) -> Headers:
    headers = Headers({name: value.reveal() for name, value in options.headers})
    with_token = options.security.mode in ("bearer", "oauth2")
    if with_token and any(name.lower() == "authorization" for name in headers):
        raise ValueError(
            "executor_config.headers must not set 'Authorization' beside a bearer token in "
            "executor_config.security; keep one of the two."
        )
    headers |= _credentials(options, key, token)
    headers["X-Wove-Sync"] = "1"
    headers["X-Wove-Max-Message"] = str(options.max_message_bytes)
    check_headers(headers)
    return headers


def _credentials(options: LinkOptions, key: Key | None, token: str = "") -> dict[str, str]:
    if isinstance(key, KeyPair) or (key is not None and "require" in (options.seal, options.worker_auth)):
        # The proof is the signature: Wove's own would let somebody in between go on as a host of Wove's.
        return {
            "X-Wove-Key": key.id,
            "X-Wove-Timestamp": str(int(time.time())),
            "X-Wove-Nonce": secrets.token_urlsafe(18),
        }
    if isinstance(key, SharedKey):
        wove_security = key.security()
    elif options.security.mode == "oauth2":
        wove_security = wove.NetworkExecutorSecurity(mode="bearer", token=token)
    else:
        wove_security = wove.NetworkExecutorSecurity.from_config(options.security.value)
    headers: dict[str, str] = wove_security.headers_for(
        transport="websocket", target=options.target, body=b""
    )
    return headers
