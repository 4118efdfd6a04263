"""The worker's pure rooms: its run table, its heartbeat schedule, its reading of commands."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wove_ws_sync.frames import InvalidMessage
from wove_ws_sync.worker.alarm import Alarm
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
    read,
)
from wove_ws_sync.worker.runs import BeatSchedule, Run, RunState, RunTable, Stopped

MODES = ("best_effort", "require_ack")


def command(run_id: str = "r1", *, beat: float | None = None, mode: str = "best_effort") -> RunTask:
    return RunTask(run_id, "task", "pickle", None, beat, mode)


def accepted(table: RunTable, **settings: Any) -> Run:
    run = table.accept(command(**settings))
    assert run is not None
    return run


def test_a_run_starts_once_and_ends_once() -> None:
    """One task_started and one terminal event are due, in whatever order they are asked for."""
    table = RunTable()
    run = accepted(table)
    assert table.started(run) and not table.started(run)
    assert table.ended(run) and not table.ended(run)
    assert not table.started(run)
    assert run.state is RunState.ENDED and table.get("r1") is None and len(table) == 0


def test_a_live_run_id_is_not_accepted_twice() -> None:
    """The second run_task with a live id is nothing; after the end the id may be used again."""
    table = RunTable()
    first = accepted(table)
    assert table.accept(command()) is None
    assert table.get("r1") is first
    table.ended(first)
    assert table.accept(command()) is not None


@pytest.mark.parametrize(
    ("stopped", "mode", "due"),
    [
        (Stopped.WITHDRAWN, "best_effort", True),
        (Stopped.WITHDRAWN, "require_ack", True),
        (Stopped.STOPPING, "best_effort", False),
        (Stopped.STOPPING, "require_ack", False),
        (Stopped.UNSTOPPABLE, "best_effort", True),
        (Stopped.UNSTOPPABLE, "require_ack", False),
    ],
)
@pytest.mark.parametrize("named_by", ["run", "cancel"])
def test_cancel_answers_as_its_table_says(stopped: Stopped, mode: str, due: bool, named_by: str) -> None:
    """The mode comes from the cancel frame, else from the run; a run not ended now ends with its task."""
    table = RunTable()
    other = MODES[1 - MODES.index(mode)]
    run = accepted(table, mode=mode if named_by == "run" else other)
    assert table.cancelled(run, stopped, None if named_by == "run" else mode) is due
    assert table.ended(run) is not due


@given(st.lists(st.sampled_from(["start", "end", *itertools.product(Stopped, (None, *MODES))]), max_size=12))
def test_every_history_has_at_most_one_terminal_event(steps: list[Any]) -> None:
    """Whatever happens in whatever order, a run has one start, one end, and no start after its end."""
    table = RunTable()
    run = accepted(table)
    sent = []
    for step in steps:
        if step == "start" and table.started(run):
            sent.append("start")
        elif table.ended(run) if step == "end" else isinstance(step, tuple) and table.cancelled(run, *step):
            sent.append("end")
    assert sent in ([], ["start"], ["end"], ["start", "end"])
    assert (run.state is RunState.ENDED) == ("end" in sent) == (table.get("r1") is None)


def test_clear_ends_every_run_without_an_event() -> None:
    """When the host is gone nothing is due for any of its runs any more."""
    table = RunTable()
    runs = [accepted(table, run_id=f"r{number}") for number in range(3)]
    assert table.clear() == runs
    assert not any(table.ended(run) or table.started(run) for run in runs)


def test_beats_are_due_at_their_interval_from_acceptance_until_the_end() -> None:
    """The first beat is one interval after acceptance, queued or running; the end stops them."""
    table, schedule = RunTable(), BeatSchedule()
    fast, slow, never = (accepted(table, run_id=str(beat), beat=beat) for beat in (1.0, 2.5, None))
    for run in (fast, slow, never):
        schedule.add(run, 100.0)
    assert schedule.next_at() == 101.0
    assert list(schedule.due(100.9)) == []
    assert list(schedule.due(101.0)) == [fast]
    assert list(schedule.due(102.5)) == [fast, slow]
    table.ended(fast)
    assert schedule.next_at() == 105.0
    table.ended(slow)
    assert schedule.next_at() is None


def test_a_stalled_process_sends_one_beat_and_not_the_missed_ones() -> None:
    """Ten intervals late, one beat is due, and the next within one interval."""
    table, schedule = RunTable(), BeatSchedule()
    run = accepted(table, beat=1.0)
    schedule.add(run, 0.0)
    assert list(schedule.due(10.0)) == [run]
    following = schedule.next_at()
    assert following is not None and 10.0 < following <= 11.0


def test_runs_that_ended_before_their_first_beat_do_not_pile_up() -> None:
    """10,000 short runs with rare beats leave a schedule of bounded size."""
    table, schedule = RunTable(), BeatSchedule()
    for number in range(10_000):
        run = accepted(table, run_id=str(number), beat=3600.0)
        schedule.add(run, 0.0)
        table.ended(run)
    assert len(schedule) <= 1024


def message(**fields: Any) -> bytes:
    frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": "eA=="} | fields
    return json.dumps({key: value for key, value in frame.items() if value is not ...}).encode()


def test_a_run_task_is_read_with_a_third_of_its_heartbeat() -> None:
    """The fields of Wove's frame are taken over; unknown fields are ignored."""
    read_back = read(
        message(
            args_pickle="YQ==",
            attempt=2,
            delivery={"delivery_heartbeat_seconds": 3, "delivery_cancel_mode": "require_ack", "new": []},
        )
    )
    assert read_back == RunTask("r", "t", "eA==", "YQ==", 1.0, "require_ack")
    assert read(message(args_pickle=None, delivery=None)) == RunTask(
        "r", "t", "eA==", None, None, "best_effort"
    )


