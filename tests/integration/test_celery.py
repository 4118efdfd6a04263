"""Real Celery workers of every pool, whose tasks use the executor."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery_work
import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured, Retry, SoftTimeLimitExceeded
from celery_worker import CeleryWorker, celery_worker, connections, status
from fault_helpers import python, until
from redis_server import needs_redis, redis_server

from wove_ws_sync import AuthenticationRejected, HandshakeRejected, WebSocketExecutor
from wove_ws_sync.contrib.celery import WoveWSTask, executor, get_executor
from wove_ws_sync.testing import LoopbackWorker

CHILDREN = 4

ASK_BY_REDIS = """
    import json, sys
    from celery import Celery
    client = Celery("client", broker=sys.argv[1], backend=sys.argv[1])
    results = [client.send_task("celery_app.square", [number]) for number in range(100)]
    print(json.dumps([result.get(timeout=60) for result in results]))
"""


@pytest.fixture(scope="module")
def service() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=4) as running:
        yield running


@pytest.fixture(scope="module")
def prefork(service: LoopbackWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryWorker]:
    with celery_worker(
        tmp_path_factory.mktemp("prefork"), service.config, "-P", "prefork", "-c", "2"
    ) as worker:
        yield worker


@pytest.fixture
def app() -> Iterator[Celery]:
    """Return an app of this process's own, for tasks that are called here."""
    with Celery("here", set_as_current=False) as made:
        made.conf.task_always_eager = True
        yield made


def right_answers(worker: CeleryWorker, task: str, count: int) -> set[int]:
    """Have *count* squares computed, and return the ids of the processes that asked for them."""
    results = [worker.send(task, number) for number in range(count)]
    answers = [worker.get(result) for result in results]
    assert [answer[0] for answer in answers] == [number**2 for number in range(count)]
    return {answer[1] for answer in answers}


class TestPools:
    """One connection per process, whatever runs the tasks there."""

    @pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
    def test_every_pool(self, pool: str, tmp_path: Path) -> None:
        """Nothing is dialled before a task needs it; then each process has one connection."""
        with (
            LoopbackWorker(workers=4) as service,
            celery_worker(tmp_path, service.config, "-P", pool, "-c", str(CHILDREN)) as worker,
        ):
            worker.run("nothing")
            assert connections(service) == 0
            processes = right_answers(worker, "square", 100)
            assert len(processes) <= (CHILDREN if pool == "prefork" else 1)
            assert connections(service) == status(service)["hosts"] == len(processes)
            assert worker.run("squares", [1, 2, 3]) == [1, 4, 9]
            assert worker.run("weave_square", 7) == 49

    @needs_redis
    def test_redis_as_the_broker(self, service: LoopbackWorker, tmp_path: Path) -> None:
        """With a broker that Celery watches on its event loop, children are forked in another way."""
        with redis_server(tmp_path) as (port, _):
            url = f"redis://127.0.0.1:{port}/0"
            before, broker = connections(service), {"broker_url": url, "result_backend": url}
            with celery_worker(tmp_path, service.config, "-c", str(CHILDREN), broker=broker):
                # A client in a process of its own: Celery's keeps descriptors until its process ends.
                out, errors, exit_code = python(ASK_BY_REDIS, url)
                assert exit_code == 0, errors
                answers = json.loads(out)
                assert [answer[0] for answer in answers] == [number**2 for number in range(100)]
                assert connections(service) - before == len({answer[1] for answer in answers}) > 1

    def test_a_connection_of_the_parent_is_not_shared(self, tmp_path: Path) -> None:
        """Children that are forked after the parent has connected dial their own, and new ones do, too."""
        with (
            LoopbackWorker(workers=4) as service,
            celery_worker(
                tmp_path, service.config, "-c", "2", use_in_parent=True, worker_max_tasks_per_child=5
            ) as worker,
        ):
            processes = right_answers(worker, "square", 20)
            assert len(processes) >= 4
            assert connections(service) == 1 + len(processes)
            until(lambda: status(service)["hosts"] <= 3)  # the parent's and those of the last children

    def test_connected_before_the_first_task(self, tmp_path: Path) -> None:
        """``wove_ws_preconnect`` has each child connect when it starts."""
        with (
            LoopbackWorker(workers=4) as service,
            celery_worker(tmp_path, service.config, "-c", "2", wove_ws_preconnect=True) as worker,
        ):
            until(lambda: connections(service) == 2)
            right_answers(worker, "square", 10)
            assert connections(service) == 2

    def test_a_service_that_is_away_does_not_keep_a_worker_from_starting(self, tmp_path: Path) -> None:
        """``wove_ws_preconnect`` warns, and the children live."""
        away = {"url": "ws://127.0.0.1:9/wove"}
        with celery_worker(tmp_path, away, "-c", "1", wove_ws_preconnect=True) as worker:
            worker.run("nothing")
            assert "could not be reached before the first task" in worker.log

    def test_a_worker_that_stops_says_goodbye(self, tmp_path: Path) -> None:
        """Children finish what nobody waits for, and close their connections."""
        gate = tmp_path / "gate"
        with (
            LoopbackWorker(workers=4) as service,
            celery_worker(tmp_path, service.config, "-c", "1") as worker,
        ):
            worker.run("forget", str(gate))
            worker.process.send_signal(signal.SIGTERM)
            until(lambda: "for 1 runs that have not ended" in worker.log)
            gate.touch()
            worker.stop()
            seen = status(service)
            assert (seen["hosts"], seen["ended"]["ok"], seen["ended"]["cancelled"]) == (0, 1, 0)


