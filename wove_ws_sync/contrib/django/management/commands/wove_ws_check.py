"""``manage.py wove_ws_check``: try to reach the worker service of an alias and say what is wrong.

Owns: which alias is checked. Never: checks anything itself; ``wove-ws-sync check`` does.
"""

from __future__ import annotations

import functools
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.connection import ConnectionDoesNotExist

from .....cli._check_report import Report
from .....cli.check import check
from ... import conf

__all__ = ["Command"]


class Command(BaseCommand):
    """``manage.py wove_ws_check [ALIAS] [--json]``."""

    help = (
        "Try to reach the worker service of an alias of WOVE_WS, step by step, and say what is wrong. "
        "The exit codes are those of wove-ws-sync check. An option that a remedy names, such as --ca-file, "
        "is the key CA_FILE of the alias."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012  # what they find is found here, too

    def add_arguments(self, parser: CommandParser) -> None:
        """See BaseCommand."""
        parser.add_argument("alias", nargs="?", default=conf.DEFAULT_ALIAS, help='default: "%(default)s"')
        parser.add_argument("--json", action="store_true", help="print one JSON document")

    def handle(self, *args: Any, **options: Any) -> None:
        """Check, and raise CommandError with the exit code of the first step that failed."""
        name = options["alias"]
        report = Report((lambda _: None) if options["json"] else self.stdout.write)
        try:
            alias = conf.read(name)
        except (ConnectionDoesNotExist, ImproperlyConfigured) as exc:
            raise CommandError(str(exc), returncode=2) from exc
        if alias.backend == "immediate":
            self.stdout.write(f"{conf.key_name(name, 'BACKEND')} is 'immediate': there is no worker service.")
            return
        check(functools.partial(dict, alias.executor_config), report)
        if options["json"]:
            self.stdout.write(report.as_json())
        if report.exit_code:
            failed = next(step for step in report.steps if step.status == "fail")
            text = f"{conf.SETTING}[{name!r}] cannot be used, the step {failed.name} failed: {failed.detail}"
            raise CommandError(conf.in_settings(name, text), returncode=report.exit_code)
