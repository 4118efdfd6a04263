"""The Django app, in real projects: settings, executors, views, commits, tasks."""

from __future__ import annotations

import dataclasses
import heapq
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

pytest.importorskip("django")
import django_host  # first: it sets Django up
import django_work
import wove
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.test import Client, override_settings
from django.utils.connection import ConnectionDoesNotExist
from django.views.debug import ExceptionReporter
from fault_helpers import WAIT, link_of, python, until
from jobs import tasks as job_tasks
from jobs.models import Order
from wove.runtime import runtime

import wove_ws_sync
from wove_ws_sync.contrib.django import conf, executor, executors, submit_on_commit
from wove_ws_sync.contrib.django.executors import register_environments
from wove_ws_sync.contrib.django.testing import DjangoWorker, immediate
from wove_ws_sync.session import links

if "tasks" in __import__("django_settings").MODULE:
    from django.tasks import signals
    from django.tasks.exceptions import TaskResultDoesNotExist
else:
    from django_tasks import signals
    from django_tasks.exceptions import TaskResultDoesNotExist

NOWHERE = {"URL": "ws://127.0.0.1:1/wove", "DELIVERY_TIMEOUT": 0.5}


@pytest.fixture(scope="module", autouse=True)
def environ() -> Iterator[None]:
    with django_host.environ():
        yield


@pytest.fixture(scope="module")
def service(environ: None) -> Iterator[DjangoWorker]:
    with DjangoWorker(workers=1) as worker:
        yield worker


@pytest.fixture
def worker(service: DjangoWorker) -> Iterator[DjangoWorker]:
    with service.settings():
        yield service


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None, wove_defaults: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with the environments of the settings, end with no executor and no database connection."""
    monkeypatch.setenv("WOVE_WORKER_SECRET", django_host.SECRET)
    register_environments()
    yield
    executors.close()
    connections.close_all()


# -- executors -------------------------------------------------------------------------------


def test_setting_up_connects_nothing_and_starts_no_thread() -> None:
    """After ``django.setup()`` there is no link and no thread, and no database was asked."""
    code = (
        "import threading, django\n"
        "django.setup()\n"
        "from wove_ws_sync.session import links\n"
        "from django.db import connections\n"
        "assert not links() and threading.enumerate() == [threading.main_thread()]\n"
        "assert connections['default'].connection is None\n"
    )
    env = {"PYTHONPATH": str(django_host.PROJECT), "DJANGO_SETTINGS_MODULE": "project.settings"}
    assert python(code, env=env) == ("", "", 0)


def test_all_threads_share_one_executor_and_one_connection(worker: DjangoWorker) -> None:
    """Eight threads get the same object for an alias, and one link carries what they submit."""
    together = threading.Barrier(8)

    def ask(number: int) -> tuple[int, int]:
        together.wait(WAIT)
        return id(executors["default"]), executor.submit(abs, -number).result(WAIT)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    assert len({who for who, _ in answers}) == 1
    assert [value for _, value in answers] == list(range(8))
    assert len(links()) == 1


def test_an_alias_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ConnectionDoesNotExist, match="no alias 'reports'; there are: 'default'"):
        executors["reports"]
    assert "default" in executors and "reports" not in executors and list(executors) == ["default"]


def test_an_executor_that_somebody_shut_is_replaced() -> None:
    """Nobody can take the shared executor from the others for good."""
    first = executors["default"]
    first.shutdown()
    assert executors["default"] is not first and not executors["default"].is_shut


def test_a_wrong_value_is_told_by_its_key_in_the_settings() -> None:
    with override_settings(WOVE_WS={"default": {"URL": "ws://127.0.0.1:1", "PING_INTERVAL": -1}}):
        with pytest.raises(ImproperlyConfigured, match=r"WOVE_WS\['default'\]\['PING_INTERVAL'\] must be"):
            executors["default"]


@pytest.mark.parametrize(
    ("alias", "text"),
    [
        ({"DELIVERY_TIMEOUT": 3}, "['URL'] is not set"),
        ({"VARIABLES": False}, "['URL'] is not set"),
        ({**NOWHERE, "CONTEXT_VARS": ["nope:nope"]}, "['CONTEXT_VARS'] names 'nope:nope', which cannot be"),
        ({"BACKEND": "immediate", "CONTEXT_VARS": ["nope:nope"]}, "['CONTEXT_VARS'] names 'nope:nope'"),
    ],
)
def test_an_alias_that_cannot_be_used_is_improperly_configured(
    alias: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of the core, WOVE_WS_URL and so on, are not for an alias without a URL."""
    monkeypatch.setenv("WOVE_WS_URL", "ws://127.0.0.1:9/wove")
    with override_settings(WOVE_WS={"default": alias}):
        with pytest.raises(ImproperlyConfigured, match=re.escape(f"WOVE_WS['default']{text}")):
            executors["default"]


