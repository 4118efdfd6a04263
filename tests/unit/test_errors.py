"""Errors: each is caught as what it extends, and arrives whole behind pickle and copy."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle

import pytest
import wove
from wove.environment import EnvironmentExecutionError

import wove_ws_sync

ERRORS: list[tuple[Exception, tuple[type[BaseException], ...]]] = [
    (
        wove_ws_sync.ConnectionLost(
            "m", run_id="r", close_code=1006, reason="x", attempt=2, maybe_executed=False
        ),
        (wove.DeliveryOrphanedError, ConnectionError),
    ),
    (wove_ws_sync.HandshakeRejected("m", status=503, retry_after=2.0), (ConnectionError,)),
    (
        wove_ws_sync.AuthenticationRejected("m", status=401),
        (wove_ws_sync.HandshakeRejected, PermissionError),
    ),
    (
        wove_ws_sync.DeliveryTimeout("m", run_id="r", cancel_acknowledged=True, late_result=True),
        (wove.DeliveryTimeoutError, TimeoutError),
    ),
    (
        wove_ws_sync.DeliveryCancelled("m", run_id="r", acknowledged=True),
        (concurrent.futures.CancelledError,),
    ),
    (wove_ws_sync.PayloadError({"kind": "K", "message": "m"}), (EnvironmentExecutionError,)),
    (EnvironmentExecutionError({"kind": "K", "message": "m"}), (Exception,)),  # Wove's own, which we raise
    (wove_ws_sync.ExecutorClosed("m"), (RuntimeError,)),
    (wove_ws_sync.ForkedError("m"), (RuntimeError,)),
]


@pytest.mark.parametrize(("error", "kinds"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_arrives_whole(error: Exception, kinds: tuple[type[BaseException], ...]) -> None:
    """Type, text, attributes and notes, by every protocol of pickle and by copy."""
    assert all(isinstance(error, kind) for kind in kinds)
    noted = copy.copy(error)
    noted.add_note("in job 5")
    copies = [pickle.loads(pickle.dumps(noted, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (*copies, copy.copy(noted), copy.deepcopy(noted)):
        assert type(again) is type(error)
        assert (str(again), again.args) == ("m", error.args)
        assert vars(again) == {**vars(error), "__notes__": ["in job 5"]}
