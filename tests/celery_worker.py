"""A Celery worker of a test's own, over a broker of files or another one, and a client for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import celery_files
from celery import Celery
from fault_helpers import WAIT, search_path, until
from prometheus_client.parser import text_string_to_metric_families
from service_thread import fetch

from wove_ws_sync.testing import LoopbackWorker


class CeleryWorker:
    """A running ``celery worker`` and who sends tasks to it."""

    def __init__(self, process: subprocess.Popen[bytes], client: Celery, log: Path) -> None:
        self.process = process
        self.client = client
        self._log = log

    @property
    def log(self) -> str:
        """Return what the worker wrote so far."""
        return self._log.read_text("utf-8", "replace")

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task of the worker's app and return its ``AsyncResult``."""
        return self.client.send_task(f"{self.client.main}.{name}", args, **options)

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task and return its result."""
        return self.get(self.send(name, *args, **options))

    def get(self, result: Any, timeout: float = WAIT) -> Any:
        """Return the result of a task that was sent."""
        return result.get(timeout=timeout, interval=0.02)

    def stop(self) -> None:
        """End the worker as an administrator does, and wait."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT)


def file_broker(folder: Path) -> dict[str, Any]:
    """Return settings for messages and results in files."""
    for name in ("queue", "done", "control", "results"):
        (folder / name).mkdir(parents=True)
    return {
        "broker_url": f"{celery_files.SCHEME}://",
        "broker_transport_options": {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "processed_folder": str(folder / "done"),
            "store_processed": True,
            "polling_interval": 0.02,
        },
        "result_backend": f"file://{folder / 'results'}",
    }


@contextlib.contextmanager
def celery_worker(
    folder: Path,
    service: dict[str, Any],
    *args: str,
    app: str = "celery_app",
    env: Mapping[str, str] | None = None,
    broker: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[CeleryWorker]:
    """Run a worker whose tasks use the worker service *service*, until the end of the block.

    It runs in *folder*, and *app* names its module, which finds its settings in ``WOVE_WS_TEST_CELERY``.
    """
    conf = {
        **(file_broker(folder) if broker is None else broker),
        "wove_ws": service,
        "worker_lost_wait": 0.5,
        "worker_prefetch_multiplier": 1,
        "broker_connection_retry_on_startup": True,
        **settings,
    }
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel", "info"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", *args]
    env = {**os.environ, "PYTHONPATH": search_path(), "WOVE_WS_TEST_CELERY": json.dumps(conf), **(env or {})}
    log = folder / "worker.log"
    client = Celery(app, set_as_current=False)
    client.conf.update(conf)
    with log.open("wb") as stream, _group(command, cwd=folder, env=env, stderr=stream) as process:
        worker = CeleryWorker(process, client, log)
        until(lambda: process.poll() is not None or " ready." in worker.log)
        assert process.poll() is None, worker.log
        try:
            yield worker
        except BaseException:
            print(worker.log[-8000:])
            raise
        finally:
            client.close()


@contextlib.contextmanager
def _group(command: list[str], **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own, and end the group: children of Celery's outlive its SIGKILL."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, **kwargs) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _fetch(service: LoopbackWorker, path: str) -> str:
    headers = {}
    if service.security is not None:
        password = service.security["secret"]
        headers["Authorization"] = "Basic " + base64.b64encode(f"x:{password}".encode()).decode()
    answer = fetch(int(service.url.rpartition(":")[2].partition("/")[0]), path, headers)
    assert answer.status == 200
    return answer.text


def status(service: LoopbackWorker) -> dict[str, Any]:
    """Return what the status page of the worker service shows."""
    return dict(json.loads(_fetch(service, "/status.json")))


def connections(service: LoopbackWorker) -> int:
    """Return how many connections the worker service has seen since its start."""
    for family in text_string_to_metric_families(_fetch(service, "/metrics")):
        for sample in family.samples:
            if sample.name == "wove_ws_connections_total":
                return int(sample.value)
    raise AssertionError("the worker service does not count its connections")
