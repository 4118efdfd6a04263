"""Who may read what a service shows of itself: its status page and its metrics.

Owns: that rule. Never: sees a frame, logs or returns a credential.

==================================== ==================================================
a request                            is answered
==================================== ==================================================
of a page of another site            403, whatever it brings
from this machine, to a loopback     200, if its Host header names this machine: a page
address of a service that listens    whose name was pointed at 127.0.0.1 (DNS rebinding)
on no other                          has another one
any other, with the secret           200
any other, to a service without one  403 (key pairs are none)
any other, to a service whose        403: a browser must not be asked to send in the clear
secret is never sent ("signed"),     what hosts only sign with
without TLS, from another machine
any other                            401, with a challenge that browsers understand
==================================== ==================================================
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence

from ..security import is_local_host, is_loopback_address
from .auth import Authenticator

__all__ = ["ReaderRule"]

#: Whoever forwards a request of somebody else says so in one of these, mostly.
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")

#: Returns every value of a header.
GetAll = Callable[[str], Sequence[str]]


class ReaderRule:
    """The rule for one service; *local* says that it listens on loopback only, *tls* that it is wss."""

    def __init__(self, auth: Authenticator, *, local: bool, tls: bool) -> None:
        self._auth = auth
        self._local = local
        self._tls = tls

    def status(self, get_all: GetAll, peer: str) -> int:
        """Return the HTTP status for a request from the address *peer*: 200, 401 or 403."""
        if _is_of_another_site(get_all):
            return 403
        at_hand = is_loopback_address(peer)
        if self._local and at_hand and _names_this_machine(get_all) and not any(map(get_all, _FORWARDED)):
            return 200
        if self._auth.mode in ("none", "ed25519") or (
            self._auth.mode == "signed" and not self._tls and not at_hand
        ):
            return 403
        return 200 if self._auth.knows_secret(get_all("Authorization")) else 401


def _is_of_another_site(get_all: GetAll) -> bool:
    """Tell whether a page of another origin makes this request; following a link to here is fine."""
    host = _only(get_all("Host")).lower()
    if any(_authority(origin) != host for origin in get_all("Origin")):
        return True
    sites, modes = get_all("Sec-Fetch-Site"), get_all("Sec-Fetch-Mode")
    return not set(sites) <= {"same-origin", "none"} and set(modes) != {"navigate"}


def _names_this_machine(get_all: GetAll) -> bool:
    try:
        return is_local_host(urllib.parse.urlsplit(f"//{_only(get_all('Host'))}").hostname or "")
    except ValueError:
        return False


def _authority(origin: str) -> str:
    try:
        return urllib.parse.urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _only(values: Sequence[str]) -> str:
    return values[0].strip() if len(values) == 1 else ""
