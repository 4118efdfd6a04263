"""How ``check`` goes from a name to a WebSocket: the product's own dial, watched stage by stage.

Owns: which stage a dial got to, and cause and remedy of the one where it ended. Never: dials
in another way than a link does.
"""

from __future__ import annotations

import dataclasses
import errno
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

from .. import frames, security
from .._route import place
from .._wire import Wire
from ..errors import AuthenticationRejected, HandshakeRejected
from ..options import LinkOptions
from ..timing import Clock
from ..transport import WebSocketTransport, dial
from . import _check_tls
from ._check_report import Step

__all__ = ["Dial", "watched"]

# What the witness of a dial calls a stage, and what the step is called.
_STAGES = {"name": "name", "tcp": "tcp", "proxy": "proxy", "tls": "tls", "answer": "handshake"}
_SHOW_ADDRESSES = 6
_SECURITY = "Both sides need the same secret, --security (executor_config.security) here and there."
_STATUSES = {
    400: "The request was taken for malformed: let the reverse proxy pass Upgrade and Connection on.",
    403: "Check --security and what this host may do there; a reverse proxy may refuse its address.",
    404: "Check the path of the URL; the worker's --path is /wove unless it says otherwise.",
    426: "The server wants another protocol or version: check that the URL is that of a worker service, "
    "and that a reverse proxy passes the headers Upgrade and Connection on.",
    429: "There were too many connections: wait, and share executors in place of one for each call.",
    502: "The reverse proxy does not reach the worker service: check that it runs and where the proxy looks.",
    503: "The worker service, or the proxy before it, takes no connections: is it stopping or starting?",
    504: "The reverse proxy got no answer of the worker service: check that it runs and is not stuck.",
}
_PROXY_STATUSES = {
    "403": "The proxy does not allow this target: have it allowed, or reach the worker without --proxy.",
    "407": "Give user and password in --proxy http://user:password@host:port (executor_config.proxy).",
    "502": "The proxy does not reach the worker service: check its name and port as the proxy sees them.",
    "503": "The proxy does not reach the worker service: check its name and port as the proxy sees them.",
    "504": "The proxy does not reach the worker service: check its name and port as the proxy sees them.",
}


