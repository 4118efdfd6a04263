"""One request for an access token: the client-credentials grant of RFC 6749, 4.4.

Owns: the request, the limits on the response, and the judgement on it; the only import of
``requests``. Never: keeps a token, tries again, follows a redirect, uses a proxy of the environment;
an error shows neither the response's body nor a credential.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ._address import web_address
from ._leash import Leash
from ._oauth2_config import LABEL
from ._retry_after import retry_after
from ._version import __version__
from .errors import AuthenticationRejected, HandshakeRejected

__all__ = ["AcceptPeer", "check_usable", "request_token"]

#: Tells whether the address of a connected peer is acceptable.
AcceptPeer = Callable[[str], bool]

_MAX_BODY = 64 * 1024
_PIECE = 4096
_MAX_SECRET_FILE = 64 * 1024
_MAX_LIFETIME = 10 * 365 * 86400.0
#: How long a token counts as valid, in seconds, if the server does not say.
_UNSTATED_LIFETIME = 60.0

_B64TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, 2.1
_ERROR_CODE = re.compile(r"[ !#-\[\]-~]{1,64}")  # RFC 6749, 5.2
_PASSING = frozenset({408, 425, 429})
_PASSING_CODES = frozenset({"server_error", "temporarily_unavailable", "slow_down"})
_REMEDIES = {
    "invalid_client": "Check client_id, the client secret and auth_method.",
    "unauthorized_client": "Allow this client the grant client_credentials.",
    "unsupported_grant_type": "Allow the grant client_credentials there.",
    "invalid_scope": "Check scope: what this client may ask for.",
    "invalid_target": "Check audience.",
    "invalid_request": "Check scope, audience and auth_method.",
}


def check_usable(config: Mapping[str, Any]) -> None:
    """Raise RuntimeError if ``requests`` or the environment variable of the secret is missing."""
    _library()
    if config.get("client_secret_env") is not None:
        _client_secret(config)


def request_token(
    config: Mapping[str, Any], leash: Leash, timeout: float | None, accept_peer: AcceptPeer | None
) -> tuple[str, float]:
    """Return an access token and its lifetime in seconds.

    *timeout* bounds the connect and each wait for bytes; *leash* ends all of it. *accept_peer* judges
    the address of the server before anything is sent. Raises TimeoutError, ConnectionError or
    HandshakeRejected for what may pass; AuthenticationRejected, ssl.SSLCertVerificationError,
    RuntimeError or ValueError for what does not.
    """
    secret = _client_secret(config)
    _check_ca_file(config["ca_file"])
    place = web_address("token_url", config["token_url"]).place
    outcome = _post(config, secret, place, leash, timeout, accept_peer)
    if isinstance(outcome, BaseException):
        raise outcome  # here and not in a handler: the library's error holds the request, so the secret
    status, headers, body = outcome
    if status == 200:
        return _read_token(body, place)
    raise _refusal(status, headers, body, place, _spellings(config, secret))


def _library() -> Any:
    try:
        import requests
    except ImportError:
        raise RuntimeError(
            f"{LABEL} of the type 'oauth2' needs the package requests: pip install \"wove_ws_sync[oauth2]\""
        ) from None
    return requests


def _client_secret(config: Mapping[str, Any]) -> str:
    """Return the secret as it is now: variables and files may be rotated."""
    if (variable := config.get("client_secret_env")) is not None:
        secret = os.environ.get(variable)
        if not secret:  # in Wove's words
            raise RuntimeError(
                f"network executor client secret environment variable '{variable}' is not set."
            )
    elif (path := config.get("client_secret_file")) is not None:
        try:
            with open(path, encoding="utf-8") as stream:
                secret = stream.read(_MAX_SECRET_FILE).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            why = getattr(exc, "strerror", None) or "it is not text"
            raise RuntimeError(f"{LABEL}.client_secret_file {path!r} cannot be read: {why}.") from None
        if not secret:
            raise RuntimeError(f"{LABEL}.client_secret_file {path!r} is empty.")
    else:
        secret = config["client_secret"]
    try:
        secret.encode()
    except UnicodeEncodeError:
        secret = ""
    if not secret:
        raise ValueError(f"{LABEL} has a client secret that is not valid Unicode; use plain text.")
    return secret


# The request


def _basic(config: Mapping[str, Any], secret: str) -> str:
    """Return the credentials as RFC 6749, 2.3.1 has them: encoded as in a form, then as Basic."""
    pair = f"{urllib.parse.quote_plus(config['client_id'])}:{urllib.parse.quote_plus(secret)}"
    return base64.b64encode(pair.encode()).decode()


def _form(config: Mapping[str, Any], secret: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the headers and the fields of the request."""
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # what is unpacked has no bound
        "User-Agent": f"wove_ws_sync/{__version__}",
    }
    fields = {"grant_type": "client_credentials"}
    fields |= {key: config[key] for key in ("scope", "audience") if config[key] is not None}
    if config["auth_method"] == "client_secret_post":
        fields |= {"client_id": config["client_id"], "client_secret": secret}
    else:
        headers["Authorization"] = f"Basic {_basic(config, secret)}"
    return headers, fields


