"""What a host says of itself in the headers of its handshake, and what it is answered.

Owns: the reading of X-Wove-Sync and of the headers that go with it. Never: looks at
credentials, never refuses a host: an odd header counts as one that is not there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

from ..frames import FEATURES

__all__ = ["SMALLEST_LIMIT", "Greeting"]

#: What a host on Wove's own executor accepts: the default limit of websockets, which it cannot change.
_FOREIGN_LIMIT = 1024 * 1024 - 1
#: The smallest limit of a message, in bytes, in which every error can be told.
SMALLEST_LIMIT = 4096
_HOST_ID = re.compile(r"[0-9a-fA-F]{32}", re.ASCII)
_DEFAULT_WINDOW = 10.0
_MAX_WINDOW = 3600.0

#: Returns every value of a header.
GetAll = Callable[[str], Sequence[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Greeting:
    """One host, as it introduced itself.

    ``ours`` says whether it is of this package, ``features`` which extensions are used with
    it, ``limit`` is the largest message in bytes that it accepts. ``host_id`` names it if
    ``resume`` is among the features and is "" otherwise; ``window`` is how long it may be
    away, in seconds.
    """

    ours: bool
    features: tuple[str, ...]
    limit: int
    host_id: str
    window: float

    @classmethod
    def read(cls, get_all: GetAll, *, seals: bool = False) -> Greeting:
        """Return what the headers of a request say. Never raises. *seals*: this side can seal for it."""
        version, _, parameters = _only(get_all, "X-Wove-Sync").partition(";")
        if version.strip() != "1":
            return cls(False, (), _FOREIGN_LIMIT, "", 0.0)
        offered = _offered(parameters)
        host_id = _only(get_all, "X-Wove-Host")
        if "ack" not in offered or not _HOST_ID.fullmatch(host_id):
            offered.discard("resume")
        known = (*FEATURES, "seal") if seals else FEATURES
        return cls(
            True,
            tuple(feature for feature in known if feature in offered),
            _limit(_only(get_all, "X-Wove-Max-Message")),
            host_id.lower() if "resume" in offered else "",
            _window(_only(get_all, "X-Wove-Resume-Window")),
        )

    def answer(self, worker_id: str, max_message_bytes: int, cancels: Iterable[str]) -> dict[str, str]:
        """Return the response headers: none for a foreign host, which never sees ours."""
        if not self.ours:
            return {}
        used = f"; f={','.join(self.features)}" if self.features else ""
        return {
            "X-Wove-Sync": f"1{used}",
            "X-Wove-Worker": worker_id,
            "X-Wove-Max-Message": str(max_message_bytes),
            "X-Wove-Cancels": ", ".join(sorted(cancels)),
        }


def _only(get_all: GetAll, name: str) -> str:
    """Return the one value of a header; "" if it is missing or repeated."""
    values = get_all(name)
    return values[0].strip() if len(values) == 1 else ""


def _offered(parameters: str) -> set[str]:
    offered: set[str] = set()
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "f":
            offered.update(feature.strip() for feature in value.split(","))
    return offered


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        return _FOREIGN_LIMIT
    return max(SMALLEST_LIMIT, int(text))


def _window(text: str) -> float:
    try:
        window = float(text)
    except ValueError:
        return _DEFAULT_WINDOW
    return min(max(window, 0.0), _MAX_WINDOW) if math.isfinite(window) else _DEFAULT_WINDOW