class TestTimeLimits:
    """What a time limit ends is cancelled at the worker service."""

    @pytest.mark.parametrize("how", ["result", "exception", "wait", "sleep"])
    def test_soft_limit(
        self, prefork: CeleryWorker, service: LoopbackWorker, tmp_path: Path, how: str
    ) -> None:
        """Wherever it strikes, all runs of the task are cancelled, and Celery sees the limit."""
        self._limited(prefork, service, 3, "hold", str(tmp_path / "gate"), how)

    def test_soft_limit_in_map(self, prefork: CeleryWorker, service: LoopbackWorker, tmp_path: Path) -> None:
        """What ``map`` has submitted is cancelled."""
        self._limited(prefork, service, 3, "hold_map", str(tmp_path / "gate"))

    def test_soft_limit_in_a_weave(
        self, prefork: CeleryWorker, service: LoopbackWorker, tmp_path: Path
    ) -> None:
        """The weave ends, and its tasks with it."""
        self._limited(prefork, service, 2, "hold_weave", str(tmp_path / "gate"))

    def test_soft_limit_that_is_caught(
        self, prefork: CeleryWorker, service: LoopbackWorker, tmp_path: Path
    ) -> None:
        """A task that cleans up has its runs cancelled, and may use the executor for that."""
        before = status(service)["ended"]["cancelled"]
        result = prefork.run("hold", str(tmp_path / "gate"), "caught", soft_time_limit=3)
        assert result == "caught, and 9"
        until(lambda: status(service)["ended"]["cancelled"] == before + 3)

    def _limited(
        self, worker: CeleryWorker, service: LoopbackWorker, runs: int, name: str, *args: Any
    ) -> None:
        before = status(service)["ended"]["cancelled"]
        with pytest.raises(SoftTimeLimitExceeded):
            worker.run(name, *args, soft_time_limit=3)
        until(lambda: status(service)["ended"]["cancelled"] == before + runs)
        assert status(service)["running"] == 0

    def test_limit_of_a_greenlet(self, service: LoopbackWorker, tmp_path: Path) -> None:
        """Celery's only limit with gevent cancels, too, and the worker goes on."""
        before = status(service)["ended"]["cancelled"]
        with celery_worker(tmp_path, service.config, "-P", "gevent", "-c", "4") as worker:
            worker.send("hold", str(tmp_path / "gate"), "result", time_limit=1)
            until(lambda: status(service)["ended"]["cancelled"] == before + 3)
            assert right_answers(worker, "square", 5)


