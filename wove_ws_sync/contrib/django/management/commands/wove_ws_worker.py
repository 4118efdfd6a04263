"""``manage.py wove_ws_worker``: run a worker service for the tasks of this project.

Owns: which options of ``wove-ws-sync worker`` follow from an alias. Never: serves itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.connection import ConnectionDoesNotExist

from .....cli import main
from .....options import LinkOptions
from .....security import is_local_host
from ... import conf

__all__ = ["Command"]

_AROUND = "wove_ws_sync.contrib.django.worker:around"
# Holds a secret that stands in the settings.
_SECRET = "WOVE_WS_DJANGO_SECRET"


class _Parser(CommandParser):
    """Keep the arguments that are not Django's for the worker command."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        known.worker_arguments = rest
        return known


class Command(BaseCommand):
    """``manage.py wove_ws_worker [--alias ALIAS] [options of wove-ws-sync worker]``."""

    help = (
        "Run a worker service for the tasks of this project: Django is set up in it, and database "
        "connections are looked after around each task. Path and secret, and on this machine the port, are "
        "those of the alias."
    )
    #: Arguments beyond the options of the command, from ``call_command``.
    stealth_options = ("worker_arguments",)

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """See BaseCommand."""
        kwargs["epilog"] = (
            "All other options are those of wove-ws-sync worker: see wove-ws-sync worker --help."
        )
        parser: CommandParser = super().create_parser(prog_name, subcommand, allow_abbrev=False, **kwargs)
        parser.__class__ = _Parser
        return parser

    def add_arguments(self, parser: CommandParser) -> None:
        """See BaseCommand."""
        parser.add_argument("--alias", default=conf.DEFAULT_ALIAS, help='of WOVE_WS (default: "%(default)s")')
        parser.add_argument("--worker-arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    def handle(self, *args: Any, **options: Any) -> None:
        """Serve until a signal; raise SystemExit with the command's exit code."""
        given = list(options["worker_arguments"] or ())
        if "--reload" in given:  # the service is a process of its own then, and needs manage.py's folder
            here = [sys.path[0], os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        sys.exit(main(["worker", "--around", _AROUND, *_derived(options["alias"], given), *given]))


def _derived(name: str, given: Sequence[str]) -> list[str]:
    """Return the options that follow from the alias and are not *given* elsewhere."""
    try:
        alias = conf.read(name)
        options = LinkOptions.from_config(alias.executor_config)
    except (ConnectionDoesNotExist, ImproperlyConfigured, TypeError, ValueError) as exc:
        raise CommandError(conf.in_settings(name, str(exc)), returncode=2) from exc
    derived = ["--path", options.target.partition("?")[0]] if _is_free("path", given) else []
    if is_local_host(options.host) and _is_free("port", given):
        derived += ["--port", str(options.port)]
    if _is_free("security", given):
        derived += _security(alias)
    return derived


def _is_free(option: str, given: Sequence[str]) -> bool:
    """Tell whether nobody says what *option* is to be: no flag, no variable, no file."""
    if f"WOVE_WS_WORKER_{option.upper()}" in os.environ or "WOVE_WS_WORKER_CONFIG" in os.environ:
        return False
    return not any(text.partition("=")[0] in (f"--{option}", "--config") for text in given)


def _security(alias: conf.Alias) -> list[str]:
    value = alias.executor_config.get("security")
    if value is None or value == "none" or value == {"type": "none"}:
        return []
    if isinstance(value, str):
        return ["--security", value]
    known = dict(value)
    if known.pop("type", "signed") == "signed" and known.pop("key", "default") == "default":
        if set(known) == {"secret_env"}:
            return ["--security", f"env:{known['secret_env']}"]
        if set(known) == {"secret"} and isinstance(known["secret"], str):
            os.environ[_SECRET] = known["secret"]
            return ["--security", f"env:{_SECRET}"]
    raise CommandError(
        f"{conf.key_name(alias.name, 'SECURITY')} does not say what a worker service needs: write that to a "
        "file and give --security file:PATH.",
        returncode=2,
    )
