"""What is in force for ``wove-ws-sync worker``: flag, else environment, else file, else default.

Owns: the precedence, the names in environment and file, ``--print-config``. All of it works on the
parser's own options, so that a new one needs no second list here. Never: shows a secret; a value of
``security`` is not repeated in any message.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from .. import _variables

__all__ = ["PREFIX", "ConfigError", "Settled", "remember_defaults", "settle", "variable"]

#: In front of every variable of the environment that is an option.
PREFIX = "WOVE_WS_WORKER_"

_DEFAULT = "default"
_FLAG = "flag "
#: What says where the options come from is none of them.
_NOT_KEPT = frozenset({"help", "config", "print_config"})
_SWITCH = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


class ConfigError(ValueError):
    """A value that cannot be used, or a file; its text says where it comes from."""


class _Default:
    """The default of an option, which tells that no flag was given; ``--help`` shows the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)

    def __copy__(self) -> Any:  # argparse adds to a copy of it
        return list(self.value)


class Settled:
    """The options as they are in force, and where each comes from."""

    def __init__(self, options: argparse.Namespace, sources: Mapping[str, str], ignored: list[str]) -> None:
        self.options = options
        self.sources = sources
        #: One sentence for each variable with our prefix that is no option.
        self.ignored = ignored

    def blame(self, message: str) -> str:
        """Return *message* with the sources of the options in it that are not on the command line."""
        said = re.sub(r"(?<=\w)-(?=\w)", "_", message)
        origins = [
            f"{name} is from {source}"
            for name, source in self.sources.items()
            if source != _DEFAULT and not source.startswith(_FLAG) and re.search(rf"\b{name}\b", said)
        ]
        return f"{message} ({', '.join(origins)}.)" if origins else message

    def to_toml(self) -> str:
        """Return every option with its value and its source, as a file for ``--config``."""
        lines = []
        for name, source in self.sources.items():
            value = getattr(self.options, name)
            if value is None:
                lines.append(f"# {name} is not set")
            else:
                lines.append(f"{name} = {_toml(value)}  # {source}")
        return "\n".join(lines) + "\n"

    def to_flags(self) -> list[str]:
        """Return the command line that says all of it; ``variables()`` are to be left out then."""
        flags = []
        for name in self.sources:
            value, flag = getattr(self.options, name), name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                flags += [f"--{flag}={one}" for one in (value if isinstance(value, list) else [value])]
        return flags

    def variables(self) -> set[str]:
        """Return the variables of the environment that are options, set or not."""
        return {variable(name) for name in [*self.sources, "config"]}


def variable(name: str) -> str:
    """Return the variable of the environment for the option called *name*."""
    return PREFIX + name.upper()


def remember_defaults(parser: argparse.ArgumentParser) -> None:
    """Have *parser* tell what was given from what was not. To be called once all options are there."""
    for action in _kept(parser):
        action.default = _Default(action.default)


def settle(parser: argparse.ArgumentParser, given: argparse.Namespace, environ: Mapping[str, str]) -> Settled:
    """Return what is in force, with *given* as what *parser* made of the command line.

    Raises ConfigError for what cannot be used of environment and file.
    """
    filed, path = _read_file(given.config or environ.get(variable("config")))
    actions = {action.dest: action for action in _kept(parser)}
    if unknown := next((key for key in filed if key not in actions), None):
        near = difflib.get_close_matches(unknown, actions, 1, 0.0)
        raise ConfigError(f"{path}: there is no option {unknown!r}; the nearest is {near[0]!r}.")
    options = argparse.Namespace(**vars(given))
    sources = {}
    for name, action in actions.items():
        value, source = getattr(given, name), _FLAG + action.option_strings[0]
        if isinstance(value, _Default):
            if environ.get(variable(name)):
                value, source = _from_text(parser, action, environ[variable(name)]), variable(name)
            elif name in filed:
                value, source = _from_file(parser, action, filed[name], path), path
            else:
                value, source = value.value, _DEFAULT
        setattr(options, name, value)
        sources[name] = source
    return Settled(options, sources, list(_ignored(actions, environ, options)))


def _kept(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest not in _NOT_KEPT]


def _read_file(file: str | None) -> tuple[dict[str, Any], str]:
    """Return what the file says and how messages call it."""
    if not file:
        return {}, ""
    path = file if file.isprintable() else ascii(file)
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream), path
    except OSError as exc:
        raise ConfigError(f"{path}: the configuration cannot be read: {exc.strerror or exc}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        reason = exc if isinstance(exc, tomllib.TOMLDecodeError) else "not UTF-8"
        raise ConfigError(f"{path}: the configuration is not TOML: {reason}.") from None


def _ignored(
    actions: Mapping[str, argparse.Action], environ: Mapping[str, str], options: argparse.Namespace
) -> Iterator[str]:
    known = {variable(name) for name in actions} | {variable("config")}
    known.add(str(options.security).removeprefix("env:"))  # a secret may well be called like that
    known.add(_variables.variable("worker_auth"))  # a host's setting
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            yield f"The environment variable {name} is no option and has no effect; the nearest is {near}."


def _from_text(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
    """Return the value of an option that the environment sets to *text*."""
    source = variable(action.dest)
    if action.nargs == 0:
        try:
            return _SWITCH[text.strip().lower()]
        except KeyError:
            raise ConfigError(f"{source}: {text!r} is neither true nor false.") from None
    if isinstance(action.default.value, list):
        return [entry for entry in text.split(os.pathsep) if entry]
    return _checked(parser, action, text, source)


def _from_file(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, path: str) -> Any:
    """Return the value of an option that stands in the file as *value*."""
    source = f"{path}: {action.dest}"
    if action.nargs == 0 or isinstance(value, bool):
        if action.nargs == 0 and isinstance(value, bool):
            return value
        raise ConfigError(
            f"{source}: true or false {'is needed' if action.nargs == 0 else 'cannot be used'}."
        )
    if isinstance(action.default.value, list):
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
        raise ConfigError(f"{source}: a list of texts is needed.")
    if not isinstance(value, str) and (action.type is None or not isinstance(value, int | float)):
        raise ConfigError(f"{source}: {'a text' if action.type is None else 'a single value'} is needed.")
    return _checked(parser, action, str(value), source)


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, text: str, source: str) -> Any:
    """Return what the parser makes of *text*: what is wrong in a flag is wrong here, in the same words."""
    before, parser.exit_on_error = parser.exit_on_error, False
    try:
        return getattr(parser.parse_args([f"{action.option_strings[0]}={text}"]), action.dest)
    except argparse.ArgumentError as exc:
        raise ConfigError(f"{source}: {exc.message}") from None
    finally:
        parser.exit_on_error = before


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # JSON has the same escapes; TOML wants one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)
