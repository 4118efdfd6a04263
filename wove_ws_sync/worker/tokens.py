"""Who may connect with a JSON Web Token (RFC 7519) as bearer token; PyJWT verifies it.

Owns: the security value of the type "jwt", the judgement on a token, and the name of its owner.
Never: sees a frame, logs or returns a token, tells a peer why it was refused. A token is looked at
in the handshake: a connection outlives it.
"""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import _checks
from .jwks import ASYMMETRIC, KeySource
from .not_ready import NotReady

__all__ = ["TokenVerifier"]

#: Returns every value of a header.
GetAll = Callable[[str], Sequence[str]]

_KEYS = frozenset(
    {"type", "jwks", "audience", "issuer", "algorithms", "leeway_seconds", "required_scope", "ca_file"}
)
_DEFAULT_LEEWAY = 30.0
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([\w-]+\.[\w-]+\.[\w-]+)", re.ASCII)
_LONGEST_SUBJECT = 255
#: When the keys of a URL that does not answer are asked for again, in seconds.
_RETRY_AFTER = 10.0
#: In this order, what names the owner.
_SUBJECTS = ("sub", "client_id", "azp")
_REASONS = {
    "ExpiredSignatureError": "it has expired",
    "ImmatureSignatureError": "it is not valid yet; compare the clocks",
    "InvalidIssuedAtError": "its iat is not a time",
    "InvalidAudienceError": "it is for another audience",
    "InvalidIssuerError": "it is of another issuer",
    "InvalidSignatureError": "its signature is wrong",
}


class TokenVerifier:
    """Verify the bearer tokens of handshakes by *config*, a dictionary of the type "jwt". Thread-safe.

    Raises ValueError or TypeError for a wrong config, RuntimeError if PyJWT is missing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._jwt = _library()
        for key in config:
            if key not in _KEYS:
                raise ValueError(f"security has no key {_checks.show(key)}. {_checks.unknown(key, _KEYS)}")
        self._audience = _texts("audience", config.get("audience"))
        self._issuer = _text("issuer", config.get("issuer"))
        self._algorithms = _algorithms(config.get("algorithms"))
        leeway = config.get("leeway_seconds", _DEFAULT_LEEWAY)
        remedy = f"leave the key out for {_DEFAULT_LEEWAY}"
        self._leeway = _checks.seconds(zero=True)("security.leeway_seconds", leeway, remedy)
        required = config.get("required_scope")
        self._required = frozenset(_text("required_scope", required).split() if required is not None else ())
        ca_file = config.get("ca_file")
        self._keys = KeySource(
            _text("jwks", config.get("jwks")), None if ca_file is None else _text("ca_file", ca_file)
        )

    def refresh(self, get_all: GetAll) -> concurrent.futures.Future[None] | None:
        """Return what to wait for before :meth:`verify`: new keys. None if these will do. Never blocks."""
        try:
            _, header = self._parse(get_all)
        except PermissionError:
            return None
        return self._keys.refresh() if self._keys.due(header.get("kid")) else None

    def verify(self, get_all: GetAll) -> str:
        """Return who the token in the header Authorization is of, or raise PermissionError.

        Reads nothing and connects nowhere; the error says why, never with what. Raises NotReady if there
        are no keys to judge it by.
        """
        token, header = self._parse(get_all)
        keys = self._keys.current()
        if keys is None:
            raise NotReady("Tokens cannot be verified: their keys could not be read.", _RETRY_AFTER)
        for key in (candidates := keys.find(header.get("kid"), header["alg"])):
            try:
                return self._judge(token, key, header["alg"])
            except self._jwt.InvalidSignatureError:
                if key is candidates[-1]:
                    raise PermissionError("The token was refused: its signature is wrong.") from None
        raise PermissionError("The token was refused: it names no key that is known for its algorithm.")

    def accepts(self, authorizations: Sequence[str]) -> bool:
        """Tell whether these values of an Authorization header would be accepted, with the keys at hand."""
        self.refresh(lambda name: authorizations)  # for the next time
        try:
            self.verify(lambda name: authorizations)
        except (PermissionError, NotReady):
            return False
        return True

    def _parse(self, get_all: GetAll) -> tuple[str, dict[str, Any]]:
        """Return the token and its header, if it is one that may be verified."""
        values = get_all("Authorization")
        if len(values) != 1:
            raise PermissionError(f"The header Authorization is {'repeated' if values else 'missing'}.")
        match = _BEARER.fullmatch(values[0].strip())
        if match is None:
            raise PermissionError("The header Authorization is not a JSON Web Token as bearer token.")
        try:
            header = self._jwt.get_unverified_header(match[1])
        except Exception as exc:
            raise PermissionError(f"The token is malformed ({type(exc).__name__}).") from None
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise PermissionError("The token was refused: its algorithm is not among those allowed.")
        if "crit" in header or not isinstance(header.get("kid"), str | None):
            raise PermissionError("The token was refused: its header is not understood.")
        return match[1], header

    def _judge(self, token: str, key: Any, algorithm: str) -> str:
        try:
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway,
                options={"require": ["exp", "aud", "iss"]},
            )
        except self._jwt.InvalidSignatureError:
            raise
        except self._jwt.MissingRequiredClaimError as exc:
            raise PermissionError(f"The token was refused: it has no {exc.claim}.") from None
        except Exception as exc:  # claims of any type, which come to anything
            kind = type(exc).__name__
            raise PermissionError(f"The token was refused: {_REASONS.get(kind, kind)}.") from None
        if not self._required <= _scopes(claims):
            raise PermissionError("The token was refused: it lacks the scope that is required.")
        return _subject(claims)


def _library() -> Any:
    try:
        import jwt
    except ImportError:
        jwt = None  # type: ignore[assignment,unused-ignore]
    if jwt is None or not jwt.algorithms.has_crypto:
        raise RuntimeError(
            "security of the type 'jwt' needs the package PyJWT with cryptography: "
            'pip install "wove_ws_sync[jwt]"'
        )
    return jwt


def _subject(claims: Mapping[str, Any]) -> str:
    """Return who runs belong to."""
    name = next((claims[key] for key in _SUBJECTS if claims.get(key) is not None), None)
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_SUBJECT or not name.isprintable():
        raise PermissionError(f"The token was refused: none of {', '.join(_SUBJECTS)} names its owner.")
    return name


def _scopes(claims: Mapping[str, Any]) -> set[str]:
    """Return what the token allows: ``scope`` (RFC 8693, 4.2) or ``scp``, as text or a list."""
    found: set[str] = set()
    for value in (claims.get("scope"), claims.get("scp")):
        if isinstance(value, str):
            found.update(value.split())
        elif isinstance(value, list):
            found.update(item for item in value if isinstance(item, str))
    return found


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"security.{key} must be text that is not empty.")
    return value


def _texts(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"security.{key} must be text or a list of texts.")
    return [_text(key, item) for item in values]


def _algorithms(value: Any) -> frozenset[str]:
    """Return the algorithms allowed; with a shared secret a public key would do to sign."""
    if value is None:
        return ASYMMETRIC
    algorithms = frozenset(_texts("algorithms", value))
    for name in sorted(algorithms - ASYMMETRIC):
        raise ValueError(
            f"security.algorithms must not have {_checks.show(name)}. {_checks.unknown(name, ASYMMETRIC)}"
        )
    return algorithms
