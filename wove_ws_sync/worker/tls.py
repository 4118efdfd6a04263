"""The TLS settings of a worker service, made of files that may be renewed while it runs.

Owns: when the files are read, what happens to those that cannot be used, the warning before the
certificate ends. Never: touches a connection that is there; each keeps what it began with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from pathlib import Path
from typing import Any, Self

__all__ = ["RenewingContext"]

_logger = logging.getLogger("wove_ws_sync.worker")

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_DAY = 86400.0
_WARN_DAYS = 14


class RenewingContext(ssl.SSLContext):
    """Make each TLS connection of what is in the files now; for servers on asyncio.

    *certificate* (a chain) and *key* are PEM files without a password; with *client_ca* only peers with a
    certificate of it get in; *min_version* is "1.2" or "1.3". A change of a file counts from the next
    handshake on. Files that cannot be used are an error in the log, once, and what was served before
    goes on being served. Use it from one thread.

    Each change makes a context of its own, so no session that began under other files is resumed: it
    would carry a client certificate past a new *client_ca*.

    Raises OSError, ssl.SSLError included, for files that cannot be used from the start.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(
        self, certificate: str, key: str, client_ca: str | None = None, *, min_version: str = "1.2"
    ) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._files = [certificate, key, *([client_ca] if client_ca is not None else [])]
        self._min_version = _VERSIONS[min_version]
        self._seen = self._state()
        self._context = self._load()
        self._ends_at = _end_of(certificate)

    @property
    def ends_at(self) -> float | None:
        """Return when the certificate that is served ends, in seconds since the epoch; None if unknown."""
        return self._ends_at

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin a connection, with the files as they are now."""
        self.renew()
        return self._context.wrap_bio(*args, **kwargs)

    def renew(self) -> None:
        """Read the files if one of them has changed since they were read last."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state  # taken before they are read: what changes meanwhile is another change
        try:
            self._context = self._load()
        except OSError as exc:
            text = "The certificate files %s have changed and cannot be used: %s. The earlier ones are kept."
            _logger.error(text, ", ".join(self._files), exc.strerror or exc)
            return
        self._ends_at = _end_of(self._certificate)
        _logger.info("The certificate files %s have changed and were read anew.", ", ".join(self._files))

    def remind(self, now: float) -> None:
        """Log a warning if the certificate ends within 14 days of *now*, seconds since the epoch."""
        if self._ends_at is None:
            return
        days = (self._ends_at - now) / _DAY
        if days < 0:
            _logger.warning("The certificate %s has expired: hosts refuse it. Renew it.", self._certificate)
        elif days < _WARN_DAYS:
            _logger.warning("The certificate %s ends in %.1f days: renew it.", self._certificate, days)

    async def remind_daily(self) -> None:
        """Look for changes and remind, now and every day, until it is cancelled."""
        while True:
            self.renew()
            self.remind(time.time())
            await asyncio.sleep(_DAY)

    def _state(self) -> list[tuple[int, ...] | None]:
        """Return what changes with each file, whether it is written anew, replaced or linked to another."""
        return [_state_of(file) for file in self._files]

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self._min_version
        # A key with a passphrase must fail and not ask the terminal of a service.
        context.load_cert_chain(self._certificate, self._key, password=lambda: b"")
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _state_of(file: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _end_of(file: str) -> float | None:
    """Return when the first certificate in *file* ends; None if only OpenSSL can read it."""
    from cryptography import x509

    try:
        first = x509.load_pem_x509_certificates(Path(file).read_bytes())[0]
    except Exception:  # it is OpenSSL that has to read it; a handshake must not fail for a date
        return None
    return first.not_valid_after_utc.timestamp()
