"""How long a server asks to wait, by its Retry-After header.

Owns: the reading of that header. Never: waits.
"""

from __future__ import annotations

import binascii
import datetime
import email.utils
from collections.abc import Mapping

__all__ = ["retry_after"]

_MAX_RETRY_AFTER = 60.0


def retry_after(response: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asks to wait, at most a minute; None if it does not.

    The names in *response* are in small letters.
    """
    text = response.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return min(_MAX_RETRY_AFTER, float(text[:9]))
    moment, now = _date(text), _date(response.get("date", "")) or datetime.datetime.now(datetime.UTC)
    return None if moment is None else min(_MAX_RETRY_AFTER, max(0.0, (moment - now).total_seconds()))


def _date(text: str) -> datetime.datetime | None:
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError, binascii.Error):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
