"""What ``check`` found: its steps, their exit codes, and how they are shown.

Owns: the names and the order of the steps, the text and the JSON of a report, and that no
secret is in either. Never: opens a connection.
"""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import wove

from ..options import LinkOptions

__all__ = ["EXIT_CODES", "Report", "Step", "secrets_of", "shown_url"]

#: The steps in their order, and the exit code of each when it is the first that failed; 0 never fails.
EXIT_CODES = {
    "options": 2,
    "name": 10,
    "tcp": 11,
    "proxy": 11,
    "tls": 12,
    "handshake": 13,
    "extensions": 0,
    "roundtrip": 15,
    "run": 16,
    "clock": 0,
}
_LONGEST = 500
# Shorter secrets are parts of ordinary words: hiding those would hide what is wrong.
_SHORTEST_SECRET = 5
_SHORTEST_PART = 8
_WORDS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "skip"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step: ``status`` is ok, warn, fail or skip; ``detail`` says what was found, or the cause;
    ``exit_code`` is that of the step unless it says otherwise; ``facts`` are for programs.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""
    seconds: float | None = None
    exit_code: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Report:
    """Collect the steps and say each aloud as it comes; *hidden* texts are in nothing that is shown."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.url: str | None = None
        self.hidden: tuple[str, ...] = ()
        self.steps: list[Step] = []
        self._say = say

    def add(self, step: Step) -> Step:
        """Keep the step, cleaned, and show it."""
        cleaned = dataclasses.replace(
            step,
            detail=self._clean(step.detail),
            remedy=self._clean(step.remedy),
            facts=self._clean_all(step.facts),
        )
        self.steps.append(cleaned)
        self._say(f"{_WORDS[cleaned.status]:<6}{cleaned.name:<12}{cleaned.detail}".rstrip())
        if cleaned.remedy:
            self._say(f"{'':18}-> {cleaned.remedy}")
        return cleaned

    def skip_rest(self, reason: str, *, but: str = "") -> None:
        """Add every step that is still missing, except *but*, as one that could not be tried."""
        have = {step.name for step in self.steps}
        for name in EXIT_CODES:
            if name not in have and name != but:
                self.add(Step(name=name, status="skip", detail=reason))

    @property
    def exit_code(self) -> int:
        """Return the code of the first step that failed; 0 if none did."""
        for step in self.steps:
            if step.status == "fail":
                return step.exit_code or EXIT_CODES[step.name]
        return 0

    def as_json(self) -> str:
        """Return the whole report as one JSON document."""
        steps = []
        for step in self.steps:
            values = dataclasses.asdict(step)
            del values["exit_code"]
            steps.append(values)
        document = {"url": self.url, "ok": self.exit_code == 0, "exit_code": self.exit_code, "steps": steps}
        return json.dumps(document, indent=2)

    def _clean(self, text: str) -> str:
        """Return *text* on one line, bounded, without a secret and without what a terminal obeys."""
        for secret in self.hidden:
            text = text.replace(secret, "***")
        text = "".join(char if char.isprintable() else " " for char in text)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

    def _clean_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, list):
            return [self._clean_all(item) for item in value]
        if isinstance(value, dict):
            return {key: self._clean_all(item) for key, item in value.items()}
        return value


def shown_url(options: LinkOptions) -> str:
    """Return the URL without the values of its query."""
    path, mark, query = options.target.partition("?")
    host = f"[{options.host}]" if ":" in options.host else options.host
    names = "&".join(f"{part.partition('=')[0]}=***" if "=" in part else "***" for part in query.split("&"))
    return f"{'wss' if options.secure else 'ws'}://{host}:{options.port}{path}{mark}{names if mark else ''}"


def secrets_of(options: LinkOptions) -> tuple[str, ...]:
    """Return every text of the options that must not be shown, the longest first."""
    security = wove.NetworkExecutorSecurity.from_config(options.security.value)
    found = [security.token or "", security.secret.decode("utf-8", "replace")]
    values = [value.reveal() for _, value in options.headers]
    found += values
    parts = [part for value in values for part in re.split(r"[\s;,=]+", value)]
    found += [part for part in parts if len(part) >= _SHORTEST_PART]
    found += _decoded(part.partition("=")[2] or part for part in options.target.partition("?")[2].split("&"))
    found += _decoded([urllib.parse.urlsplit(options.proxy.reveal() if options.proxy else "").password or ""])
    return tuple(sorted({text for text in found if len(text) >= _SHORTEST_SECRET}, key=len, reverse=True))


def _decoded(texts: Iterable[str]) -> list[str]:
    return [form for text in texts for form in (text, urllib.parse.unquote(text))]
