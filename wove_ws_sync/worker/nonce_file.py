"""Nonces in a file that worker services of one machine share, and that outlives them.

Owns: the file and its format. Never: forgets a nonce before it has expired, goes on with a
file that was taken away: a new one would know nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator

from .nonces import NonceStoreError, mark_of

__all__ = ["FileNonces"]

#: Tells our files from those of other programs ("wove" in ASCII), and this format from later ones.
_APPLICATION, _FORMAT = 0x776F7665, 1
#: How long, in seconds, a check may wait for siblings; the handshake has ten.
_BUSY_TIMEOUT = 2.0
_PAGE_BYTES = 4096
_MAX_BYTES = 64 * 1024 * 1024
#: How many expired nonces a check forgets at most. More than it adds.
_SWEEP = 64

_SCHEMA = (
    "CREATE TABLE nonces (mark BLOB PRIMARY KEY, expires REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX nonces_by_expires ON nonces (expires)",
    "CREATE TABLE forgotten (one INTEGER PRIMARY KEY CHECK (one = 1), expires REAL NOT NULL)",
    "INSERT INTO forgotten VALUES (1, 0.0)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_FORMAT}",
)
_EXPIRED = "SELECT mark, expires FROM nonces WHERE expires < ? ORDER BY expires LIMIT ?"


class FileNonces:
    """Remember nonces in the SQLite file *path*, which is made if it is not there, with mode 0600.

    It grows to *max_bytes* at most (64 MiB hold about 600,000 nonces); when that is reached
    handshakes are refused until old nonces expire.
    """

    blocks = True

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = _MAX_BYTES) -> None:
        self._path = os.path.abspath(path)
        self._max_pages = max(16, max_bytes // _PAGE_BYTES)
        self._lock = threading.Lock()  # one thread at a time uses the connection
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)

    def __repr__(self) -> str:
        return f"<FileNonces {self._path!r} {'closed' if self._connection is None else 'open'}>"

    def open(self) -> None:
        """Open the file, or make it. Raises NonceStoreError that says what is wrong with it."""
        with self._used(), contextlib.ExitStack() as undo:
            self._identity = self._prepare()
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            undo.callback(connection.close)
            connection.execute("PRAGMA synchronous = FULL")  # what is accepted survives a power cut
            connection.execute(f"PRAGMA max_page_count = {self._max_pages}")
            connection.execute("BEGIN IMMEDIATE")  # siblings may begin at the same moment
            if self._is_new(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
            _write_ahead(connection)
            [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise NonceStoreError(f"The nonce file {self._path!r} is damaged; move it away.")
            undo.pop_all()
            self._connection = connection

    def _prepare(self) -> tuple[int, int]:
        """Make the file if it is not there; return which one it is. Nobody else may write to it."""
        # One that is there must not be opened here: closing it would end the locks of another connection.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        folder = os.path.dirname(os.path.abspath(self._path))
        if stat.S_IMODE(os.stat(folder).st_mode) & 0o022:  # what SQLite puts beside the file is believed, too
            raise NonceStoreError(
                f"The directory {folder!r} of the nonce file must not be writable for others: "
                "use one of the service's own, or chmod it to 700."
            )
        found = os.lstat(self._path)
        if not stat.S_ISREG(found.st_mode):
            raise NonceStoreError(f"The nonce file {self._path!r} is no regular file.")
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise NonceStoreError(
                f"The nonce file {self._path!r} must belong to the user of the service and to nobody else: "
                "chown it to that user and chmod it to 600."
            )
        return found.st_dev, found.st_ino

    def _is_new(self, connection: sqlite3.Connection) -> bool:
        """Tell whether the file is empty. Raises NonceStoreError if it is not ours."""
        [application] = connection.execute("PRAGMA application_id").fetchone()
        [version] = connection.execute("PRAGMA user_version").fetchone()
        [objects] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version) == (_APPLICATION, _FORMAT):
            return False
        if application or version or objects:
            raise NonceStoreError(f"The nonce file {self._path!r} is of another program or version.")
        return True

    def use(self, key: str, nonce: str, now: float, expires: float) -> bool:
        """Remember *nonce*; return False if any process knew it. Raises NonceStoreError."""
        mark = mark_of(key, nonce)
        with self._used():
            if self._connection is None:
                raise NonceStoreError("The nonce file is not open.")
            found = os.stat(self._path)
            if (found.st_dev, found.st_ino) != self._identity:
                raise NonceStoreError(f"The nonce file {self._path!r} was replaced; restart the service.")
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                is_new = _use(cursor, mark, now, expires)
                cursor.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # an error may have ended the transaction
                    cursor.execute("ROLLBACK")
                raise
            return is_new

    def close(self) -> None:
        """Close the file, which stays. Idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Have the connection for this thread, and tell what goes wrong as a NonceStoreError."""
        if not self._lock.acquire(timeout=_BUSY_TIMEOUT):
            raise NonceStoreError(f"The nonce file {self._path!r} is busy.")
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise NonceStoreError(f"The nonce file {self._path!r} cannot be used: {reason}.") from None
        finally:
            self._lock.release()


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Have readers and writers not wait for each other; SQLite does not wait for the lock that this takes."""
    ends_at, pause = time.monotonic() + _BUSY_TIMEOUT, threading.Event()
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() >= ends_at:
                raise
            pause.wait(0.02)
        else:
            return


def _use(cursor: sqlite3.Cursor, mark: bytes, now: float, expires: float) -> bool:
    """Forget what has expired, then have the unique key decide. Within a transaction."""
    expired = cursor.execute(_EXPIRED, (now, _SWEEP)).fetchall()
    if expired:
        cursor.executemany("DELETE FROM nonces WHERE mark = ?", [(old,) for old, _ in expired])
        cursor.execute("UPDATE forgotten SET expires = max(expires, ?)", (expired[-1][1],))
    cursor.execute("INSERT INTO nonces VALUES (?, ?) ON CONFLICT DO NOTHING", (mark, expires))
    if cursor.rowcount == 0:
        return False
    [forgotten] = cursor.execute("SELECT expires FROM forgotten").fetchone()
    if expires <= forgotten:
        raise NonceStoreError(
            "The clock went back: a replay could not be told from a new handshake until it is where it was. "
            "If it was wrong then, stop the services that use the nonce file and move it away; handshakes of "
            "the last minutes could be replayed once after that."
        )
    return True
