"""The queue of what waits to be written to a host: order, sharing, accounting."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from wove_ws_sync.worker.sendqueue import SMALL, SendQueue

LARGE = b'"' + b"x" * SMALL + b'"'


def everything(queue: SendQueue) -> list[bytes]:
    """Return the messages in the order in which they leave."""
    messages = []
    while queue:
        messages += [message for message in (queue.next_small(), queue.next_large()) if message]
    return messages


def test_small_events_share_messages_and_go_first() -> None:
    """In their order, as a list of at most the size of a batch; a large one goes alone."""
    queue = SendQueue(20)
    for event in (b'"a"', LARGE, b'"bb"', b'"ccccccccc"', b'"d"'):
        queue.put(event)
    assert everything(queue) == [b'["a","bb"]', LARGE, b'["ccccccccc","d"]']
    assert queue.bytes == 0


def test_a_host_without_lists_gets_one_event_in_each_message() -> None:
    """As Wove's own worker does it."""
    queue = SendQueue(0)
    queue.put(b"1")
    queue.put(b"2")
    assert everything(queue) == [b"1", b"2"]


def test_a_large_event_does_not_overtake_what_was_queued_before_it() -> None:
    """Behind more small events than one message holds: its task_started, a resume_state of any size."""
    queue = SendQueue(10)
    for number in range(5):
        queue.put(str(number).encode() * 8)
    queue.put(b"s" + LARGE, first=True)
    queue.put(LARGE)
    queue.put(b"later")
    messages = everything(queue)
    assert messages.index(LARGE) == messages.index(b"s" + LARGE) + 1 == len(messages) - 2


def test_what_is_made_later_is_made_in_its_turn() -> None:
    """It counts little until then, whatever its size; nothing to say is no message."""
    queue = SendQueue(100)
    said = {"small": b"1", "large": b"2", "none": b""}
    for name, size in (("small", 10), ("none", 10), ("large", 10 * SMALL), ("none", 10 * SMALL)):
        queue.put_later(size, lambda name=name: said[name])  # type: ignore[misc]
    assert queue.bytes == 4 * 512
    said |= {"small": b"3", "large": b"4"}
    assert everything(queue) == [b"3", b"4"]
    assert queue.bytes == 0


def test_logs_are_bounded_in_number_and_bytes() -> None:
    """What is full of results takes no further log; what left makes room."""
    queue = SendQueue(100)
    assert all(queue.put_log(b"log") for _ in range(2000)) and not queue.put_log(b"log")
    while queue.next_small():
        pass
    assert queue.put_log(b"log")
    queue.put(bytes(9 * 1024 * 1024))
    assert not queue.put_log(b"log")
    queue.clear()
    assert not queue and queue.bytes == 0 and queue.put_log(b"log")


@given(st.lists(st.tuples(st.sampled_from(["put", "first", "later", "log"]), st.integers(0, 80_000))))
def test_everything_leaves_once_and_the_account_is_even(steps: list[tuple[str, int]]) -> None:
    """Whatever is queued: each event once, the small ones in order and the large ones in order."""
    queue, queued = SendQueue(SMALL), []
    for number, (how, size) in enumerate(steps):
        event = json.dumps([number, "x" * size]).encode()
        queued.append((number, how, len(event)))
        if how == "later":
            queue.put_later(len(event), lambda event=event: event)  # type: ignore[misc]
        elif how == "log":
            assert queue.put_log(event)
        else:
            queue.put(event, first=how == "first")
    left: list[int] = []
    for message in everything(queue):
        found = json.loads(message)
        left += [event[0] for event in found] if isinstance(found[0], list) else [found[0]]
    in_turn = [number for number, how, size in queued if how in ("first", "log") or size <= SMALL]
    assert [number for number in left if number in set(in_turn)] == in_turn
    assert sorted(left) == [number for number, _, _ in queued]
    assert [number for number in left if number not in set(in_turn)] == [
        number for number, _, _ in queued if number not in set(in_turn)
    ]
    assert queue.bytes == 0