def _post(
    config: Mapping[str, Any],
    secret: str,
    place: str,
    leash: Leash,
    timeout: float | None,
    accept_peer: AcceptPeer | None,
) -> tuple[int, dict[str, str], bytes] | BaseException:
    """Return status, headers (names in small letters) and body of the response, or what went wrong."""
    requests = _library()
    headers, fields = _form(config, secret)
    try:
        with requests.Session() as session:
            session.trust_env = False
            adapter = _adapter(leash, accept_peer)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            with session.post(
                config["token_url"],
                data=fields,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                stream=True,
                verify=config["ca_file"] or True,
            ) as response:
                found = {name.lower(): value for name, value in response.headers.items()}
                return response.status_code, found, _body(response, place)
    except HandshakeRejected as exc:
        return exc
    except OSError as exc:  # requests' own errors are OSErrors, too
        return _unreached(exc, place, isinstance(exc, requests.Timeout | TimeoutError))
    except Exception as exc:
        text = str(exc) if isinstance(exc, _UnacceptablePeerError) else f"it failed with {type(exc).__name__}"
        return RuntimeError(f"No token from {place}: {text}.")


def _check_ca_file(path: str | None) -> None:
    if path is None:
        return
    try:
        ssl.create_default_context(cafile=path)
    except OSError as exc:
        why = exc.strerror if not isinstance(exc, ssl.SSLError) else "it is not a usable PEM file"
        raise RuntimeError(f"{LABEL}.ca_file {path!r} cannot be used: {why}.") from None


class _UnacceptablePeerError(ValueError):
    """The server has another address than its name promises."""


def _adapter(leash: Leash, accept_peer: AcceptPeer | None) -> Any:
    """Return an adapter whose connections are on the *leash*, and to acceptable peers only."""
    from requests.adapters import HTTPAdapter
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    def take(sock: socket.socket) -> socket.socket:
        try:
            leash.hold(sock)
            if accept_peer is not None and not accept_peer(sock.getpeername()[0]):
                raise _UnacceptablePeerError(
                    "its name means an address of another machine; use https:// or an address"
                )
        except BaseException:
            sock.close()
            raise
        return sock

    def pool(kind: Any) -> Any:
        class Connection(kind.ConnectionCls):  # type: ignore[misc]
            def _new_conn(self) -> Any:
                return take(super()._new_conn())

        return type("Pool", (kind,), {"ConnectionCls": Connection})

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            pools = {"http": pool(HTTPConnectionPool), "https": pool(HTTPSConnectionPool)}
            self.poolmanager.pool_classes_by_scheme = pools

    return Adapter(max_retries=0)