def test_override_settings_brings_another_executor_and_another_environment() -> None:
    """``setting_changed`` ends the executors; what was before comes back, Wove's environments as well."""
    before = executors["default"]
    with override_settings(WOVE_WS={"default": {**NOWHERE, "ENVIRONMENT": "elsewhere"}}):
        within = executors["default"]
        assert before.is_shut and within._core.options.port == 1
        assert runtime.environments["elsewhere"]["executor_config"]["url"] == NOWHERE["URL"]
        assert "workers" not in runtime.environments
    assert within.is_shut and executors["default"]._core.options.port == 8765
    assert "elsewhere" not in runtime.environments and "workers" in runtime.environments


def test_an_environment_of_the_projects_own_comes_back() -> None:
    """An alias replaces the Wove environment that it names, and gives it back, without a merge."""
    wove.config(environments={"mine": {"executor": "local", "max_workers": 3}})
    with override_settings(WOVE_WS={"default": {**NOWHERE, "ENVIRONMENT": "mine"}}):
        assert "max_workers" not in runtime.environments["mine"]
    assert runtime.environments["mine"] == {"executor": "local", "max_workers": 3}


def test_variables_stand_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable wins over the setting, an empty one is none, and an alias may exist by one alone."""
    monkeypatch.setenv("WOVE_WS_DEFAULT_URL", "ws://127.0.0.1:2/other")
    monkeypatch.setenv("WOVE_WS_DEFAULT_OPEN_TIMEOUT", "2.5")
    monkeypatch.setenv("WOVE_WS_DEFAULT_IDLE_TIMEOUT", "none")
    monkeypatch.setenv("WOVE_WS_DEFAULT_DELIVERY_TIMEOUT", "7")
    with override_settings(WOVE_WS={"default": {"URL": "ws://127.0.0.1:1", "OPEN_TIMEOUT": 1.0}}):
        made = executors["default"]
        assert (made._core.options.port, made._core.options.open_timeout) == (2, 2.5)
        assert made._core.options.idle_timeout is None and made._delivery.delivery_timeout == 7
    with override_settings(WOVE_WS={}):
        assert list(executors) == ["default"]
        assert executors["default"]._core.options.target == "/other"
    monkeypatch.setenv("WOVE_WS_DEFAULT_URL", "")
    with override_settings(WOVE_WS={}):
        assert list(executors) == []


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("OPEN_TIMEOUT", " ", 4.0),
        ("INSECURE", "1", True),
        ("CONTEXT_VARS", "jobs.tasks:a, jobs.tasks:b", ["jobs.tasks:a", "jobs.tasks:b"]),
        ("CONTEXT_VARS", '["jobs.tasks:a"]', ["jobs.tasks:a"]),
        ("HEADERS", '{"X-Team": "blue"}', {"X-Team": "blue"}),
        ("URL", "ws://127.0.0.1:2", "ws://127.0.0.1:2"),
    ],
)
def test_a_variable_is_read_as_those_of_the_core(
    key: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"WOVE_WS_DEFAULT_{key}", text)
    with override_settings(WOVE_WS={"default": {**NOWHERE, "OPEN_TIMEOUT": 4.0}}):
        assert conf.read("default").executor_config[key.lower()] == value


def test_a_forked_child_dials_its_own_connection(worker: DjangoWorker) -> None:
    """Parent and child use ``executors["default"]``; the worker sees two hosts and right answers."""
    code = (
        "import os, sys, warnings, django\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # there are threads: that is the point\n"
        "django.setup()\n"
        "from wove_ws_sync.contrib.django import executors\n"
        "assert executors['default'].submit(abs, -1).result(30) == 1\n"
        "child = os.fork()\n"
        "assert executors['default'].submit(abs, -2).result(30) == 2\n"
        "assert executors['default'].submit(abs, -3).result(30) == 3\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    connected = worker.log.count("connected.")
    env = {
        "PYTHONPATH": str(django_host.PROJECT),
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "WOVE_WS_DEFAULT_URL": worker.url,
        "WOVE_WORKER_SECRET": (worker.security or {})["secret"],
    }
    assert python(code, env=env) == ("", "", 0)
    until(lambda: worker.log.count("connected.") == connected + 2)


def test_without_django_the_error_has_the_install_line() -> None:
    code = (
        "import sys\n"
        "sys.modules['django'] = None\n"
        "try:\n"
        "    import wove_ws_sync.contrib.django\n"
        "except ModuleNotFoundError as exc:\n"
        "    print(exc)\n"
    )
    assert 'pip install "wove_ws_sync[django]"' in python(code)[0]


# -- views -----------------------------------------------------------------------------------


def test_a_sync_view_runs_a_weave_at_the_worker(worker: DjangoWorker) -> None:
    """The environment of the alias takes a whole weave; all views share the connection."""
    client = Client()
    for number in range(5):
        answer = client.get(f"/report/{number}/").json()
        assert answer == {
            "number": number,
            "answer": number * number + 2 * number,
            "worker": worker.pid,
            "host": os.getpid(),
        }
    assert client.get("/total/5/").json() == {"total": 30}
    assert len(links()) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"SECURITY": {"secret": "planted" * 5}},
        {"SECURITY": {"keys": [{"key": "first", "secret": "planted" * 5}]}},
        {"HEADERS": {"X-Who": "planted"}},
        {"SECURITY": {"secret": "planted" * 5}, "PING_INTERVAL": -1},
    ],
    ids=["secret", "keys", "header", "wrong value"],
)
def test_error_reports_of_django_show_no_secret(keys: dict[str, Any]) -> None:
    """A report, which is mailed to the admins, has the local variables of every frame, Wove's too."""
    with override_settings(WOVE_WS={"default": {**NOWHERE, **keys, "ENVIRONMENT": "workers"}}):
        try:
            executors["default"]
            with wove.weave(environment="workers") as w:
                w.do(job_tasks.where)
        except (ConnectionError, ImproperlyConfigured):
            report = ExceptionReporter(None, *sys.exc_info())
    frames = [frame for frame in report.get_traceback_data()["frames"] if frame["filename"] != __file__]
    shown = [str(frame.get("vars")) for frame in frames]
    assert not [text for text in shown if "planted" in text]
    assert any("not shown" in text for text in shown)


