"""The package keeps to its floor plan: who may import whom, what is public, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wove_ws_sync

PACKAGE = Path(wove_ws_sync.__file__).parent

# Every module of the package, by level and by room. A module imports from levels below its
# own and from its own room. "" is the package itself; a name with a dot at the end stands
# for every module of that folder.
LEVELS: tuple[tuple[frozenset[str], ...], ...] = (
    (
        *(
            frozenset({name})
            for name in (
                "errors",
                "timing",
                "_carry",
                "_condition",
                "_exact",
                "_fork",
                "_leash",
                "_retry_after",
                "_telemetry",
                "_version",
                "_waker",
            )
        ),
        frozenset(
            {
                "options",
                "_address",
                "_checks",
                "_oauth2_config",
                "_pins",
                "_secrets",
                "_security_config",
                "_variables",
            }
        ),
        frozenset({"current", "_progress"}),
    ),
    (
        *(frozenset({name}) for name in ("frames", "payloads", "_otel")),
        frozenset({"security", "_keys", "_oauth2", "_proof", "_seal", "_token_endpoint"}),
    ),
    (
        frozenset({"transport", "_framing", "_handshake", "_outbox", "_route", "_wire"}),
        frozenset({"_named"}),
        frozenset({"runs", "_alarms", "_book", "_line", "_losses", "_run", "_reconnect"}),
        frozenset(
            {
                "worker.access",
                "worker.alarm",
                "worker.auth",
                "worker.commands",
                "worker.dedupe",
                "worker.events",
                "worker.greeting",
                "worker.host",
                "worker.hosts",
                "worker.jobs",
                "worker.jwks",
                "worker.kept",
                "worker.keyring",
                "worker.logs",
                "worker.metrics",
                "worker.nonce_file",
                "worker.nonce_redis",
                "worker.nonces",
                "worker.not_ready",
                "worker.outbox",
                "worker.pacing",
                "worker.parked",
                "worker.registry",
                "worker.runs",
                "worker.sendqueue",
                "worker.shelf",
                "worker.sockets",
                "worker.statistics",
                "worker.surroundings",
                "worker.telemetry",
                "worker.tls",
                "worker.tokens",
                "worker.voice",
            }
        ),
    ),
    (
        frozenset({"link", "_link_core", "_link_ends", "_link_threads", "_tell", "connection"}),
        frozenset({"_memory"}),
        frozenset(
            {
                "worker.apart",
                "worker.dask_engine",
                "worker.engines",
                "worker.executions",
                "worker.future_engine",
                "worker.loops",
                "worker.process_child",
                "worker.process_engine",
                "worker.process_pools",
                "worker.thread_engine",
            }
        ),
    ),
    (frozenset({"session"}), frozenset({"_observe"}), frozenset({"_certificates"})),
    (
        frozenset({"sync", "futures", "_executor_core", "_run_future", "aio", "plugin", ""}),
        *(frozenset({name}) for name in ("progress", "otel")),
        frozenset(
            {
                "worker",
                "worker.channel",
                "worker.connection",
                "worker.dispatcher",
                "worker.doorkeeper",
                "worker.entrance",
                "worker.messenger",
                "worker.pages",
                "worker.service",
                "worker.status",
            }
        ),
    ),
    (frozenset({"testing"}),),
    (frozenset({"cli", "cli.", "__main__"}),),
    (
        frozenset({"contrib"}),
        frozenset({"contrib.celery"}),
        frozenset({"contrib.django", "contrib.django."}),
        frozenset({"contrib.joblib"}),
    ),
)
DOORS = len(LEVELS) - 3  # from here up, both the host's side and the worker's may be used

# Who may import what is not ours; "worker." and "cli." as above.
OUTSIDE = {
    "celery": {"contrib.celery"},
    "cloudpickle": {"payloads"},
    "websocket": {"transport", "_framing", "_handshake", "_outbox", "cli."},
    "websockets": {"worker.", "cli."},
    "cryptography": {"_keys", "_proof", "_seal", "_certificates", "worker.tls", "cli."},
    "dask": {"worker.dask_engine"},
    "django": {"contrib.django", "contrib.django."},
    "django_tasks": {"contrib.django."},
    "joblib": {"contrib.joblib"},
    "jwt": {"worker.jwks", "worker.tokens"},
    "opentelemetry": {"_otel", "otel", "worker.telemetry"},
    "pebble": {"worker.process_pools"},
    "prometheus_client": {"worker.metrics"},
    "redis": {"worker.nonce_redis"},
    "requests": {"_token_endpoint"},
    "rich": {"progress"},
    "tqdm": {"progress"},
    "urllib3": {"_token_endpoint"},
    "watchfiles": {"cli._worker_reload"},
}

PUBLIC = {
    "AsyncWebSocketEnvironmentExecutor",
    "AuthenticationRejected",
    "CurrentRun",
    "ConnectionLost",
    "DeliveryCancelled",
    "DeliveryTimeout",
    "ExecutorClosed",
    "ForkedError",
    "HandshakeRejected",
    "PayloadError",
    "Progress",
    "RunFuture",
    "SyncWebSocketEnvironmentExecutor",
    "WebSocketExecutor",
    "__version__",
    "config",
    "current_run",
    "install",
    "named",
    "uninstall",
}


def _modules() -> dict[str, ast.Module]:
    """Return every module's syntax tree by its name inside the package."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


