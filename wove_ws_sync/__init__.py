"""A synchronous, threaded websocket executor for Wove, on one kept connection.

Owns: the public names, listed in ``__all__``. Never: starts a thread or opens a socket on
import.
"""

import logging

from ._named import named
from ._progress import Progress
from ._version import __version__
from .aio import AsyncWebSocketEnvironmentExecutor
from .current import CurrentRun, current_run
from .errors import (
    AuthenticationRejected,
    ConnectionLost,
    DeliveryCancelled,
    DeliveryTimeout,
    ExecutorClosed,
    ForkedError,
    HandshakeRejected,
    PayloadError,
)
from .futures import RunFuture, WebSocketExecutor
from .plugin import config, install, uninstall
from .sync import SyncWebSocketEnvironmentExecutor

__all__ = [
    "AsyncWebSocketEnvironmentExecutor",
    "AuthenticationRejected",
    "ConnectionLost",
    "CurrentRun",
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
]

logging.getLogger("wove_ws_sync").addHandler(logging.NullHandler())
