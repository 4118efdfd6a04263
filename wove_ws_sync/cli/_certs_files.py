"""The files of ``certs``: written all or not at all, never over others, keys for the owner only.

Owns: names, modes and order of writing. Never: knows what is in a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

__all__ = ["create", "is_key", "open_to_others", "replace"]

_MODE, _KEY_MODE, _FOLDER_MODE = 0o644, 0o600, 0o700


def is_key(name: str) -> bool:
    """Tell whether the file of that name holds a private key."""
    return name.endswith(".key")


def open_to_others(path: Path) -> str:
    """Return the mode of a file that others may read or write, "" if they may not."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{mode:04o}" if mode & 0o077 else ""


def create(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write new files; the folder is made if need be. Whatever goes wrong, none of them stays.

    Raises FileExistsError that names those that are there, and other OSErrors.
    """
    made = _make(folder)
    written: list[Path] = []
    try:
        if there := [name for name in contents if os.path.lexists(folder / name)]:
            raise FileExistsError(f"{folder} has {', '.join(there)} already; nothing was written")
        for name, content in contents.items():
            descriptor = _new(folder / name, _KEY_MODE if is_key(name) else _MODE)
            written.append(folder / name)
            _fill(descriptor, content)
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put each file in the place of the one of its name, with the same owner and mode; raises OSError.

    Who opens a file sees the earlier content or the new one. Nothing is replaced before all is written.
    """
    ready: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            path = folder / f".{name}.{secrets.token_hex(8)}"
            descriptor = _new(path, _KEY_MODE if is_key(name) else _MODE)
            ready[path] = folder / name
            with contextlib.suppress(OSError):  # then it keeps the mode that it was made with
                _take_over(descriptor, folder / name)
            _fill(descriptor, content)
        for path, target in ready.items():
            os.replace(path, target)
    finally:
        for path in ready:
            path.unlink(missing_ok=True)


def _make(folder: Path) -> bool:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(_FOLDER_MODE)
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no directory") from None
        return False
    return True


def _new(path: Path, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def _fill(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)


def _take_over(descriptor: int, earlier: Path) -> None:
    found = earlier.stat()
    os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
