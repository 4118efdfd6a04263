"""Access tokens of this process, each fetched once for everybody who wants it.

Owns: the token of each configuration until it expires, the one fetch at a time, and who waits for
it how long. Never: speaks HTTP itself (``_token_endpoint`` does), shows or pickles a token, holds a
lock while it fetches.
"""

from __future__ import annotations

import copy
import functools
import hmac
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from . import _fork
from ._leash import Leash
from ._security_config import SecurityConfig
from ._token_endpoint import AcceptPeer, check_usable, request_token
from .timing import Deadline

__all__ = ["TokenSource", "check_usable", "source_for"]

_MOST_SOURCES = 64
#: A token is renewed when less than this, or a tenth of its lifetime, is left, in seconds.
_LONGEST_LEEWAY = 60.0
#: The part of a dial's time that the renewal of a token which is still valid may take.
_RENEWAL_SHARE = 1 / 3
#: So many seconds nobody tries to renew a valid token after that failed.
_RENEWAL_PAUSE = 5.0
_LATE = "timed out waiting for an access token"

_numbers = itertools.count(1)
_lock = threading.Lock()  # guards _sources; a leaf
_sources: dict[tuple[SecurityConfig, bool], TokenSource] = {}


def _suspended_too() -> Callable[[], float]:
    """Return a monotonic clock that goes on while the machine is suspended, as a token's time does."""
    boot_time = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if boot_time is None else functools.partial(time.clock_gettime, boot_time)


_now = _suspended_too()


class _Token:
    """An access token; moments are those of ``_now``."""

    __slots__ = ("renew_at", "text", "valid_until")

    def __init__(self, text: str, valid_until: float, renew_at: float) -> None:
        self.text = text
        self.valid_until = valid_until
        self.renew_at = renew_at

    def __repr__(self) -> str:
        return "<access token>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("An access token is not pickled.")


class _Fetch:
    """One request under way. ``outcome`` is None until it is done, and if it was given up."""

    def __init__(self) -> None:
        self.leash = Leash()
        self.done = threading.Event()
        self.outcome: _Token | Exception | None = None


class TokenSource:
    """The token of one configuration, for all threads and links of the process. Thread-safe.

    *accept_peer* judges the address of the token endpoint; *now* is there for tests.
    """

    def __init__(
        self, security: SecurityConfig, accept_peer: AcceptPeer | None, now: Callable[[], float] = _now
    ) -> None:
        self._security = security
        self._accept_peer = accept_peer
        self._now = now
        self._lock = threading.Lock()  # guards all below; a leaf
        self._token: _Token | None = None
        self._fetch: _Fetch | None = None
        # What the endpoint said, and until when it is not asked again.
        self._refusal: Exception | None = None
        self._quiet_until = 0.0

    def __repr__(self) -> str:
        state = "fetching" if self._fetch else "idle" if self._token is None else "with a token"
        return f"<TokenSource {state}>"

    def abandon_after_fork(self) -> None:
        """Drop the fetch of the parent's thread and make a fresh lock; the token is as good here."""
        self._lock = threading.Lock()
        self._fetch = None

    def token(self, timeout: float) -> str:
        """Return a token that is valid now, fetched if need be, within *timeout* seconds.

        Raises what :func:`wove_ws_sync._token_endpoint.request_token` does, TimeoutError included.
        """
        deadline = Deadline.after(timeout, time.monotonic())
        while True:
            fetch, leads, held = self._join()
            if fetch is None:
                assert held is not None
                return held.text
            left = deadline.remaining(time.monotonic()) or 0.0
            limits = [left, self._setting("timeout") or left]
            if held is not None:
                limits.append(timeout * _RENEWAL_SHARE)
            outcome = self._await(fetch, leads, min(limits))
            if isinstance(outcome, _Token):
                return outcome.text
            if held is not None and self._still(held):
                return held.text
            if outcome is not None:
                raise copy.copy(outcome)  # each thread its own, without the traceback of others
            if leads or deadline.expired(time.monotonic()):
                raise TimeoutError(_LATE)

    def drop(self, token: str) -> None:
        """Forget *token*, which was refused, if it is the one that is kept; a newer one stays."""
        with self._lock:
            if self._token is not None and hmac.compare_digest(self._token.text, token):
                self._token = None

    def _setting(self, key: str) -> Any:
        return self._security.value[key]

    def _join(self) -> tuple[_Fetch | None, bool, _Token | None]:
        """Return the fetch to wait for, whether this thread leads it, and the token held so far.

        There is none to wait for while the token held is good enough.
        """
        now = self._now()
        with self._lock:
            held = self._token if self._token is not None and now < self._token.valid_until else None
            if held is not None and (now < held.renew_at or now < self._quiet_until):
                return None, False, held
            if held is None and self._refusal is not None and now < self._quiet_until:
                raise copy.copy(self._refusal)
            leads = self._fetch is None
            if self._fetch is None:
                self._fetch = _Fetch()
            return self._fetch, leads, held

    def _await(self, fetch: _Fetch, leads: bool, patience: float) -> _Token | Exception | None:
        """Return the outcome of *fetch*; None if it does not come in time. Whoever leads it, ends it."""
        try:
            if leads:
                name = f"wove-ws-token-{next(_numbers)}"
                arguments = (fetch, patience)
                threading.Thread(target=self._run, args=arguments, name=name, daemon=True).start()
            fetch.done.wait(patience)
        finally:
            if leads and not fetch.done.is_set():
                self._finish(fetch, None)
                fetch.leash.cut()
        return fetch.outcome

    def _run(self, fetch: _Fetch, timeout: float) -> None:
        """Fetch a token. In a thread of its own, as no resolver can be interrupted."""
        began = self._now()
        outcome: _Token | Exception
        try:
            text, lifetime = request_token(self._security.value, fetch.leash, timeout, self._accept_peer)
            leeway = self._setting("leeway")
            if leeway is None:
                leeway = min(_LONGEST_LEEWAY, lifetime / 10)
            outcome = _Token(text, began + lifetime, began + lifetime - leeway)
        except Exception as exc:
            outcome = exc.with_traceback(None)
        finally:
            fetch.leash.release()
        self._finish(fetch, outcome)

    def _finish(self, fetch: _Fetch, outcome: _Token | Exception | None) -> None:
        """Settle *fetch*, once: what comes after it was given up is dropped."""
        now = self._now()
        with self._lock:
            if self._fetch is not fetch:
                return
            self._fetch = None
            fetch.outcome = outcome
            if isinstance(outcome, _Token):
                self._token, self._refusal = outcome, None
                self._quiet_until = 0.0
            else:
                asked = getattr(outcome, "retry_after", None)
                self._refusal = outcome if asked else None
                self._quiet_until = now + max(asked or 0.0, _RENEWAL_PAUSE if self._token else 0.0)
        fetch.done.set()

    def _still(self, held: _Token) -> bool:
        """Tell whether *held* may be used: a worker may have refused it meanwhile."""
        with self._lock:
            return self._token is held and self._now() < held.valid_until


def source_for(security: SecurityConfig, accept_peer: AcceptPeer | None = None) -> TokenSource:
    """Return the one source of this process for *security*. Thread-safe."""
    _fork.check()
    key = (security, accept_peer is not None)
    with _lock:
        source = _sources.get(key)
        if source is None:
            if len(_sources) >= _MOST_SOURCES:
                _sources.clear()
            source = _sources[key] = TokenSource(security, accept_peer)
            _fork.forget_in_child(source)
        return source


@_fork.in_child
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()
