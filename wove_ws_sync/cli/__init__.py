"""The command line: ``wove-ws-sync COMMAND``, also ``python -m wove_ws_sync COMMAND``.

Owns: the choice of the command and one clear line for what is missing. Never: does the
work of a command. Each command is a module here with ``register(subparsers)``, which adds
a parser and sets its default ``run``, a function from the parsed arguments to the exit
code. Such a module is imported only if its command was asked for.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from .._version import __version__

__all__ = ["main"]

_SUMMARIES = {
    "demo": "show the main job on this machine",
    "worker": "run a worker service",
    "bench": "compare with Wove's own websocket executor",
    "check": "try to reach a worker service and say what is wrong",
    "certs": "make certificates for a worker service",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 success, 1 failure, 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        parsed = _parser(wanted).parse_args(arguments)
        return int(parsed.run(parsed))
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing in ("", "wove_ws_sync"):
            raise
        print(_missing_extra(wanted, missing), file=sys.stderr)
        return 1
    except SystemExit as exc:  # argparse ends this way
        return exc.code if isinstance(exc.code, int) else 1


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wove-ws-sync", description="Wove tasks over one kept WebSocket.")
    parser.add_argument("--version", action="version", version=f"wove-ws-sync {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    there = {module.name for module in pkgutil.iter_modules(__path__)}
    for name, summary in _SUMMARIES.items():
        if name in there:
            _add(subparsers, name, summary, wanted == name)
    return parser


def _add(subparsers: Any, name: str, summary: str, asked_for: bool) -> None:
    if asked_for:
        importlib.import_module(f"{__name__}.{name}").register(subparsers)
    else:
        subparsers.add_parser(name, help=summary, add_help=False)


def _missing_extra(command: str | None, module: str) -> str:
    return (
        f"wove-ws-sync {command} needs the package {module!r}, which is not installed: "
        'pip install "wove_ws_sync[worker]"'
    )