@dataclasses.dataclass
class Dial:
    """A dial as it was seen: what came of each stage and when, and how it ended."""

    options: LinkOptions
    began: float = 0.0
    outcomes: dict[str, Any] = dataclasses.field(default_factory=dict)
    moments: dict[str, float] = dataclasses.field(default_factory=dict)
    transport: WebSocketTransport | None = None
    error: Exception | None = None
    #: The time of day when the answer had come.
    answered_at: float = 0.0

    def witness(self, stage: str, outcome: Any) -> None:
        """Note that a stage succeeded."""
        self.outcomes[stage], self.moments[stage] = outcome, time.perf_counter()
        if stage == "answer":
            self.answered_at = time.time()

    @property
    def wire(self) -> Wire:
        """Return the connected bytes."""
        wire: Wire = self.outcomes["tcp"]
        return wire

    @property
    def answer(self) -> dict[str, str]:
        """Return the headers of the answer to the handshake, names in lower case."""
        headers: dict[str, str] = self.outcomes.get("answer", (0, {}))[1]
        return headers

    def steps(self) -> Iterator[Step]:
        """Yield a step for each stage up to the one that failed."""
        error, ended = self.error, time.perf_counter()
        # With TLS 1.3 a worker refuses a client certificate when the handshake is over for this side.
        late = isinstance(error, ssl.SSLError) and "answer" not in self.outcomes
        before = self.began
        for stage, name in _STAGES.items():
            skipped = self._not_needed(stage)
            if skipped:
                yield Step(name=name, status="skip", detail=skipped)
                continue
            after = self.moments.get(stage, ended)
            done = stage in self.moments and not (stage == "tls" and late)
            if error is not None and (not done or stage == "answer"):
                yield self._failed(name, error, after - before)
                return
            yield self._passed(name, after - before)
            before = after

    def _not_needed(self, stage: str) -> str:
        if stage == "proxy" and not self.options.proxy:
            return "no proxy is configured"
        return "a ws:// URL has no TLS" if stage == "tls" and not self.options.secure else ""

    # -- what went well --------------------------------------------------------------

    def _passed(self, name: str, seconds: float) -> Step:
        if name == "tls":
            return _check_tls.passed(self.outcomes["tls"], self.options, seconds)
        facts: dict[str, Any] = {}
        if name == "name":
            found = list(dict.fromkeys(str(entry[4][0]) for entry in self.outcomes["name"]))
            facts, host = {"addresses": found}, self._target()[0]
            detail = f"{host} is an address" if found == [host] else f"{host} is {_listed(found)}"
            if self.options.proxy:
                detail += "; that is the proxy, which looks up the worker service itself"
        elif name == "tcp":
            # The handshake's wire is closed if something failed later: its address is noted in time.
            facts = {"address": self.outcomes["address"], "port": self._target()[1]}
            detail = f"connected to {_at(facts['address'], facts['port'])}"
        elif name == "proxy":
            detail = f"the proxy connected to {place(self.options)}"
        else:
            facts = {"http_status": 101, "security": self.options.security.mode}
            sent = self.options.security.mode
            detail = "HTTP 101, " + ("no security sent" if sent == "none" else f"{sent} handshake accepted")
            facts["worker_proved"] = "x-wove-server-signature" in self.answer  # a wrong one is an error
            if facts["worker_proved"]:
                detail += "; the worker service proved that it has the key"
        return Step(name=name, status="ok", detail=detail, seconds=seconds, facts=facts)

    def _target(self) -> tuple[str, int]:
        return self.options.proxy_address or (self.options.host, self.options.port)

    # -- what did not ----------------------------------------------------------------

    def _failed(self, name: str, error: Exception, seconds: float) -> Step:
        if name == "tls" and isinstance(error, OSError):
            return _check_tls.failed(error, self.options, seconds)
        code = 0
        facts: dict[str, Any] = {"error": type(error).__name__}
        if name == "name":
            cause, remedy = self._unresolved(error)
        elif name == "tcp":
            cause, remedy = self._unconnected(error)
        elif name == "proxy":
            cause, remedy = self._unproxied(error)
        else:
            cause, remedy = self._unanswered(error)
            code = 14 if isinstance(error, AuthenticationRejected) else 0
            facts |= {"http_status": getattr(error, "status", None)}
        return Step(
            name=name,
            status="fail",
            detail=cause,
            remedy=remedy,
            seconds=seconds,
            exit_code=code,
            facts=facts,
        )

    def _unresolved(self, error: Exception) -> tuple[str, str]:
        host = self._target()[0]
        if isinstance(error, TimeoutError):
            cause = f"no answer about {host} within {self.options.open_timeout:g} s"
            return cause, "Check the name servers of this machine; --timeout waits longer."
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            return (
                f"{host} cannot be looked up now",
                "Check name servers and network of this machine.",
            )
        whose = "proxy" if self.options.proxy else "URL"
        return f"{host} has no address", f"Check the spelling of the {whose}, the name server, /etc/hosts."

    def _unconnected(self, error: Exception) -> tuple[str, str]:
        host, port = self._target()
        where, whom = _at(host, port), "proxy" if self.options.proxy else "worker service"
        if isinstance(error, ValueError):  # the rule for targets without protection
            return str(error), "Use wss:// and --security, or an address of this machine."
        if isinstance(error, ConnectionRefusedError):
            cause = f"{where} refused the connection: nothing listens there"
            return (
                cause,
                f"Start the {whom}, or check host, port and what address it listens on (--host, --port).",
            )
        if isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.ETIMEDOUT:
            cause = f"{where} did not answer within {self.options.open_timeout:g} s"
            return cause, "A firewall may drop the packets, or the machine is down; --timeout waits longer."
        cause = f"no connection to {where}: {getattr(error, 'strerror', None) or error}"
        return cause, "Check the route to that machine, its firewall and its address."

    def _unproxied(self, error: Exception) -> tuple[str, str]:
        where = _at(*self._target())
        if isinstance(error, TimeoutError):
            cause = f"the proxy {where} did not answer within {self.options.open_timeout:g} s"
            return cause, "Check that it is an HTTP proxy that allows CONNECT; --timeout waits longer."
        text = str(error)
        for status, remedy in _PROXY_STATUSES.items():
            if text.endswith(f"(HTTP {status})."):
                return text, remedy
        if "worker service" in text:  # the dial cannot know who closed it
            text = f"the proxy {where} closed the connection"
        return text, "Check that --proxy names an HTTP proxy that allows CONNECT to this host and port."

    def _unanswered(self, error: Exception) -> tuple[str, str]:
        if isinstance(error, AuthenticationRejected):
            return self._unauthenticated(error)
        if isinstance(error, HandshakeRejected):
            return self._rejected(error)
        if isinstance(error, TimeoutError):
            cause = f"connected, but no answer to the handshake within {self.options.open_timeout:g} s"
            return cause, self._right_port("and that it is not stuck; --timeout waits longer.")
        return str(error), self._right_port("and its log.")

    def _right_port(self, more: str) -> str:
        """Return the advice for a port that does not behave like a worker service's."""
        first = "" if self.options.secure else "If the port has TLS, use a wss:// URL. "
        return f"{first}Check that the port is that of a worker service, {more}"

    def _unauthenticated(self, error: AuthenticationRejected) -> tuple[str, str]:
        mode = self.options.security.mode
        cause = f"HTTP {error.status}: the worker service did not accept "
        cause += {"none": "a handshake without security", "bearer": "the bearer token"}.get(
            mode, "the signature"
        )
        if mode == "none":
            return cause, "Give --security env:VARIABLE with the secret of the worker service."
        if error.status == 403:
            return cause, f"{_STATUSES[403]} {_SECURITY}"
        if mode == "signed":
            return cause, (
                f"{_SECURITY} A clock that is wrong on one of the machines is another cause (see the step "
                "clock), as is a reverse proxy that changes the path or the query, which are signed."
            )
        return cause, "Give the token that the worker service expects."

    def _rejected(self, error: HandshakeRejected) -> tuple[str, str]:
        status = error.status
        if status is None:
            return "the other side does not speak HTTP", self._right_port("and its log.")
        if status == 101:
            return str(error), "Something between changes the upgrade: check the reverse proxy's headers."
        if 300 <= status < 400:
            return f"HTTP {status}: a redirect, which is not followed", "Put the final address into the URL."
        cause, remedy = f"HTTP {status}", _STATUSES.get(status, "")
        if 200 <= status < 300:
            cause += ": an answer, but no upgrade: not a websocket server, or not at this path"
            remedy = "Check the URL, and that a reverse proxy passes the headers Upgrade and Connection on."
        elif status >= 500:
            cause += ": the server failed" if status in (500, 501) else ": the server is not available"
        elif status == 404:
            cause += ": there is nothing at this path"
        if error.retry_after is not None:
            remedy = f"It asks to wait {error.retry_after:g} s. {remedy}"
        return cause, remedy or "See the log of the server: is it a worker service?"


def watched(options: LinkOptions, clock: Clock) -> Dial:
    """Dial as a link does, within ``open_timeout`` seconds, and return what was seen."""
    seen = Dial(options)
    headers = security.handshake_headers(options) | {
        "X-Wove-Sync": f"1; f={','.join(frames.FEATURES)}",
        "X-Wove-Host": secrets.token_hex(16),  # a host of its own, which says goodbye
        "X-Wove-Resume-Window": "0",
    }

    def witness(stage: str, outcome: Any) -> None:
        seen.witness(stage, outcome)
        if stage == "tcp":
            seen.outcomes["address"] = outcome.peer_address()

    seen.began = time.perf_counter()
    try:
        seen.transport = dial(options, headers, clock=clock, witness=witness)
    except Exception as exc:
        seen.error = exc
    return seen


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_SHOW_ADDRESSES]) + (", ..." if len(items) > _SHOW_ADDRESSES else "")


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
