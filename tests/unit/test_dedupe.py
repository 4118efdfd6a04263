"""What is remembered of runs by their idempotency keys, and what a command says while runs wait."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from wove_ws_sync.frames import InvalidMessage, encode
from wove_ws_sync.worker.commands import (
    AttachTask,
    CancelTask,
    DetachTask,
    EventAck,
    Ignored,
    MalformedRun,
    Resume,
    RunTask,
    Shutdown,
    Withdrawn,
    read,
)
from wove_ws_sync.worker.dedupe import Dedupe, Key, Shared
from wove_ws_sync.worker.events import cancelled_event, error_event, life_event, plain_error, renamed
from wove_ws_sync.worker.parked import Parked
from wove_ws_sync.worker.runs import Run

KEY: Key = ("owner", "work")


def command(run_id: str, task_id: str = "task") -> RunTask:
    return RunTask(run_id, task_id, "code", None, None, "best_effort")


def a_run(run_id: str, task_id: str = "task") -> Run:
    return Run(command(run_id, task_id), None)


def result(run_id: str, value: bytes = b"value") -> bytes:
    return encode({"type": "task_result", "run_id": run_id, "task_id": "task", "result_pickle": value})


def begun(dedupe: Dedupe, key: Key, run_id: str) -> Shared:
    run = a_run(run_id)
    shared = dedupe.begin(key, run)
    shared.job = object()
    shared.add(run)
    return shared


def end(dedupe: Dedupe, key: Key, run_id: str, now: float, value: bytes = b"value") -> None:
    """Have a run under *key* begin and end with *value*."""
    dedupe.ended(begun(dedupe, key, run_id), result(run_id, value), now)


class TestRenamed:
    """The events of one run become those of another one."""

    @pytest.mark.parametrize(
        "event",
        [
            result("r1"),
            cancelled_event("r1", "task"),
            life_event("r1", "task", started=True),
            error_event("r1", "task", plain_error("E", "r1", "task"), b"pickle"),
        ],
    )
    def test_only_the_ids_change(self, event: bytes) -> None:
        """Whatever they hold, quotes and what is not ASCII included, and what else the event says."""
        for run_id, task_id in [("r2", "other"), ('"},{\\"', "t\u00e4sk\n"), ("", "")]:
            changed = renamed(event, ("r1", "task"), (run_id, task_id))
            assert json.loads(changed) == {**json.loads(event), "run_id": run_id, "task_id": task_id}
            assert renamed(changed, (run_id, task_id), ("r1", "task")) == event

    def test_the_event_of_another_run_is_refused(self) -> None:
        """A result must not be given out under a name that it does not have."""
        with pytest.raises(ValueError, match="begins with"):
            renamed(result("r3"), ("r1", "task"), ("r2", "task"))


class TestDedupe:
    """One execution for a key, then its result, for a while."""

    def test_while_it_runs_others_join(self) -> None:
        """They get its events under their own ids."""
        dedupe = Dedupe(300.0)
        shared = begun(dedupe, KEY, "r1")
        assert dedupe.find(KEY) is shared and dedupe.find(("other owner", "work")) is None
        second = a_run("r2", "again")
        shared.add(second)
        assert second.job is shared.job and len(shared.runs) == 2
        assert json.loads(shared.event_for(second, result("r1"))) == {
            "type": "task_result",
            "run_id": "r2",
            "task_id": "again",
            "result_pickle": "value",
        }
        shared.leave(second)
        assert second.shared is None and second.job is None and len(shared.runs) == 1

    def test_a_result_is_kept_for_the_window(self) -> None:
        """From the end of the execution on, and no moment longer; only under its key and its owner."""
        dedupe = Dedupe(300.0)
        end(dedupe, KEY, "r1", 10.0)
        assert dedupe.find(KEY) is None and dedupe.next_at() == 310.0
        again = dedupe.replay(KEY, a_run("r2"), 309.9)
        assert again == result("r2")
        assert dedupe.replay(("other owner", "work"), a_run("r2"), 11.0) is None
        assert dedupe.replay(("owner", "other work"), a_run("r2"), 11.0) is None
        assert dedupe.replay(KEY, a_run("r2"), 310.0) is None
        assert (len(dedupe), dedupe.bytes, dedupe.next_at()) == (0, 0, None)

    def test_what_is_no_result_is_not_kept(self) -> None:
        """Whoever comes after an error, or a cancellation, begins anew."""
        dedupe = Dedupe(300.0)
        dedupe.ended(begun(dedupe, KEY, "r1"), None, 1.0)
        assert dedupe.find(KEY) is None and dedupe.replay(KEY, a_run("r2"), 1.0) is None
        assert len(dedupe) == 0

    def test_without_a_window_only_live_runs_are_joined(self) -> None:
        """--dedupe-window 0"""
        dedupe = Dedupe(0.0)
        shared = begun(dedupe, KEY, "r1")
        assert dedupe.find(KEY) is shared
        dedupe.ended(shared, result("r1"), 1.0)
        assert dedupe.replay(KEY, a_run("r2"), 1.0) is None and len(dedupe) == 0

    def test_nobody_joins_what_is_closed(self) -> None:
        """Its result is not kept either, and does not end what was begun after it."""
        dedupe = Dedupe(300.0)
        first = begun(dedupe, KEY, "r1")
        dedupe.close(first)
        second = begun(dedupe, KEY, "r2")
        dedupe.close(first)
        dedupe.ended(first, result("r1"), 1.0)
        assert dedupe.find(KEY) is second and dedupe.replay(KEY, a_run("r3"), 1.0) is None
        dedupe.ended(second, result("r2", b"second"), 2.0)
        assert dedupe.replay(KEY, a_run("r3"), 2.0) == result("r3", b"second")

    def test_the_result_of_what_was_closed_is_kept_where_nothing_newer_is(self) -> None:
        """A cancellation came too late for it: the work is done, and a retry must not do it again."""
        dedupe = Dedupe(300.0)
        first = begun(dedupe, KEY, "r1")
        dedupe.close(first)
        second = begun(dedupe, KEY, "r2")
        dedupe.ended(second, result("r2", b"second"), 1.0)
        dedupe.ended(first, result("r1", b"first"), 2.0)
        assert dedupe.replay(KEY, a_run("r3"), 2.0) == result("r3", b"second")
        alone = begun(dedupe, ("owner", "other work"), "r4")
        dedupe.close(alone)
        dedupe.ended(alone, result("r4"), 3.0)
        assert dedupe.replay(("owner", "other work"), a_run("r5"), 3.0) == result("r5")
        dedupe.expire(303.0)
        assert (len(dedupe), dedupe.bytes) == (0, 0)

    def test_bytes_are_bounded(self) -> None:
        """The oldest result makes room; one that is larger than all the room is not kept at all."""
        dedupe = Dedupe(300.0, max_bytes=100_000)
        for number in range(50):
            end(dedupe, ("owner", f"k{number}"), f"r{number}", float(number), b"x" * 10_000)
            assert dedupe.bytes <= 100_000
        kept = [n for n in range(50) if dedupe.replay(("owner", f"k{n}"), a_run("again"), 50.0)]
        assert kept == list(range(50 - len(kept), 50)) and len(kept) == 9
        end(dedupe, KEY, "large", 51.0, b"x" * 100_000)
        assert dedupe.replay(KEY, a_run("again"), 51.0) is None
        assert len(dedupe) == 9

    def test_their_number_is_bounded_too(self) -> None:
        """The smallest results and their keys are counted with what they take besides."""
        dedupe = Dedupe(300.0, max_bytes=100_000)
        for number in range(1000):
            end(dedupe, ("owner", f"k{number}"), "r", 0.0, b"")
        assert 0 < len(dedupe) < 200


class TestParked:
    """What a host said while its runs wait."""

    def test_runs_wait_in_order(self) -> None:
        """With what else has to wait between them; bytes count up and down."""
        parked = Parked()
        items: list[Any] = [command("r1"), DetachTask("r1"), command("r2"), InvalidMessage("no")]
        for item in items:
            assert parked.overtakes(item) == [] and parked.put(item, 1000, 0.0)
        assert parked.bytes > 4000 and len(parked) == 4
        assert [parked.take() for _ in items] == items
        assert parked.bytes == 0 and len(parked) == 0

    def test_acknowledgements_and_questions_do_not_wait(self) -> None:
        """They are about other runs."""
        parked = Parked()
        parked.put(command("r1"), 10, 0.0)
        for item in (EventAck(("r0",)), Resume(("r0",), False), CancelTask("r0", None)):
            assert parked.overtakes(item) == [item]
        assert len(parked) == 1

    def test_a_cancel_takes_the_run_out(self) -> None:
        """With its mode; the others stay where they are."""
        parked = Parked()
        for run_id in ("r1", "r2", "r3"):
            parked.put(command(run_id), 10, 0.0)
        cancel = CancelTask("r2", "require_ack")
        assert parked.overtakes(cancel) == [Withdrawn("r2", "task", "require_ack")]
        assert parked.overtakes(cancel) == [cancel]
        assert [parked.take(), parked.take()] == [command("r1"), command("r3")]
        assert parked.bytes == 0

    def test_a_shutdown_takes_them_all_out(self) -> None:
        """Before it is obeyed itself."""
        parked = Parked()
        for item in (command("r1"), InvalidMessage("no"), command("r2")):
            parked.put(item, 10, 0.0)
        withdrawn = [Withdrawn(run_id, "task", None) for run_id in ("r1", "r2")]
        assert parked.overtakes(Shutdown()) == [*withdrawn, Shutdown()]
        assert isinstance(parked.take(), InvalidMessage) and len(parked) == 0

    def test_a_cancel_has_its_run_attached_before(self) -> None:
        """Or it would find no run. What is about other runs stays where it is."""
        parked, attach = Parked(), AttachTask("r1", "task", None, "best_effort")
        for item in (command("r0"), attach, command("r2")):
            parked.put(item, 10, 0.0)
        malformed = MalformedRun("r1", "task", "no", "run_task")
        assert parked.overtakes(malformed) == []
        assert parked.overtakes(CancelTask("r1", None)) == [attach, CancelTask("r1", None)]
        assert parked.overtakes(malformed) == [malformed]
        parked.put(attach, 10, 0.0)
        assert parked.overtakes(DetachTask("r1")) == [attach, DetachTask("r1")]
        assert [parked.take(), parked.take()] == [command("r0"), command("r2")] and parked.bytes == 0

    def test_a_shutdown_has_everything_handed_over_before(self) -> None:
        """Or what is to outlive its host would be cancelled with the rest."""
        parked, attach = Parked(), AttachTask("r4", "task", None, "best_effort")
        for item in (command("r1"), command("r2"), command("r3"), attach, DetachTask("r3"), DetachTask("r1")):
            assert parked.overtakes(item) == []
            parked.put(item, 10, 0.0)
        handed = [attach, command("r3"), DetachTask("r3"), command("r1"), DetachTask("r1")]
        assert parked.overtakes(Shutdown()) == [*handed, Withdrawn("r2", "task", None), Shutdown()]
        assert len(parked) == 0 and parked.bytes == 0
        assert parked.overtakes(CancelTask("r1", None)) == [CancelTask("r1", None)]

    def test_a_run_that_does_not_wait_is_let_go_at_once(self) -> None:
        """Which may make room for those that wait. What has no meaning waits for nothing either."""
        parked = Parked()
        parked.put(command("r1"), 10, 0.0)
        for item in (DetachTask("r0"), MalformedRun("r0", "task", "no", "run_task"), Ignored("type")):
            assert parked.overtakes(item) == [item]
        for item in (DetachTask("r1"), MalformedRun("r1", "task", "no", "run_task")):
            assert parked.overtakes(item) == []
        assert "r1" in parked and "r0" not in parked

    def test_a_run_waits_once(self) -> None:
        """The second one would begin after the first was cancelled."""
        parked = Parked()
        assert parked.put(command("r1"), 10, 0.0) and not parked.put(command("r1"), 10, 0.0)
        assert len(parked) == 1 and parked.take() == command("r1")
        assert parked.put(command("r1"), 10, 0.0)
        parked.clear()
        assert parked.put(command("r1"), 10, 0.0) and len(parked) == 1

    def test_a_run_that_waits_beats(self) -> None:
        """Until it is taken or cancelled, if its host asked for that."""
        parked, owner = Parked(), object()
        for run_id in ("r1", "r2"):
            parked.put(dataclasses.replace(command(run_id), beat_interval=5.0), 10, 1.0, owner)
        parked.put(command("r3"), 10, 1.0, owner)
        assert parked.beats.next_at() == 6.0
        due = list(parked.beats.due(6.0))
        assert [(run.run_id, run.owner) for run in due] == [("r1", owner), ("r2", owner)]
        parked.take()
        assert [run.run_id for run in parked.beats.due(11.0)] == ["r2"]
        parked.overtakes(CancelTask("r2", None))
        assert parked.beats.next_at() is None


class TestKey:
    """The key of a ``run_task``, from a host that nobody trusts."""

    def read(self, **delivery: Any) -> Any:
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": "x"}
        return read(json.dumps({**frame, "delivery": delivery}))

    def test_it_is_text(self) -> None:
        """Without one, or with an empty one, nothing is shared."""
        assert self.read(delivery_idempotency_key="order-7").idempotency_key == "order-7"
        for none in ({}, {"delivery_idempotency_key": None}, {"delivery_idempotency_key": ""}):
            assert self.read(**none).idempotency_key == ""

    @pytest.mark.parametrize("key", [7, ["a"], {"a": 1}, True, "x" * 4097])
    def test_anything_else_is_an_error_of_the_run(self, key: Any) -> None:
        """It would not be deduplicated, and nobody would know."""
        malformed = self.read(delivery_idempotency_key=key)
        assert isinstance(malformed, MalformedRun) and "delivery_idempotency_key" in malformed.message
