"""What ``wove-ws-sync worker`` may be told, in one table, and where it was told so.

Owns: the settings with their checks, and the one precedence: a flag, then the variable
``WOVE_WS_WORKER_<NAME>``, then the file of ``--config``, then the default. Never: acts on a
setting; never shows a secret, so ``security`` is always the name of a variable.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SETTINGS", "Setting", "SettingError", "Settings", "add_flags", "settle"]

_PREFIX = "WOVE_WS_WORKER_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_MIB = 1024 * 1024


class SettingError(ValueError):
    """A setting that cannot be used; the text says where it was made and what it must be."""


def _port(text: str) -> int:
    port = _whole(text)
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is not from 0 to 65535")
    return port


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise ValueError(f"{number} is not above 0")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a whole number") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text[:40]!r} is not a number of seconds from 0 on")
    return seconds


def _engine(text: str) -> str:
    from ..worker.engines import check_engine

    return check_engine(text)


def _security(text: str) -> str:
    if not text.startswith("env:") or text == "env:":
        raise ValueError("it must be 'env:VARIABLE', the name of the variable that holds the secret")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text[:40]!r} is none of {', '.join(choices)}")
        return text

    return check


def _switch(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text[:40]!r} is neither true nor false")
    return text.lower() in _TRUE


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: ``--its-name`` is its flag. ``check`` reads its text and raises ValueError."""

    name: str
    default: Any
    help: str
    check: Callable[[str], Any] = str
    metavar: str | None = None
    many: bool = False

    @property
    def flag(self) -> str:
        """Return the option of the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Return the environment variable."""
        return _PREFIX + self.name.upper()

    def read(self, value: Any, source: str) -> Any:
        """Return *value*, text or a value of TOML, as what it means. Raises SettingError."""
        if self.many:
            return [self._read(each, source) for each in (value if isinstance(value, list) else [value])]
        return self._read(value, source)

    def _read(self, value: Any, source: str) -> Any:
        if isinstance(value, bool) and self.check is not _switch:
            raise SettingError(
                f"{source}: {self.name}: a {self.metavar or 'value'} is wanted, not a boolean."
            )
        if not isinstance(value, str | int | float):
            raise SettingError(f"{source}: {self.name}: one value is wanted, not a {type(value).__name__}.")
        try:
            return self.check(str(value))
        except ValueError as exc:
            raise SettingError(f"{source}: {self.name}: {str(exc).rstrip('.')}.") from None