def test_an_alias_with_a_secret_of_its_own_is_checked_once() -> None:
    """Each weave asks for the options of its alias; they are remembered, though its secret is not shown."""
    with override_settings(WOVE_WS={"default": {**NOWHERE, "SECURITY": {"secret": "planted" * 5}}}):
        config = conf.read("default").executor_config
    assert "planted" not in repr(config)
    assert wove_ws_sync.security.link_options(config) is wove_ws_sync.security.link_options(config)


def test_a_worker_that_is_down_is_one_exception_within_the_deadline_and_the_site_recovers() -> None:
    """Weave and executor fail by the alias's DELIVERY_TIMEOUT; with the worker back the next view works."""
    short = {"default": {"DELIVERY_TIMEOUT": 1.0, "ENVIRONMENT": "workers"}}
    with DjangoWorker() as service, override_settings(WOVE_WS=short), service.settings():
        client = Client()
        assert client.get("/total/3/").json() == {"total": 5}
        service.kill()
        # A run that left before the loss was noticed waits for the worker, and then for its deadline.
        told = {"ConnectionLost", "ConnectionRefusedError", "DeliveryTimeoutError"}
        for _ in range(2):
            answer = client.get("/report/2/")
            assert answer.status_code == 503 and answer.json()["error"] in told, answer.json()
            assert client.get("/total/3/").status_code == 503
        service.restart()
        until(lambda: client.get("/total/3/").status_code == 200)
        assert client.get("/report/2/").json()["answer"] == 8
        assert len(links()) == 1


