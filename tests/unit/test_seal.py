"""A sealed message opens once, whole, in its turn and with the other side's keys; otherwise not at all."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wove_ws_sync._seal import PIECE_BYTES, BrokenSeal, SealKeys, Way, derive_keys, sealed_size

TAG = 16
BOX = PIECE_BYTES + TAG
SIZES = [0, 1, 1000, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 3 * PIECE_BYTES + 5]


def both(transcript: bytes = b"transcript") -> tuple[SealKeys, SealKeys]:
    """Return the keys as a host and as a worker service have them."""
    return tuple(derive_keys(b"\1" * 64, transcript, of_host=of_host) for of_host in (True, False))  # type: ignore[return-value]


def pattern(size: int) -> bytes:
    return bytes(number * 7 % 251 for number in range(min(size, 997))) * (size // 997 + 1)


def sealed(way: Way, message: bytes) -> bytes:
    """Seal piece by piece, as both sides send."""
    return b"".join(way.seal(message, start) for start in range(0, len(message) or 1, PIECE_BYTES))


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_sealed_opens(size: int, kind: type) -> None:
    """Messages of any size, one after the other, both ways; the size is what sealed_size says."""
    host, worker = both()
    for sender, receiver in ((host, worker), (worker, host)):
        for number in range(3):
            message = pattern(size)[:size]
            box = sealed(sender.outgoing, message)
            assert len(box) == sealed_size(size)
            assert message[:8] not in box or size < 8, number
            assert receiver.incoming.open(kind(box)) == message


def test_the_format_stays() -> None:
    """A host and a worker service of different versions understand each other.

    The values are those of another implementation, of OpenSSL through Node.
    """
    host, worker = both()
    assert host.outgoing.seal(b"hello").hex() == "64ac9c6d8f0e2cd4d1bd107db48810b7f5cdc80ba4"
    assert worker.outgoing.seal(b"hello").hex() == "d8229947fa553abc6699df2bd9bee0e1af03dbebad"
    assert host.outgoing.seal(b"").hex() == "ce276a6a27479524984ed6dc297fa765"


@pytest.mark.parametrize("place", [0, 1, PIECE_BYTES, BOX - 1, BOX, BOX + 9, -1, -TAG - 1])
def test_a_flipped_bit_is_noticed(place: int) -> None:
    host, worker = both()
    box = bytearray(sealed(host.outgoing, bytes(2 * PIECE_BYTES)))
    box[place] ^= 1
    with pytest.raises(BrokenSeal):
        worker.incoming.open(box)


@pytest.mark.parametrize("which", range(6))
def test_only_the_next_message_opens(which: int) -> None:
    """Not one again, not one before its turn, not one of the other direction or another connection.

    After that nothing does: what is right might have been moved.
    """
    host, worker = both()
    zero, first, second, third = (host.outgoing.seal(b"%d" % number) for number in range(4))
    assert worker.incoming.open(zero) == b"0"
    other = both(b"other")[0].outgoing
    other.seal(b"0")
    wrong = (zero, second, third, worker.outgoing.seal(b"1"), other.seal(b"1"), b"")[which]
    with pytest.raises(BrokenSeal):
        worker.incoming.open(wrong)
    for late in (first, second):
        with pytest.raises(BrokenSeal):
            worker.incoming.open(late)


@pytest.mark.parametrize(
    "change",
    [
        lambda box: box[:BOX],
        lambda box: box[BOX:],
        lambda box: box[BOX : 2 * BOX] + box[:BOX] + box[2 * BOX :],
        lambda box: box + box[-TAG:],
        lambda box: box[:-1],
        lambda box: box[:TAG],
        lambda box: b"",
        lambda box: box[:BOX] + box[:BOX] + box[2 * BOX :],
    ],
    ids=["first box", "without it", "swapped", "longer", "shorter", "a tag", "nothing", "a box twice"],
)
def test_boxes_of_a_message_belong_together(change: object) -> None:
    host, worker = both()
    box = sealed(host.outgoing, bytes(2 * PIECE_BYTES + 100))
    with pytest.raises(BrokenSeal):
        worker.incoming.open(change(box))  # type: ignore[operator]


@given(st.binary(max_size=2000))
def test_nothing_that_was_not_sealed_opens(junk: bytes) -> None:
    _, worker = both()
    with pytest.raises(BrokenSeal):
        worker.incoming.open(junk)


@st.composite
def tampered(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Return messages, and what a man in the middle makes of them once they are sealed."""
    messages = draw(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
    host, _ = both()
    boxes = [host.outgoing.seal(message) for message in messages]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(boxes)))
        deed = draw(st.sampled_from(["drop", "repeat", "move", "flip", "cut", "plant"]))
        if deed == "plant":
            boxes.insert(place, draw(st.binary(max_size=60)))
        elif place < len(boxes):
            box = boxes.pop(place)
            if deed == "repeat":
                boxes[place:place] = [box, box]
            elif deed == "move":
                boxes.insert(draw(st.integers(0, len(boxes))), box)
            elif deed == "flip":
                bit = draw(st.integers(0, max(0, len(box) * 8 - 1)))
                boxes.insert(place, bytes(b ^ ((bit // 8 == i) << bit % 8) for i, b in enumerate(box)))
            elif deed == "cut":
                boxes.insert(place, box[: draw(st.integers(0, len(box)))])
    return messages, boxes


@given(tampered())
def test_what_opens_is_what_was_sent_up_to_the_first_change(case: tuple[list[bytes], list[bytes]]) -> None:
    """Whatever is done to the messages: a receiver that ends the connection then has seen a prefix."""
    messages, boxes = case
    _, worker = both()
    opened = []
    try:
        for box in boxes:
            opened.append(bytes(worker.incoming.open(box)))
    except BrokenSeal:
        pass
    assert opened == messages[: len(opened)]


def test_keys_are_not_shown_and_not_pickled() -> None:
    host, _ = both()
    assert not any(letter in repr(host.outgoing) for letter in ("key", "AESGCM"))
    with pytest.raises(TypeError):
        pickle.dumps(host)