class Striking:
    """A value in whose pickling the soft time limit strikes."""

    def __reduce__(self) -> Any:
        raise SoftTimeLimitExceeded


def struck_items() -> Iterator[int]:
    yield from range(3)
    raise SoftTimeLimitExceeded


class TestLimitsAnywhere:
    """The soft time limit may strike where nothing waits for a result; nothing it has begun goes on."""

    @pytest.mark.parametrize(
        "way", ["in submit", "in the items of map", "between results", "told as a retry"]
    )
    def test_nothing_goes_on(self, app: Celery, service: LoopbackWorker, way: str) -> None:
        app.conf.wove_ws = service.config
        kept: list[Any] = []

        @app.task  # type: ignore[untyped-decorator]
        def work() -> str:
            if way == "in submit":
                kept.extend(executor.submit(celery_work.sleep_long, number + 1) for number in range(3))
                executor.submit(abs, Striking())
            elif way == "in the items of map":
                executor.map(celery_work.sleep_long, struck_items())
            elif way == "between results":
                kept.append(executor.map(celery_work.sleep_long, [0, 60, 60], buffersize=2))
                next(kept[0])
                raise SoftTimeLimitExceeded
            else:
                kept.extend(executor.submit(celery_work.sleep_long, number + 1) for number in range(3))
                raise Retry("again", exc=SoftTimeLimitExceeded())
            return "it went on"

        result = work.apply()
        assert result.state == ("RETRY" if way == "told as a retry" else "FAILURE"), result.result
        core = get_executor(app)._core
        until(lambda: not core.pending)


