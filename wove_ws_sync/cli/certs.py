"""``wove-ws-sync certs``: a certificate authority of one's own, for a worker service and its hosts.

Owns: the options, which certificates are made, what is said about them. Never: writes over a file
unless ``--renew`` says so, shows a key.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._address import bracketed, server_name
from . import _certs_files

if TYPE_CHECKING:
    from .._certificates import Authority, Certificate

__all__ = ["register"]

_NAMES = ("localhost", "127.0.0.1", "::1")
_CLIENT = "wove-ws-sync host"
_MOST_DAYS = 3650
_MOST_CHARACTERS = 64  # RFC 5280, ub-common-name
_DAY = 86400.0


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "certs",
        help="make certificates for a worker service",
        description="Make a certificate authority and certificates for a worker service and its hosts: "
        "ca.pem, ca.key, server.pem, server.key, client.pem, client.key. No file is written over.",
        epilog="Exit codes: 0 done, 1 failed, or --show found a certificate that has expired, 2 wrong usage.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="where the files are, or shall be; it is made if need be")
    add("--name", type=_name, action="append", metavar="HOST",
        help="its name or address; may be repeated (default: localhost, 127.0.0.1, ::1)")  # fmt: skip
    add("--client", type=_client, metavar="NAME", help=f"name of the host (default: {_CLIENT})")
    add("--days", type=_days, default=90, metavar="N",
        help="how long server.pem and client.pem are valid (default: %(default)s)")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--show", action="store_true", help="list what is there and when it ends; write nothing"
    )
    what.add_argument(
        "--renew", action="store_true", help="replace server.pem and client.pem by new ones of the same CA"
    )
    add("--new-keys", action="store_true", help="with --renew: replace server.key and client.key as well")
    parser.set_defaults(run=_run)


def _name(text: str) -> str:
    plain = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return server_name("HOST", plain, "").rstrip(".")
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _client(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > _MOST_CHARACTERS:
        raise argparse.ArgumentTypeError(f"not 1 to {_MOST_CHARACTERS} characters that can be printed")
    return text


def _days(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= _MOST_DAYS):
        raise argparse.ArgumentTypeError(f"not a whole number of days from 1 to {_MOST_DAYS}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.new_keys and not arguments.renew:
        return _fail("--new-keys goes with --renew.", 2)
    if arguments.show and (arguments.name or arguments.client):
        return _fail("--show goes with neither --name nor --client.", 2)
    folder: Path = arguments.folder
    try:
        if arguments.renew:
            _renew(arguments)
        elif not arguments.show:
            _make(arguments)
        expired = _show(folder)
    except (OSError, ValueError, TypeError) as exc:
        return _fail(f"{_reason(exc)}.", 1)
    if not arguments.show:
        _advise(folder.absolute())
    return 1 if arguments.show and expired else 0


def _fail(message: str, code: int) -> int:
    print(f"wove-ws-sync certs: {message}", file=sys.stderr)
    return code


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.strerror} ({exc.filename})" if exc.filename else exc.strerror
    return str(exc)


def _make(arguments: argparse.Namespace) -> None:
    from .._certificates import Authority

    authority = Authority.make()
    server = authority.server(arguments.name or _NAMES, arguments.days)
    client = authority.client(arguments.client or _CLIENT, arguments.days)
    contents: dict[str, bytes] = {}
    for name, pair in (("ca", authority.pair), ("server", server), ("client", client)):
        contents |= {f"{name}.pem": pair.certificate, f"{name}.key": pair.key}
    _certs_files.create(arguments.folder, contents)


def _renew(arguments: argparse.Namespace) -> None:
    """Issue both certificates anew, for the same names unless others are given."""
    folder, authority = arguments.folder, _authority(arguments.folder)
    server, client = _read(folder / "server.pem"), _read(folder / "client.pem")
    keys: dict[str, bytes | None] = {"server": None, "client": None}
    if not arguments.new_keys:
        keys = {name: (folder / f"{name}.key").read_bytes() for name in keys}
    names, whom = arguments.name or server.names, arguments.client or client.subject
    try:
        renewed = {
            "server": authority.server(names, arguments.days, keys["server"]),
            "client": authority.client(whom, arguments.days, keys["client"]),
        }
    except (ValueError, TypeError) as exc:
        files = f"{folder / 'server.key'} or client.key"
        raise ValueError(f"{files} cannot be used: {exc}; --new-keys replaces both") from None
    contents = {f"{name}.pem": pair.certificate for name, pair in renewed.items()}
    if arguments.new_keys:
        contents |= {f"{name}.key": pair.key for name, pair in renewed.items()}
    _certs_files.replace(folder, contents)


def _authority(folder: Path) -> Authority:
    from .._certificates import Authority, Pair

    pair = Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
    try:
        return Authority(pair)
    except (ValueError, TypeError) as exc:
        raise ValueError(f"{folder / 'ca.pem'} and ca.key cannot be used: {exc}") from None


def _read(path: Path) -> Certificate:
    from .._certificates import Certificate

    try:
        return Certificate(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not a certificate") from None


def _show(folder: Path) -> bool:
    """List the files; return whether a certificate has expired. Raises OSError if there is none."""
    found = [path for name in ("ca", "server", "client") if (path := folder / f"{name}.pem").exists()]
    if not found:
        raise FileNotFoundError(f"{folder} has none of ca.pem, server.pem, client.pem")
    expired = False
    for path in found:
        certificate = _read(path)
        seconds = (certificate.ends - datetime.datetime.now(datetime.UTC)).total_seconds()
        expired |= seconds < 0
        when = f"in {seconds / _DAY:.0f} days" if seconds >= 0 else f"EXPIRED {-seconds / _DAY:.0f} days ago"
        whom = ", ".join(certificate.names) or certificate.subject
        print(f"{path.name:<10}  {whom}; ends {certificate.ends:%Y-%m-%d %H:%M} UTC ({when})")
        if path.stem == "server":
            print(f"{'':<10}  pin {certificate.pin}")
        key = path.with_suffix(".key")
        if key.exists():
            mode = _certs_files.open_to_others(key)
            warning = f"; OPEN TO OTHERS (mode {mode})" if mode else ""
            print(f"{key.name:<10}  its key{warning}")
    return expired


def _advise(folder: Path) -> None:
    """Say what to do with the files."""
    files = {name: str(folder / name) for name in ("ca.pem", "server.pem", "server.key")}
    quoted = {name: shlex.quote(file) for name, file in files.items()}
    names = _read(folder / "server.pem").names
    config = {
        "url": f"wss://{bracketed(names[0])}:8765/wove" if names else "wss://...",
        "ca_file": files["ca.pem"],
        "client_cert_file": str(folder / "client.pem"),
        "client_key_file": str(folder / "client.key"),
        "security": "env:WOVE_WORKER_SECRET",
    }
    print("\nA worker service needs server.pem, server.key and ca.pem:")
    print(
        f"  wove-ws-sync worker --tls-cert {quoted['server.pem']} --tls-key {quoted['server.key']} "
        f"--tls-client-ca {quoted['ca.pem']} --security env:WOVE_WORKER_SECRET"
    )
    print("Its hosts need ca.pem, client.pem and client.key, in executor_config:")
    print("\n".join(f"  {line}" for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines()))
    print("Keep ca.key to yourself: whoever has it can pass for the worker service and for any host.")