def _body(response: Any, place: str) -> bytes:
    """Return the body if it is within its bounds."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _unusable(place, response.status_code, "it is compressed, which was not asked for")
    body = b""
    for piece in response.iter_content(_PIECE):
        body += piece
        if len(body) > _MAX_BODY:
            raise _unusable(place, response.status_code, f"it has more than {_MAX_BODY} bytes")
    return body


def _unreached(exc: OSError, place: str, late: bool) -> OSError:
    """Return the error of a request that got no answer as one clear sentence."""
    causes = list(_causes(exc))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            text = f"The certificate of the token endpoint at {place} was refused: {cause.verify_message}."
            return ssl.SSLCertVerificationError(1, text)
    if late:
        return TimeoutError(f"The token endpoint at {place} did not answer in time.")
    plain = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    return ConnectionError(f"No token from {place}: {plain[-1] if plain else 'the connection broke'}.")


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield *exc* and what is behind it, the first cause last."""
    todo: list[Any] = [exc]
    seen: set[int] = set()
    while todo:
        each = todo.pop(0)
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]


# The judgement


def _unusable(place: str, status: int, fault: str) -> AuthenticationRejected:
    text = f"The token endpoint at {place} answered HTTP {status}, and its answer is of no use: {fault}."
    return AuthenticationRejected(f"{text} Check {LABEL}.token_url.", status=status)


def _document(body: bytes) -> dict[str, Any]:
    """Return the JSON object that *body* is; an empty one if it is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _read_token(body: bytes, place: str) -> tuple[str, float]:
    document = _document(body)
    token, kind = document.get("access_token"), document.get("token_type")
    if not isinstance(token, str):
        raise _unusable(place, 200, "it is not JSON with an access_token")
    if not _B64TOKEN.fullmatch(token):
        raise _unusable(place, 200, "its access_token has characters that a bearer token cannot have")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise _unusable(place, 200, "its token_type is not bearer")
    lifetime = _lifetime(document.get("expires_in"))
    if lifetime is None:
        raise _unusable(place, 200, "its expires_in is not a number of seconds")
    return token, lifetime


def _lifetime(value: Any) -> float | None:
    """Return how long a token is valid, in seconds; None if *value* does not say it properly."""
    if value is None:
        return _UNSTATED_LIFETIME
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = float(value[:16])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not (math.isfinite(value) if isinstance(value, float) else True) or value < 0:
        return None
    return float(min(value, _MAX_LIFETIME))


def _refusal(
    status: int, headers: Mapping[str, str], body: bytes, place: str, secrets: tuple[str, ...]
) -> HandshakeRejected:
    """Return the error for any answer but 200."""
    code = _document(body).get("error")
    if not isinstance(code, str) or not _ERROR_CODE.fullmatch(code) or _echoes(code, secrets):
        code = ""
    said = f"HTTP {status}{f' ({code})' if code else ''}"
    if status in _PASSING or status >= 500 or code in _PASSING_CODES:
        text = f"The token endpoint at {place} is not available: {said}."
        return HandshakeRejected(text, status=status, retry_after=retry_after(headers))
    remedy = _REMEDIES.get(code, f"Check {LABEL}, and the log of the authorization server.")
    if status in (404, 405) or status < 400:
        remedy = f"Check {LABEL}.token_url."
    if 300 <= status < 400:
        remedy = f"Redirects are not followed; set {LABEL}.token_url to the final address."
    return AuthenticationRejected(
        f"The token endpoint at {place} gave no token: {said}. {remedy}", status=status
    )


def _spellings(config: Mapping[str, Any], secret: str) -> tuple[str, ...]:
    """Return how the secret stands in the request."""
    return secret, urllib.parse.quote_plus(secret), _basic(config, secret)


def _echoes(code: str, secrets: tuple[str, ...]) -> bool:
    """Tell whether the server sends back a part of what it must not."""
    known = code in _REMEDIES or code in _PASSING_CODES
    return not known and any(secret in code or code in secret for secret in secrets)