class TestLosses:
    """What is lost is done again, if the task says so."""

    def _killed_child(self, tmp_path: Path, tasks: int) -> None:
        gate, pid_file = tmp_path / "gate", tmp_path / "pid"
        with (
            LoopbackWorker(workers=4) as service,
            celery_worker(tmp_path, service.config, "-c", str(CHILDREN)) as worker,
        ):
            numbers = [*range(tasks // 2), 3, *range(tasks // 2, tasks)]
            results = [worker.send("square_late", number) for number in numbers]
            results[tasks // 2] = worker.send("lost_once", 3, str(pid_file), str(gate))
            until(lambda: pid_file.exists() and pid_file.read_text() and status(service)["running"])
            victim = pid_file.read_text()
            os.kill(int(victim), signal.SIGKILL)
            until(lambda: pid_file.read_text() not in ("", victim))  # delivered again, to another child
            gate.touch()
            answers = [worker.get(result) for result in results]
            assert [answer[0] for answer in answers] == [number**2 for number in numbers]
            dead = int(victim)
            processes = {answer[1] for answer in answers} | {dead}
            assert len(processes) <= CHILDREN + 1
            assert connections(service) == len(processes)
            until(lambda: status(service)["hosts"] == len(processes) - 1)

    def test_a_killed_child(self, tmp_path: Path) -> None:
        """Its task is done by another child: ``acks_late`` and ``reject_on_worker_lost``."""
        self._killed_child(tmp_path, 100)

    @pytest.mark.soak
    @pytest.mark.timeout(600)
    def test_a_killed_child_among_a_thousand_tasks(self, tmp_path: Path) -> None:
        """The same with 1,000 tasks."""
        self._killed_child(tmp_path, 1000)

    def test_retry_of_what_was_lost(self, tmp_path: Path) -> None:
        """A task of ``WoveWSTask`` runs again when its worker service has died under it."""
        with LoopbackWorker(workers=1) as service:
            config = {**service.config, "resume_window": 0.5}
            with celery_worker(tmp_path, config, "-c", "1") as worker:
                result = worker.send("lose_service", str(tmp_path / "mark"))
                until((tmp_path / "mark").exists)
                service.restart()
                assert worker.get(result) == "done"
                assert "Retry in" in worker.log and "ConnectionLost" in worker.log

    def test_retries_end(self, service: LoopbackWorker, tmp_path: Path) -> None:
        """What stays away is the task's error after ``max_retries``; a wrong secret is so at once."""
        wrong = [{"url": f"{service.url}/none"}, {"security": {"type": "signed", "secret": "x" * 32}}]
        for number, (setting, error, deliveries) in enumerate(
            zip(wrong, (HandshakeRejected, AuthenticationRejected), (3, 1), strict=True)
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            with celery_worker(folder, {**service.config, **setting}, "-P", "solo") as worker:
                with pytest.raises(error):
                    worker.run("in_vain", str(folder / "count"))
            assert (folder / "count").read_text() == "x" * deliveries


class TestExecutor:
    """Which executor a process uses."""

    def test_settings(self, app: Celery, service: LoopbackWorker) -> None:
        """It is made of ``app.conf.wove_ws`` once, and anew when that has changed."""
        app.conf.wove_ws = service.config
        first = get_executor(app)
        assert get_executor(app) is first
        assert first.submit(celery_work.square, 3).result() == 9
        app.conf.wove_ws = {**service.config, "ping_interval": 5.0}
        second = get_executor(app)
        assert second is not first and second.submit(celery_work.square, 4).result() == 16
        second.shutdown()
        assert get_executor(app).submit(celery_work.square, 5).result() == 25

    def test_settings_in_a_namespace(self, app: Celery, service: LoopbackWorker) -> None:
        """Django's way: ``CELERY_WOVE_WS`` in the settings module."""
        app.config_from_object({"CELERY_WOVE_WS": service.config}, namespace="CELERY")
        assert get_executor(app).submit(celery_work.square, 3).result() == 9

    @pytest.mark.parametrize("settings", [None, {}, "ws://127.0.0.1:1"])
    def test_no_settings(self, app: Celery, settings: Any) -> None:
        """The error names the setting."""
        app.conf.wove_ws = settings
        with pytest.raises(ImproperlyConfigured, match=r"'here'.*app\.conf\.wove_ws"):
            get_executor(app)

    def test_a_wrong_setting(self, app: Celery) -> None:
        """It is checked as the executor does it."""
        app.conf.wove_ws = {"url": "ws://127.0.0.1:1", "pong_timout": 3}
        with pytest.raises(ValueError, match="pong_timeout"):
            get_executor(app)

    def test_the_app_of_the_task_that_runs(self, app: Celery, service: LoopbackWorker) -> None:
        """``executor`` belongs to the app of the current task, whichever app is the default."""
        app.conf.wove_ws = service.config

        @app.task
        def task() -> int:
            assert isinstance(executor, WebSocketExecutor)
            return executor.with_options(delivery_timeout=60.0).submit(celery_work.square, 6).result()

        assert task.delay().get(disable_sync_subtasks=False) == 36

    def test_threads_share_one(self, app: Celery, service: LoopbackWorker) -> None:
        """Threads that are the first ones at the same moment get the same executor."""
        app.conf.wove_ws = service.config
        barrier, found = threading.Barrier(8), []

        def look() -> None:
            barrier.wait(60)
            found.append(get_executor(app))

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 8 and len({id(each) for each in found}) == 1

    def test_a_task_has_its_own_retries(self, app: Celery) -> None:
        """``WoveWSTask`` is nothing but defaults: a task may name its own errors."""

        @app.task(base=WoveWSTask, max_retries=1, autoretry_for=(ConnectionError, KeyError))
        def task() -> None:
            raise KeyError("not there")

        result = task.apply()
        assert (type(result.result), result.state) == (KeyError, "FAILURE")
        assert task.max_retries == 1 and task.retry_backoff is True


def test_without_celery() -> None:
    """What is missing is named with the command that installs it."""
    code = """
        import sys
        sys.modules["celery"] = None
        import wove_ws_sync.contrib.celery
    """
    _, errors, exit_code = python(code)
    assert exit_code == 1
    assert 'pip install "wove_ws_sync[celery]"' in errors