@pytest.mark.parametrize("heartbeat", [1e-9, 0.02])
def test_beats_are_never_more_than_100_a_second(heartbeat: float) -> None:
    """A host cannot make the worker spend itself on heartbeats."""
    parsed = read(message(delivery={"delivery_heartbeat_seconds": heartbeat}))
    assert isinstance(parsed, RunTask) and parsed.beat_interval == 0.01


@pytest.mark.parametrize(
    "fields",
    [
        {"task_id": ...},
        {"task_id": 7},
        {"task_id": "x" * 5000},
        {"callable_pickle": ...},
        {"callable_pickle": ""},
        {"callable_pickle": ["eA=="]},
        {"args_pickle": {}},
        {"delivery": []},
        {"delivery": "soon"},
        *({"delivery": {"delivery_heartbeat_seconds": odd}} for odd in (0, -1, True, "5", [], 10**400)),
        *({"delivery": {"delivery_heartbeat_seconds": float(odd)}} for odd in ("nan", "inf")),
        {"delivery": {"delivery_cancel_mode": "soon"}},
        {"delivery": {"delivery_cancel_mode": []}},
    ],
)
def test_an_odd_run_task_that_names_its_run_is_an_error_of_that_run(fields: dict[str, Any]) -> None:
    """Missing fields and wrong types have a message for the run that the frame names."""
    odd = read(message(**fields))
    assert isinstance(odd, MalformedRun) and odd.run_id == "r" and odd.message


@pytest.mark.parametrize("run_id", [..., None, 7, [], "", "x" * 5000])
@pytest.mark.parametrize("kind", ["run_task", "cancel_task"])
def test_a_command_without_a_usable_run_id_is_ignored(kind: str, run_id: Any) -> None:
    """Nobody can be told, so it is only counted."""
    assert read(message(type=kind, run_id=run_id)) == Ignored("run_id")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"null", "shape"),
        (b"42", "shape"),
        (b"NaN", "shape"),
        (b"[]", "shape"),
        (b'"run_task"', "shape"),
        (b"{}", "type"),
        (b'{"events": []}', "type"),
        (b'{"type": null}', "type"),
        (b'{"type": ["run_task"]}', "type"),
        (b'{"type": "dance", "run_id": "r"}', "type"),
    ],
)
def test_json_of_another_shape_is_ignored(text: bytes, reason: str) -> None:
    """Valid JSON that is no command hurts nobody and has a reason to count."""
    assert read(text) == Ignored(reason)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf{}", b"1" * 5000, b"[" * 100_000, b"{} {}"],
)
def test_what_is_not_json_is_invalid(text: bytes) -> None:
    """Such a message closes the connection with 1007; its content is not in the error."""
    with pytest.raises(InvalidMessage) as caught:
        read(text)
    assert caught.value.close_code == 1007
    assert len(str(caught.value)) < 100


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8)
)
@settings(max_examples=200)
def test_reading_never_raises_for_json(value: Any) -> None:
    """Any JSON value in any field gives a command or a reason."""
    commands = (
        RunTask,
        MalformedRun,
        CancelTask,
        Shutdown,
        Ignored,
        Resume,
        EventAck,
        DetachTask,
        AttachTask,
    )
    assert isinstance(read(json.dumps(value).encode()), commands)
    for field in ("type", "run_id", "task_id", "callable_pickle", "args_pickle", "delivery"):
        assert isinstance(read(message(**{field: value})), commands)
    odd = {
        "delivery_heartbeat_seconds": value,
        "delivery_cancel_mode": value,
        "delivery_orphan_policy": value,
    }
    for kind in ("run_task", "attach_task", "detach_task", "resume", "event_ack"):
        assert isinstance(read(message(type=kind, delivery=odd, run_ids=value, more=value)), commands)