MODULES = _modules()


def _is_package(name: str) -> bool:
    return (PACKAGE.joinpath(*name.split(".")) / "__init__.py").exists()


def _imports(name: str) -> Iterator[str]:
    """Yield the full name of all that the module imports, wherever in it the import stands."""
    package = ["wove_ws_sync", *name.split(".")] if name else ["wove_ws_sync"]
    if not _is_package(name):
        package.pop()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole.removeprefix("wove_ws_sync.") in MODULES else source


def _siblings(name: str) -> set[str]:
    """Return the modules of this package that the module imports, by their name inside it."""
    found = {full for full in _imports(name) if full.partition(".")[0] == "wove_ws_sync"}
    return {full.removeprefix("wove_ws_sync").removeprefix(".") for full in found} - {name}


def _is_of(name: str, listed: str) -> bool:
    return name == listed or (listed.endswith(".") and name.startswith(listed))


def _place(name: str) -> tuple[int, frozenset[str]]:
    """Return the level and the room of the module."""
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if any(_is_of(name, listed) for listed in room):
                return level, room
    raise AssertionError(f"wove_ws_sync.{name} is on no level: give it its place in LEVELS")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """A module imports from the levels below it and from its own room, nothing else."""
    level, room = _place(name)
    for imported in _siblings(name):
        below, other = _place(imported)
        assert below < level or other is room, f"{name} (level {level}) imports {imported} (level {below})"


@pytest.mark.parametrize("name", MODULES)
def test_host_and_worker_share_the_ground_only(name: str) -> None:
    """The worker service imports nothing of the host's upper levels, nor the host of the worker's."""
    if _place(name)[0] >= DOORS:
        return
    mine = name.partition(".")[0] == "worker"
    for imported in _siblings(name):
        theirs = imported.partition(".")[0] == "worker"
        assert theirs == mine or (mine and _place(imported)[0] <= 1), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_each_outside_library_has_one_door(name: str) -> None:
    """Pickling, the WebSocket libraries and certificates are imported where the plan says, only there."""
    for library in {full.partition(".")[0] for full in _imports(name)} & set(OUTSIDE):
        assert any(_is_of(name, listed) for listed in OUTSIDE[library]), f"{name} imports {library}"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_what_it_offers(name: str) -> None:
    """A module has a docstring and lists its public names."""
    assert ast.get_docstring(MODULES[name]), f"wove_ws_sync.{name} has no docstring"
    if name == "__main__":
        return  # nobody imports it
    targets = [
        target
        for node in MODULES[name].body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    assert "__all__" in names, f"wove_ws_sync.{name} has no __all__"


def test_no_place_is_kept_for_a_module_that_is_gone() -> None:
    """The floor plan lists what exists."""
    listed = {entry for rooms in LEVELS for room in rooms for entry in room}
    assert {entry for entry in listed if not any(_is_of(name, entry) for name in MODULES)} == set()


def test_public_names() -> None:
    """The package offers these names and no others; other programs are written against them."""
    assert set(wove_ws_sync.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(wove_ws_sync, name)] == []


def test_import_is_light() -> None:
    """Importing loads no framework and no optional library, starts no thread, logs to nobody."""
    program = (
        "import logging, sys, threading, wove_ws_sync\n"
        "heavy = {'django', 'celery', 'gevent', 'requests', 'opentelemetry', 'websockets', 'cryptography'}\n"
        "heavy |= {'prometheus_client', 'tqdm', 'rich', 'jwt', 'urllib3', 'redis', 'sqlite3'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert threading.enumerate() == [threading.main_thread()], threading.enumerate()\n"
        "[handler] = logging.getLogger('wove_ws_sync').handlers\n"
        "assert type(handler) is logging.NullHandler and not logging.root.handlers\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