SETTINGS: tuple[Setting, ...] = (
    Setting("host", "127.0.0.1", "address to listen on (default: 127.0.0.1)"),
    Setting("port", 8765, "0 takes a free one (default: 8765)", _port),
    Setting("path", "/wove", "path of the URL (default: /wove)"),
    Setting("security", None, "environment variable that holds the shared secret", _security, "env:VARIABLE"),
    Setting(
        "engine",
        "threads",
        "what runs the tasks: threads (the default), processes, dask:ADDRESS, or module:factory for a "
        "function that returns a concurrent.futures.Executor",
        _engine,
        "ENGINE",
    ),
    Setting(
        "workers",
        None,
        "tasks at once (default: CPUs + 4, at most 32; processes: CPUs; others: theirs)",
        _positive,
        "N",
    ),
    Setting(
        "max_message_bytes",
        256 * _MIB,
        "largest message accepted from a host (default: 256 MiB)",
        _positive,
        "BYTES",
    ),
    Setting(
        "max_kept_bytes",
        512 * _MIB,
        "what results may take that have not arrived, for each host (default: 512 MiB)",
        _positive,
        "BYTES",
    ),
    Setting(
        "max_queue",
        100_000,
        "runs that may wait to begin, of all hosts (default: 100000)",
        _positive,
        "N",
    ),
    Setting(
        "max_in_flight",
        10_000,
        "runs of a host under way, beyond which its reading pauses (default: 10000)",
        _positive,
        "N",
    ),
    Setting(
        "dedupe_window",
        300.0,
        "how long a result is given again for its idempotency key (default: 300)",
        _seconds,
        "SECONDS",
    ),
    Setting("tls_cert", None, "certificate chain (PEM); makes the URL wss://", str, "FILE"),
    Setting("tls_key", None, "private key of the certificate (PEM)", str, "FILE"),
    Setting("tls_client_ca", None, "accept only hosts with a certificate of this CA (PEM)", str, "FILE"),
    Setting(
        "drain_timeout",
        30.0,
        "how long runs may take to end after SIGTERM (default: 30)",
        _seconds,
        "SECONDS",
    ),
    Setting("insecure", False, "allow other machines without TLS and security", _switch),
    Setting(
        "log_level",
        "info",
        "what goes to stderr: debug, info, warning or error (default: info)",
        _one_of("debug", "info", "warning", "error"),
        "LEVEL",
    ),
    Setting(
        "log_format",
        "text",
        "how: text, or json for one object a line (default: text)",
        _one_of("text", "json"),
        "FORMAT",
    ),
    Setting("reload", False, "for development: start again when Python files change", _switch),
    Setting(
        "reload_dir",
        [],
        "where to look for them (default: the working directory); may be repeated",
        str,
        "DIR",
        many=True,
    ),
    Setting("until_stdin_closes", False, "stop at once when stdin ends, as it does with its parent", _switch),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values that count, by name, and where each comes from.

    ``unknown`` are variables that look as if they were meant for the worker. They are not refused:
    a cluster makes such variables of the name of a service.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def as_toml(self) -> str:
        """Return a file for ``--config`` that says the same, with the source of each value."""
        return "".join(f"{self._line(setting)}\n" for setting in SETTINGS)

    def _line(self, setting: Setting) -> str:
        value, source = self.values[setting.name], self.sources[setting.name]
        if value is None:
            return f"# {setting.name} =  # not set"
        return f"{setting.name} = {json.dumps(value, ensure_ascii=False)}  # {source}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give *parser* a flag for each setting; those that were not given are absent from its result."""
    for setting in SETTINGS:
        absent: dict[str, Any] = {"default": argparse.SUPPRESS, "help": setting.help, "dest": setting.name}
        if setting.check is _switch:
            parser.add_argument(setting.flag, action="store_true", **absent)
        else:
            how = "append" if setting.many else "store"
            parser.add_argument(
                setting.flag, action=how, metavar=setting.metavar or setting.name.upper(), **absent
            )


def settle(given: Mapping[str, Any], environment: Mapping[str, str], file: str | None) -> Settings:
    """Return what counts of the flags *given*, the *environment* and the *file*. Raises SettingError."""
    variables, unknown = _of_environment(environment)
    from_file = _of_file(file) if file else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in SETTINGS:
        name = setting.name
        if name in given:
            found, source = given[name], f"argument {setting.flag}"
        elif name in variables:
            found, source = variables[name], f"environment variable {setting.variable}"
        elif name in from_file:
            found, source = from_file[name], f"file {file}"
        else:
            values[name], sources[name] = setting.default, "default"
            continue
        values[name], sources[name] = setting.read(found, source), source
    secret = str(values["security"]).removeprefix("env:")
    return Settings(values, sources, tuple(variable for variable in unknown if variable != secret))


def _of_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the settings that are made there, and the variables that are none."""
    found, unknown = {}, []
    for variable, text in environment.items():
        if variable.startswith(_PREFIX) and variable != f"{_PREFIX}CONFIG":
            name = variable.removeprefix(_PREFIX).lower()
            if name in _BY_NAME:
                found[name] = text
            else:
                unknown.append(variable)
    return found, unknown


def _of_file(file: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise SettingError(f"file {file} cannot be read: {reason}.") from None
    found = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in _BY_NAME:
            raise SettingError(f"file {file}: {_unknown(name)}")
        found[name] = value
    return found


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_BY_NAME)}."
    return f"there is no setting {name[:60]!r}; {hint}"
