"""``joblib.Parallel`` on a worker service: results, generators, errors, aborts, nesting."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
from engine_tasks import hold_until, square
from fault_helpers import WAIT, python, until
from joblib import Parallel, delayed, parallel_config

from wove_ws_sync import DeliveryTimeout, WebSocketExecutor
from wove_ws_sync.contrib.joblib import WoveBackend, register
from wove_ws_sync.testing import LoopbackWorker

SQUARES = [number * number for number in range(300)]


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    register()
    with LoopbackWorker(workers=4) as running:
        yield running


def _pid_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), number * number


def _fail_at(number: int, at: int) -> int:
    if number == at:
        raise LookupError(f"number {number}")
    return number


def _nested(number: int) -> tuple[str, list[int]]:
    with Parallel(n_jobs=2) as inner:
        return type(inner._backend).__name__, inner(delayed(square)(n) for n in range(number))


def test_results_in_order_from_the_worker(worker: LoopbackWorker) -> None:
    with parallel_config("wove_ws", **worker.config):
        found = Parallel()(delayed(_pid_and_square)(number) for number in range(300))
    assert [value for _, value in found] == SQUARES
    assert {pid for pid, _ in found} == {worker.pid}


@pytest.mark.parametrize("how", ["generator", "generator_unordered"])
def test_results_as_a_generator(worker: LoopbackWorker, how: str) -> None:
    with parallel_config("wove_ws", **worker.config):
        results = Parallel(n_jobs=4, return_as=how)(delayed(square)(n) for n in range(300))
        found = list(results)
    assert (found if how == "generator" else sorted(found)) == SQUARES


def test_small_tasks_are_batched(worker: LoopbackWorker) -> None:
    """joblib finds out that they are quick, and sends many in one run."""
    with WebSocketExecutor(**worker.config) as pool, parallel_config("wove_ws", executor=pool, n_jobs=2):
        before = pool._core.new_run_id(square)
        assert Parallel()(delayed(square)(n) for n in range(2000)) == [n * n for n in range(2000)]
        after = pool._core.new_run_id(square)
    assert int(after[-8:], 16) - int(before[-8:], 16) < 1000


def test_an_error_is_raised_as_itself_and_ends_the_rest(worker: LoopbackWorker) -> None:
    """With the worker's traceback; the backend serves the next call."""
    with parallel_config("wove_ws", **worker.config):
        with pytest.raises(LookupError, match="number 7") as caught:
            Parallel(n_jobs=2)(delayed(_fail_at)(number, 7) for number in range(10_000))
        assert "_fail_at" in str(caught.value.__cause__)
        assert Parallel(n_jobs=2)(delayed(square)(n) for n in range(5)) == SQUARES[:5]


def test_a_timeout_cancels_what_is_under_way(worker: LoopbackWorker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with WebSocketExecutor(**worker.config) as pool, parallel_config("wove_ws", executor=pool):
        try:
            with pytest.raises(multiprocessing.TimeoutError):  # joblib's
                Parallel(n_jobs=4, timeout=0.5)(delayed(hold_until)(str(gate)) for _ in range(8))
            until(lambda: not pool._core.pending)
        finally:
            gate.touch()
        assert pool.submit(square, 3).result(WAIT) == 9  # it stays open


def test_what_cannot_be_pickled_is_an_error_and_no_hang(worker: LoopbackWorker) -> None:
    with parallel_config("wove_ws", **worker.config), pytest.raises(TypeError, match="pickle"):
        Parallel(n_jobs=2)(delayed(str)(lock) for lock in [threading.Lock()])


def test_parallel_inside_of_a_task_is_sequential(worker: LoopbackWorker) -> None:
    """As many runs as there are slots wait for nobody."""
    with parallel_config("wove_ws", **worker.config):
        found = Parallel(n_jobs=4)(delayed(_nested)(number) for number in range(8))
    assert found == [("SequentialBackend", SQUARES[:number]) for number in range(8)]


def test_how_many_runs_n_jobs_means(worker: LoopbackWorker) -> None:
    """-1 is the CPUs over there, or what ``slots`` says; one run asks, once."""
    with WebSocketExecutor(**worker.config) as pool:
        cpus = max(2, pool.submit(joblib.cpu_count).result(WAIT))
        with parallel_config("wove_ws", executor=pool):
            assert joblib.effective_n_jobs(-1) == cpus
            assert joblib.effective_n_jobs(7) == 7
    with parallel_config("wove_ws", slots=10, **worker.config):
        assert [joblib.effective_n_jobs(n) for n in (-1, -2, -99)] == [10, 9, 1]
        with pytest.raises(ValueError, match="n_jobs == 0"):
            joblib.effective_n_jobs(0)


def test_a_worker_with_one_cpu_is_used() -> None:
    """With one job joblib would call the tasks in this process."""
    register()
    with LoopbackWorker(env={"LOKY_MAX_CPU_COUNT": "1"}) as small, parallel_config("wove_ws", **small.config):
        assert Parallel()(delayed(_pid_and_square)(n) for n in range(3)) == [
            (small.pid, n * n) for n in range(3)
        ]


@pytest.mark.parametrize(
    "settings", [{"slots": 1}, {"url": "ws://127.0.0.1:1/wove", "delivery_timeout": 0.2}], ids=["one", "down"]
)
def test_nothing_stays_of_a_call_that_submits_nothing(
    worker: LoopbackWorker, settings: dict[str, Any]
) -> None:
    """joblib ends no backend that it did not use: with one job, or if nobody says how many there are."""
    with parallel_config("wove_ws", **{**worker.config, **settings}):
        with pytest.raises(DeliveryTimeout) if "url" in settings else contextlib.nullcontext():
            assert Parallel()(delayed(square)(n) for n in range(9)) == SQUARES[:9]
    until(lambda: not any(thread.name.startswith("wove-ws-joblib") for thread in threading.enumerate()))


@pytest.mark.parametrize("settings", [{"slots": 0}, {"slots": True}, {"slots": "4"}])
def test_slots_are_a_whole_number(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whole number"):
        WoveBackend(**settings)


def test_settings_come_from_the_environment(worker: LoopbackWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.security is not None
    monkeypatch.setenv("WOVE_WS_URL", worker.url)
    monkeypatch.setenv("WOVE_WS_SECURITY", "env:A_SECRET")
    monkeypatch.setenv("A_SECRET", worker.security["secret"])
    assert Parallel(n_jobs=2, backend="wove_ws")(delayed(square)(n) for n in range(9)) == SQUARES[:9]


def test_a_missing_joblib_is_named_with_its_install_line() -> None:
    code = """
        import sys
        sys.modules["joblib"] = None
        try:
            import wove_ws_sync.contrib.joblib
        except ModuleNotFoundError as exc:
            print(exc)
    """
    output, errors, _ = python(code)
    assert 'pip install "wove_ws_sync[joblib]"' in output, errors


def test_grid_search(tmp_path: Path) -> None:
    """The example of scikit-learn runs as it is, where that is installed."""
    datasets = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    here = GridSearchCV(SVC(), {"C": [0.1, 1, 10], "gamma": [0.01, 0.1, 1]}, cv=3)
    here.fit(*datasets.load_iris(return_X_y=True))
    example = Path(__file__).parents[2] / "docs/examples/grid_search.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{here.best_params_} {round(here.best_score_, 2)}\n"