def test_cancel_and_shutdown_are_read() -> None:
    """An unknown cancel mode leaves the decision to the run's own."""
    assert read(message(type="cancel_task", delivery_cancel_mode="require_ack")) == CancelTask(
        "r", "require_ack"
    )
    assert read(message(type="cancel_task", delivery_cancel_mode="odd")) == CancelTask("r", None)
    assert read(message(type="shutdown", run_id=...)) == Shutdown()


@pytest.mark.parametrize("policy", ["fail", "cancel", "requeue", "detach"])
def test_the_orphan_policy_of_a_run_is_read(policy: str) -> None:
    """It says what an absence of the host does; "cancel" unless the frame has one that we know."""
    for sent, expected in ((policy, policy), ("new", "cancel"), ([], "cancel"), (None, "cancel")):
        parsed = read(message(delivery={"delivery_orphan_policy": sent}))
        assert isinstance(parsed, RunTask) and parsed.orphan_policy == expected


def test_commands_of_the_extensions_are_read() -> None:
    """resume, event_ack, detach_task and attach_task with the delivery of run_task."""
    assert read(message(type="resume", run_id=..., run_ids=["a", "b"])) == Resume(("a", "b"), False)
    assert read(message(type="resume", run_ids=[], more=True)) == Resume((), True)
    assert read(message(type="event_ack", run_ids=["a"], more=False)) == EventAck(("a",))
    assert read(message(type="detach_task")) == DetachTask("r")
    delivery = {"delivery_heartbeat_seconds": 6, "delivery_orphan_policy": "detach"}
    attach = read(message(type="attach_task", callable_pickle=..., delivery=delivery))
    assert attach == AttachTask("r", "t", 2.0, "best_effort", "detach")
    odd = read(message(type="attach_task", delivery={"delivery_heartbeat_seconds": -1}))
    assert isinstance(odd, MalformedRun) and odd.run_id == "r"


@pytest.mark.parametrize("kind", ["resume", "event_ack"])
@pytest.mark.parametrize(
    "fields",
    [
        {"run_ids": odd}
        for odd in (..., None, "r", {}, [1], [""], [["r"]], ["r", None], ["x" * 5000], ["r"] * 100_001)
    ]
    + [{"run_ids": ["r"], "more": odd} for odd in (None, 1, "true", [])],
)
def test_an_odd_list_of_runs_is_ignored(kind: str, fields: dict[str, Any]) -> None:
    """As a whole: half of a list would end the runs of the other half."""
    assert read(message(type=kind, **fields)) == Ignored("run_ids")


def test_a_list_of_100000_runs_is_read() -> None:
    """It is the longest."""
    assert read(message(type="event_ack", run_ids=["r"] * 100_000)) == EventAck(("r",) * 100_000)


def test_a_run_that_was_removed_beats_when_it_is_added_again() -> None:
    """While nobody hears of it, it costs nothing, however often it would beat."""
    table, schedule = RunTable(), BeatSchedule()
    run = accepted(table, beat=1.0)
    schedule.add(run, 0.0)
    for due in schedule.due(1.0):
        schedule.remove(due)
    assert schedule.next_at() is None and len(schedule) == 0
    schedule.add(run, 10.0)
    assert schedule.next_at() == 11.0 and list(schedule.due(11.0)) == [run]


def test_an_alarm_that_was_stopped_stays_silent() -> None:
    """A host that leaves while the service closes does not wake it again."""
    loop = asyncio.new_event_loop()
    try:
        alarm = Alarm(loop, lambda: 5.0, lambda now: None)
        alarm.arm()
        alarm.stop()
        alarm.arm()
        assert alarm._handle is None
    finally:
        loop.close()