# -- what the worker does for Django ---------------------------------------------------------


def test_connections_are_looked_after_around_each_task(worker: DjangoWorker) -> None:
    """With CONN_MAX_AGE=0 a task begins without the connection that the one before left open."""
    first, second = (executor.submit(django_work.connected_before).result(WAIT) for _ in range(2))
    assert first == second == (first[0], False)
    assert executor.submit(django_work.asks_in_a_coroutine).result(WAIT) >= 0
    assert executor.submit(django_work.database_name).result(WAIT) == os.environ["DJANGO_DATABASE"]


def test_coroutines_do_not_close_each_others_connections(worker: DjangoWorker) -> None:
    """One that is in the middle of its rows goes on after others have come and gone."""
    for _ in range(3):
        Order.objects.create(amount=1)
    reader = executor.submit(django_work.reads_rows)
    for last in (False, True):
        executor.submit(django_work.comes_between, last).result(WAIT)
    assert reader.result(WAIT) >= 3


def test_connections_that_are_young_enough_are_kept() -> None:
    """It is ``close_old_connections`` that closes: with CONN_MAX_AGE a connection serves many tasks."""
    with DjangoWorker(workers=1, env={"TEST_CONN_MAX_AGE": "600"}) as service, service.settings():
        found = [executor.submit(django_work.connected_before).result(WAIT)[1] for _ in range(2)]
    assert found == [False, True]


def test_processes_are_set_up_as_well() -> None:
    """With ``--engine processes`` each process knows the project."""
    with DjangoWorker(workers=1, args=["--engine", "processes"]) as service, service.settings():
        found = [executor.submit(django_work.connected_before).result(WAIT)[1] for _ in range(2)]
        assert found == [False, False]


# -- commits ---------------------------------------------------------------------------------


def test_on_commit_submits_after_the_commit_only(worker: DjangoWorker) -> None:
    """A view's task finds what the view saved; after a rollback nothing runs."""
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        lost = Order.objects.create(amount=1)
        submit_on_commit(job_tasks.write_receipt, lost.pk)
        raise ZeroDivisionError
    assert links() == []
    order = Client().post("/orders/", {"amount": 12}).json()["order"]
    until(lambda: Order.objects.get(pk=order).receipt == "12 paid")
    kept = Order.objects.create(amount=7)
    submit_on_commit(job_tasks.write_receipt, order_id=kept.pk, using="default", alias="default")
    until(lambda: Order.objects.get(pk=kept.pk).receipt == "7 paid")


def test_what_fails_after_the_commit_is_logged(
    worker: DjangoWorker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "wove_ws_sync.host"):
        submit_on_commit(django_work.fails, "nobody looks")
        until(lambda: "nobody looks" in caplog.text)
    assert "submitted on commit, failed: LookupError" in caplog.text
    [record] = [found for found in caplog.records if found.name == "wove_ws_sync.host"]
    assert record.exc_info is not None and record.exc_info[0] is LookupError
    assert record.threadName is not None and record.threadName.startswith("wove-ws-told-")


def test_what_was_run_after_the_commit_is_not_unpickled(worker: DjangoWorker) -> None:
    """Nobody asked for the result, and the thread that brings it serves all others."""
    submit_on_commit(django_work.UnpickledTo, "the list")
    assert executor.submit(abs, -1).result(WAIT) == 1  # one worker: the first has ended
    assert django_work.unpickled == []
    assert executor.submit(django_work.UnpickledTo, "the list").result(WAIT) == "the list"
    assert django_work.unpickled == ["the list"]


def test_what_was_lost_after_the_commit_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with override_settings(WOVE_WS={"default": NOWHERE}), caplog.at_level(logging.ERROR, "wove_ws_sync.host"):
        submit_on_commit(abs, -1)
        until(lambda: "submitted on commit, failed: DeliveryTimeout" in caplog.text)


@pytest.mark.parametrize("inside", [True, False], ids=["in a transaction", "without one"])
def test_a_robust_submission_that_fails_is_logged_and_harms_nobody(
    inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Django logs that there is no such alias, without the arguments, and goes on."""
    with caplog.at_level(logging.ERROR, "django"), transaction.atomic() if inside else nullcontext():
        submit_on_commit(print, "an argument", alias="nobody", robust=True)
    [record] = caplog.records
    assert record.exc_info is not None and record.exc_info[0] is ConnectionDoesNotExist
    assert "submit_on_commit" in record.getMessage() and "an argument" not in caplog.text


# -- tests of a project ----------------------------------------------------------------------


def test_immediate_runs_in_the_transaction_of_the_test() -> None:
    """The backend "immediate" calls at once, in this thread, and needs no worker service."""
    with immediate(), transaction.atomic():
        Order.objects.create(amount=4711)
        future = executor.submit(django_work.orders_here, 4711)
        assert future.done() and future.result() == 1
        assert list(executor.map(abs, [-1, -2])) == [1, 2]
        assert executor.with_options(delivery_timeout=1).submit(django_work.doubled, 4).result() == 8
        told = executor.submit(django_work.tells)
        assert told.result() == told.run_id and told.progress is not None and told.progress.message == "half"
        with pytest.raises(LookupError, match="of the task"):
            executor.submit(django_work.fails, "of the task").result()
        transaction.set_rollback(True)
    assert links() == []
    with immediate(), wove.weave(environment="workers") as w:

        @w.do
        def here() -> int:
            return os.getpid()

    assert w.result["here"] == os.getpid()


def test_immediate_refuses_what_would_not_travel() -> None:
    """Arguments and results go through pickle, as on their way to a worker service."""
    with immediate():
        given: list[int] = []
        executor.submit(given.append, 1).result()
        assert given == []  # the task had a copy
        with pytest.raises(TypeError, match="pickle"):
            executor.submit(id, threading.Lock()).result()
        with pytest.raises(TypeError, match="pickle"):
            executor.submit(threading.Lock).result()


def test_immediate_refuses_what_has_no_name_or_is_no_json() -> None:
    """With RESULT_FORMAT "json" what would not travel without pickles fails here, too."""
    with override_settings(WOVE_WS={"default": {**NOWHERE, "RESULT_FORMAT": "json"}}), immediate():
        given = [3, 1]
        assert executor.submit(sorted, given, reverse=True).result() == [3, 1]
        assert executor.submit(heapq.heapify, given).result() is None and given == [3, 1]
        with pytest.raises(TypeError, match="no name under which"):
            executor.submit(lambda: 1).result()
        with pytest.raises(TypeError, match="positional argument 0"):
            executor.submit(len, (1, 2)).result()
        with pytest.raises(TypeError, match="the result"):
            executor.submit(complex, 1).result()


def test_immediate_maps_what_has_no_end() -> None:
    """It takes ``buffersize`` items and then as many as are asked for, and refuses what is no size."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):  # the test ends if the executor does not
            taken.append(number)
            yield number

    with immediate():
        results = executor.map(abs, numbers(), buffersize=2)
        assert taken == [0, 1]
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3] and taken == [0, 1, 2, 3]
        for wrong in ({"chunksize": 0}, {"buffersize": 0}):
            with pytest.raises(ValueError, match="must be"):
                executor.map(abs, [1], **wrong)


def test_immediate_is_shut_like_any_other() -> None:
    with immediate():
        pool = executors["default"]
        pool.shutdown()
        with pytest.raises(wove_ws_sync.ExecutorClosed):
            pool.submit(abs, -1)
        assert executors["default"].submit(abs, -1).result() == 1


def test_variables_do_not_reach_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's environment does not send tests to a worker service that is in use."""
    monkeypatch.setenv("WOVE_WS_DEFAULT_BACKEND", "websocket")
    monkeypatch.setenv("WOVE_WS_DEFAULT_URL", NOWHERE["URL"])
    with immediate():
        assert executor.submit(abs, -1).result() == 1


# -- django.tasks ----------------------------------------------------------------------------


def _finished(result: Any) -> Any:
    until(lambda: result.refresh() or result.is_finished)
    return result


def test_tasks_run_at_the_worker(worker: DjangoWorker) -> None:
    """A result has what Django's own backends give: status, value, times, attempts, who ran it."""
    seen = []

    def note(sender: Any, task_result: Any, **_: Any) -> None:
        seen.append(task_result.id)

    signals.task_enqueued.connect(note)
    try:
        result = django_work.add.enqueue(2, second=3)
    finally:
        signals.task_enqueued.disconnect(note)
    assert seen == [result.id] and result.enqueued_at is not None
    _finished(result)
    assert (result.status, result.return_value, result.attempts) == ("SUCCESSFUL", 5, 1)
    assert result.worker_ids[0].endswith(f":{worker.pid}")
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert django_work.add.get_result(result.id).return_value == 5
    told = _finished(django_work.says_what_it_is.enqueue())
    assert told.return_value == [told.id, 1, worker.pid]
    assert _finished(django_work.waits.enqueue(4)).return_value == 4


def test_a_task_that_fails_says_why(worker: DjangoWorker) -> None:
    result = _finished(django_work.breaks.enqueue())
    assert result.status == "FAILED"
    assert result.errors[0].exception_class is ValueError and "as it was told" in result.errors[0].traceback


def test_a_task_that_leaves_has_finished(worker: DjangoWorker) -> None:
    """``sys.exit()`` in a task is a failure that ``task_finished`` tells of, as it is with Django itself."""
    executor.submit(django_work.listen).result(WAIT)
    result = _finished(django_work.leaves.enqueue())
    assert result.status == "FAILED" and result.errors[0].exception_class is SystemExit
    assert (result.id, "FAILED") in executor.submit(django_work.heard).result(WAIT)


def test_a_task_that_nobody_can_take_is_an_error_of_enqueue() -> None:
    """There is no queue on disk: what cannot be handed over is not taken."""
    with override_settings(WOVE_WS={"default": NOWHERE}), pytest.raises(ConnectionRefusedError):
        django_work.add.enqueue(1, 2)


def test_a_task_whose_worker_dies_has_failed() -> None:
    """The result says so with the error of the run."""
    backend = f"{type(django_work.add.get_backend()).__module__}.WoveWsBackend"
    at_once = {"default": {"BACKEND": backend, "OPTIONS": {"DELIVERY_ORPHAN_POLICY": "fail"}}}
    with (
        DjangoWorker() as service,
        override_settings(
            WOVE_WS={"default": {"URL": service.url, "SECURITY": service.security, "RESUME_WINDOW": 0.1}},
            TASKS=at_once,
        ),
    ):
        lost = django_work.stops_at_nothing.enqueue()
        until(lambda: lost.refresh() or lost.status == "RUNNING")
        service.kill()
        _finished(lost)
    assert lost.status == "FAILED" and lost.errors[0].exception_class is wove_ws_sync.ConnectionLost


def test_an_unknown_result_does_not_exist() -> None:
    with pytest.raises(TaskResultDoesNotExist):
        django_work.add.get_result("nobody")


def test_tasks_run_at_once_in_tests() -> None:
    with immediate():
        result = django_work.add.enqueue(20, 3)
        result.refresh()
        assert result.return_value == 23


def test_a_task_of_another_version_of_django(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its dataclass asks for besides is for who enqueues: Django 6.0 wants a ``run_after``."""
    backend = type(django_work.add.get_backend())
    older = dataclasses.make_dataclass(
        "Older",
        [("run_after", Any), ("one_more", Any)],
        bases=(backend.task_class,),
        frozen=True,
        kw_only=True,
    )
    monkeypatch.setattr(backend, "task_class", older)
    with immediate():
        result = django_work.add.enqueue(20, 3)
        result.refresh()
        assert result.return_value == 23


def test_the_link_is_the_executors(worker: DjangoWorker) -> None:
    """``connect()`` dials without a run."""
    executors["default"].connect()
    assert link_of(executors["default"]).stats()["generation"] == 1
